"""Search for an order of the channels by which N:M masks keep more.

The channels of a set are read by the rows of some layers. The score of a weight is what it adds to
its layer's output if inputs are independent, relative to the mean of the layer:

    (w_ij ||x_j||)^2 / its mean over the layer    ||x_j||: norm of input feature j over the
                                                  calibration tokens

Of every M channels of a row the N with the largest scores are kept. The search maximises the sum of
the kept scores over all rows. An exchange takes a channel out of each of B blocks. If a block gets
channel x instead, a row of it keeps

    the N - 1 largest of the M - 1 left  +  max(t, x)        t: the N-th largest of those left

and sum max(t, x) = 1/2 (sum t + sum x + sum |t - x|). So giving B channels back to B blocks is an
assignment problem with L1 distances as values, which is solved exactly. A round exchanges channels
of all blocks, TOGETHER at a time. No exchange makes the order worse.
"""

import math
from collections import defaultdict

from masking.fused_ops import nth_largest
from models.layers import is_transposed, weight_matrix
from models.loss import batch_loss
from pruning.calibration import input_norms
from pruning.channels import ChannelSet, Orders, channel_sets, reorder
from utils import UserError, progress_bar

import torch
from torch import Tensor, nn

# kind of set -> shares of its score that the best mask keeps (before, after)
Shares = dict[str, tuple[float, float]]
ROUNDS = 20  # of the search, per set of channels
ROWS = 16384  # most rows, of those that read a set of channels, that are used
TOGETHER = 128  # most blocks that exchange channels at once
LOSS_TOLERANCE_NATS = 0.05  # change in one sequence's loss that 16-bit rounding may cause


def kept(score: Tensor, n: int, m: int) -> float:
    """Return the part of a score `[rows, size]` that the best N:M mask keeps: the sum of the n
    largest of every m along a row."""
    return sum(
        float(part.unflatten(1, (-1, m)).topk(n, dim=2).values.sum(dtype=torch.float64))
        for part in score.split(4096)
    )


def assignment(value: Tensor) -> Tensor:
    """Return the permutation p, int64 `[n]`, with the largest sum of value[i, p[i]]; value `[n,
    n]`. Raises UserError if scipy is missing."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("reordering channels needs scipy: pip install scipy")
    return torch.from_numpy(linear_sum_assignment(value.cpu().numpy(), maximize=True)[1])


def _striped(columns: Tensor, m: int) -> Tensor:
    """Deal the channels out by their sums: a block gets every (size / M)-th. Returns int64
    `[blocks, M]`."""
    return columns.sum(1).argsort(descending=True).view(m, -1).T.contiguous()


def best_order(score: Tensor, n: int, m: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Return an order of the channels by which an N:M mask keeps more of their score, and never
    less, than in the present order.

    score: nonnegative float32 `[rows, size]`; M divides size. Returns int64 `[size]`: the channel
    that comes to each position.
    """
    columns = score.T.contiguous()  # a channel's scores lie together
    present = torch.arange(len(columns), device=score.device).view(-1, m)
    blocks = max(
        (present, _striped(columns, m)), key=lambda order: kept(score[:, order.flatten()], n, m)
    ).clone()
    for _ in range(rounds):
        for chosen in torch.randperm(len(blocks), generator=generator).split(TOGETHER):
            _exchange(columns, blocks, chosen.to(score.device), n, generator)
    return blocks.flatten()


def _exchange(
    columns: Tensor, blocks: Tensor, chosen: Tensor, n: int, generator: torch.Generator
) -> None:
    """Take a channel out of each chosen block and give the channels back in the best way, in place.
    columns `[size, rows]`; blocks: int64 `[blocks, M]`; chosen: int64 indices of blocks."""
    m = blocks.shape[1]
    hole = torch.randint(m, (len(chosen), 1), generator=generator).to(chosen.device)
    taken = blocks[chosen].gather(1, hole).squeeze(1)
    left = blocks[chosen].gather(1, (hole + torch.arange(1, m, device=chosen.device)) % m)
    value = torch.cdist(nth_largest(columns[left].unbind(1), n), columns[taken], p=1)
    blocks[chosen, hole.squeeze(1)] = taken[assignment(value).to(chosen.device)]


