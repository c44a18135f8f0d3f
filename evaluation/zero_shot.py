"""Zero-shot multiple choice with lm-evaluation-harness: which choice does the model find most
likely after the context?

A task is one of the harness, given by name or as a YAML file, or a file with one JSON object per
line:

    {"context": "Question: What do bees make?\nAnswer:", "choices": [" honey", " wool"], "gold": 0}

A choice is appended to its context unchanged, so it includes its leading space. Its score is the
sum of the log probabilities of its tokens, each given all tokens before it, in float32:

    acc         the share of items whose gold choice has the highest score
    acc_norm    the same with each score divided by the number of characters of its choice, without
                the leading space if all choices of the file have one
    *_stderr    the sample standard deviation over the items / sqrt(items)
"""

import functools
import hashlib
import json
import logging
import math
from pathlib import Path

import data
from files import hub
from models.loading import Tokenizer
from utils import UserError, as_user_error

from torch import nn


def read_items(path: str) -> list[dict]:
    """Read the items of a task file. Raises UserError that names the first wrong line."""
    with as_user_error(f"--task_file {path}", "give a file with one JSON object per line"):
        # splitlines() would split inside JSON strings
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        items = [
            _checked(line, number) for number, line in enumerate(lines, start=1) if line.strip()
        ]
        if not items:
            raise UserError("it has no items; give a file with one JSON object per line")
    return items


def _checked(line: str, number: int) -> dict:
    """Return the item of a line. Raises UserError if it is not one."""
    try:
        item = json.loads(line)
        json.dumps(item, ensure_ascii=False).encode()  # raises for lone surrogates
        choices = item["choices"]
        is_item = (
            isinstance(item["context"], str)
            and isinstance(choices, list)
            and len(choices) > 1
            and all(choice.strip() for choice in choices)
            and type(item["gold"]) is int
            and item["gold"] in range(len(choices))
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        is_item = False
    if not is_item:
        raise UserError(
            f"line {number} is not an item: it needs a context, two or more choices that are not "
            'blank, and the index of the right one as gold, such as {"context": "The sky is", '
            '"choices": [" blue", " green"], "gold": 0}'
        )
    return item


# --------------------------------------------------------------------------------------------------
# lm-evaluation-harness


@functools.cache
def _task_manager(with_tasks: bool):
    """Return the harness's task manager, with its own tasks, for which it reads thousands of YAML
    files for seconds, or without. Raises UserError if lm_eval is missing or too old."""
    try:
        from lm_eval.tasks.manager import TaskManager  # its place since 0.4.12
    except ImportError:
        raise UserError(
            "tasks need lm-evaluation-harness 0.4.12 or later: pip install 'lm_eval>=0.4.12,<0.5'"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=with_tasks)


def load_file(path: str) -> object:
    """Return a task file as a task of the harness."""
    items = read_items(path)
    _ = _task_manager(with_tasks=False)
    from datasets import Dataset  # takes seconds, as the harness does
    from lm_eval.api.task import ConfigurableTask

    are_spaced = all(choice[0] == " " for item in items for choice in item["choices"])
    # the harness cannot take a context of only spaces: it has no token
    rows = [
        {
            "context": item["context"] if item["context"].strip() else "",
            "choices": [choice[are_spaced:] for choice in item["choices"]],
            "gold": item["gold"],
        }
        for item in items
    ]
    return ConfigurableTask(
        config={
            "task": Path(path).stem,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": " " if are_spaced else "",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in ("acc", "acc_norm")
            ],
        }
    )


