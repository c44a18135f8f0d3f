"""training/curvature.py: its factors by enumeration, what it adds by a loss that is quadratic, and when."""
import copy
import itertools
from types import SimpleNamespace

from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from training.curvature import EVERY, Curvature, with_curvature
from training.straight_through import StraightThrough

import pytest
import torch
from masked import TOKENS, learner_of, logits_of
from torch import nn

WORDS = torch.tensor([[0, 1, 2, 3, 1], [3, 2, 2, 0, 1]])
MASK = torch.tensor([[True, False, True, False], [False, True, False, True]])


class OneLayer(nn.Module):
    """Words -> 4 features -> one masked layer `[2, 4]`, tanh -> 4 predictions, each of its own word alone."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.embed, self.layer, self.head = nn.Embedding(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        for parameter in self.parameters():
            parameter.data = 1.5 * torch.randn(parameter.shape, generator=generator)
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(self.layer(self.embed(input_ids)).tanh()))


def one_layer():
    """(StraightThrough with the curvature of this model, its MaskedModel, its layer)."""
    masked = MaskedModel(OneLayer(), {"layer": MASK}, LinearSpace(2, 4), mode="eager")
    return StraightThrough(masked, curvature=True), masked, masked.layers["layer"]


def test_the_factors_are_those_of_the_fisher_information():
    """At the outputs: of each word, the squared gradients of log p(y), all y weighed by their probability."""
    learner, masked, layer = one_layer()
    masked.seed, masked.microbatch = 2**63 - 1, 10**6  # any can be measured with
    before = logits_of(layer)
    learner.curvature.measure(WORDS.repeat(2000, 1))
    assert torch.equal(logits_of(layer), before) and not learner.is_measuring
    model, predicting = OneLayer(), WORDS[:, :-1]
    inputs = model.embed(predicting).flatten(0, 1)
    outputs = (inputs @ (model.layer.weight * MASK).T).requires_grad_()
    probs = model.head(outputs.tanh()).softmax(1)
    expected = torch.zeros(2)
    for word in range(4):
        gradient, = torch.autograd.grad(probs[:, word].log().sum(), outputs, retain_graph=True)
        expected += (probs[:, word:word + 1].detach() * gradient.square()).mean(0)
    at_outputs, of_inputs = learner.curvature.factors["layer"]
    assert torch.allclose(at_outputs, expected * 4 / 5, rtol=0.04)  # the last of five predicts nothing
    assert torch.allclose(of_inputs, model.embed(WORDS).flatten(0, 1).square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_slope_becomes_the_whole_change_of_a_quadratic_loss(dtype, tolerance):
    """f = 1/2 sum F_ij (m_ij w_ij - w_ij)^2 + c.(m w): what adding or dropping any one weight changes it by."""
    outputs, inputs = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.3, 2.0, 0.7])
    fisher, linear = torch.outer(outputs, inputs), torch.tensor([[0.3, -0.2, 0.1, 0.5], [1.0, -1.0, 0.2, 0.4]])
    *_, layer = one_layer()
    weight, mask = layer.weight, MASK.float()

    def loss(mask):
        return float((0.5 * fisher * (mask * weight - weight).square() + linear * mask * weight).sum())
    slope = (fisher * (mask * weight - weight) + linear).to(dtype)
    found = with_curvature(slope, weight.to(dtype), layer.bits, outputs, inputs, 4)
    assert found.dtype == dtype
    for place in itertools.product(range(2), range(4)):
        kept, dropped = mask.clone(), mask.clone()
        kept[place], dropped[place] = 1, 0
        assert float((found.float() * weight)[place]) == pytest.approx(loss(kept) - loss(dropped), abs=tolerance)


def test_it_counts_from_its_place_in_the_run_on(monkeypatch):
    learner, masked, layer = one_layer()
    learner.curvature, seen = Curvature(masked), []

    def record(_logits, _bits, _weight, gradient, *_, **__):
        seen.append(gradient)
        return torch.ones(2)
    monkeypatch.setattr(masked.kernels, "vjp", record)
    for progress in (0.2, 0.5, 0.7, 0.9, 1.0):
        learner.step(WORDS, 0.0, progress)
    assert torch.equal(seen[0], seen[1])
    half, full, after = (gradient - seen[0] for gradient in seen[2:])
    assert torch.allclose(2 * half, full, atol=1e-6) and torch.equal(full, after)
    assert full.abs().max() > 1e-3
    learner.curvature.tokens *= 2  # gradients are sums over them
    assert torch.allclose(learner.curvature.added_to(torch.zeros(2, 4), layer), 2 * full, atol=1e-6)


@pytest.mark.parametrize("kind, checkpointing", [("llama", False), ("llama", True), ("gpt2", False), ("opt", False)])
def test_every_layer_is_measured_now_and_then(load, kind, checkpointing):
    learner = learner_of(load(kind), checkpointing=checkpointing, curvature=True)[0]
    measured = []
    for _ in range(EVERY + 1):
        learner.step(TOKENS, 0.0, 1.0)
        measured.append(learner.curvature.mean_squares.clone())
    assert measured[0].isfinite().all() and (measured[0] >= 0).all() and measured[0].count_nonzero() > 100
    assert all(torch.equal(measured[0], later) for later in measured[1:EVERY])
    assert not torch.equal(measured[EVERY], measured[0])


def test_what_is_not_finite_is_not_taken_in():
    learner, masked, _ = one_layer()
    learner.step(WORDS, 0.1, 1.0)
    before = learner.curvature.mean_squares.clone()
    masked.model.head.weight.data[0, 0] = torch.nan
    learner.curvature.measure(WORDS)
    assert torch.equal(before, learner.curvature.mean_squares) and before.isfinite().all()


def test_a_restored_state_goes_on_alike():
    learner, masked, layer = one_layer()
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy([part.state() for part in (masked, learner)])
        learner.step(WORDS, 0.3, 1.0)
    again, masked, restored = one_layer()
    for part, (scalars, tensors) in zip((masked, again), saved):
        part.restore(scalars, lambda name, like, tensors=tensors: tensors[name])
    for _ in range(3):
        again.step(WORDS, 0.3, 1.0)
    assert torch.equal(logits_of(layer), logits_of(restored))
    assert torch.equal(learner.curvature.mean_squares, again.curvature.mean_squares)
