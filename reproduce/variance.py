"""Signal and noise of the paper's estimators, measured, and the steps that follow from them.

    # the small model, 1:4 and 2:4
    python reproduce/variance.py --record reproduce/records/variance.json
    python reproduce/variance.py --model demo/model --patterns 2:4 --samples 64 \\
        --record variance.json
    python reproduce/variance.py --model demo/model --patterns 2:4 --samples 64 --targets layers.29.
    python reproduce/variance.py --model demo/model --patterns 2:4 --samples 64 --logits 4 \\
        --init scores

A step moves the logits by -eta X, X = A score(m), m ~ p(pi), of which the mean is the gradient g of
the expected loss. Masks are drawn again and again from logits that stay as they are, C * m0, m0 of
Wanda, on minibatches of 8 x 128 tokens. Noise is the second moment E |X|^2 for each advantage A:

    vanilla     f(m * w)
    residual    f(m * w) - f(m0 * w)                    of the same minibatch
    maskpro     f(m * w) - f(m0 * w) - delta            delta: the mean residual, to which the
                tracker goes

Signal is |g|^2. A backward pass at a drawn mask gives Y = J^T G (docs/sparsify.md), whose mean is g
where f is linear in a single block, the others drawn: so it is, nearly, among many blocks. |g|^2 is
the mean product of the means of Y over any two of GROUPS groups of draws, which has no noise
squared in it; its standard error is given. Most of it only makes m0 more probable, where leaving it
costs much. What can end in another mask is the part away from m0: that of the blocks where a step
makes m0 less probable.

After T steps noise has moved each of the d logits by eta sqrt(T E|X|^2 / d), and the expected loss
has fallen, in those blocks, by T eta |g_away|^2, to first order. With eta such that the noise is
half a nat, a fall by L takes

    T = (2 L / |g_away|^2)^2 E|X|^2 / d        steps

of maskpro at the pace of the first: the last column, for L a tenth of f(m0 * w) - f(w), the gap on
the minibatches. The column before it has the eta of half a nat in STEPS steps, to begin a search
with. Needs the demo's text.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils

utils.use_short_spins()

import data
from evaluation.comparison import markdown_table
from files.records import write_json
from masking import fused_ops
from masking.block_bits import kept_planes
from masking.masked_layer import MaskedLayer
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loading import load_model
from models.machine import environment
from pruning.one_shot import OneShot, one_shot_masks
from training.initialize import from_scores
from training.straight_through import StraightThrough
from utils import positive_int, progress_bar, run_script, sparsity_type

import torch
from torch import Tensor

ADVANTAGES = ("vanilla", "residual", "maskpro")
GROUPS = 8  # of draws, each with its own mean
NOISE = 0.5  # nats that noise may move a logit
SHARE = 0.1  # of the gap
STEPS = 10_000  # the paper's
HEADING = [
    "N:M",
    "C",
    *(f"noise, {name}" for name in ADVANTAGES),
    "signal, ‖g‖²",
    "away from m0",
    f"η for {STEPS:,} steps",
    "steps to a tenth of the gap",
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="reproduce/small_model")
    parser.add_argument("--text", default="demo/train.jsonl")
    parser.add_argument("--patterns", nargs="+", type=sparsity_type, default=[(1, 4), (2, 4)])
    parser.add_argument(
        "--targets",
        nargs="+",
        default=None,
        help="the layers whose masks are drawn; others keep m0",
    )
    parser.add_argument("--logits", nargs="+", type=float, default=[5.0, 10.0], help="C")
    parser.add_argument("--init", choices=["mask", "scores"], default="mask", help="as train.py's")
    parser.add_argument("--samples", type=positive_int, default=512, help="masks drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.samples % GROUPS:
        parser.error(f"--samples {args.samples} is no multiple of {GROUPS}")
    return args


class Collected:
    """In place of a learner's normalization: takes J^T G of each layer, and moves nothing. total:
    flat, float32 `[logits]`, to which it is added; scale: what the gradient of the summed loss is
    multiplied by."""

    def __init__(self, masked: MaskedModel):
        self.masked = masked
        self.total = None
        self.scale = 1.0
        self.not_finite = 0
        ends = (
            torch.tensor([layer.shape.numel() for layer in masked.layers.values()])
            .cumsum(0)
            .tolist()
        )
        self.parts = dict(zip(masked.layers, map(slice, [0, *ends[:-1]], ends)))

    def begin_pass(self, size: float) -> None:
        """Nothing to prepare."""

    def end_pass(self) -> None:
        """Nothing is left to do."""

    def move(self, layer: MaskedLayer, gradient: Tensor, key: Tensor) -> None:
        """As `Normalization.move`."""
        saliency = (layer.weight * gradient).view(-1, layer.m) * self.scale
        planes = fused_ops.vjp(layer.logits, list(saliency.unbind(1)), self.masked.space.n)
        self.total[self.parts[layer.name]] += torch.stack(planes, 1).flatten()


def scores(masked: MaskedModel, bits: dict[str, Tensor]) -> Iterator[Tensor]:
    """The score of these masks, a layer after the other, float32 `[blocks, M]`."""
    for layer in masked.layers.values():
        yield torch.stack(
            fused_ops.score(
                fused_ops.rates(layer.logits, masked.space.n),
                kept_planes(bits[layer.name], layer.m),
                masked.space.n,
            ),
            1,
        )


def mean_product(means: Tensor) -> tuple[float, float]:
    """The mean product of any two of these `[groups, logits]`, and its standard error, by the
    jackknife: each is in several products."""
    products = (means @ means.T).double()
    pairs = products[~torch.eye(GROUPS, dtype=torch.bool)].view(GROUPS, -1).mean(1).tolist()
    return fmean(pairs), 2 * (GROUPS - 1) / (GROUPS - 2) * stdev(pairs) / GROUPS**0.5


def away_from_m0(means: Tensor, m0: Iterator[Tensor]) -> float:
    """The part of |g|^2 in blocks where a step along -g makes m0 less probable, from the groups'
    means of Y, `[groups, logits]`, and m0's score. Half of the groups chooses the blocks, the
    others tell the product there; and vice versa.
    """
    total = 0.0
    begin = 0
    half = GROUPS // 2
    for score in m0:
        part = means[:, begin : begin + score.numel()].view(GROUPS, *score.shape)
        begin += score.numel()
        for choosing, telling in ((part[:half], part[half:]), (part[half:], part[:half])):
            away = (choosing.mean(0) * score).sum(1) > 0
            first = telling[::2].mean(0)[away]
            second = telling[1::2].mean(0)[away]
            total += float((first * second).sum()) / 2
    return total


def measure(masked: MaskedModel, batches: Tensor, samples: int) -> dict:
    """What a record has of these logits. batches: int64 `[minibatches, sequences, tokens]`."""
    m0 = masked.bits()
    baseline = [masked.loss(batch) for batch in batches]
    with masked.use_dense():
        dense = fmean(masked.loss(batch) for batch in batches)
    learner = StraightThrough(masked, batches.shape[2])
    learner.normalization = gradients = Collected(masked)
    gradients.scale = 1 / (batches.shape[1] * (batches.shape[2] - 1))

    first = []
    for number in range(max(8, samples // 8)):
        masked.update(0.0)
        first.append(masked.loss(batches[number % len(batches)]) - baseline[number % len(batches)])
    delta = fmean(first)
    moments = {name: [] for name in ADVANTAGES}
    count = sum(layer.shape.numel() for layer in masked.layers.values())
    sums = torch.zeros(GROUPS, count)
    for number in progress_bar(range(samples), desc="draws"):
        index = number % len(batches)
        masked.update(0.0)
        gradients.total = sums[number % GROUPS]
        loss = learner.step(batches[index], 0.0).loss
        residual = loss - baseline[index]
        square = sum(float(score.square().sum()) for score in scores(masked, masked.bits()))
        for name, advantage in zip(ADVANTAGES, (loss, residual, residual - delta)):
            moments[name].append(advantage**2 * square)
    means = sums.mul_(GROUPS / samples)
    signal, error = mean_product(means)
    return {
        "logits": count,
        "dense": dense,
        "m0": fmean(baseline),
        "drawn": fmean(baseline) + delta,
        "second_moment": {name: fmean(values) for name, values in moments.items()},
        "signal": signal,
        "signal_error": error,
        "signal_away": away_from_m0(means, scores(masked, m0)),
    }


def noise_lr(found: dict, steps: int = STEPS) -> float:
    """The eta with which noise moves a logit by NOISE in so many steps of maskpro."""
    return NOISE / (steps * found["second_moment"]["maskpro"] / found["logits"]) ** 0.5


def steps_to_share(found: dict, share: float = SHARE) -> float:
    """The steps of maskpro to this share of the gap, by the docstring's T."""
    fall = share * (found["m0"] - found["dense"])
    return (
        (fall / NOISE / found["signal_away"]) ** 2
        * found["second_moment"]["maskpro"]
        / found["logits"]
    )


