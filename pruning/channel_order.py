"""Which channels should share a block? A search for the order that lets an N:M mask keep the most.

X `[rows, size]` holds a score for each weight that reads the channels of a set; of every M channels of a row the N
largest are kept. Take one channel out of each of B blocks. A row then keeps, of a block that gets channel x instead,

    the N - 1 largest of the M - 1 left  +  max(t, x)        t: the N-th largest of those left

and sum max(t, x) = 1/2 (sum t + sum x + sum |t - x|). So how to give the B channels back to the B blocks is an
assignment problem whose values are L1 distances, and its optimum is found exactly (`assignment`): of B! ways the best
in one step, where a swap tries one pair. Steps are repeated with other channels taken out; none makes the order worse.
"""
import math
import time
from dataclasses import dataclass

from utils import progress_bar

import numpy as np
import torch
from torch import Tensor, nn

from models.layers import is_transposed, weight_matrix
from pruning.channels import ChannelSet, Orders

TOGETHER = 128  # blocks, at most, that exchange channels in one step
GAIN = 1e-4  # of what is kept: less than that in 2 M^2 steps, in which most pairs of channels meet, ends a search


def kept(score: Tensor, n: int, m: int) -> float:
    """What the best N:M mask keeps of a score `[rows, size]`: the sum of the n largest of every m along a row."""
    return sum(float(part.unflatten(1, (-1, m)).topk(n, dim=2).values.sum(dtype=torch.float64))
               for part in score.split(4096))


def assignment(value: Tensor) -> Tensor:
    """The permutation p, int64 `[n]`, of the largest sum of value[i, p[i]]; value `[n, n]`.

    Shortest augmenting paths (Jonker & Volgenant 1987): row after row is added, and Dijkstra's algorithm on reduced
    costs, kept non-negative by prices of the columns, finds whom it displaces.
    """
    cost = -value.double().cpu().numpy()
    n, price = len(cost), cost.min(0)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    for column, row in enumerate(cost.argmin(0)):  # rows that are a column's cheapest
        if column_of[row] < 0:
            column_of[row], row_of[column] = column, row
    for start in np.flatnonzero(column_of < 0):
        distance, before, is_open, reached = cost[start] - price, np.full(n, start), np.ones(n, dtype=bool), []
        while True:
            column = distance.argmin()
            nearest, row = distance[column], row_of[column]
            if row < 0:
                break
            reached.append((column, nearest))
            distance[column], is_open[column] = np.inf, False
            through = cost[row] - price
            through += nearest - through[column]
            shorter = (through < distance) & is_open
            np.copyto(distance, through, where=shorter)
            before[shorter] = row
        for done, length in reached:
            price[done] += length - nearest
        while row != start:  # along the path, each row takes the next column
            row = before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return torch.from_numpy(column_of)


def _nth_largest(values: Tensor, n: int) -> Tensor:
    """Of values of at least 0, `[blocks, k, rows]`, the n-th largest of the k: `[blocks, rows]`."""
    largest = [torch.zeros_like(values[:, 0]) for _ in range(n)]
    for value in values.unbind(1):
        for i in range(n):
            largest[i], value = torch.maximum(largest[i], value), torch.minimum(largest[i], value)
    return largest[-1]


def _striped(columns: Tensor, m: int) -> Tensor:
    """Blocks of one channel from each M-th of them by size; int64 `[blocks, M]`."""
    return columns.sum(1).argsort(descending=True).view(m, -1).T.contiguous()


def best_order(score: Tensor, n: int, m: int, steps: int, generator: torch.Generator,
               deadline: float = float("inf")) -> Tensor:
    """An order of the channels by which N:M masks keep more of their score, and never less, than as they are.

    score: float32 of at least 0, `[rows, size]`, M divides size; steps: at most; deadline: by time.monotonic().
    int64 `[size]`: which channel comes to each place.
    """
    columns = score.T.contiguous()  # a channel's scores lie together
    given = torch.arange(len(columns), device=score.device).view(-1, m)
    blocks = max((given, _striped(columns, m)), key=lambda order: kept(score[:, order.flatten()], n, m)).clone()
    total, gains = kept(score, n, m), []
    for _ in range(steps):
        gains.append(sum(_exchange(columns, blocks, some.to(score.device), n, generator)
                         for some in torch.randperm(len(blocks), generator=generator).split(TOGETHER)))
        if time.monotonic() > deadline or (len(gains) >= 2 * m * m and sum(gains[-2 * m * m:]) < GAIN * total):
            break
    return blocks.flatten()


