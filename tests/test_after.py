"""The recipes of docs/after.md, run as they stand there on a tiny model: zeros stay."""

import re
import subprocess
import sys

from files import mask_files
from masking.layers import apply_masks, check_sparsity
from models.layers import find_layers
from models.loading import load_model
from pruning.one_shot import OneShot, one_shot_masks

import pytest
import torch
from runs import ROOT
from tiny import write_corpus

PAGE = (ROOT / "docs/after.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path, workshop):
    """A folder in which results/RUN is what a run leaves, and text.jsonl some text."""
    model, tokenizer = load_model(str(workshop / "dense"), "float32", "cpu")
    layers = find_layers(model)
    masks = dict(one_shot_masks(model, layers, None, OneShot("magnitude")))
    apply_masks(layers, masks)
    checkpoint = tmp_path / "results/RUN/checkpoint"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    mask_files.save(tmp_path / "results/RUN/mask.safetensors", masks, 2, 4)
    (tmp_path / "maskpro").symlink_to(ROOT)
    write_corpus(tmp_path / "text.jsonl", 8)
    return tmp_path


def recipe(heading: str) -> str:
    """The first code of a section of the page."""
    section = PAGE.split(f"## {heading}")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def moved(before, after):
    """The share of the weights of masked layers that differ."""
    pairs = zip(find_layers(before).values(), find_layers(after).values())
    changed = [(a.weight != b.weight).float().mean() for a, b in pairs]
    return torch.stack(changed).mean().item()


@pytest.mark.parametrize(
    "heading, out",
    [
        ("Fine-tune, and keep the zeros", "finetuned/model"),
        ("Quantise, and keep the zeros", "int8"),
    ],
    ids=["fine-tuning", "int8"],
)
def test_a_recipe_keeps_the_zeros_and_moves_the_other_weights(run, heading, out):
    code = recipe(heading).replace("max_steps=300", "max_steps=3, use_cpu=True")
    (run / "recipe.py").write_text(code)
    subprocess.run([sys.executable, "recipe.py"], cwd=run, check=True)
    before, _ = load_model(str(run / "results/RUN/checkpoint"), "float32", "cpu")
    after, _ = load_model(str(run / out), "float32", "cpu")
    assert check_sparsity(find_layers(after), (2, 4)) <= 0.5
    assert moved(before, after) > 0.3
    masks = mask_files.load(run / "results/RUN/mask.safetensors").masks
    for name, layer in find_layers(after).items():
        assert not layer.weight[~masks[name]].any()
