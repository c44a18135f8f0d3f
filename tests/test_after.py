"""The recipes of docs/after.md, run as they stand there on a tiny model: zeros stay."""

import re
import sys

from files import mask_files
from masking.layers import apply_masks, check_sparsity
from models.layers import find_layers
from models.loading import load_model
from pruning.one_shot import OneShot, one_shot_masks
from utils import UserError

import pytest
import torch
from runs import ROOT
from tiny import write_corpus

sys.path.insert(0, str(ROOT / "reproduce"))
import after


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
    write_corpus(tmp_path / "text.jsonl", 8)
    return tmp_path


def moved(before, now):
    """The share of the weights of masked layers that differ."""
    pairs = zip(find_layers(before).values(), find_layers(now).values())
    changed = [(a.weight != b.weight).float().mean() for a, b in pairs]
    return torch.stack(changed).mean().item()


@pytest.mark.parametrize("name", after.RECIPES)
def test_a_recipe_keeps_the_zeros_and_moves_the_other_weights(name, run, monkeypatch):
    code = after.recipe(name).replace("max_steps=300", "max_steps=3, use_cpu=True")
    monkeypatch.setattr(after, "recipe", lambda _: code)
    monkeypatch.setattr(after, "SHORTEST", 1)
    results = run / "results/RUN"
    flags = f"{name} --run {results} --text {run}/text.jsonl --out {run}/out"
    after.main(flags.split())
    dense, _ = load_model(str(results / "checkpoint"), "float32", "cpu")
    model, _ = load_model(str(run / "out"), "float32", "cpu")
    assert check_sparsity(find_layers(model), (2, 4)) <= 0.5
    assert moved(dense, model) > 0.3
    masks = mask_files.load(results / "mask.safetensors").masks
    for layer_name, layer in find_layers(model).items():
        assert not layer.weight[~masks[layer_name]].any()


def test_masks_on_a_merged_adapter_keep_the_zeros(run, monkeypatch):
    """The page's two lines on LoRA, after an adapter has learned."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    monkeypatch.chdir(run)
    dense, _ = load_model("results/RUN/checkpoint", "float32", "cpu")
    base, _ = load_model("results/RUN/checkpoint", "float32", "cpu")
    adapter = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    (recipe,) = re.findall(r"```python\n(merged = .*?)```", after.PAGE.read_text(), re.DOTALL)
    names = {
        "peft_model": peft.get_peft_model(base, adapter),
        "apply_masks": apply_masks,
        "find_layers": find_layers,
        "load": mask_files.load,
    }
    exec(recipe, names)
    assert check_sparsity(find_layers(names["merged"]), (2, 4)) <= 0.5
    assert moved(dense, names["merged"]) > 0.3


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint/"):
        after.main(["quantise", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
