"""training/validation.py: the mask that did best on held-out minibatches is delivered."""
import math

import data
import pge
from files import mask_files
from masking.block_bits import bits_to_mask
from masking.masked_model import MaskedModel
from models import processes
from training import validation

import pytest
import torch
from masked import forward, logits_of, make, same, seeded
from runs import loss_under
from transformers import AutoTokenizer


def test_the_mask_with_the_lowest_loss_is_kept(load, monkeypatch):
    """Planted divergence: the losses of five evaluations; nan and inf are never best; the mask of the lowest is
    delivered."""
    masked = make(load(), magnitude=1.0)[0]
    losses = iter([3.0, math.inf, 2.5, math.nan, 2.7])
    evaluated = []

    def planted(masked, batch):
        evaluated.append(forward(masked.model))
        return next(losses)
    monkeypatch.setattr(MaskedModel, "loss", planted)
    best = validation.Validation(masked, torch.zeros(1, 2, 20, dtype=torch.int64))
    masks, found = [], []
    for t in range(5):
        masks.append(masked.masks_of(masked.mode_bits()))
        found.append(best.evaluate(t))
        for layer in masked.layers.values():
            layer.logits[t % 4].add_(3.0)
    assert found == [3.0, None, 2.5, None, 2.7] and (best.loss, best.step, best.m0_loss) == (2.5, 2, 3.0)
    assert not any(same(masks[2], masks[t]) for t in (0, 1, 3, 4))
    assert same(masked.finish(best.bits), masks[2])
    assert torch.equal(forward(masked.model), evaluated[2]) and not torch.equal(evaluated[2], evaluated[3])


def test_the_best_of_held_out_minibatches_is_delivered(learn, text_and_masks, models):
    """Losses on the last minibatches, which are not learned from, by the HF model."""
    run = learn("--val_fraction 0.3 --max_step 8 --lr 100 --batchsize 2 --estimator vanilla")
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    batches = data.minibatches(tokenizer, f"{text_and_masks}/text.jsonl", 8, 2, 32)
    summary, evaluations = run.record["summary"], [line["heldout"] for line in run.metrics if "heldout" in line]
    delivered = loss_under(models["llama"], run.masks, batches[2:].flatten(0, 1))
    assert delivered == pytest.approx(min(summary["heldout_loss_of_m0"], *evaluations), rel=1e-5)
    assert delivered == pytest.approx(summary["heldout_loss"], rel=1e-5) and evaluations[-1] > delivered + 0.05


def test_the_prior_is_weakened_for_as_long_as_that_helps(load, monkeypatch):
    """Planted: the loss is least where a tenth of the blocks differ from m0. Masks by float64; none is tried twice."""
    masked, m0, _ = make(load(), magnitude=10.0)
    for layer in masked.layers.values():
        moved = logits_of(layer) + 0.3 * torch.randn(len(layer.bits), 4, generator=seeded(len(layer.bits)))
        layer.set_logits(lambda part, moved=moved: moved[part])
    blocks = {name: mask.view(-1, 4) for name, mask in m0.items()}

    def changed(masks):
        return sum(int((mask != blocks[name]).any(1).sum()) for name, mask in masks.items()) / masked.blocks
    best, tried = validation.Validation(masked, torch.zeros(1, 2, 20)), []

    def planted(bits):
        tried.append(changed({name: bits_to_mask(found, 4) for name, found in bits.items()}))
        return abs(tried[-1] - 0.1)
    monkeypatch.setattr(best, "_loss_of", planted)
    best.weaken_prior(m0, 10.0, 7)
    masks = {share: {name: pge.mode(logits_of(layer).double() - 10 * (1 - share) * blocks[name], 2)
                     for name, layer in masked.layers.items()} for share in validation.PRIORS}
    nearest = min(masks, key=lambda share: abs(changed(masks[share]) - 0.1))
    assert (best.prior, best.step) == (nearest, 7) and 0.01 < nearest < 0.5
    assert same({name: bits_to_mask(bits, 4) for name, bits in best.bits.items()}, masks[nearest])
    assert tried[0] > 0 and tried == sorted(set(tried)) and len(tried) == tried.index(changed(masks[nearest])) + 4


def test_what_was_learned_is_delivered_with_less_of_the_prior(learn, text_and_masks):
    """Where the most probable mask is still m0: the N largest of the saved logits less a part of C * m0."""
    run = learn("--val_fraction 0.3 --max_step 40 --logits 6 --lr 5 --batchsize 2")
    summary, m0 = run.record["summary"], mask_files.load(text_and_masks / "2_4.safetensors").masks
    assert summary["prior"] < 1 and summary["heldout_loss"] < summary["heldout_loss_of_m0"]
    for name, mask in run.masks.items():
        blocks = m0[name].view(-1, 4)
        assert torch.equal(pge.mode(run.logits[name], 2), blocks)
        assert torch.equal(mask.view(-1, 4), pge.mode(run.logits[name] - 6 * (1 - summary["prior"]) * blocks, 2))


def test_processes_whose_logits_differ_are_noticed(load, monkeypatch):
    masked, told = make(load())[0], []
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "check_same", lambda text, what: told.append((text, what)))
    best = validation.Validation(masked, torch.zeros(0, 2, 20, dtype=torch.int64))
    for step in 1, 2, 3:
        best.evaluate(step)
        masked.layers["model.layers.1.mlp.up_proj"].logits[0][5] += step - 1
    assert told[0] == told[1] != told[2] and told[0][1] == "the logits"


def test_m0_is_the_first_even_where_all_logits_are_the_same(load):
    masked, m0, _ = make(load(), magnitude=0.0)
    best = validation.Validation(masked, torch.arange(40).view(1, 2, 20) % 32)
    best.evaluate(0)
    assert same(masked.finish(best.bits), m0)
