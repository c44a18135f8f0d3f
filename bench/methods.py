"""Which one-shot mask is the best start? Every method of prune.py on the demo's model, 2:4 and 4:8, on held-out text.

    python bench/methods.py [--quick] [--json FILE] [--ppl FILE ...] [--nwindows 32] [--nsamples 64] [--dtype auto]

Needs what `make demo DEMO_FLAGS=--quick` leaves in demo/. Calibrated as the demo is, on --nsamples rows of 256 tokens
of demo/train.jsonl; perplexity of --nwindows windows of 512 tokens of each text. Frozen: the method's mask on the
original weights, where MaskPro starts from. Updated: SparseGPT's own weights, which make up for the pruned. Seconds are
those of pruning to 2:4, calibration included, loading not. --quick prunes the first of 30 blocks only.
"""
import time
from pathlib import Path

import common
from tqdm import tqdm

import data
import prune
from get_mask import nonzero_mask
from layers import apply_masks, check_sparsity, find_layers, weight_matrix
from utils import UserError, batch_loss, load_model, perplexity, run

METHODS = {
    "magnitude": ["--prune_method", "magnitude"],
    "Wanda": ["--prune_method", "wanda"],
    "Wanda, exchanges": ["--prune_method", "wanda", "--exchange", "6"],
    "Wanda, exchanges, true sequential": ["--prune_method", "wanda", "--exchange", "6", "--true_sequential"],
    "RIA": ["--prune_method", "ria"],
    "SparseGPT": ["--prune_method", "sparsegpt"],
    "SparseGPT, true sequential": ["--prune_method", "sparsegpt", "--true_sequential"]}
PATTERNS = ["2:4", "4:8"]


def judge(model, texts: dict) -> dict[str, float]:
    """Perplexity by text; texts: name -> windows int64 `[windows, tokens]`."""
    return {name: perplexity([batch_loss(model, window[None]) for window in
                              tqdm(windows, desc=f"perplexity, {name}", unit="window", disable=None, leave=False)])
            for name, windows in texts.items()}


def measure(samples, texts, args) -> tuple[dict, dict | None, float]:
    """(perplexities of the mask on frozen weights, those of the weights as the method left them, seconds to prune)."""
    model, _ = load_model(args)
    layers = find_layers(model, args.targets)
    start = time.perf_counter()
    prune.prune_model(model, layers, samples if args.prune_method != "magnitude" else None, args)
    seconds = time.perf_counter() - start
    check_sparsity(layers, args.sparsity_type)
    found = judge(model, texts)
    if args.prune_method != "sparsegpt":
        return found, None, seconds
    masks = {name: nonzero_mask(weight_matrix(module), *args.sparsity_type)[0] for name, module in layers.items()}
    model, _ = load_model(args)
    apply_masks(find_layers(model, args.targets), masks)
    return judge(model, texts), found, seconds


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/model", help="folder of a causal LM")
    parser.add_argument("--dtype", default="auto", help="of the weights, see prune.py")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration rows of 256 tokens")
    parser.add_argument("--ppl", nargs="+", default=["demo/heldout.txt"], help="held-out texts: wikitext2, c4, files")
    parser.add_argument("--nwindows", type=int, default=32, help="windows of 512 tokens of each text")
    parser.add_argument("--methods", default="", help="only those whose names contain one of these, by commas")
    args = parser.parse_args()
    shared = ["--model", args.model, "--dtype", args.dtype, "--device", args.device, "--seed", str(args.seed),
              *(["--targets", "layers.0."] if args.quick else [])]
    nsamples, nwindows, patterns = (4, 4, PATTERNS[:1]) if args.quick else (args.nsamples, args.nwindows, PATTERNS)
    try:
        model, tokenizer = load_model(prune.parse_args(shared))
    except UserError as error:
        raise UserError(f"{error}; `make demo DEMO_FLAGS=--quick` leaves the model and the texts in demo/")
    samples = data.calibration_samples(tokenizer, "demo/train.jsonl", nsamples, 256, args.seed)
    texts = {Path(text).name: data.perplexity_windows(tokenizer, text, 512, nwindows) for text in args.ppl}

    def cells(pattern: str, found: dict | None) -> dict:
        return {f"{pattern}, {text}": ppl for text, ppl in (found or {}).items()}
    rows, found = [{"method": "dense", "weights": ""}], judge(model, texts)
    for pattern in patterns:
        rows[0] |= cells(pattern, found)
    wanted = [part for part in args.methods.split(",") if part]
    for name, arguments in METHODS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        frozen, updated = {"method": name, "weights": "frozen"}, {"method": name, "weights": "updated"}
        for pattern in patterns:
            parsed = prune.parse_args([*shared, *arguments, "--sparsity_type", pattern])
            on_frozen, on_updated, seconds = measure(samples, texts, parsed)
            frozen |= cells(pattern, on_frozen)
            updated |= cells(pattern, on_updated)
            frozen.setdefault("seconds", seconds)
        rows += [frozen, updated] if parsed.prune_method == "sparsegpt" else [frozen]
    dtype = str(model.dtype).removeprefix("torch.")
    common.report(rows, args, f"perplexity; {args.model}, {dtype}, calibrated on {nsamples} x 256 tokens; {nwindows} "
                              "windows of 512 tokens of each text")


if __name__ == "__main__":
    run(main)
