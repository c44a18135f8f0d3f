"""Extract the initial mask from a sparse model: which weights are not zero.

    python get_mask.py                                        # folder `out`, 2:4 -> initial_mask.safetensors
    python get_mask.py --model SPARSE_FOLDER --sparsity_type 4:8 --save my_mask.safetensors

Checks every layer: a block of M that keeps more than N weights is an error that names its layer. A block that keeps
fewer (a kept weight was zero itself) is filled up from its lowest free positions, and counted.
"""
import json
from pathlib import Path

import torch

import mask_files
from layers import check_divisible, find_layers, weight_matrix
from utils import (
    UserError,
    add_model_arguments,
    load_model,
    model_fingerprint,
    refuse_existing,
    run,
    script_parser,
    sparsity_type,
)


def parse_args(argv=None):
    parser = script_parser(__doc__)
    add_model_arguments(parser, model_default="out")
    parser.set_defaults(dtype="checkpoint", device="cpu")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=(2, 4), help="N:M the model must have")
    parser.add_argument("--targets", nargs="+", default=None, help="take the layers whose names contain one of these")
    parser.add_argument("--save", default="initial_mask.safetensors", help="mask file to write, must be new")
    return parser.parse_args(argv)


def nonzero_mask(weight: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, int, int]:
    """Mask of the weights that are not zero, bool `[out, in]`; the number of blocks with more, and with fewer."""
    kept = (weight != 0).reshape(-1, m)
    counts = kept.sum(1)
    short = counts < n
    missing = (n - counts[short])[:, None]
    kept[short] |= ~kept[short] & ((~kept[short]).cumsum(1) <= missing)
    return kept.view(weight.shape), int((counts > n).sum()), int(short.sum())


def main(argv=None):
    args = parse_args(argv)
    n, m = args.sparsity_type
    out = refuse_existing(args.save, "choose another --save or remove it")
    model, _ = load_model(args)
    layers = find_layers(model, args.targets)
    check_divisible(layers, m)
    masks, broken, filled = {}, {}, 0
    for name, module in layers.items():
        masks[name], crowded, short = nonzero_mask(weight_matrix(module), n, m)
        filled += short
        if crowded:
            broken[name] = f"{crowded} of {module.weight.numel() // m} blocks"
    if broken:
        listed = ", ".join(f"{name} ({count})" for name, count in list(broken.items())[:5])
        raise UserError(f"{args.model} is not {n}:{m} sparse in {len(broken)} of {len(layers)} layers: {listed}"
                        f"{' ...' if len(broken) > 5 else ''}; prune it with prune.py, give its --sparsity_type, or "
                        "leave these layers out with --targets")
    record = Path(args.model) / "prune.json"
    try:
        base = json.loads(record.read_text())["arguments"]["model"] if record.is_file() else args.model
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record} is damaged; remove it, or prune anew with prune.py")
    mask_files.save(out, masks, n, m, base, model_fingerprint(model))
    weights = sum(mask.numel() for mask in masks.values())
    print(f"{n}:{m} mask of {len(masks)} layers, {weights / 1e6:.1f} M weights -> {out} "
          f"({out.stat().st_size / 2**20:.1f} MiB)"
          + (f"; {filled} blocks had fewer than {n} weights that are not zero and were filled up" if filled else ""))


if __name__ == "__main__":
    run(main)