def row(found: dict) -> list[str]:
    """A line of the table; no steps where the signal is within two of its errors from 0."""
    is_seen = found["signal"] > 2 * found["signal_error"] and found["signal_away"] > 0
    return [
        found["pattern"],
        f"{found['C']:g}",
        *(f"{moment:.2g}" for moment in found["second_moment"].values()),
        f"{found['signal']:.2g} ± {found['signal_error']:.1g}",
        f"{found['signal_away']:.1e}",
        f"{noise_lr(found):.2g}",
        f"{steps_to_share(found):.1e}" if is_seen else "not seen",
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = []
    here = environment("cpu")
    for n, m in args.patterns:
        model, tokenizer = load_model(args.model, "auto", "cpu")
        layers = find_layers(model)
        batches = data.minibatches(tokenizer, args.text, 512, 8, 128)[: args.samples]
        masks = dict(
            one_shot_masks(model, layers, batches[:8].flatten(0, 1), OneShot("wanda", (n, m)))
        )
        learned = list(find_layers(model, args.targets)) if args.targets else None
        for c in args.logits:
            masked = MaskedModel(
                copy.deepcopy(model),
                masks,
                LinearSpace(n, m),
                c,
                learned=learned,
                seed=args.seed,
                keep_dense=True,
            )
            if args.init == "scores":
                from_scores(masked, c, batches[:8].flatten(0, 1))
            rows.append({"pattern": f"{n}:{m}", "C": c, **measure(masked, batches, args.samples)})
    print(markdown_table(HEADING, [row(found) for found in rows]))
    if args.record:
        arguments = {name: value for name, value in vars(args).items() if name != "record"}
        write_json(args.record, {"arguments": arguments, "environment": here, "rows": rows})


if __name__ == "__main__":
    run_script(main)
