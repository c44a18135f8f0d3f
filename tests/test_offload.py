"""Models whose weights accelerate keeps in the host's memory: every script makes of them what it makes of others."""
import json

from utils import UserError

import accelerate
import pytest
import torch
import transformers
from faults import kill
from masked import forward, make, same
from safetensors.torch import load_file
from tiny import write_corpus

import evaluate
import get_mask
import inference_loss
import prune
import train
from models import offload
from models.layers import find_layers, weight_matrix
from models.loading import input_device, load_model, model_fingerprint
from training.straight_through import StraightThrough


@pytest.fixture
def lent(monkeypatch):
    """A function after which --device auto loads models offloaded: run on the CPU, their weights kept apart, by this
    function of accelerate."""
    def patch(offload_by=accelerate.cpu_offload, **settings):
        load = transformers.AutoModelForCausalLM.from_pretrained

        def offloaded(*given, device_map=None, **names):
            model, found = load(*given, **names)
            if device_map is None:
                return model, found
            model.hf_device_map = {"model": "cpu", "lm_head": 0}  # as --device auto leaves; saving looks for it
            return offload_by(model.eval(), execution_device="cpu", **settings), found
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", offloaded)
    return patch


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_masks_are_learned_on_lent_weights(load, kind):
    """The logits and masks after a few steps are those of a model of its own weights, and so is the finished model."""
    models = load(kind), accelerate.cpu_offload(load(kind), execution_device="cpu")
    assert torch.equal(forward(models[0]), forward(models[1]))
    masked = [make(model)[0] for model in models]
    for step in range(4):
        assert torch.equal(*(forward(model) for model in models))
        for one in masked:
            one.update(0.3 * step)
    assert masked[0].checksum() == masked[1].checksum()
    assert same(*(one.finish() for one in masked))
    assert torch.equal(forward(models[0]), forward(models[1]))
    for module in find_layers(models[1]).values():
        assert module.weight.is_meta and (weight_matrix(module) == 0).float().mean() >= 0.5


def test_where_weights_are_kept(load):
    plain, model = load("llama"), accelerate.cpu_offload(load("llama"), execution_device="cpu")
    assert input_device(model) == torch.device("cpu")
    assert model_fingerprint(model) == model_fingerprint(plain)
    for mine, lent in zip(find_layers(plain).values(), find_layers(model).values()):
        assert lent.weight.is_meta and torch.equal(weight_matrix(lent), weight_matrix(mine))
        assert not offload.is_on_disk(lent) and not offload.is_on_disk(mine)


def test_the_whole_pipeline(models, tmp_path, lent):
    """prune, get_mask, inference_loss, train and evaluate, offloaded and not: the same files, the same numbers."""
    write_corpus(tmp_path / "text.jsonl", 16)
    text, methods, found = f"--dataset {tmp_path}/text.jsonl", ("wanda", "sparsegpt", "magnitude"), []
    for device in ("cpu", "auto"):
        w, placed = tmp_path / device, f"--dtype float32 --device {device}"
        w.mkdir()
        if device == "auto":
            lent()
        for method in methods:
            prune.main(f"--model {models['llama']} {placed} {text} --prune_method {method} --nsamples 4 --seqlen 32 "
                       f"--save_model {w}/{method}".split())
        get_mask.main(f"--model {w}/wanda --save {w}/mask.safetensors".split())
        data = f"{text} --dataset_size 8 --batchsize 4 --seqlen 32 --mask {w}/mask.safetensors"
        inference_loss.main(f"--model {models['llama']} {placed} {data} --save {w}/losses.json".split())
        train.main(f"--model {models['llama']} {placed} {data} --baseline {w}/losses.json --save --logits 1 --lr 5 "
                   f"--epoch 4 --out {w}/run".split())
        evaluate.main(f"--model {w}/run/checkpoint {placed} --ppl {tmp_path}/text.jsonl --seqlen 64".split())
        run = kill.contents(w / "run")
        levels = json.loads((w / "run/checkpoint/evaluation.json").read_text())
        found.append([run["summary"], run["metrics"], {key: run[key] for key in run if isinstance(run[key], tuple)},
                      [levels[key] for key in ("ppl", "density", "fingerprint", "tokens")]])
        found[-1][0].pop("device", None)
    assert found[0] == found[1]
    for method in methods:
        assert same(*(load_file(tmp_path / device / method / "model.safetensors") for device in ("cpu", "auto")))


def test_weights_on_the_disk_are_refused(models, tmp_path, lent):
    lent(accelerate.disk_offload, offload_dir=str(tmp_path / "disk"))
    with pytest.raises(UserError, match="weights on the disk cannot be masked"):
        load_model(models["llama"], dtype="float32", device="auto")


def test_gradients_are_not_taken_on_lent_weights(load):
    masked = make(accelerate.cpu_offload(load("llama"), execution_device="cpu"))[0]
    with pytest.raises(UserError, match="needs all weights on GPUs"):
        StraightThrough(masked)
