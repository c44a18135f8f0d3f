"""Zero-shot multiple choice: which of the choices does the model find most likely after the context?

Tasks come from lm-evaluation-harness, by name or as YAML files, or from files of one's own, one JSON object a line:
    {"context": "Question: What do bees make?\nAnswer:", "choices": [" honey", " wool"], "gold": 0}
A choice is put behind its context as it stands, so it brings its leading space along. Its score is the sum of the
log-probabilities of its tokens given all tokens before them, and as in the harness
    acc         is the share of items whose gold choice has the highest score,
    acc_norm    the same after dividing a score by the characters of its choice, the one leading space not counted,
    *_stderr    the sample standard deviation over the items / sqrt(items).
Files are scored here, in float32; harness tasks by the harness, in the dtype of the model.
"""
import difflib
import functools
import hashlib
import json
import logging
import math
import statistics
from pathlib import Path

from utils import UserError, progress_bar

import torch
from torch import nn

from models.loading import Tokenizer, input_device


def read_items(path: str) -> list[dict]:
    """The items of a task file, checked; UserError names the line that is wrong and says what is."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would split inside JSON strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--task_file {path} cannot be read ({error}); give a file of one JSON object a line")
    items = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                item = json.loads(line)
                flaw = _flaw(item)
            except (ValueError, RecursionError) as error:
                flaw = f"it is not JSON ({str(error)[:200]})"
            if flaw:
                raise UserError(f"--task_file {path}, line {number}: {flaw}; a line looks like "
                                '{"context": "The sky is", "choices": [" blue", " green"], "gold": 0}')
            items.append({**item, "place": f"{path}, line {number}"})
    if not items:
        raise UserError(f"--task_file {path} has no items; give a file of one JSON object a line")
    return items


def _flaw(item: object) -> str | None:
    """What is wrong with an item, or None."""
    if not isinstance(item, dict):
        return "it is not a JSON object"
    missing = [key for key in ("context", "choices", "gold") if key not in item]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    context, choices, gold = item["context"], item["choices"], item["gold"]
    if not isinstance(context, str):
        return "context is not a string"
    if not isinstance(choices, list) or len(choices) < 2:
        return "choices is not a list of two or more"
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return "a choice is blank or not a string"
    if any("\ud800" <= sign <= "\udfff" for text in (context, *choices) for sign in text):
        return "it has half a surrogate pair, which is no character"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return f"gold is {json.dumps(gold)[:40]}, not the index of a choice, 0 to {len(choices) - 1}"
    return None


def encode(tokenizer: Tokenizer, context: str, choice: str, bos: bool = True) -> tuple[list[int], int]:
    """Tokens of context and choice in one call, and the index where the choice begins, at least 1.

    As in the harness: spaces that end the context count as the choice's; an empty context is the BOS token, or EOS
    where there is none. bos: with the special tokens that the tokenizer begins a text with.
    """
    tokens = tokenizer(context + choice, add_special_tokens=bos, verbose=False).input_ids
    start = len(tokenizer(context.rstrip(), add_special_tokens=bos, verbose=False).input_ids)
    if start == 0:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [first, *tokens], 1
    return tokens, start


@torch.no_grad()
def log_likelihoods(model: nn.Module, requests: list[tuple[list[int], int]], batchsize: int) -> list[float]:
    """Σ log p(token | all before), in nats, over the tokens from `start` on, of each (tokens, start)."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))  # longest first: memory suffices or not
    scores = [0.0] * len(requests)
    with progress_bar(total=len(requests), desc="choices") as bar:
        for batch in (order[i:i + batchsize] for i in range(0, len(order), batchsize)):
            rows = [torch.tensor(requests[i][0][:-1]) for i in batch]
            inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where no token looks
            logits = model(input_ids=inputs.to(input_device(model)), use_cache=False).logits
            for row_logits, i in zip(logits, batch):
                tokens, start = requests[i]
                chosen = torch.tensor(tokens[start:], device=logits.device)
                chances = row_logits[start - 1:len(tokens) - 1].float().log_softmax(-1)
                scores[i] = chances.gather(1, chosen[:, None]).double().sum().item()
            bar.update(len(batch))
    return scores


