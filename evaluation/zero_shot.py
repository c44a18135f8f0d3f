"""Zero-shot multiple choice: which choice does the model find most likely after the context?

A task is one of lm-evaluation-harness, given by name or as a YAML file, or a file with one JSON object a line:
    {"context": "Question: What do bees make?\nAnswer:", "choices": [" honey", " wool"], "gold": 0}
A choice is appended to its context as it is, so it includes its leading space. Its score is the sum of the log
probabilities of its tokens, each given all tokens before it. As in the harness:
    acc         the share of items whose gold choice has the highest score
    acc_norm    the same with each score divided by the characters of its choice, one leading space not counted
    *_stderr    the sample standard deviation over the items / sqrt(items)
Task files are scored here, in float32. Tasks of the harness are scored by the harness, in the dtype of the model.
"""
import functools
import hashlib
import json
import logging
import math
import statistics
from pathlib import Path

import data
from files.errors import explained
from models.loading import Tokenizer, input_device
from utils import UserError, progress_bar

import torch
from torch import nn


def read_items(path: str) -> list[dict]:
    """The items of a task file. UserError names the first wrong line."""
    items = []
    with explained(f"--task_file {path}", "give a file of one JSON object a line"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would split inside JSON strings
        for number, line in enumerate(lines, start=1):
            if line.strip():
                items.append({**_checked(line, number), "place": f"{path}, line {number}"})
        if not items:
            raise UserError("it has no items; give a file of one JSON object a line")
    return items


def _checked(line: str, number: int) -> dict:
    """The item of a line; UserError where it is none."""
    try:
        item = json.loads(line)
        json.dumps(item, ensure_ascii=False).encode()  # half a surrogate pair is no character
        choices = item["choices"]
        is_item = (isinstance(item["context"], str) and isinstance(choices, list) and len(choices) > 1
                   and all(choice.strip() for choice in choices) and type(item["gold"]) is int
                   and item["gold"] in range(len(choices)))
    except (ValueError, LookupError, TypeError, AttributeError):
        is_item = False
    if not is_item:
        raise UserError(f"line {number} is no item: it needs a context, two or more choices that are not blank, and as "
                        'gold the index of one, such as {"context": "The sky is", "choices": [" blue", " green"], '
                        '"gold": 0}')
    return item


def encode(tokenizer: Tokenizer, context: str, choice: str, bos: bool = True) -> tuple[list[int], int]:
    """The tokens of context and choice, and the index of the choice's first token, which is at least 1.

    As in the harness, spaces at the end of the context belong to the choice, and an empty context is the BOS token, or
    EOS where there is none. Where the choice changes the last token of its context, the context keeps its own tokens,
    and the choice is what both together have beyond so many. bos: include the special tokens with which the tokenizer
    begins a text. Those with which it ends one are left out; the harness would score them.
    """
    tokens, before = (data.encode(tokenizer, text, bos) for text in (context + choice, context.rstrip()))
    if not before:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [first, *tokens], 1
    return before + tokens[len(before):], len(before)


@torch.no_grad()
def log_likelihoods(model: nn.Module, requests: list[tuple[list[int], int]], batchsize: int) -> list[float]:
    """For each (tokens, start), in nats: Σ log p(token | all tokens before it) over the tokens from `start` on."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))  # longest first: out of memory at once
    batches = [order[i:i + batchsize] for i in range(0, len(order), batchsize)]
    scores = [0.0] * len(requests)
    for batch in progress_bar(batches, desc="choices", unit="batch"):
        rows = [torch.tensor(requests[i][0][:-1]) for i in batch]
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right: no token attends to it
        logits = model(input_ids=inputs.to(input_device(model)), use_cache=False).logits
        for row_logits, i in zip(logits, batch):
            tokens, start = requests[i]
            chosen = torch.tensor(tokens[start:], device=logits.device)
            log_probs = row_logits[start - 1:len(tokens) - 1].float().log_softmax(-1)
            scores[i] = log_probs.gather(1, chosen[:, None]).double().sum().item()
    return scores


def score_items(model: nn.Module, tokenizer: Tokenizer, items: list[dict], batchsize: int = 16,
                bos: bool = True) -> dict:
    """acc, acc_norm and their standard errors (None for a single item), `items` (how many), and `source` (their
    fingerprint). A text longer than the model's positions loses its first tokens.

    UserError for a choice that alone exceeds the positions or adds no token, and for scores that are not finite.
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
    content = [[item[key] for key in ("context", "choices", "gold")] for item in items]
    source = f"file {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"
    result = {"items": len(items), "source": source if bos else f"{source}, no BOS"}
    for metric, found in hits.items():
        result[metric] = sum(found) / len(items)
        result[f"{metric}_stderr"] = statistics.stdev(found) / math.sqrt(len(items)) if len(items) > 1 else None
    return result


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness

@functools.cache  # it reads thousands of YAML files, which takes seconds
def _task_manager():
    """The harness's list of tasks; UserError where lm_eval is missing."""
    try:
        from lm_eval.tasks.manager import TaskManager  # where it is since 0.4.12
    except ImportError:
        raise UserError("--tasks needs lm-evaluation-harness 0.4.12 or later: pip install 'lm_eval>=0.4.12,<0.5'; "
                        "--task_file needs nothing")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def load_harness(names: list[str], trusted: bool = False) -> dict:
    """Task name -> lm_eval's task object with its data. names: tasks, tags or groups of tasks, or YAML files.

    trusted: YAML files may name Python functions and other files. UserError for a file that does so and is not trusted,
    an unknown name, data that cannot be loaded, a task without acc, and where lm_eval is missing.
    """
    found = {}
    for name in names:
        is_file = Path(name).is_file()
        text = Path(name).read_text(encoding="utf-8", errors="replace") if is_file and not trusted else ""
        for mark in ("!function", "include:"):
            if mark in text:
                raise UserError(f"--tasks {name} has {mark!r} in it, by which a task runs code from other files; read "
                                "it, and give --trust_remote_code if you trust it")
        manager = _task_manager()
        if name not in manager.all_tasks and not is_file:
            raise UserError(f"--tasks {name}: lm-evaluation-harness has no such task and there is no such YAML file; "
                            "correct the name (`lm_eval ls tasks` lists them)")
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # of the Hub, the network, Arrow, YAML or the task's own code
            raise UserError(f"--tasks {name} cannot be loaded ({type(error).__name__}: {str(error)[:200]}); its data "
                            "come from the Hugging Face Hub: check the network, or score local items with --task_file")
    for name, task in found.items():
        if "acc" not in task.aggregation():
            raise UserError(f"--tasks {name} has no acc but {', '.join(task.aggregation())}; leave it out")
    return found


def run_harness(model: nn.Module, tokenizer: Tokenizer, loaded: dict, batchsize: int,
                limit: int | None = None, bos: bool = True) -> dict[str, dict]:
    """Task name -> the harness's zero-shot results in the form of `score_items`, with acc_norm where the task has it.

    loaded: the tasks of `load_harness`. bos False: prompts without BOS, lm_eval's default before 0.4.9.2.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batchsize, add_bos_token=None if bos else False)
    told = lm_eval.simple_evaluate(model=lm, tasks=list(loaded.values()), task_manager=_task_manager(), num_fewshot=0,
                                   limit=limit, log_samples=False)
    source = f"lm_eval {lm_eval.__version__}" if bos else f"lm_eval {lm_eval.__version__}, no BOS"
    results = {}
    for name in loaded:
        numbers = {key.partition(",")[0]: value for key, value in told["results"][name].items()}  # "acc,none" -> acc
        results[name] = {key: None if numbers[key] == "N/A" else float(numbers[key])
                         for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr") if key in numbers}
        results[name] |= {"items": told["n-samples"][name]["effective"], "source": source}
    return results
