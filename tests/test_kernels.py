"""masking/kernels.py: the fused, the compiled and the exact step against pge.py."""

from functools import partial
from types import SimpleNamespace

import pge
from masking import exact_kernels, slicing
from masking.block_bits import bits_dtype, bits_to_mask, mask_to_bits
from masking.fused_kernels import fused_update
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace, PatternSpace

import pytest
import torch
from exact import chi_square, distribution, pattern_counts
from masked import Launches, planes_of, seeded
from torch._dynamo.utils import counters

FUSED = [(n, m) for n in range(1, 5) for m in range(n + 1, 9)]


def same_bits(a, b):
    """Equality that tells -0.0 from 0.0 and knows NaN."""
    words = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(words), b.contiguous().view(words)
    )


def take(function, logits, mask, coefficient=0.0, dtype=torch.float32, weight=None, t=0):
    """One step from logits and mask `[blocks, M]`: new logits `[blocks, M]`, mask and masked
    weight."""
    m = mask.shape[1]
    planes, bits = planes_of(logits, dtype), mask_to_bits(mask)
    weight = torch.zeros(mask.numel(), dtype=torch.bfloat16) if weight is None else weight
    out = torch.full_like(weight, 7.0)
    key = layer_keys(0, t, 1)[0]
    function(planes, bits, weight, out, torch.tensor(coefficient), key)
    assert planes[0].dtype == dtype and bits.dtype == bits_dtype(m)
    return torch.stack(planes, 1), bits_to_mask(bits, m), out


def eager_update(logits, bits, *rest):
    """The fused update of the linear space, without a compiler."""
    n = int(bits_to_mask(bits[:1], len(logits)).sum())
    Kernels(LinearSpace(n, len(logits)), "eager").update(logits, bits, *rest)


def fused_score(logits, mask):
    """The score that the step subtracts, to 6e-8: a coefficient of 2^20 leaves nothing of the old
    logits to round."""
    return (logits - take(eager_update, logits, mask, 2.0**20)[0]) / 2**20


# -------------------------------------------------------------------------- bits and masked weights


@pytest.mark.parametrize("m", range(1, 17))
def test_bit_i_is_weight_i(m):
    mask = torch.rand(40, m, generator=seeded(m)) < 0.5
    bits = mask_to_bits(mask)
    assert bits.dtype == (torch.uint8 if m <= 8 else torch.int32)
    assert bits.tolist() == [sum(1 << i for i in range(m) if row[i]) for row in mask.tolist()]
    assert torch.equal(bits_to_mask(bits, m), mask)


