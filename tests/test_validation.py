"""training/validation.py: the mask that did best on held-out minibatches is delivered."""
import math

import pytest
import torch
from masked import forward, make, same
from runs import GRADIENTS, loss_under, sequences_of

import pge
from files import mask_files
from models.processes import ProcessGroup
from training import validation
from training.straight_through import StraightThrough


def test_validation_keeps_the_mask_with_the_lowest_loss(load, monkeypatch):
    """Planted divergence: the losses of five evaluations; nan and inf are never best; the mask of the lowest is
    delivered."""
    masked = make(load(), magnitude=1.0)[0]
    losses = iter([3.0, math.inf, 2.5, math.nan, 2.7])
    evaluated = []

    def planted(model, batch, microbatch):
        evaluated.append(forward(model))
        return next(losses)
    monkeypatch.setattr(validation, "batch_loss", planted)
    best = validation.Validation(masked, torch.zeros(1, 2, 20, dtype=torch.int64), ProcessGroup())
    masks, found = [], []
    for t in range(5):
        masks.append(masked.mode_masks())
        found.append(best.evaluate(t))
        for layer in masked.layers.values():
            layer.logits[t % 4].add_(3.0)
    assert found == [3.0, None, 2.5, None, 2.7] and (best.loss, best.step, best.m0_loss) == (2.5, 2, 3.0)
    assert not any(same(masks[2], masks[t]) for t in (0, 1, 3, 4))
    assert same(masked.finish(best.bits), masks[2])
    assert torch.equal(forward(masked.model), evaluated[2]) and not torch.equal(evaluated[2], evaluated[3])


def test_the_best_of_held_out_minibatches_is_delivered(learn, text_and_masks, models, monkeypatch):
    """Planted divergence: the second half of the steps climbs. Losses on the last minibatches, which are not learned
    from, by the HF model."""
    learn_from, planted = StraightThrough.learn, iter([0.4] * 4 + [-0.8] * 4)
    monkeypatch.setattr(StraightThrough, "learn", lambda self, batch, _: learn_from(self, batch, next(planted)))
    run = learn(f"{GRADIENTS} --epoch 2 --val_fraction 0.3 --num_evals 4")
    batches = sequences_of(text_and_masks, models, 768)
    assert len(run.metrics) == 8  # four of six minibatches, twice
    evaluations = [line["heldout"] for line in run.metrics if "heldout" in line]
    m0 = mask_files.load(text_and_masks / "2_4.safetensors").masks
    started = loss_under(models, m0, batches[4:].flatten(0, 1))
    delivered = loss_under(models, run.masks, batches[4:].flatten(0, 1))
    assert len(evaluations) == 4 and delivered == pytest.approx(min(started, *evaluations), rel=1e-5)
    assert evaluations[-1] > delivered + 0.05
    assert run.metrics[0]["loss"] == pytest.approx(loss_under(models, m0, batches[0]), rel=1e-5)


def test_without_held_out_minibatches_the_last_mask_is_delivered(learn):
    run = learn(f"{GRADIENTS} --targets k_proj")
    assert not any("heldout" in line for line in run.metrics)
    for name, logits in run.logits.items():
        assert torch.equal(run.masks[name].view(-1, 4), pge.mode(logits, 2))


def test_m0_is_the_first_even_where_all_logits_are_the_same(load):
    masked, m0, _ = make(load(), magnitude=0.0)
    best = validation.Validation(masked, torch.arange(40).view(1, 2, 20) % 32, ProcessGroup())
    best.evaluate(0)
    assert same(masked.finish(best.bits), m0)
