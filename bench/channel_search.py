"""Which search finds the better order of channels? Steps of assignments against swaps, on sets of the demo's model.

    python bench/channel_search.py [--quick] [--json FILE] [--layers 3,15,27] [--steps 10,20,40,80] [--together 64,128]

Needs what `make demo DEMO_FLAGS=--quick` leaves in demo/. The sets are the hidden channels of the MLPs of --layers,
at 2:4. Swaps: plain hill climbing. In every sweep the gains of all swaps of two channels are exact, and the best swaps
of which no two touch a block are made, until none gains. Steps: those of pruning/channel_order.py, with so many blocks
together. Kept: the share of the score that the best mask keeps, mean of the sets; seconds: of a set. --quick: one set,
10 steps.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import common
from utils import run_script

import torch
from torch import Tensor

import data
from models.layers import find_layers
from models.loading import load_model
from pruning import channel_order
from pruning.calibration import input_norms
from pruning.channels import channel_sets

N, M = 2, 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # that is what it measures
    parser.add_argument("--model", default="demo/model", help="folder of a causal LM")
    parser.add_argument("--layers", default="3,15,27", help="decoder layers, by commas")
    parser.add_argument("--steps", default="10,20,40,80", help="by commas")
    parser.add_argument("--together", default="64,128,256", help="blocks in a step, by commas")
    return parser.parse_args(argv)


def hill_climbing(score: Tensor) -> Tensor:
    """An order, int64 `[size]`, that no swap of two channels improves; score `[rows, size]`."""
    columns = score.T.contiguous()
    size = len(columns)
    given = torch.arange(size).view(-1, M)
    blocks = max((given, channel_order._striped(columns, M)),
                 key=lambda order: channel_order.kept(score[:, order.flatten()], N, M)).clone()
    value, changed = torch.zeros(size, size), torch.arange(len(blocks))
    while len(changed):
        for place in range(M):  # value[i, x]: what i's block keeps with x in i's place, up to what cancels
            left = torch.cat([blocks[changed, :place], blocks[changed, place + 1:]], 1)
            threshold = channel_order._nth_largest(columns[left], N)
            value[blocks[changed, place]] = torch.cdist(threshold, columns, p=1)
        own, home = value.diagonal(), torch.empty(size, dtype=torch.int64)
        home[blocks.flatten()] = torch.arange(size) // M
        gain = (value + value.T - own - own[:, None]).masked_fill_(home == home[:, None], 0.0)
        partner = gain.argmax(1)
        best = gain.gather(1, partner[:, None]).squeeze(1)
        touched = set()
        for i in best.argsort(descending=True).tolist():
            pair = {int(home[i]), int(home[partner[i]])}
            if best[i] <= 1e-6 * float(own.max()) or touched & pair:
                continue
            touched |= pair
            first, second = (blocks == i).nonzero()[0], (blocks == partner[i]).nonzero()[0]
            blocks[tuple(first)], blocks[tuple(second)] = int(partner[i]), i
        changed = torch.tensor(sorted(touched), dtype=torch.int64)
    return blocks.flatten()


def measure(scores: list[Tensor], find: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The row of a search: kept share and seconds of a set, means of all."""
    shares, seconds = [], []
    for score in scores:
        start = time.perf_counter()
        order = find(score)
        seconds.append(time.perf_counter() - start)
        shares.append(channel_order.kept(score[:, order], N, M) / float(score.sum(dtype=torch.float64)))
    return {"kept": f"{statistics.mean(shares):.5f}", "seconds": statistics.mean(seconds)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    layers, steps, together = ([int(word) for word in text.split(",")]
                               for text in (args.layers, args.steps, args.together))
    if args.quick:
        layers, steps, together = layers[:1], steps[:1], together[:1]
    model, tokenizer = load_model(args.model, "auto", args.device)
    names = [f"model.layers.{layer}.hidden" for layer in layers]
    sets, found = channel_sets(model), find_layers(model, [f".{layer}.mlp.down" for layer in layers])
    samples = data.calibration_samples(tokenizer, "demo/train.jsonl", 4 if args.quick else 16, 256, args.seed)
    norms, generator = input_norms(model, found, samples), torch.Generator()
    scores = [channel_order.scores(found, norms, channel_order.readers(sets[name], found), 10**6, generator)[0]
              for name in names]
    rows = [{"search": "none", **measure(scores, lambda score: torch.arange(score.shape[1]))},
            {"search": "channels dealt out by size",
             **measure(scores, lambda score: channel_order._striped(score.T, M).flatten())},
            {"search": "swaps", **measure(scores, hill_climbing)}]
    for channel_order.TOGETHER in together:
        for count in steps:
            generator.manual_seed(args.seed)
            rows.append({"search": f"{count} steps, {channel_order.TOGETHER} blocks together",
                         **measure(scores, lambda score, count=count: channel_order.best_order(
                             score, N, M, count, generator))})
    common.report(rows, args)


if __name__ == "__main__":
    run_script(main)
