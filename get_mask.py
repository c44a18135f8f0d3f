"""Extract the initial mask (True where a weight is not zero) from a sparse model, or convert a mask
file.

    # folder `out`, 2:4 -> initial_mask.safetensors
    python get_mask.py
    python get_mask.py --model SPARSE_FOLDER --sparsity_type 4:8 --save my_mask.safetensors
    # from MaskLLM's or PATCH's format
    python get_mask.py --convert mask.npz --model BASE_MODEL --save mask.safetensors
    # from the authors' folder
    python get_mask.py --convert folder --sparsity_type 4:8 --save mask.safetensors
    # to the authors' folder
    python get_mask.py --convert mask.safetensors --save initial_mask
    # to publish
    python get_mask.py --convert mask.safetensors --base_model HUB_ID --save named.safetensors

Every layer is checked: a block of M with more than N nonzero weights is an error that names the
layer. A block with fewer, because a kept weight happened to be zero, is filled up at its lowest
free positions and counted.

The suffix of --save decides the format: .safetensors (packed, with the model's name and
fingerprint), .npz (MaskLLM's) or none (the MaskPro authors' folder of .pt). --convert reads all
three. Only a .safetensors stores its N:M; the others count as 2:4 unless --sparsity_type is given.

With --convert, --model is optional, and the mask is checked against it. MaskLLM's .npz needs it,
since it stores no shapes. A .safetensors made from a foreign format gets a fingerprint, by which
other models refuse the mask later, only if --model is given.
"""

import argparse
import re
import sys

from files.records import base_model
from utils import (
    UserError,
    add_model_arguments,
    begin_script,
    run_script,
    script_parser,
    sparsity_type,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser, model="out", dtype="checkpoint", device="cpu", is_random=False)
    parser.add_argument(
        "--convert", default=None, help="mask file, RUN or folder of .pt masks to convert"
    )
    parser.add_argument(
        "--sparsity_type",
        type=sparsity_type,
        default="2:4",
        help="N:M the model must have or, with --convert, the mask (default then: its own, or 2:4)",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=None,
        help="layers to take: parts of their names, or regular expressions",
    )
    parser.add_argument(
        "--base_model", default=None, help="hub id to store as the base model, to publish a mask"
    )
    parser.add_argument(
        "--save", default="initial_mask.safetensors", help="mask file to write, must be new"
    )
    args = parser.parse_args(argv)
    if args.convert:  # flags that were not given have other defaults
        parser.set_defaults(model=None, sparsity_type=None)
        args = parser.parse_args(argv)
        if args.targets:
            parser.error(
                "--targets cannot be used with --convert, which converts every layer of the mask"
            )
    return args


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

from dataclasses import replace

from files import mask_files
from files.atomic import refuse_existing
from masking.layers import check_sparsity, nonzero_mask, read_masks
from models.layers import find_layers, layers_to_mask, weight_matrix
from models.loading import load_model, model_fingerprint


def extract(args: argparse.Namespace) -> mask_files.MaskFile:
    """Return the mask of the nonzero weights of --model."""
    n, m = args.sparsity_type
    model, _ = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    layers = layers_to_mask(model, args.targets, m)
    check_sparsity(layers, (n, m))
    masks = {}
    filled = 0
    for name, module in layers.items():
        masks[name], short = nonzero_mask(weight_matrix(module), n, m)
        filled += short
    if filled:
        print(f"{filled} blocks had fewer than {n} nonzero weights and were filled up")
    base = base_model(args.model)  # the model itself if prune.py did not make it: base unknown
    return mask_files.MaskFile(
        masks, n, m, "" if base == args.model else base, model_fingerprint(model)
    )


def convert(args: argparse.Namespace) -> mask_files.MaskFile:
    """Return the mask in --convert, checked against --model if that is given."""
    if not args.model:
        return mask_files.load(args.convert, args.sparsity_type)
    model, _ = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    mask_file = read_masks(args.convert, model, args.sparsity_type)
    unmasked = [name for name in find_layers(model) if name not in mask_file.masks]
    if unmasked:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in unmasked})
        print(f"{args.convert} has no mask for {', '.join(kinds)}")
    return replace(mask_file, model=base_model(args.model), fingerprint=model_fingerprint(model))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = refuse_existing(args.save, "choose another --save or remove it")
    if out.suffix not in (".safetensors", ".npz", ""):
        raise UserError(
            f"--save {out} must end in .safetensors, in .npz, or have no suffix, for a folder of "
            ".pt"
        )
    mask_file = convert(args) if args.convert else extract(args)
    mask_file.model = args.base_model or mask_file.model
    mask_files.save(out, **vars(mask_file))
    if out.suffix == ".safetensors" and not mask_file.fingerprint:
        print(
            f"warning: {out} has no fingerprint, so it cannot be checked against a model later; "
            "give --model to store one",
            file=sys.stderr,
        )
    print(f"{mask_file.n}:{mask_file.m} mask of {len(mask_file.masks)} layers -> {out}")


if __name__ == "__main__":
    run_script(main)
