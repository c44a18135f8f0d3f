"""training/loss.py: the loss, distilled or not, and its gradient against autograd."""
import pytest
import torch
from masked import seeded
from torch import nn

from training.loss import summed_loss


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summed_loss_and_its_gradient_are_autograds(distill, dtype):
    logits = (torch.randn(3, 7, 11, generator=seeded(0)) * 3).to(dtype)
    teacher = torch.randn(3, 7, 11, generator=seeded(1)) * 3
    sequences = torch.randint(11, (3, 7), generator=seeded(2))
    followed = logits.double().requires_grad_()
    flat = followed[:, :-1].flatten(0, 1)
    text = nn.functional.cross_entropy(flat, sequences[:, 1:].flatten(), reduction="sum")
    copied = nn.functional.cross_entropy(flat, teacher[:, :-1].double().softmax(-1).flatten(0, 1), reduction="sum")
    expected, = torch.autograd.grad((1 - distill) * text + distill * copied, followed)
    loss, gradient = summed_loss(logits, sequences, teacher if distill else None, distill)
    assert loss == pytest.approx(float(text), rel=1e-5) and gradient.dtype == dtype
    assert torch.allclose(gradient.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.01)


def test_a_perfect_pupil_has_nothing_to_learn():
    """Distilled from itself, the gradient is zero though the text surprises it."""
    logits, sequences = torch.randn(2, 5, 9, generator=seeded(0)), torch.zeros(2, 5, dtype=torch.int64)
    loss, gradient = summed_loss(logits, sequences, logits, 1.0)
    assert loss > 1 and gradient.abs().max() < 1e-6
