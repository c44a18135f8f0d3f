"""The estimators of bench/variants.py, by enumeration of all masks of a toy model."""
import itertools
from types import SimpleNamespace

import pytest
import torch
import variants
from torch import nn

import pge
from masking.block_bits import mask_to_bits, write_masked
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.loss import batch_loss

LR, BATCH = 0.5, torch.tensor([[0, 1, 2, 3, 1], [3, 2, 2, 0, 1]])


class Toy(nn.Module):
    """Tokens -> 4 features -> one masked layer `[2, 4]`, tanh -> 4 predictions. The loss is far from linear in it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed, self.inner, self.head = nn.Embedding(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        for parameter in self.parameters():
            parameter.data = 2 * torch.randn(parameter.shape, generator=generator)
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(torch.tanh(self.inner(self.embed(input_ids)))))


MASKS = [torch.stack(pair) for pair in itertools.product(pge.patterns(2, 4), repeat=2)]  # all 36, bool [2 blocks, 4]
LOGITS = torch.tensor([[0.3, -0.5, 1.0, 0.1], [-0.2, 0.8, 0.0, 0.6]])


def masked_toy():
    """The toy under LOGITS and their most probable mask."""
    masked = MaskedModel(Toy(), {"inner": pge.mode(LOGITS, 2)}, LinearSpace(2, 4), mode="eager")
    layer = masked.layers["inner"]
    for plane, column in zip(layer.logits, LOGITS.T):
        plane.copy_(column)
    return masked, layer


def moved(layer):
    """What a step has taken off the logits, `[2, 4]`, for a rate of 1."""
    return (LOGITS - torch.stack(layer.logits, 1)) / LR


def drawing(masked, masks):
    """Let the model draw these masks one after the other instead of by chance."""
    coming = iter(masks)

    def draw(_logits, bits, weight, out, _key, **_):
        bits.copy_(mask_to_bits(next(coming)))
        write_masked(weight, bits, out, 4)
    masked.kernels.draw = draw


def chance(masks) -> float:
    return float(torch.stack([pge.log_prob(LOGITS.double(), mask).sum() for mask in masks]).sum().exp())


@pytest.fixture(scope="module")
def gradient():
    """d E f / d logits: every mask's loss on the weights multiplied by it, and autograd of its probability."""
    losses = []
    for mask in MASKS:
        model = Toy()
        model.inner.weight.data *= mask
        losses.append(batch_loss(model, BATCH))
    logits = LOGITS.double().requires_grad_()
    expected = sum(loss * pge.log_prob(logits, mask).sum().exp() for loss, mask in zip(losses, MASKS))
    return torch.autograd.grad(expected, logits)[0]


def control_variate_step(mask, saliency, residual):
    """One step at this mask, with G' and b as if learned from minibatches before."""
    masked, layer = masked_toy()
    drawing(masked, [mask])
    learner = variants.ControlVariate(masked)
    if saliency is not None:
        learner.saliencies[layer.name] = saliency
        learner.residual, learner.steps = residual * (1 - 0.9**3), 3
    learner.learn(BATCH, LR, baseline=0.7)
    return moved(layer).double(), learner, layer


@pytest.mark.parametrize("saliency", [None, torch.zeros(4, 2),
                                      torch.tensor([[0.4, -1], [0.7, 0.1], [-2, 0.3], [0, 1]])])
def test_the_control_variate_is_unbiased_for_any_saliencies_and_baseline(gradient, saliency):
    mean = sum(chance([mask]) * control_variate_step(mask, saliency, -0.4)[0] for mask in MASKS)
    assert gradient.abs().max() > 0.05
    assert torch.allclose(mean, gradient, atol=2e-5)


def test_the_control_variate_takes_in_the_saliency():
    _, learner, layer = control_variate_step(MASKS[7], None, 0.0)
    mask = MASKS[7].view(2, 4).float().requires_grad_()
    model = Toy()
    hidden = torch.tanh(model.embed(BATCH) @ (mask * model.inner.weight).T)
    logits = model.head(hidden)[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), BATCH[:, 1:].flatten())
    expected, = torch.autograd.grad(loss, mask)
    assert torch.allclose(learner.saliencies[layer.name].float(), expected.T, rtol=1e-2, atol=1e-4)  # of bfloat16


def test_leave_one_out_is_unbiased(gradient):
    mean = torch.zeros(2, 4, dtype=torch.float64)
    for pair in itertools.combinations(MASKS, 2):  # in either order; the same mask twice moves nothing
        masked, layer = masked_toy()
        drawing(masked, pair)
        variants.LeaveOneOut(masked, 2).learn(BATCH, LR)
        mean += 2 * chance(pair) * moved(layer).double()
    assert torch.allclose(mean, gradient, atol=2e-5)


def test_sign_moves_every_logit_by_the_rate_against_its_gradient():
    masked, layer = masked_toy()
    plain, other = masked_toy()
    variants.Sign(masked).learn(BATCH, LR)
    learner = variants.StraightThrough(plain)
    learner.normalization.mean_squares.fill_(1e8)  # far from the clip
    learner.learn(BATCH, 1.0)
    gradient = LOGITS - torch.stack(other.logits, 1)
    assert torch.allclose(moved(layer), gradient.sign())
    assert gradient.abs().min() > 0


def test_momentum_moves_by_the_mean_of_the_gradients():
    """Two steps on minibatches x, y with no rate, then the running mean is 0.9 G(x) + 0.1 G(y)."""
    masked, layer = masked_toy()
    seen = []
    learner = variants.Momentum(masked)
    for batch in (BATCH, BATCH.flip(1)):
        plain, _ = masked_toy()
        one = variants.Momentum(plain, momentum=0.0)
        one.learn(batch, 0.0)
        seen.append(next(iter(one.means.values())).float())
        learner.learn(batch, 0.0)
    assert torch.allclose(learner.means[layer.name].float(), 0.9 * seen[0] + 0.1 * seen[1], rtol=0.02, atol=1e-3)
    assert not torch.allclose(seen[0], seen[1], rtol=0.1)


def test_sharpening_keeps_the_mode():
    masked, layer = masked_toy()
    before = masked.mode_masks()["inner"]
    variants.sharpen(masked, 3.0)
    assert torch.equal(masked.mode_masks()["inner"], before)
    assert torch.allclose(torch.stack(layer.logits, 1), 3 * LOGITS)
