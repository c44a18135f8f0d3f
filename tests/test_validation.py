"""training/validation.py: the mask that did best on held-out minibatches is delivered."""

import math

import data
import pge
from files import mask_files
from masking.masked_model import MaskedModel
from models import processes
from training import validation
from training.learner import Learner

import pytest
import torch
from masked import forward, make, same
from runs import loss_under
from transformers import AutoTokenizer


def test_the_mask_with_the_lowest_loss_is_kept(load, monkeypatch):
    """Planted divergence: the losses of five evaluations; nan and inf are never best; the mask of
    the lowest is delivered."""
    masked = make(load(), magnitude=1.0)[0]
    losses = iter([3.0, math.inf, 2.5, math.nan, 2.7])
    evaluated = []

    def planted(masked, batch):
        evaluated.append(forward(masked.model))
        return next(losses)

    monkeypatch.setattr(MaskedModel, "loss", planted)
    best = validation.Validation(Learner(masked), torch.zeros(1, 2, 20, dtype=torch.int64))
    masks, found = [], []
    for t in range(5):
        masks.append(masked.masks_of(masked.mode_bits()))
        found.append(best.evaluate(t))
        for layer in masked.layers.values():
            layer.logits[t % 4].add_(3.0)
    assert found == [3.0, None, 2.5, None, 2.7] and (best.loss, best.step, best.m0_loss) == (
        2.5,
        2,
        3.0,
    )
    assert not any(same(masks[2], masks[t]) for t in (0, 1, 3, 4))
    assert same(masked.finish(best.bits), masks[2])
    assert torch.equal(forward(masked.model), evaluated[2]) and not torch.equal(
        evaluated[2], evaluated[3]
    )


@pytest.fixture
def heldout(text_and_masks, models):
    """The last minibatches, which are not learned from, with --val_fraction 0.3."""
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    return data.minibatches(tokenizer, f"{text_and_masks}/text.jsonl", 8, 2, 32)[2:].flatten(0, 1)


def test_the_best_of_held_out_minibatches_is_delivered(learn, heldout, models):
    """Losses by the HF model."""
    run = learn("--val_fraction 0.3 --max_step 8 --lr 100 --batchsize 2 --estimator vanilla")
    summary, evaluations = (
        run.record["summary"],
        [line["heldout"] for line in run.metrics if "heldout" in line],
    )
    delivered = loss_under(models["llama"], run.masks, heldout)
    assert delivered == pytest.approx(min(summary["heldout_loss_of_m0"], *evaluations), rel=1e-5)
    assert (
        delivered == pytest.approx(summary["heldout_loss"], rel=1e-5)
        and evaluations[-1] > delivered + 0.05
    )


def test_what_was_learned_is_delivered_with_less_of_the_prior(
    learn, heldout, text_and_masks, models
):
    """Where the most probable mask is still m0: that of the saved logits less a part of C * m0. The
    search ends after three masks in a row that are worse than one before; losses by the HF
    model."""
    run = learn("--val_fraction 0.3 --max_step 40 --logits 6 --lr 5 --batchsize 2")
    summary, m0 = run.record["summary"], mask_files.load(text_and_masks / "2_4.safetensors").masks
    last, *masks = [
        {
            name: pge.mode(logits - 6 * (1 - share) * m0[name].view(-1, 4), 2).reshape(
                m0[name].shape
            )
            for name, logits in run.logits.items()
        }
        for share in (1.0, *validation.PRIORS)
    ]
    losses = [loss_under(models["llama"], found, heldout) for found in masks]
    end = next(i for i in range(4, 21) if min(losses[i - 3 : i]) > min(losses[: i - 3]))
    best = losses.index(min(losses[:end]))
    assert same(last, m0) and same(masks[best], run.masks) and not same(run.masks, m0)
    assert (summary["prior"], summary["heldout_loss"]) == pytest.approx(
        (validation.PRIORS[best], losses[best])
    )


def test_processes_whose_logits_differ_are_noticed(load, monkeypatch):
    masked, told = make(load())[0], []
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "check_same", lambda text, what: told.append((text, what)))
    best = validation.Validation(Learner(masked), torch.zeros(0, 2, 20, dtype=torch.int64))
    for step in 1, 2, 3:
        best.evaluate(step)
        masked.layers["model.layers.1.mlp.up_proj"].logits[0][5] += step - 1
    assert told[0] == told[1] != told[2] and told[0][1] == "the logits"


def test_m0_is_the_first_even_where_all_logits_are_the_same(load):
    masked, m0, _ = make(load(), magnitude=0.0)
    best = validation.Validation(Learner(masked), torch.arange(40).view(1, 2, 20) % 32)
    best.evaluate(0)
    assert same(masked.finish(best.bits), m0)
