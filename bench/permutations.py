"""What do reordered channels bring? Masks of the demo's model under orders of more and more channels, on held-out text.

    python bench/permutations.py [--quick] [--json FILE] [--ppl FILE ...] [--methods Wanda,SparseGPT,preset]
        [--orders nothing,all] [--patterns 2:4,4:8] [--tokens 206000]

Needs what `make demo DEMO_FLAGS=--quick` leaves in demo/. Orders are searched as permute.py does, on --nsamples
sequences of 256 tokens of --dataset, on which the one-shot methods are calibrated too; perplexity of --nwindows windows
of 512 tokens (one number, or one of each text). The preset is `train.py --preset fast` from the Wanda mask, on --tokens
of --learn. SparseGPT updates its weights, the other methods leave them as they are. Seconds: of the search (once per
pattern, for all rows), of pruning, or of learning. Methods other than Wanda have the first and the last of the orders,
unless --orders names some. --quick orders and prunes the first of 30 blocks only, by Wanda.
"""
import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
from utils import UserError, progress_bar, run_script, sparsity_type

from torch import Tensor, nn

import data
from files import mask_files
from masking.layers import apply_masks, check_sparsity, nonzero_mask
from models.layers import find_layers, weight_matrix
from models.loading import Tokenizer, load_model, model_fingerprint
from models.loss import batch_loss, perplexity
from pruning.calibration import input_norms
from pruning.channel_order import Found, find_orders
from pruning.channels import Orders, channel_sets, reorder
from pruning.one_shot import OneShot, prune_model

ORDERS = {"nothing": (), "V/O": ("value",), "V/O, residual": ("value", "residual"),
          "all: V/O, residual, MLP": ("value", "residual", "hidden")}
METHODS = {  # of OneShot; swaps and the preset start from Wanda
    "Wanda": dict(prune_method="wanda"),
    "swaps, true sequential": dict(prune_method="wanda", swaps=6, true_sequential=True),
    "SparseGPT, true sequential": dict(prune_method="sparsegpt", true_sequential=True),
    "preset": dict(prune_method="wanda")}
Texts = dict[str, Tensor]  # name -> windows int64 [windows, tokens]


@dataclass
class Setting:
    """What all rows share."""
    args: argparse.Namespace
    tokenizer: Tokenizer
    samples: Tensor
    texts: Texts
    targets: list[str] | None

    def model(self, orders: Orders) -> nn.Module:
        """The dense model in these orders."""
        model = load_model(self.args.model, self.args.dtype, self.args.device)[0]
        if orders:
            reorder(model, orders)
        return model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/model", help="folder of a causal LM")
    parser.add_argument("--dtype", default="auto", help="of the weights, see prune.py")
    parser.add_argument("--dataset", default="demo/train.jsonl", help="text to calibrate on")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration sequences of 256 tokens")
    parser.add_argument("--ppl", nargs="+", default=["demo/heldout.txt"], help="held-out texts: wikitext2, c4, files")
    parser.add_argument("--nwindows", type=int, nargs="+", default=[32], help="windows of 512 tokens, of each text")
    parser.add_argument("--patterns", default="2:4,4:8", help="N:M, by commas")
    parser.add_argument("--methods", default="", help="only those whose names contain one of these, by commas")
    parser.add_argument("--orders", default="", help="only those whose names contain one of these, by commas")
    parser.add_argument("--steps", type=int, default=20, help="of the search, see permute.py")
    parser.add_argument("--rows", type=int, default=16384, help="of the search, see permute.py")
    parser.add_argument("--learn", default="demo/train.jsonl", help="text that the preset learns from")
    parser.add_argument("--tokens", type=int, default=206_000, help="of it that the preset sees")
    return parser.parse_args(argv)


def search(setting: Setting, pattern: tuple[int, int]) -> Found:
    """Orders of all channels, those of decoder blocks that are not pruned left out."""
    model = setting.model({})
    layers = find_layers(model, setting.targets)
    sets = {name: channels for name, channels in channel_sets(model).items()
            if name == "residual" or not setting.targets or any(target in name for target in setting.targets)}
    return find_orders(sets, layers, input_norms(model, layers, setting.samples), pattern, setting.args.steps,
                       setting.args.rows, setting.args.seed)


