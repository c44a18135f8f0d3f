"""Extract the initial mask (which weights are not zero) from a sparse model, or convert a mask
file.

    # folder `out`, 2:4 -> initial_mask.safetensors
    python get_mask.py
    python get_mask.py --model SPARSE_FOLDER --sparsity_type 4:8 --save my_mask.safetensors
    # from MaskLLM's format
    python get_mask.py --convert mask.npz --model BASE_MODEL --save mask.safetensors
    # from the authors' folder
    python get_mask.py --convert folder --sparsity_type 4:8 --save mask.safetensors
    # to the authors' folder
    python get_mask.py --convert mask.safetensors --save initial_mask
    # to publish
    python get_mask.py --convert mask.safetensors --base_model HUB_ID --save named.safetensors

Checks every layer: a block of M that keeps more than N weights is an error that names its layer. A
block that keeps fewer (a kept weight was zero itself) is filled up from its lowest free positions,
and counted.

The name given to --save decides the format: .safetensors (packed, with the model's name and
fingerprint), .npz (MaskLLM's) or no suffix (the MaskPro authors' folder of .pt). --convert reads
all three. Only a .safetensors knows its N:M; the others are 2:4 unless --sparsity_type says
otherwise. With --model it holds the mask against that model; an .npz, which has no shapes, cannot
be read without, and only with it does a .safetensors made from a foreign format get the fingerprint
by which a mask of another model is refused later.
"""

import argparse
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
        help="N:M the model must have; with --convert, the mask (then default: its own, or 2:4)",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=None,
        help="take these layers: parts of their names, or regular expressions",
    )
    parser.add_argument(
        "--base_model", default=None, help="hub id to name as the base, of masks to be published"
    )
    parser.add_argument(
        "--save", default="initial_mask.safetensors", help="mask file to write, must be new"
    )
    args = parser.parse_args(argv)
    if args.convert:  # what was not said is not asked for
        parser.set_defaults(model=None, sparsity_type=None)
        args = parser.parse_args(argv)
        if args.targets:
            parser.error(
                "--targets does not go with --convert, which converts every layer of the mask"
            )
    return args


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

from dataclasses import replace

from files import mask_files
from files.atomic import refuse_existing
from masking.layers import check_sparsity, nonzero_mask, read_masks
from models.layers import layers_to_mask, weight_matrix
from models.loading import load_model, model_fingerprint


def extract(args: argparse.Namespace) -> mask_files.MaskFile:
    """The mask of the weights of --model that are not zero."""
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
        print(f"{filled} blocks had fewer than {n} weights that are not zero and were filled up")
    base = base_model(args.model)  # of a sparse model that prune.py did not make, it is not known
    return mask_files.MaskFile(
        masks, n, m, "" if base == args.model else base, model_fingerprint(model)
    )


def convert(args: argparse.Namespace) -> mask_files.MaskFile:
    """The mask in --convert, checked against --model if there is one."""
    if not args.model:
        return mask_files.load(args.convert, args.sparsity_type)
    model, _ = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    found = read_masks(args.convert, model, args.sparsity_type)
    return replace(found, model=base_model(args.model), fingerprint=model_fingerprint(model))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = refuse_existing(args.save, "choose another --save or remove it")
    if out.suffix not in (".safetensors", ".npz", ""):
        raise UserError(
            f"--save {out} must end in .safetensors, in .npz, or have no suffix, for a folder of "
            ".pt"
        )
    found = convert(args) if args.convert else extract(args)
    found.model = args.base_model or found.model
    mask_files.save(out, **vars(found))
    if out.suffix == ".safetensors" and not found.fingerprint:
        print(
            f"warning: {out} can be checked against no model later, it has no fingerprint; give "
            "--model for one",
            file=sys.stderr,
        )
    print(f"{found.n}:{found.m} mask of {len(found.masks)} layers -> {out}")


if __name__ == "__main__":
    run_script(main)
