"""Compute the baseline losses f(m0 * w, minibatch) that train.py subtracts.

    python inference_loss.py --dataset_size 512 --batchsize 32
    python inference_loss.py --model MODEL --mask initial_mask.safetensors --dataset text.jsonl
    # a model without a mask
    python inference_loss.py --model SPARSE_FOLDER --mask none --save dense.npz

It makes one pass over each minibatch. Use the same --model, --mask and data flags for train.py,
which compares them with those in the file.
"""

import argparse
import math

from utils import (
    UserError,
    add_data_arguments,
    add_model_arguments,
    begin_script,
    progress_bar,
    run_script,
    script_parser,
    sparsity_type,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser, is_random=False)
    add_data_arguments(parser)
    parser.add_argument(
        "--mask",
        default="initial_mask.safetensors",
        help="m0: mask file or folder of .pt masks; none: the model without a mask",
    )
    parser.add_argument(
        "--sparsity_type",
        type=sparsity_type,
        default=None,
        help="N:M the mask must have (default: its own, or 2:4 if its format stores none)",
    )
    parser.add_argument(
        "--save",
        default=None,
        help="baseline file to write, must be new (default: named after the data flags)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

import data
from files.atomic import refuse_existing
from files.documents import check_paths
from masking.layers import apply_masks, read_masks
from models.layers import find_layers
from models.loading import check_length, load_model
from models.loss import batch_loss
from models.machine import peak_memory_bytes
from training import baselines


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    path = args.save or baselines.default_path(args.dataset_size, args.batchsize, args.seqlen)
    out = refuse_existing(path, "choose another --save or remove it")
    check_paths([] if args.mask == "none" else [args.mask], [args.dataset])
    model, tokenizer = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    check_length(model, args.seqlen)
    layers = find_layers(model)
    masks = {} if args.mask == "none" else read_masks(args.mask, model, args.sparsity_type).masks
    batches = data.minibatches(
        tokenizer, args.dataset, args.dataset_size, args.batchsize, args.seqlen
    )
    depends_on = baselines.conditions(model, masks, batches)
    apply_masks(layers, masks)
    losses = [
        batch_loss(model, batch, args.microbatch)
        for batch in progress_bar(batches, desc="baseline", unit="minibatch")
    ]
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"the loss of minibatch {[math.isfinite(loss) for loss in losses].index(False)} is "
            f"not finite; {model.dtype} may overflow here: try --dtype bfloat16 or float32"
        )
    baselines.save(out, losses, depends_on)
    print(
        f"{len(losses)} minibatches, mean loss {sum(losses) / len(losses):.4f} nats -> {out}  "
        f"(peak {peak_memory_bytes() / 2**30:.2f} GiB)"
    )


if __name__ == "__main__":
    run_script(main)