def evaluate(model: nn.Module, texts: Texts) -> dict[str, float]:
    """Perplexity by text."""
    return {name: perplexity([batch_loss(model, window[None]) for window in
                              progress_bar(windows, desc=f"perplexity, {name}", unit="window")])
            for name, windows in texts.items()}


def measure(setting: Setting, method: str, pattern: tuple[int, int], orders: Orders) -> tuple[dict, float]:
    """(perplexities by text, seconds to prune or to learn) of a method on the model in these orders."""
    model, way = setting.model(orders), OneShot(sparsity_type=pattern, **METHODS[method])
    layers = find_layers(model, setting.targets)
    start = time.perf_counter()
    prune_model(model, layers, setting.samples, way)
    seconds = time.perf_counter() - start
    check_sparsity(layers, pattern)
    if method != "preset":
        return evaluate(model, setting.texts), seconds
    masks = {name: nonzero_mask(weight_matrix(module), *pattern)[0] for name, module in layers.items()}
    with tempfile.TemporaryDirectory() as folder:
        return learn(setting, pattern, orders, masks, Path(folder))


def learn(setting: Setting, pattern: tuple[int, int], orders: Orders, masks: dict[str, Tensor],
          folder: Path) -> tuple[dict, float]:
    """`measure` of the preset from these masks, in this folder; its seconds are those of its steps and swaps."""
    args, model = setting.args, setting.model(orders)
    model.save_pretrained(folder / "model")
    setting.tokenizer.save_pretrained(folder / "model")
    mask_files.save(folder / "mask.safetensors", masks, *pattern, "model", model_fingerprint(model))
    subprocess.run([sys.executable, common.ROOT / "train.py", "--model", folder / "model", "--dtype", args.dtype,
                    "--device", args.device, "--mask", folder / "mask.safetensors", "--sparsity_type",
                    "{}:{}".format(*pattern), "--preset", "fast", "--dataset", args.learn, "--tokens", str(args.tokens),
                    "--num_evals", "5", "--seed", str(args.seed), "--skip_checkpoint", "--checkpoint_every", "1000m",
                    "--out", folder / "run"], check=True, stdout=sys.stderr)
    apply_masks(find_layers(model), mask_files.load(folder / "run/mask.safetensors").masks)
    summary = json.loads((folder / "run/run.json").read_text())["summary"]
    return evaluate(model, setting.texts), summary["seconds"]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    patterns = [sparsity_type(text) for text in args.patterns.split(",")]
    methods, names = common.chosen(METHODS, args.methods), common.chosen(ORDERS, args.orders)
    if args.quick:
        args.nsamples, args.nwindows, args.steps, args.rows = 4, [4], 3, 2048
        patterns, methods = patterns[:1], methods[:1]
    try:
        model, tokenizer = load_model(args.model, args.dtype, args.device)
    except UserError as error:
        raise UserError(f"{error}; `make demo DEMO_FLAGS=--quick` leaves the model and the texts in demo/")
    texts = {Path(text).name: data.perplexity_windows(tokenizer, text, 512, windows)
             for text, windows in zip(args.ppl, itertools.cycle(args.nwindows))}
    samples = data.calibration_samples(tokenizer, args.dataset, args.nsamples, 256, args.seed)
    setting = Setting(args, tokenizer, samples, texts, [".layers.0."] if args.quick else None)
    rows = [{"N:M": "", "method": "dense", "reordered": "", **evaluate(model, texts)}]
    common.print_table(rows)
    for pattern in patterns:
        found = search(setting, pattern) if names != ["nothing"] else Found({}, {})
        for method in methods:
            for name in names if method == "Wanda" or args.orders else names[::max(1, len(names) - 1)]:
                orders = {key: order for key, order in found.orders.items()
                          if key.rpartition(".")[2] in ORDERS[name]}
                searching = sum(found.kinds[kind]["seconds"] for kind in ORDERS[name])
                ppl, seconds = measure(setting, method, pattern, orders)
                rows.append({"N:M": "{}:{}".format(*pattern), "method": method, "reordered": name, **ppl,
                             "search (s)": searching, "prune or learn (s)": seconds})
                common.print_table(rows[-1:])
    dtype = str(model.dtype).removeprefix("torch.")
    common.report(rows, args, f"perplexity; {args.model}, {dtype}, calibrated on {args.nsamples} x 256 tokens; "
                              f"{', '.join(map(str, args.nwindows))} windows of 512 tokens of each text")


if __name__ == "__main__":
    run_script(main)