def readers(channels: ChannelSet, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return layer name -> positions of these channels among its inputs, int64 `[groups, copies,
    size]`, for the layers that read them."""
    reader_places = {}
    for parameter, (dim, places) in channels.places.items():
        name = parameter.removesuffix(".weight")
        if name in layers and dim == (0 if is_transposed(layers[name]) else 1):
            reader_places[name] = places
    return reader_places


def scores(
    layers: dict[str, nn.Module],
    norms: dict[str, Tensor],
    places: dict[str, Tensor],
    most_rows: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the scores (see the top of this file) of the weights that read these channels, float32
    `[groups, rows, size]`, with the rows of all layers in `places` concatenated. If there are more
    than `most_rows` rows, that many are drawn, the same share from each layer."""
    rows = sum(weight_matrix(layers[name]).shape[0] for name in places)
    parts = []
    for name, positions in places.items():
        weight = weight_matrix(layers[name])
        if rows > most_rows:
            drawn = torch.randperm(len(weight), generator=generator)[
                : math.ceil(len(weight) * most_rows / rows)
            ]
            weight = weight[drawn.to(weight.device)]
        score = (weight.float() * norms[name]).square()
        score /= score.mean().clamp(min=1e-30)  # the mean is 0 in a layer that never fires
        parts.append(score[:, positions.to(score.device)].permute(1, 2, 0, 3).flatten(1, 2))
    return torch.cat([part.to(parts[0].device) for part in parts], 1)


@torch.no_grad()
def find_orders(
    model: nn.Module,
    layers: dict[str, nn.Module],
    norms: dict[str, Tensor],
    pattern: tuple[int, int],
    rounds: int = ROUNDS,
    most_rows: int = ROWS,
    seed: int = 0,
) -> tuple[Orders, Shares]:
    """Search for an order of every set of channels that these layers read. Sets whose size M does
    not divide are left out.

    layers: all layers that a mask will have; norms: ||x_j|| of their inputs, float32 `[in]` each;
    pattern: (N, M).
    """
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    # of the score: total, kept before, kept after
    sums = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    places = {
        name: readers(channels, layers)
        for name, channels in channel_sets(model).items()
        if channels.size % m == 0
    }
    for name in progress_bar(
        [name for name in places if places[name]], desc="searching", unit="set"
    ):
        score = scores(layers, norms, places[name], most_rows, generator)
        order = torch.stack([best_order(group, n, m, rounds, generator) for group in score])
        orders[name], after = order.cpu(), score.gather(2, order[:, None].expand_as(score))
        sums[name.rpartition(".")[2]] += torch.tensor(
            [
                score.sum(dtype=torch.float64),
                kept(score.flatten(0, 1), n, m),
                kept(after.flatten(0, 1), n, m),
            ]
        )
    return orders, {kind: tuple((total[1:] / total[0]).tolist()) for kind, total in sums.items()}


def check_reorderable(model: nn.Module) -> None:
    """Raise UserError if `search_and_reorder` would refuse this model, or if scipy is missing. No
    samples are needed."""
    if getattr(model.config, "channel_permutation", None):
        raise UserError(
            "the channels of this model were reordered before; give the model that it was made from"
        )
    channel_sets(model)
    assignment(torch.eye(1))


def search_and_reorder(
    model: nn.Module,
    layers: dict[str, nn.Module],
    samples: Tensor,
    pattern: tuple[int, int],
    rounds: int = ROUNDS,
    seed: int = 0,
) -> tuple[Orders, Shares]:
    """Search for the best orders on calibration samples, and reorder the model in place.

    layers: all layers that a mask will have; samples: int64 `[sequences, tokens]`, of at least 2
    tokens each; pattern: (N, M). Raises UserError if the model was reordered before, if its
    architecture is not known, or if reordering changes the loss of the first sample.
    """
    check_reorderable(model)
    orders, shares = find_orders(
        model, layers, input_norms(model, layers, samples), pattern, rounds, seed=seed
    )
    before = batch_loss(model, samples[:1])
    reorder(model, orders)
    after = batch_loss(model, samples[:1])
    if not abs(after - before) < LOSS_TOLERANCE_NATS:
        raise UserError(
            f"the loss of a calibration sequence is {after:.4f} nats in the new order, and was "
            f"{before:.4f}; use the model as it is, and report its architecture"
        )
    return orders, shares