@pytest.mark.parametrize("n, m", [(2, 4), (2, 5), (4, 8), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_writes_the_weight_under_the_mask_it_drew(n, m, dtype, monkeypatch):
    """Kept weights bit for bit, -0.0 and NaN too; pruned ones +0.0 whatever they were. In slices of
    blocks as in one piece; and so does `write`."""
    kernels, logits = (
        Kernels(LinearSpace(n, m), "eager"),
        torch.randn(200, m, generator=seeded(0)) * 2,
    )
    weight = -torch.randn(200 * m, generator=seeded(1)).to(dtype)
    weight[::3], weight[::7], weight[1::11] = torch.inf, -0.0, torch.nan
    whole = take(kernels.update, logits, pge.mode(logits, n), 0.1, dtype, weight)
    written = torch.full_like(weight, torch.nan)
    kernels.write(weight, mask_to_bits(whole[1]), written)
    for out in (whole[2], written):
        assert same_bits(out, torch.where(whole[1].flatten(), weight, torch.zeros_like(weight)))
    if n <= 4:
        monkeypatch.setattr(slicing, "chunk_of", lambda _: 96)
        parts = take(kernels.update, logits, pge.mode(logits, n), 0.1, dtype, weight)
        assert (
            torch.equal(whole[0], parts[0])
            and torch.equal(whole[1], parts[1])
            and same_bits(whole[2], parts[2])
        )


# --------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("n, m", FUSED)
def test_the_fused_score_is_that_of_pge(n, m):
    for seed, scale in enumerate((0.1, 1.0, 5.0, 20.0, 60.0)):
        logits = torch.randn(500, m, generator=seeded(seed)) * scale
        masks = [pge.sample(logits, n, seeded(1)), pge.mode(logits, n)]
        # masks that the distribution hardly ever draws would need more range than float32 has
        if scale <= 1:
            masks.append(pge.sample(torch.zeros_like(logits), n, seeded(2)))
        for mask in masks:
            assert (fused_score(logits, mask) - pge.score(logits, mask)).abs().max() <= 2e-6, scale


@pytest.mark.parametrize("n, m", [(2, 4), (3, 4), (2, 8), (4, 8)])
@pytest.mark.parametrize("lead", [30.0, 75.0, 100.0, 1000.0])
def test_logits_that_ran_away_leave_the_others_their_competition(n, m, lead):
    """n - 1 logits far ahead: the last seat is still drawn among the rest by their own logits."""
    rest = torch.tensor([1.0, 0.0, 0.5, -0.5, 0.2, 0.7, -1.0])[: m - n + 1]
    logits = torch.cat([torch.full((n - 1,), lead), rest]).expand(2**16, m)
    mask = pge.sample(logits, n, seeded(0))
    assert (fused_score(logits, mask) - pge.score(logits, mask)).abs().max() <= 2e-6
    drawn = take(eager_update, logits, mask)[1]
    assert drawn[:, : n - 1].all()
    assert chi_square(drawn[:, n - 1 :].sum(0), rest.double().softmax(0)) > 1e-4


@pytest.mark.parametrize("n, m", FUSED)
def test_extreme_logits_stay_finite(n, m):
    rows = torch.stack(
        [(torch.arange(m) < k) * 200.0 for k in range(m + 1)]
        + [-200.0 * torch.arange(m), torch.rand(m, generator=seeded(0)) * 200]
    )
    logits = torch.cat([rows, -rows]).repeat(20, 1)
    for mask in (
        pge.mode(logits, n),
        pge.mode(-logits, n),
        pge.sample(torch.zeros_like(logits), n, seeded(1)),
    ):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            updated, drawn, _ = take(eager_update, logits, mask, 0.5, dtype)
            assert updated.isfinite().all() and (drawn.sum(1) == n).all()
            assert ((updated - logits).abs() <= 0.51 * n + logits.abs() / 100).all()


@pytest.mark.parametrize(
    "space",
    [
        LinearSpace(1, 4),
        LinearSpace(2, 4),
        LinearSpace(2, 8),
        LinearSpace(3, 4),
        LinearSpace(4, 8),
        LinearSpace(8, 16),
        PatternSpace(2, 4),
    ],
)
def test_the_update_is_minus_coefficient_times_score(space, monkeypatch):
    """By the fused routines as by the exact ones, of several chunks; draws repeat with the step's
    key; the mode is the space's."""
    if space.n < 8:  # elsewhere a chunk would be of three blocks
        monkeypatch.setattr(exact_kernels, "CHUNK", 100)
    logits = torch.randn(300, space.width, generator=seeded(0)) * 3
    mask = space.sample(logits, seeded(1))
    expected = logits - 0.37 * space.score(logits, mask)
    for backend in ("eager", "exact"):
        kernels = Kernels(space, backend)
        assert torch.equal(
            bits_to_mask(kernels.mode(planes_of(logits)), space.m), space.mode(logits)
        )
        less = kernels.mode(planes_of(logits), mask_to_bits(mask), 2.0)
        assert torch.equal(bits_to_mask(less, space.m), space.mode(logits - space.init(mask, 2.0)))
        step = partial(take, kernels.update, logits, mask, 0.37)
        updated, drawn, _ = step()
        assert torch.allclose(updated, expected, atol=2e-6, rtol=0)
        assert (drawn.sum(1) == space.n).all() and not torch.equal(drawn, mask)
        assert torch.equal(step()[1], drawn) and not torch.equal(step(t=1)[1], drawn)


def test_wide_blocks_are_taken_a_few_at_a_time(monkeypatch):
    """At 12:16 a block has 49,152 numbers: 2^22 blocks at a time would be terabytes. A GPU has room
    for more."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert 1 <= exact_kernels.blocks_at_a_time(LinearSpace(12, 16), cpu) <= 2**24 / 49_152
    assert exact_kernels.blocks_at_a_time(LinearSpace(4, 8), cpu) == 2**18
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30)
    )
    for n, m in ((2, 4), (4, 8), (8, 16), (12, 16)):
        blocks = exact_kernels.blocks_at_a_time(LinearSpace(n, m), gpu)
        assert exact_kernels.blocks_at_a_time(LinearSpace(n, m), cpu) < blocks <= 2**22
        assert blocks * n * 2**n * exact_kernels.BYTES <= 5 * 2**30


def test_the_exact_step_launches_little_and_waits_for_nothing(monkeypatch):
    """Two numbers are fetched: of the keys, which are on the CPU."""
    logits = torch.randn(40, 16, generator=seeded(0))
    for blocks_at_a_time, operations in ((40, 900), (10, 3600)):
        monkeypatch.setattr(
            exact_kernels, "blocks_at_a_time", lambda *_, count=blocks_at_a_time: count
        )
        with Launches() as launches:
            take(Kernels(LinearSpace(8, 16)).update, logits, pge.mode(logits, 8), 0.1)
        assert launches.waits == 2 and launches.operations < operations


@pytest.mark.parametrize("backend", ["eager", "exact"])
@pytest.mark.parametrize(
    "dtype, value", [(torch.float16, 3.0), (torch.bfloat16, 3.0), (torch.float16, 0.0)]
)
def test_updates_far_below_a_16_bit_step_count_on_average(dtype, value, backend):
    """Rounded to nearest, not one logit of 3 would move: the update is a 200th (1600th) of the step
    between numbers. Planes 2k and 2k+1 share their random bits: their roundings must not go
    together."""
    logits = torch.full((2**18, 4), value)
    mask = torch.tensor([True, True, False, False]).expand(2**18, 4)
    coefficient = 2e-5 if value else 1e-8
    moved = (
        take(Kernels(LinearSpace(2, 4), backend).update, logits, mask, coefficient, dtype)[
            0
        ].double()
        - value
    )
    expected = -coefficient * pge.score(logits[:1], mask[:1])[0].double()
    spread = moved.std(0) / 2**9
    assert (spread > 0).all() and ((moved.mean(0) - expected).abs() < 5 * spread).all()
    assert (torch.corrcoef(moved.T) - torch.eye(4)).abs().max() < 5 / 2**9


# ---------------------------------------------------------------------------------- the masks drawn

# n, m and the bits of the weights that lead; by one number and a table: N = 1, and 2 of up to 4;
# else a race
DRAWS = [
    (1, 4, 0b0100),
    (2, 3, 0b011),
    (2, 4, 0b1010),
    (2, 4, 0b0001),
    (1, 8, 0b1),  # table
    (3, 4, 0b0111),
    (2, 6, 0b100001),
    (4, 8, 0b01010101),  # race
]


def check_draws(function, n, m, code, gap, times, **given):
    """The patterns drawn where the weights of these bits lead by a gap: `times` steps of 2^18
    blocks, coefficient 0."""
    logits = bits_to_mask(torch.tensor([code]), m)[0] * gap
    block = logits.expand(2**18, -1)
    mask = pge.mode(block, n)
    counts = sum(pattern_counts(take(function, block, mask, t=t, **given)[1]) for t in range(times))
    assert chi_square(counts, distribution(logits.tolist(), n)) > 1e-4


@pytest.mark.parametrize("gap", [0.0, 3.0, 10.0])
@pytest.mark.parametrize(
    "n, m, code, backend", [*[(*draw, "eager") for draw in DRAWS], (2, 4, 0b1010, "exact")]
)
def test_masks_drawn_have_the_exact_distribution(n, m, code, backend, gap):
    check_draws(Kernels(LinearSpace(n, m), backend).update, n, m, code, gap, 4 if m < 6 else 2)


def test_masks_are_drawn_from_the_updated_logits():
    """And, with 16-bit logits, from the rounded ones, which the next score will be taken at."""
    logits = torch.tensor([0.5, 0.0, 0.0, 0.0]).expand(2**18, 4)
    mask = pge.mode(logits, 2)
    updated, drawn, _ = take(eager_update, logits, mask, 3.0)
    assert chi_square(pattern_counts(drawn), distribution(updated[0].tolist(), 2)) > 1e-4
    assert chi_square(pattern_counts(drawn), distribution(logits[0].tolist(), 2)) < 1e-9
    updated, drawn, _ = take(eager_update, logits, mask, 3.0, torch.bfloat16)
    chosen = (updated == updated[updated[:, 0] == updated[:, 0].min()][0]).all(1)
    assert chosen.sum() > 2000
    assert (
        chi_square(pattern_counts(drawn[chosen]), distribution(updated[chosen][0].tolist(), 2))
        > 1e-4
    )


def test_maskpro_finds_the_best_mask():
    """From the worst mask there is, from losses alone, f = sum of the w_i^2 that are pruned +
    |e|^2: that of a linear regression on orthonormal inputs, whose noise e is each minibatch's
    own."""
    # the best mask keeps the two largest of each block
    order = torch.rand(6, 4, generator=seeded(0)).argsort(1)
    weight = torch.tensor([2.0, 1.5, 0.5, 0.25])[order].flatten() / 4
    worst, noise = order >= 2, (0.0, 1.0, 25.0)
    loss = weight.square().sum() - (weight * worst.flatten()).square().sum()
    logits, bits, out = (
        planes_of(worst.float(), torch.float16),
        mask_to_bits(worst),
        weight * worst.flatten(),
    )
    estimator = pge.Estimator(debias=True)
    for t in range(1200):
        found = weight.square().sum() - out.square().sum()
        advantage = estimator.advantage(float(found + noise[t % 3]), float(loss + noise[t % 3]))
        eager_update(
            logits, bits, weight, out, torch.tensor(0.6 * advantage), layer_keys(0, t, 1)[0]
        )
    assert torch.equal(pge.mode(torch.stack(logits, 1).float(), 2), order < 2)


# ------------------------------------------------------------------------------------- the compiler


@pytest.mark.parametrize(
    "n, m, dtype", [(2, 4, torch.float32), (2, 5, torch.bfloat16)], ids=["table", "race"]
)
def test_the_compiled_step_is_the_eager_one(n, m, dtype, compiler, capsys):
    """Same logits and masks but for a vanishing share (a sum may be rounded otherwise), the same
    distribution.

    A compilation takes 10 to 15 s on two cores, so there are only two: one for each way to draw,
    whether gradients are recorded or not.
    """
    kernels, logits = Kernels(LinearSpace(n, m)), torch.randn(2**18, m, generator=seeded(0)) * 3
    mask = pge.sample(logits, n, seeded(1))
    given = {"dtype": dtype, "weight": torch.randn(mask.numel(), generator=seeded(2)).bfloat16()}
    fast = take(kernels.update, logits, mask, 0.3, **given)
    graphs = counters["stats"]["unique_graphs"]
    assert torch.equal(
        torch.no_grad()(take)(kernels.update, logits, mask, 0.3, **given)[0], fast[0]
    )
    assert counters["stats"]["unique_graphs"] == graphs > 0
    slow = take(eager_update, logits, mask, 0.3, **given)
    assert "torch.compile failed" not in capsys.readouterr().err
    # it was compiled
    assert kernels._update is not slicing.sliced(fused_update)
    assert torch.isclose(fast[0], slow[0], atol=1e-5, rtol=1e-5).all(1).float().mean() > 1 - 1e-3
    assert (fast[1] != slow[1]).any(1).float().mean() < 1e-4
    assert same_bits(
        fast[2], torch.where(fast[1].flatten(), given["weight"], torch.zeros_like(given["weight"]))
    )
    for gap in (0.0, 3.0, 10.0):
        check_draws(kernels.update, n, m, 0b1010, gap, 4, **given)
