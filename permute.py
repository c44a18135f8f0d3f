"""Reorder a model's channels so that an N:M mask keeps more. The reordered model computes the same
function.

    python permute.py --model MODEL --dataset text.jsonl --seqlen 512 --save_model permuted
    # then as with any model
    python prune.py --model permuted --dataset text.jsonl --seqlen 512
    python permute.py --model MODEL --order permuted.permutation.safetensors --save_model reordered

A mask keeps N of every M consecutive weights. Which weights are consecutive is arbitrary: channels
can change places in the residual stream, within each KV head (v and o) and within each MLP, and the
model stays the same (pruning/channels.py). The search looks for an order in which the best N:M mask
keeps the most of the weights' scores

    (w_ij ||x_j||)^2 / its mean over the layer    ||x_j||: norm of input feature j over the
                                                  calibration tokens

which is how much the weights add to the layers' outputs (pruning/channel_order.py). Calibration is
that of prune.py without --bos.

The script writes a plain Hugging Face folder, with the stored weights in another order and
permute.json beside them. The order is written next to the folder NAME, as
NAME.permutation.safetensors. To publish a mask of the reordered model, publish that file with it:
--order reorders the original model again. The mask is refused for a model in another order.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

from files.records import write_json
from utils import (
    add_model_arguments,
    begin_script,
    positive_int,
    run_script,
    script_parser,
    sequence_length,
    sparsity_type,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--order", default=None, help="permutation file to apply instead of searching"
    )
    parser.add_argument(
        "--sparsity_type", type=sparsity_type, default="2:4", help="N:M of the later masks"
    )
    parser.add_argument(
        "--dataset", default="allenai/c4", help="calibration text: hub id, file or folder"
    )
    parser.add_argument("--nsamples", type=positive_int, default=128, help="calibration sequences")
    parser.add_argument(
        "--seqlen", type=sequence_length, default=2048, help="tokens per calibration sequence"
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=20, help="rounds of the search, per set of channels"
    )
    parser.add_argument(
        "--save_model", default="permuted", help="folder of the reordered model, must be new"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

import data
from files import permutation_files
from files.atomic import atomic_write, refuse_existing
from files.documents import check_paths
from models.layers import layers_to_mask
from models.loading import check_length, load_model, model_fingerprint
from models.loss import check_tokens
from models.machine import environment, peak_memory_bytes
from pruning.channel_order import check_reorderable, search_and_reorder
from pruning.channels import Orders, apply_permutation, reorder


def search(args: argparse.Namespace) -> tuple[Orders, dict]:
    """Return the orders of the channels, and a summary of the search."""
    started = time.time()
    model, tokenizer = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    check_reorderable(model)
    layers = layers_to_mask(model, None, args.sparsity_type[1])
    check_length(model, args.seqlen)
    samples = data.calibration_samples(
        tokenizer, args.dataset, args.nsamples, args.seqlen, args.seed
    )
    check_tokens(model, samples)
    orders, shares = search_and_reorder(
        model, layers, samples, args.sparsity_type, args.rounds, args.seed
    )
    for kind, (before, after) in shares.items():
        print(
            "{}: a {}:{} mask keeps".format(kind, *args.sparsity_type),
            f"{before:.4f} of the score in the model's order, and {after:.4f} in the new one",
        )
    return orders, {
        "seconds": round(time.time() - started, 1),
        "shares": shares,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    remedy = "choose another --save_model or remove it"
    out = refuse_existing(args.save_model, remedy)
    file = Path(f"{out}.permutation.safetensors")
    check_paths([args.order], [] if args.order else [args.dataset])
    started = time.time()
    summary = {}
    if not args.order:
        refuse_existing(file, remedy)
        orders, summary = search(args)
    model, tokenizer = load_model(
        args.model, "checkpoint", "cpu", trust_remote_code=args.trust_remote_code
    )
    fingerprint = model_fingerprint(model)
    if args.order:
        apply_permutation(model, args.order)
    else:
        reorder(model, orders)
    order_file = nullcontext() if args.order else atomic_write(file)
    with order_file as tmp_order, atomic_write(out) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        write_json(
            tmp / "permute.json",
            {"arguments": vars(args), "environment": environment(args.device), "summary": summary},
        )
        if tmp_order:
            permutation_files.save(tmp_order, orders, args.model, fingerprint)
    print(
        f"reordered model -> {out}, order {'from' if args.order else '->'} {args.order or file} "
        f"({time.time() - started:.0f} s)"
    )


if __name__ == "__main__":
    run_script(main)
