"""Signal and noise of the paper's estimators, measured: masks drawn again and again from logits that stay as they are.

    python reproduce/variance.py --record reproduce/records/variance.json        # the small model, 1:4 and 2:4
    python reproduce/variance.py --model demo/model --patterns 2:4 --samples 64 --record variance.json

A step moves the logits by -eta X, X = A score(m), m ~ p(pi), of which the mean is the gradient g of the expected loss.
With logits C * m0, m0 of Wanda, and minibatches of 8 x 128 tokens, for each advantage A

    vanilla     f(m * w)
    residual    f(m * w) - f(m0 * w)                    of the same minibatch
    maskpro     f(m * w) - f(m0 * w) - delta            delta: the mean residual, to which the tracker goes

the table has E |X|^2, its second moment; |g|^2, from the means over two halves of the draws, whose product has no noise
squared in it, with the standard error of the same over several ways to halve them; and how many steps at these logits
go half way to -g, steps = E |X|^2 / (3 |g|^2): the sum of so many X has a cosine of 1/2 with g. Needs the demo's text.
"""
import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import pge
from evaluation.comparison import markdown_table
from files.records import write_json
from masking.block_bits import bits_to_mask
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loading import load_model
from pruning.one_shot import OneShot, one_shot_masks
from utils import environment, positive_int, progress_bar, run_script, sparsity_type

import torch

ADVANTAGES = ("vanilla", "residual", "maskpro")
GROUPS = 16  # of draws, each with its own mean
HEADING = ["N:M", "C", "advantage", "noise, E ‖X‖²", "signal, ‖g‖²", "noise / signal", "steps to a cosine of 1/2"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reproduce/small_model")
    parser.add_argument("--text", default="demo/train.jsonl")
    parser.add_argument("--patterns", nargs="+", type=sparsity_type, default=[(1, 4), (2, 4)])
    parser.add_argument("--targets", nargs="+", default=None, help="the layers whose masks are drawn; others keep m0")
    parser.add_argument("--logits", nargs="+", type=float, default=[5.0, 10.0], help="C")
    parser.add_argument("--samples", type=positive_int, default=1024, help="masks drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default=None, help="JSON file to write")
    return parser.parse_args(argv)


def scores(masked: MaskedModel) -> torch.Tensor:
    """The score of the masks that the last forward pass drew, float32 `[learned weights]`."""
    return torch.cat([pge.score(torch.stack([plane.float() for plane in layer.logits], 1),
                                bits_to_mask(layer.bits, layer.m)).flatten() for layer in masked.layers.values()])


def measure(masked: MaskedModel, batches: torch.Tensor, samples: int) -> dict[str, dict[str, float]]:
    """Advantage -> second moment of X, square of its mean and that one's standard error. batches: int64 `[minibatches,
    sequences, tokens]`."""
    baseline = [masked.loss(batch) for batch in batches]
    sums = {name: [0.0] * GROUPS for name in ADVANTAGES}
    seconds = {name: [] for name in ADVANTAGES}

    def draw(index: int) -> tuple[float, float]:
        masked.redraw()
        return masked.loss(batches[index]), baseline[index]
    losses = [draw(number % len(batches)) for number in range(max(16, samples // 8))]
    delta = fmean(loss - reference for loss, reference in losses)
    for number in progress_bar(range(samples), desc="draws"):
        loss, reference = draw(number % len(batches))
        score = scores(masked)
        square = float(score.double().square().sum())
        for name, advantage in zip(ADVANTAGES, (loss, loss - reference, loss - reference - delta)):
            seconds[name].append(advantage**2 * square)
            sums[name][number % GROUPS] = sums[name][number % GROUPS] + advantage * score
    found = {}
    for name in ADVANTAGES:
        means = torch.stack(sums[name]) / (samples / GROUPS)
        products = (means @ means.T).double()  # of the means of any two groups
        pairs = products[~torch.eye(GROUPS, dtype=torch.bool)].view(GROUPS, -1).mean(1).tolist()
        found[name] = {"second_moment": fmean(seconds[name]), "signal": fmean(pairs),
                       "signal_error": stdev(pairs) / GROUPS**0.5}
    return found


def row(found: dict) -> list[str]:
    """A line of the table; no ratio where the signal is within two of its errors from 0."""
    ratio = found["second_moment"] / found["signal"]
    is_seen = found["signal"] > 2 * found["signal_error"]
    return [found["pattern"], f"{found['C']:g}", found["advantage"], f"{found['second_moment']:.3g}",
            f"{found['signal']:.2g} ± {found['signal_error']:.1g}", f"{ratio:.2g}" if is_seen else "not seen",
            f"{ratio / 3:.2g}" if is_seen else "not seen"]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = []
    for n, m in args.patterns:
        model, tokenizer = load_model(args.model, "auto", "cpu")
        layers = find_layers(model)
        batches = data.minibatches(tokenizer, args.text, 512, 8, 128)
        masks = one_shot_masks(model, layers, batches[:8].flatten(0, 1), OneShot("wanda", (n, m)))
        for c in args.logits:
            learned = list(find_layers(model, args.targets)) if args.targets else None
            masked = MaskedModel(model, masks, LinearSpace(n, m), c, learned=learned, seed=args.seed, keep_dense=True)
            for name, found in measure(masked, batches, args.samples).items():
                rows.append({"pattern": f"{n}:{m}", "C": c, "advantage": name, **found})
            masked.finish()
            model, _ = load_model(args.model, "auto", "cpu")
    print(markdown_table(HEADING, [row(found) for found in rows]))
    if args.record:
        arguments = {name: value for name, value in vars(args).items() if name != "record"}
        write_json(args.record, {"arguments": arguments, "environment": environment("cpu"), "rows": rows})


if __name__ == "__main__":
    run_script(main)
