"""Runs one of the authors' scripts unchanged, with the libraries that it imports patched. It is
called by against_authors.py.

    python reproduce/authors_scripts.py '{"authors": FOLDER, "model": FOLDER,
        "script": ["train.py", "--lr", "10"], "dataset": "text.jsonl", "seed": 0,
        "recorded": [1, 2]}'

The scripts read and write in the working folder. For the recorded steps of train.py, this script
writes steps.pt: a list of (step, a layer's logits after it, the mask drawn from them).
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import datasets
import torch
import transformers

# the model that the scripts load by this name is replaced by the given one
LLAMA2 = "meta-llama/Llama-2-7b-hf"


def patch_transformers(model: str) -> None:
    """Load the model and its tokenizer from a folder, float32 on the CPU. Define AdamW, which is
    imported but never used."""
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    load_tokenizer = transformers.AutoTokenizer.from_pretrained

    def tokenizer_of(name: str, **_: object) -> transformers.PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(model if name == LLAMA2 else name)
        # the scripts pad with EOS, though no document is short enough to need it
        if tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"eos_token": "<|none|>"})
        return tokenizer

    transformers.AutoModelForCausalLM.from_pretrained = lambda name, **_: load_model(
        model if name == LLAMA2 else name
    ).float()
    transformers.AutoTokenizer.from_pretrained = tokenizer_of
    transformers.AdamW = torch.optim.AdamW


def patch_datasets(dataset: str) -> None:
    """Load the text from a file, in one process."""

    def rows(*_: object, **__: object) -> datasets.Dataset:
        with open(dataset, encoding="utf-8") as file:
            return datasets.Dataset.from_dict({"text": [json.loads(line)["text"] for line in file]})

    def alone(method: Callable) -> Callable:
        return lambda self, *given, **named: method(self, *given, **named | {"num_proc": None})

    datasets.load_dataset = rows
    datasets.Dataset.filter = alone(datasets.Dataset.filter)
    datasets.Dataset.map = alone(datasets.Dataset.map)


def patch_torch(seed: int) -> None:
    """Hide any GPU, and replace every manual seed by this one."""
    seeded = torch.manual_seed
    torch.cuda.is_available = lambda: False
    torch.manual_seed = lambda _: seeded(seed)


def record_steps(steps: list[int]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Return a list that is filled with the recorded steps as train.py draws masks, one call per
    layer."""
    import wrapper  # the authors' module

    draw = wrapper.generate_mask
    found = []
    calls = count()
    layers = len(os.listdir("initial_mask"))

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        mask = draw(logits)
        step = next(calls) // layers + 1
        if step in steps:
            found.append((step, logits.clone(), mask.clone()))
        return mask

    wrapper.generate_mask = drawn
    return found


def main(
    authors: str, script: list[str], model: str, dataset: str, seed: int, recorded: list[int]
) -> None:
    sys.dont_write_bytecode = True  # leave no files in the clone
    sys.path.insert(0, authors)
    patch_transformers(model)
    patch_datasets(dataset)
    patch_torch(seed)
    found = record_steps(recorded)
    sys.argv = script
    runpy.run_path(str(Path(authors, script[0])), run_name="__main__")
    if found:
        torch.save(found, "steps.pt")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
