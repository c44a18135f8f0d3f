"""Measures signal and noise of the paper's estimators, and computes the steps that they imply.

    # the small model, 1:4 and 2:4
    python reproduce/variance.py --record reproduce/records/variance.json
    python reproduce/variance.py --model demo/model --patterns 2:4 --samples 64 \\
        --record variance.json
    python reproduce/variance.py --model demo/model --patterns 2:4 --samples 64 --logits 4 \\
        --init scores

A step moves the logits by -eta X with X = A score(m), m ~ p(pi). The mean of X is the gradient g of
the expected loss. Masks are drawn repeatedly from fixed logits C * m0, with m0 of Wanda, on
minibatches of 8 x 128 tokens. Noise is the second moment E |X|^2 for each advantage A:

    vanilla     f(m * w)
    residual    f(m * w) - f(m0 * w)                    on the same minibatch
    maskpro     f(m * w) - f(m0 * w) - delta            delta: the mean residual, to which the
                tracker converges

Signal is |g|^2. A backward pass at a drawn mask gives Y = J^T G (docs/sparsify.md). Its mean is g
if f is linear in each single block with the others drawn, which is nearly so with many blocks.
|g|^2 is estimated as the mean product of the means of Y over two different groups of draws, out of
GROUPS groups, which contains no squared noise; its standard error is given. Most of the signal only
makes m0 more probable, in blocks where leaving m0 is costly. Only the part away from m0 can lead to
another mask: the part in blocks where a step makes m0 less probable.

After T steps, noise has moved each of the d logits by eta sqrt(T E|X|^2 / d), and the expected loss
has fallen, in those blocks, by T eta |g_away|^2, to first order. If eta is chosen so that the noise
is half a nat, a fall by L takes

    T = (2 L / |g_away|^2)^2 E|X|^2 / d        steps

of maskpro at the rate of the first step. The last column is T for L = a tenth of the gap
f(m0 * w) - f(w) on the minibatches. The column before it is the eta that gives half a nat of noise
in STEPS steps, as a start for a search. It needs the demo's text.
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
from masking import fused_ops, inclusion
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
GROUPS = 8  # groups of draws, each with its own mean
NOISE = 0.5  # nats that noise may move a logit
SHARE = 0.1  # share of the gap to close
STEPS = 10_000  # as in the paper
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
        "--logits", nargs="+", type=float, default=[5.0, 10.0], help="initial logits C"
    )
    parser.add_argument("--init", choices=["mask", "scores"], default="mask", help="as in train.py")
    parser.add_argument("--samples", type=positive_int, default=512, help="number of masks drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.samples % GROUPS:
        parser.error(f"--samples {args.samples} is no multiple of {GROUPS}")
    return args


class Collected:
    """Stands in for a learner's normalization: sums up J^T G of each layer, and moves nothing.
    total: the flat sum, float32 `[logits]`; scale: the factor of the gradient of the summed
    loss."""

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

    def begin_pass(self, size: float, temperature: float = 1.0) -> None:
        """Do nothing: there is nothing to prepare."""

    def end_pass(self) -> None:
        """Do nothing: nothing is left to do."""

    def move(self, layer: MaskedLayer, gradient: Tensor, key: Tensor) -> None:
        """Add J^T G of a layer to `total`, in place of `Normalization.move`."""
        saliency = (layer.weight * gradient).view(-1, layer.m) * self.scale
        planes = inclusion.vjp(layer.logits, list(saliency.unbind(1)), self.masked.space.n)
        self.total[self.parts[layer.name]] += torch.stack(planes, 1).flatten()


def scores(masked: MaskedModel, bits: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield the score of these masks layer by layer, float32 `[blocks, M]`."""
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
    """Return the mean product of two different rows of `[groups, logits]`, and its standard error
    by the jackknife, since each row is in several products."""
    products = (means @ means.T).double()
    pairs = products[~torch.eye(GROUPS, dtype=torch.bool)].view(GROUPS, -1).mean(1).tolist()
    return fmean(pairs), 2 * (GROUPS - 1) / (GROUPS - 2) * stdev(pairs) / GROUPS**0.5


def away_from_m0(means: Tensor, m0: Iterator[Tensor]) -> float:
    """Return the part of |g|^2 in blocks where a step along -g makes m0 less probable, from the
    groups' means of Y, `[groups, logits]`, and m0's score. One half of the groups chooses the
    blocks and the other half gives the product there, and vice versa."""
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
    """Return the measurements of a record for these logits. batches: int64
    `[minibatches, sequences, tokens]`."""
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
    """Return the eta with which noise moves a logit by NOISE in `steps` steps of maskpro."""
    return NOISE / (steps * found["second_moment"]["maskpro"] / found["logits"]) ** 0.5


def steps_to_share(found: dict, share: float = SHARE) -> float:
    """Return the steps of maskpro to close this share of the gap: T of the module's docstring."""
    fall = share * (found["m0"] - found["dense"])
    return (
        (fall / NOISE / found["signal_away"]) ** 2
        * found["second_moment"]["maskpro"]
        / found["logits"]
    )


def row(found: dict) -> list[str]:
    """Return a row of the table; "not seen" in place of the steps if the signal is within two
    standard errors of 0."""
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
        for c in args.logits:
            masked = MaskedModel(
                copy.deepcopy(model),
                masks,
                LinearSpace(n, m),
                c,
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
