"""training/normalization.py by block, and soft masks: each step by an independent formula, soft masks by enumeration,
and the gradient under them by finite differences of the whole model's loss."""
import pytest
import torch
from exact import exact_vjp, inclusion_by_drawings, jacobian, pattern_inclusion
from masked import TOKENS, forward, logits_of, make, seeded, watch

from masking.block_bits import bits_dtype, bits_to_mask
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import SPACES
from models.layers import find_layers
from training.normalization import KEPT_BY_BLOCK
from training.straight_through import COLD, HOT, StraightThrough, soft_temperature

BLOCKS = [*[("linear", n, m, mode) for n, m in ((1, 4), (2, 4), (3, 4), (4, 8)) for mode in ("eager", "exact")],
          ("linear", 5, 6, "exact"), ("pattern", 2, 4, "eager")]


def inclusion_of(space, n, m):
    """P(i is kept) of one block's logits, float64 `[width]` -> `[M]`, by enumeration."""
    return (lambda x: pattern_inclusion(x, n, m)) if space == "pattern" else lambda x: inclusion_by_drawings(x, n)


@pytest.mark.parametrize("space, n, m, mode", BLOCKS)
def test_a_step_by_block_follows_the_jacobian_at_the_temperature(space, n, m, mode):
    """pi - step * J^T G / rms with J at the logits times 0.5; the running mean squares; the mode of the result."""
    made = SPACES[space](n, m)
    logits, saliency = torch.randn(5, made.width, generator=seeded(n)), torch.randn(5, m, generator=seeded(m))
    vjp = torch.stack([jacobian(inclusion_of(space, n, m), 0.5 * x).T @ g.double() for x, g in zip(logits, saliency)])
    planes = [plane.clone() for plane in logits.unbind(1)]
    bits, mean_squares = torch.zeros(5, dtype=bits_dtype(m)), torch.tensor([-1.0, -1.0, 0.0, 0.01, 2.0])
    now, before = vjp.square().mean(1), mean_squares.double()
    expected = torch.where(before < 0, now, 0.9 * before + 0.1 * now)
    squares = Kernels(made, mode).vjp(planes, bits, saliency, torch.ones_like(saliency), mean_squares,
                                      torch.tensor([0.0, 0.3, 0.5, 0.9]), layer_keys(0, 0, 1)[0])
    moved = torch.stack(planes, 1)
    assert torch.allclose(moved.double(), logits - 0.3 * vjp / expected.sqrt()[:, None], atol=1e-5)
    assert torch.allclose(mean_squares.double(), expected, rtol=1e-4)
    assert torch.allclose(squares.double(), vjp.square().sum(1), rtol=1e-4)
    assert torch.equal(bits_to_mask(bits, m), made.mode(moved))


@pytest.mark.parametrize("mode", ["eager", "exact"])
def test_a_block_that_is_not_finite_keeps_its_mean_square(mode):
    logits, saliency = torch.randn(3, 4, generator=seeded(0)), torch.randn(3, 4, generator=seeded(1))
    saliency[1, 2], saliency[2, 0] = torch.inf, torch.nan
    planes, mean_squares = [plane.clone() for plane in logits.unbind(1)], torch.tensor([-1.0, -1.0, 2.0])
    squares = Kernels(SPACES["linear"](2, 4), mode).vjp(planes, None, saliency, torch.ones_like(saliency), mean_squares,
                                                        torch.tensor([0.0, 1.0, 1.0, 0.9]), layer_keys(0, 0, 1)[0])
    moved = torch.stack(planes, 1)
    assert torch.equal(moved[1:], logits[1:]) and not torch.equal(moved[0], logits[0])
    assert squares.isnan().tolist() == [False, True, True]
    assert mean_squares[0] > 0 and mean_squares[1:].tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("space", ["linear", "pattern"])