def load_harness(names: list[str]) -> dict:
    """Load tasks of the harness with their data; return task name -> lm_eval's task object.

    names: tasks, tags or groups of tasks, or YAML files, which may run code. Raises UserError if a
    name is unknown, data cannot be loaded, a task has no acc or has the model write its answers, or
    lm_eval is missing.
    """
    tasks = {}
    if names:
        hub.answers()
    for name in names:
        manager = _task_manager(with_tasks=True)
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UserError(
                f"--tasks {name}: lm-evaluation-harness has no such task and there is no such "
                "YAML file; correct the name (`lm_eval ls tasks` lists them)"
            )
        advice = "check the network, since its data come from the Hub, or use --task_file"
        with as_user_error(f"--tasks {name}", advice):
            tasks |= manager.load([name])["tasks"]
    for name, task in tasks.items():
        if "acc" not in task.aggregation():
            raise UserError(
                f"--tasks {name} has no acc, only {', '.join(task.aggregation())}; leave it out"
            )
        if task.OUTPUT_TYPE == "generate_until":
            raise UserError(
                f"--tasks {name} has the model write its answers, which eval.py does not score; "
                "leave it out"
            )
    return tasks


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise UserError if the harness cannot use the tokenizer: it has neither BOS nor EOS."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no token that begins or ends a text, and the harness needs one: "
            "leave out --tasks and --task_file"
        )


def run_harness(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: dict,
    batchsize: int,
    limit: int | None = None,
    bos: bool = True,
) -> dict[str, dict]:
    """Run tasks, zero-shot, and return task name -> acc, acc_norm if the task has it, their
    standard errors (None for a single item), `items` (their number), and `source` (the harness's
    version, or the fingerprint of a file).

    tasks: name -> task of `load_harness` or `load_file`. limit: the number of first items to use
    per task; None means all. bos: False leaves BOS out of prompts, lm_eval's default before
    0.4.9.2. A text longer than the model's positions loses its first tokens. Raises UserError if
    the harness cannot score an item, or if a score is not finite.
    """
    import lm_eval

    try:
        output = lm_eval.simple_evaluate(
            model=_harness_model(model, tokenizer, batchsize, bos),
            tasks=list(tasks.values()),
            num_fewshot=0,
            limit=limit,
            task_manager=_task_manager(with_tasks=False),
        )
    except AssertionError as error:
        raise UserError(
            f"{', '.join(tasks)}: a choice has no token of its own, or more tokens than the model "
            f"has positions ({error})"
        )
    results = {}
    for name, task in tasks.items():
        samples = output["samples"][name]
        scores = [score for sample in samples for score, _ in sample["filtered_resps"]]
        if not all(map(math.isfinite, scores)):
            raise UserError(
                f"a score is not finite; {model.dtype} may overflow: try --dtype bfloat16 or "
                "float32"
            )
        source = f"lm_eval {lm_eval.__version__}"
        if task.config.custom_dataset:
            content = json.dumps(list(task.dataset["test"])[:limit]).encode()
            source = f"file {hashlib.sha256(content).hexdigest()[:16]}"
        results[name] = {
            **_accuracies(output["results"][name]),
            "items": output["n-samples"][name]["effective"],
            "source": source if bos else f"{source}, no BOS",
        }
    return results


def _harness_model(model: nn.Module, tokenizer: Tokenizer, batchsize: int, bos: bool) -> object:
    """Return the model wrapped for the harness."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs
        ) -> list[int]:
            """Encode a text without an appended end-of-text token. The harness cuts
            tokens(context + choice) at len(tokens(context)); an end-of-text token there would leave
            the choice's first token unscored."""
            tokens = super().tok_encode(string, add_special_tokens, **kwargs)
            if add_special_tokens is False or not bos:
                return tokens
            return data.without_end(tokenizer, tokens)

    return Model(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batchsize,
        add_bos_token=None if bos else False,
        softmax_dtype="float32",
    )


def _accuracies(metrics: dict) -> dict[str, float | None]:
    """Return the harness's "acc,none" as acc, and so on for the other metrics."""
    numbers = {key.partition(",")[0]: value for key, value in metrics.items()}
    return {
        key: None if numbers[key] == "N/A" else float(numbers[key])
        for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        if key in numbers
    }
