"""Which one-shot mask is the best start? Every method of prune.py on the demo's model, 2:4 and 4:8, on held-out text.

    python bench/methods.py [--quick] [--json FILE] [--ppl FILE ...] [--nwindows 32] [--nsamples 64] [--dtype auto]

Needs what `make demo DEMO_FLAGS=--quick` leaves in demo/. Calibrated as the demo is, on --nsamples sequences of 256
tokens of demo/train.jsonl; perplexity of --nwindows windows of 512 tokens of each text. Frozen: the method's mask on
the original weights, where MaskPro starts from. Updated: SparseGPT's own weights, which make up for the pruned. Seconds
are those of pruning to 2:4, calibration included, loading not. --quick prunes the first of 30 blocks only.
"""
import argparse
import time
from collections.abc import Callable
from pathlib import Path

import common
from utils import UserError, progress_bar, run_script

from torch import Tensor, nn

import data
from masking.layers import apply_masks, check_sparsity, nonzero_mask
from models.layers import find_layers, weight_matrix
from models.loading import load_model
from models.loss import batch_loss, perplexity
from pruning.one_shot import OneShot, prune_model

METHODS = {  # of OneShot
    "magnitude": dict(prune_method="magnitude"),
    "Wanda": dict(prune_method="wanda"),
    "Wanda, swaps": dict(prune_method="wanda", swaps=6),
    "Wanda, swaps, true sequential": dict(prune_method="wanda", swaps=6, true_sequential=True),
    "RIA": dict(prune_method="ria"),
    "SparseGPT": dict(prune_method="sparsegpt"),
    "SparseGPT, true sequential": dict(prune_method="sparsegpt", true_sequential=True)}
PATTERNS = [(2, 4), (4, 8)]
Texts = dict[str, Tensor]  # name -> windows int64 [windows, tokens]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/model", help="folder of a causal LM")
    parser.add_argument("--dtype", default="auto", help="of the weights, see prune.py")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration sequences of 256 tokens")
    parser.add_argument("--ppl", nargs="+", default=["demo/heldout.txt"], help="held-out texts: wikitext2, c4, files")
    parser.add_argument("--nwindows", type=int, default=32, help="windows of 512 tokens of each text")
    parser.add_argument("--methods", default="", help="only those whose names contain one of these, by commas")
    return parser.parse_args(argv)


def evaluate(model: nn.Module, texts: Texts) -> dict[str, float]:
    """Perplexity by text."""
    return {name: perplexity([batch_loss(model, window[None]) for window in
                              progress_bar(windows, desc=f"perplexity, {name}", unit="window")])
            for name, windows in texts.items()}


def measure(load: Callable[[], nn.Module], way: OneShot, samples: Tensor, texts: Texts,
            targets: list[str] | None) -> tuple[dict, dict | None, float]:
    """(perplexities of the mask on frozen weights, those of the weights as the method left them, seconds to prune).
    load: gives the dense model; samples: int64 `[sequences, tokens]`; targets: of `find_layers`."""
    model = load()
    layers = find_layers(model, targets)
    start = time.perf_counter()
    prune_model(model, layers, samples if way.needs_text else None, way)
    seconds = time.perf_counter() - start
    check_sparsity(layers, way.sparsity_type)
    found = evaluate(model, texts)
    if way.prune_method != "sparsegpt":
        return found, None, seconds
    masks = {name: nonzero_mask(weight_matrix(module), *way.sparsity_type)[0] for name, module in layers.items()}
    model = load()
    apply_masks(find_layers(model, targets), masks)
    return evaluate(model, texts), found, seconds


def cells(pattern: tuple[int, int], found: dict[str, float]) -> dict[str, float]:
    """The table's cells of perplexities by text."""
    return {f"{pattern[0]}:{pattern[1]}, {text}": ppl for text, ppl in found.items()}


def method_rows(name: str, load: Callable[[], nn.Module], samples: Tensor, texts: Texts, targets: list[str] | None,
                patterns: list[tuple[int, int]]) -> list[dict]:
    """The table's row of a method, or its two."""
    frozen, updated = {"method": name, "weights": "frozen"}, {"method": name, "weights": "updated"}
    for pattern in patterns:
        way = OneShot(sparsity_type=pattern, **METHODS[name])
        on_frozen, on_updated, seconds = measure(load, way, samples, texts, targets)
        frozen |= cells(pattern, on_frozen)
        updated |= cells(pattern, on_updated or {})
        frozen.setdefault("seconds", seconds)
    return [frozen, updated] if on_updated else [frozen]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    nsamples, nwindows, patterns = args.nsamples, args.nwindows, PATTERNS
    if args.quick:
        nsamples, nwindows, patterns = 4, 4, PATTERNS[:1]
    targets, names = ["layers.0."] if args.quick else None, common.chosen(METHODS, args.methods)
    try:
        model, tokenizer = load_model(args.model, args.dtype, args.device)
    except UserError as error:
        raise UserError(f"{error}; `make demo DEMO_FLAGS=--quick` leaves the model and the texts in demo/")
    samples = data.calibration_samples(tokenizer, "demo/train.jsonl", nsamples, 256, args.seed)
    texts = {Path(text).name: data.perplexity_windows(tokenizer, text, 512, nwindows) for text in args.ppl}
    rows, found = [{"method": "dense", "weights": ""}], evaluate(model, texts)
    for pattern in patterns:
        rows[0] |= cells(pattern, found)
    for name in names:
        rows += method_rows(name, lambda: load_model(args.model, args.dtype, args.device)[0], samples, texts, targets,
                            patterns)
    dtype = str(model.dtype).removeprefix("torch.")
    common.report(rows, args, f"perplexity; {args.model}, {dtype}, calibrated on {nsamples} x 256 tokens; {nwindows} "
                              "windows of 512 tokens of each text")


if __name__ == "__main__":
    run_script(main)