@pytest.mark.parametrize("microbatch", [32, 1])
def test_updates_by_block_follow_the_formula(load, space, microbatch):
    """pi <- pi - rate / parts * J^T G / rms, rms^2 a running mean of the block's mean squares, this one's included."""
    masked, _, dense = make(load(), 2, 4, space, mode="eager", magnitude=1.0)
    learner = StraightThrough(masked, microbatch=microbatch, normalize="block")
    seen, rates = watch(learner), [0.05, 0.03, 0.01]
    for rate in rates:
        learner.learn(TOKENS, rate)
    parts = -(-len(TOKENS) // microbatch)
    for name, layer in masked.layers.items():
        mine = [(gradient, logits) for of, gradient, logits in seen if of.name == name]
        after = [logits for _, logits in mine[1:]] + [logits_of(layer).double()]
        mean_squares = None
        for index, (gradient, logits) in enumerate(mine):
            vjp = exact_vjp(masked.space, logits, (dense[name] * gradient).double().view(-1, 4))
            now = vjp.square().mean(1)
            mean_squares = now if mean_squares is None else torch.lerp(now, mean_squares, KEPT_BY_BLOCK)
            move = vjp / mean_squares.sqrt()[:, None] * rates[index // parts] / parts
            counts = mean_squares > 1e-9 * mean_squares.mean()  # float32 has digits left
            assert counts.float().mean() > 0.9
            assert torch.allclose(after[index][counts], (logits - move)[counts], atol=1e-4)
        found = learner.normalization.mean_squares[name].double()
        assert torch.allclose(found[counts], mean_squares[counts], rtol=1e-2)


# ---------------------------------------------------------------------------------------------------------- soft masks


@pytest.mark.parametrize("space, n, m, mode", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_soft_mask_is_the_probability_of_being_kept(space, n, m, mode, dtype):
    made = SPACES[space](n, m)
    logits, weight = torch.randn(50, made.width, generator=seeded(n)), torch.randn(50, m, generator=seeded(m)).to(dtype)
    out = torch.empty(50 * m, dtype=dtype)
    Kernels(made, mode).write_soft(list(logits.unbind(1)), weight.view(-1), out, torch.tensor(0.5))
    expected = torch.stack([inclusion_of(space, n, m)(0.5 * x.double()) for x in logits]) * weight.double()
    assert torch.allclose(out.view(50, m).double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.01)


def test_soft_masks_of_large_blocks_add_up_to_n():
    """8:16 by the race stopped at one time: near the exact probabilities, and with their sum."""
    made = SPACES["linear"](8, 16)
    logits, out = torch.randn(20, 16, generator=seeded(0)), torch.empty(320)
    Kernels(made, "eager").write_soft(list(logits.unbind(1)), torch.ones(320), out, torch.tensor(1.0))
    assert torch.allclose(out.view(20, 16).sum(1), torch.tensor(8.0), atol=1e-4)
    assert (out.view(20, 16) - made.inclusion(logits)).abs().max() < 0.1


@pytest.mark.parametrize("space", ["linear", "pattern"])
def test_under_soft_masks_it_is_the_gradient_of_the_models_own_loss(load, space):
    """By finite differences in a logit of some layers: nothing is linearised."""
    masked, _, dense = make(load(), 2, 4, space, mode="eager", magnitude=1.0)
    learner = StraightThrough(masked, temperature=lambda: 0.8)
    seen = watch(learner)
    learner.learn(TOKENS, 0.0)

    def loss_of(name, logits):
        plain = load().double()
        for other, module in find_layers(plain).items():
            now = logits if other == name else logits_of(masked.layers[other]).double()
            module.weight.copy_(dense[other].double() * masked.space.inclusion(now / 0.8).view(module.weight.shape))
        log_probs = plain(input_ids=TOKENS).logits[:, :-1].log_softmax(-1)
        return -log_probs.gather(2, TOKENS[:, 1:, None]).sum()
    for layer, gradient, logits in seen[:3]:
        vjp = exact_vjp(masked.space, logits / 0.8, (dense[layer.name] * gradient).double().view(-1, 4)) / 0.8
        block, place = divmod(int(vjp.abs().argmax()), masked.space.width)
        shift = torch.zeros_like(logits)
        shift[block, place] = 0.01  # norms compute in float32
        slope = (loss_of(layer.name, logits + shift) - loss_of(layer.name, logits - shift)) / 0.02
        assert float(vjp[block, place]) == pytest.approx(float(slope), rel=5e-3)


def test_soft_masks_cool_down_in_the_first_half_of_a_run():
    assert soft_temperature(0.0) == HOT and soft_temperature(0.5 - 1e-9) == pytest.approx(COLD)
    assert soft_temperature(0.25) == pytest.approx((HOT * COLD) ** 0.5) and soft_temperature(0.5) == 0


def test_soft_masks_are_used_only_where_no_mask_is_named(load):
    masked = make(load(), mode="eager", magnitude=1.0)[0]
    hard = forward(masked.model)
    masked.use_soft_masks(HOT)
    assert not torch.allclose(forward(masked.model), hard, atol=1e-3)
    with masked.use_masks(masked.mode_bits()):  # as validation does
        assert torch.equal(forward(masked.model), hard)
    with masked.use_dense():  # as the teacher
        assert torch.allclose(forward(masked.model), forward(load()), atol=1e-5)
    masked.use_soft_masks(0.0)
    assert torch.equal(forward(masked.model), hard)
