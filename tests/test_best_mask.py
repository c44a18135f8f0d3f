"""The paper's estimator with the fused step, on a problem whose best mask is known."""
import pytest
import torch
from masked import planes_of, seeded

import pge
from masking.block_bits import mask_to_bits
from masking.kernels import eager_update
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace


class Regression:
    """Linear regression whose best 2:4 mask is known: y = X w + e with orthonormal columns of X, e orthogonal to them.

    So f(m) = sum of the w_i^2 pruned + |e|^2, and the best mask keeps the two largest of each block. Every minibatch
    has its own X and e: the residual takes |e|^2 out.
    """

    def __init__(self, blocks=16, seed=0):
        generator = seeded(seed)
        self.weight = torch.randn(blocks * 4, generator=generator)
        order = torch.rand(blocks, 4, generator=generator).argsort(1)
        sizes = torch.tensor([2.0, 1.5, 0.5, 0.25])
        self.weight = self.weight.sign() * sizes[order].flatten() / blocks**0.5
        self.best = order < 2
        self.batches = []
        for difficulty in (0.0, 1.0, 5.0):
            columns = torch.linalg.qr(torch.randn(blocks * 8, blocks * 4, generator=generator))[0]
            noise = torch.randn(blocks * 8, generator=generator)
            noise = (noise - columns @ (columns.T @ noise)) * difficulty
            self.batches.append((columns, columns @ self.weight + noise))

    def loss(self, weight, batch):
        columns, y = self.batches[batch]
        return float((columns @ weight - y).square().sum())


def learn(dtype, steps=3000, lr=0.3, magnitude=1.0):
    problem = Regression()
    space, estimator = LinearSpace(2, 4), pge.MaskPro(0.99, debias=True)
    m0 = ~problem.best  # the worst mask there is
    baselines = [problem.loss(problem.weight * m0.flatten(), b) for b in range(3)]
    logits = planes_of(space.init(m0, magnitude), dtype)
    bits, out = mask_to_bits(m0), problem.weight * m0.flatten()
    for t in range(steps):
        advantage = estimator.advantage(problem.loss(out, t % 3), baselines[t % 3])
        key = layer_keys(0, t, 1)[0]
        eager_update(logits, bits, problem.weight, out, torch.tensor(lr * advantage), key, 2, 4)
    return space.mode(torch.stack(logits, 1).float()), problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maskpro_finds_the_best_mask(dtype):
    """From the worst mask, from losses alone, with float16 logits as with float32."""
    learned, problem = learn(dtype)
    assert torch.equal(learned, problem.best)