def score_items(model: nn.Module, tokenizer: Tokenizer, items: list[dict], batchsize: int = 16,
                bos: bool = True) -> dict:
    """acc, acc_norm and their standard errors (None for a single item), the number of items, and a fingerprint of
    them as `source`. Of what is longer than the model has positions, the last tokens are kept.

    UserError for a choice that is longer than that itself, or adds no token, and for scores that are not finite.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    requests = []
    for item in items:
        for choice in item["choices"]:
            tokens, start = encode(tokenizer, item["context"], choice, bos)
            if start >= len(tokens):
                raise UserError(f"{item['place']}: the choice {choice!r} adds no token to its context; begin it with a "
                                "space, or end the context before a word")
            surplus = max(0, len(tokens) - 1 - longest)  # the last token is not put in, only predicted
            if surplus >= start:
                raise UserError(f"{item['place']}: a choice of {len(tokens) - start} tokens is more than the {longest} "
                                "positions of the model; shorten it")
            requests.append((tokens[surplus:], start - surplus))
    scores = log_likelihoods(model, requests, batchsize)
    if not all(map(math.isfinite, scores)):
        raise UserError(f"a score is not finite; {model.dtype} may overflow: try --dtype bfloat16 or float32")
    hits, scores = {"acc": [], "acc_norm": []}, iter(scores)
    for item in items:
        sums = [next(scores) for _ in item["choices"]]
        per_character = [total / len(choice.removeprefix(" ")) for total, choice in zip(sums, item["choices"])]
        for metric, values in (("acc", sums), ("acc_norm", per_character)):
            hits[metric].append(values.index(max(values)) == item["gold"])
    told = [[item[key] for key in ("context", "choices", "gold")] for item in items]
    source = f"file {hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"
    numbers = {}
    for metric, found in hits.items():
        numbers[metric] = sum(found) / len(items)
        numbers[f"{metric}_stderr"] = statistics.stdev(found) / math.sqrt(len(items)) if len(items) > 1 else None
    return {**numbers, "items": len(items), "source": source if bos else f"{source}, no BOS"}


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness

@functools.cache  # it reads thousands of YAML files, which takes seconds
def _task_manager():
    """UserError without lm_eval."""
    try:
        from lm_eval.tasks.manager import TaskManager  # where it is since 0.4.12
    except ImportError:
        raise UserError("--tasks needs lm-evaluation-harness 0.4.12 or later: pip install 'lm_eval>=0.4.12,<0.5'; "
                        "--task_file needs nothing")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def load_harness(names: list[str], trusted: bool = False) -> dict:
    """Task name -> lm_eval's task object, its data fetched, of names, tags or YAML files.

    trusted: a YAML file may name Python functions, or other files. UserError for one that does and is not, without
    lm_eval, for a name it has not, data that cannot be had, and tasks that have no acc.
    """
    for name in names:
        if Path(name).is_file() and not trusted:
            text = Path(name).read_text(encoding="utf-8", errors="replace")
            mark = next((mark for mark in ("!function", "include:") if mark in text), None)
            if mark:
                raise UserError(f"--tasks {name} has {mark!r} in it, by which a task runs code from other files; read "
                                "it, and give --trust_remote_code if you trust it")
    manager, found = _task_manager(), {}
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3))
            raise UserError(f"--tasks {name}: lm-evaluation-harness has no such task and there is no such YAML file; "
                            f"correct the name{f' (near it are {near})' if near else ''}")
        if name == "wikitext":
            raise UserError("--tasks wikitext is perplexity by words, not to be mixed with that by tokens; use "
                            "--ppl wikitext2")
        try:
            loaded = manager.load([name])
        except Exception as error:  # of the Hub, the network, Arrow, YAML or the task's own code
            raise UserError(f"--tasks {name} cannot be loaded ({type(error).__name__}: {str(error)[:200]}); its data "
                            "come from the Hugging Face Hub: check the network, or score local items with --task_file")
        if loaded["groups"]:
            raise UserError(f"--tasks {name} is a group; name its tasks: {', '.join(list(loaded['tasks'])[:80])}")
        for task_name, task in loaded["tasks"].items():
            metrics = list(task.aggregation())
            if "acc" not in metrics:
                raise UserError(f"--tasks {task_name} has no acc but {', '.join(metrics)}, and only accuracy is taken "
                                "from the harness; leave it out")
            found[task_name] = task
    return found


def run_harness(model: nn.Module, tokenizer: Tokenizer, loaded: dict, batchsize: int,
                limit: int | None = None, bos: bool = True) -> dict[str, dict]:
    """Zero-shot results of `load_harness`'s tasks by the harness itself, in the form of `score_items`; acc_norm where
    the task has it. bos False: prompts without the BOS token, lm_eval's default before 0.4.9.2."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batchsize, add_bos_token=None if bos else False)
    told = lm_eval.simple_evaluate(model=lm, tasks=list(loaded.values()), task_manager=_task_manager(), num_fewshot=0,
                                   limit=limit, log_samples=False)
    source = f"lm_eval {lm_eval.__version__}"
    results = {}
    for name in loaded:
        numbers = {key.partition(",")[0]: value for key, value in told["results"][name].items()}  # "acc,none" -> acc
        wanted = [key for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr") if key in numbers]
        results[name] = {key: None if numbers[key] == "N/A" else float(numbers[key]) for key in wanted}
        results[name] |= {"items": told["n-samples"][name]["effective"],
                          "source": source if bos else f"{source}, no BOS"}
    return results