def _exchange(columns: Tensor, blocks: Tensor, some: Tensor, n: int, generator: torch.Generator) -> float:
    """Take a channel out of each of some blocks and give them back in the best way, in place; what is kept more.
    columns `[size, rows]`, blocks int64 `[blocks, M]`, some: int64, which of them."""
    m = blocks.shape[1]
    hole = torch.randint(m, (len(some), 1), generator=generator).to(some.device)
    taken = blocks[some].gather(1, hole).squeeze(1)
    left = blocks[some].gather(1, (hole + torch.arange(1, m, device=some.device)) % m)
    value = torch.cdist(_nth_largest(columns[left], n), columns[taken], p=1)
    best = assignment(value).to(some.device)
    gain = float((value.gather(1, best[:, None]).squeeze(1) - value.diagonal()).double().sum()) / 2
    if gain > 0:
        blocks[some, hole.squeeze(1)] = taken[best]
    return max(gain, 0.0)


def readers(channels: ChannelSet, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The layers whose inputs these channels are -> where they lie among them, int64 `[groups, copies, size]`."""
    found = {}
    for parameter, (dim, places) in channels.places.items():
        name = parameter.removesuffix(".weight")
        if name in layers and dim == (0 if is_transposed(layers[name]) else 1):
            found[name] = places
    return found


def scores(layers: dict[str, nn.Module], norms: dict[str, Tensor], places: dict[str, Tensor], most_rows: int,
           generator: torch.Generator) -> Tensor:
    """What each weight that reads these channels adds to its layer's output, (w ||x||)^2, over the mean of the layer's
    weights: float32 `[groups, rows, size]`, the rows of all layers `places` one below the other.

    most_rows: of more than so many rows that many are drawn, the same share of each layer's.
    """
    rows = sum(weight_matrix(layers[name]).shape[0] for name in places)
    parts = []
    for name, along in places.items():
        weight = weight_matrix(layers[name])
        if rows > most_rows:
            drawn = torch.randperm(len(weight), generator=generator)[:math.ceil(len(weight) * most_rows / rows)]
            weight = weight[drawn.to(weight.device)]
        score = (weight.float() * norms[name]).square()
        score /= score.mean().clamp(min=1e-30)  # of a layer that never fires
        parts.append(score[:, along.to(score.device)].permute(1, 2, 0, 3).flatten(1, 2))
    return torch.cat([part.to(parts[0].device) for part in parts], 1)


@dataclass
class Found:
    """What a search found: orders, and by kind of set how many orders, and the share of the score that the best N:M
    mask keeps before and after."""
    orders: Orders
    kinds: dict[str, dict]


@torch.no_grad()
def find_orders(sets: dict[str, ChannelSet], layers: dict[str, nn.Module], norms: dict[str, Tensor],
                pattern: tuple[int, int], steps: int, most_rows: int, seed: int,
                max_minutes: float | None = None) -> Found:
    """Search an order for each of these sets, by `scores`. Sets whose groups M does not divide stay as they are.

    layers: all that a mask will have; norms: ||x_j|| of their inputs, float32 `[in]`; max_minutes: shared out among the
    sets by what they take.
    """
    n, m = pattern
    generator, deadline = torch.Generator().manual_seed(seed), time.monotonic() + 60 * (max_minutes or math.inf)
    places = {name: readers(channels, layers) for name, channels in sets.items()}
    work = {name: min(most_rows, sum(weight_matrix(layers[reader]).shape[0] * along.shape[1]
                                     for reader, along in places[name].items())) * sets[name].groups * sets[name].size
            for name in sets if places[name] and sets[name].size % m == 0}
    found, left = Found({}, {}), sum(work.values())
    for name in progress_bar(work, desc="searching", unit="set"):
        began = time.monotonic()
        share = (deadline - began) * work[name] / left  # of the time that is left
        score = scores(layers, norms, places[name], most_rows, generator)
        orders = [best_order(group, n, m, steps, generator, began + share * (i + 1) / len(score))
                  for i, group in enumerate(score)]
        found.orders[name] = torch.stack(orders).cpu()
        kind = found.kinds.setdefault(name.rpartition(".")[2], {"orders": 0, "channels": sets[name].size, "total": 0.0,
                                                                "before": 0.0, "after": 0.0, "seconds": 0.0})
        kind["orders"] += len(score)
        kind["total"] += float(score.sum(dtype=torch.float64))
        kind["before"] += sum(kept(group, n, m) for group in score)
        kind["after"] += sum(kept(group[:, order], n, m) for group, order in zip(score, orders))
        kind["seconds"] += time.monotonic() - began
        left -= work[name]
    return found
