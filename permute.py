"""Reorder a model's channels so that an N:M mask keeps more: the same function, and better blocks to choose from.

    python permute.py --model MODEL --dataset text.jsonl --seqlen 512 --dtype auto --save_model permuted
    python permute.py --model MODEL --dataset text.jsonl --sparsity_type 4:8 --channels value hidden
    python prune.py --model permuted --dataset text.jsonl --seqlen 512 --dtype auto      # and on, as with any model
    python evaluate.py --model MODEL --permutation permuted.permutation.safetensors --mask results/RUN/mask.safetensors

Which M weights of a row share a block is arbitrary where channels can change places without changing what the model
computes: those of the residual stream, of v and o within each KV head, and of each MLP (pruning/channels.py). An order
is searched in which the best N:M mask keeps the most of the weights' scores (pruning/channel_order.py)

    (w_ij ||x_j||)^2 / its mean over the layer    ||x_j||: norm of input feature j over the calibration tokens

summed over all layers that read the channels: the share of a layer's output, its inputs taken as independent, that
Wanda's mask keeps. Calibration is that of prune.py without --bos. The residual stream is read by very many rows;
--rows of them are drawn.

Writes a plain Hugging Face folder, the weights as they are stored and in another order, with permute.json beside them,
and the order itself to NAME.permutation.safetensors next to the folder NAME: the original model, that file and a mask
file are all that has to be shipped. A mask made for one order is refused by the model in another.
"""
import argparse
import time
from pathlib import Path

from utils import (
    UserError,
    add_model_arguments,
    arguments_of,
    environment,
    peak_memory,
    positive_float,
    positive_int,
    run_script,
    script_parser,
    set_seed,
    sparsity_type,
)

from torch import Tensor, nn

import data
from files import permutation_files
from files.atomic import atomic_write, check_disk, refuse_existing
from files.records import write_json
from models.layers import check_divisible, find_layers
from models.loading import check_length, devices_of, load_model, model_fingerprint
from models.loss import batch_loss, check_tokens
from pruning.calibration import input_norms
from pruning.channel_order import find_orders
from pruning.channels import Orders, channel_sets, reorder

KINDS = ("residual", "value", "hidden")
LOSS_TOLERANCE = 0.05  # nats, of one sequence in 16 bits, before and after


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--sparsity_type", type=sparsity_type, default=(2, 4), help="N:M of the masks to come")
    parser.add_argument("--channels", nargs="+", choices=KINDS, default=list(KINDS), help="which may change places")
    parser.add_argument("--dataset", default="allenai/c4", help="calibration text: hub id, file or folder")
    parser.add_argument("--nsamples", type=positive_int, default=128, help="calibration sequences")
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens in a calibration sequence")
    parser.add_argument("--steps", type=positive_int, default=20, help="of the search in each set of channels, at most")
    parser.add_argument("--rows", type=positive_int, default=16384,
                        help="drawn of the rows that read a set of channels, at most")
    parser.add_argument("--max_minutes", type=positive_float, default=None,
                        help="of the search; the order then depends on the machine (default: until --steps)")
    parser.add_argument("--save_model", default="permuted", help="folder of the reordered model, must be new")
    return parser.parse_args(argv)


def search(args: argparse.Namespace) -> tuple[Orders, dict]:
    """The orders, checked to leave the loss of a calibration sequence as it was, and what came of the search."""
    model, tokenizer = load_model(**arguments_of(load_model, args))
    if getattr(model.config, "channel_permutation", None):
        raise UserError(f"the channels of {args.model} are reordered already; give the model that it was made from")
    sets, layers = channel_sets(model), find_layers(model)
    check_divisible(layers, args.sparsity_type[1])
    if args.seqlen < 2:
        raise UserError(f"--seqlen is {args.seqlen}: it must be at least 2 tokens, one to predict the next from")
    check_length(model, args.seqlen, "--seqlen")
    check_disk(args.save_model, sum(parameter.nbytes for parameter in model.parameters()) + 2**24)  # and the tokenizer
    samples = data.calibration_samples(tokenizer, args.dataset, args.nsamples, args.seqlen, args.seed)
    check_tokens(model, samples)
    sets = {name: channels for name, channels in sets.items() if name.rpartition(".")[2] in args.channels}
    found = find_orders(sets, layers, input_norms(model, layers, samples), args.sparsity_type, args.steps, args.rows,
                        args.seed, args.max_minutes)
    if not found.orders:
        raise UserError(f"M = {args.sparsity_type[1]} divides none of these sets of channels; choose another "
                        "--sparsity_type, or more --channels")
    check_function(model, found.orders, samples[:1])
    return found.orders, {"kinds": found.kinds, **peak_memory(devices_of(model))}


def check_function(model: nn.Module, orders: Orders, sample: Tensor) -> None:
    """Reorder the model; UserError if its loss on a sample, int64 `[1, tokens]`, is not what it was."""
    before = batch_loss(model, sample)
    reorder(model, orders)
    after = batch_loss(model, sample)
    print(f"loss of a calibration sequence: {before:.4f} nats before, {after:.4f} reordered")
    if not abs(after - before) < LOSS_TOLERANCE:
        raise UserError("the reordered model computes something else; use it as it is, and report its architecture")


def write(args: argparse.Namespace, orders: Orders, out: Path, permutation: Path, summary: dict) -> None:
    """The model as it is stored, reordered, and its permutation file."""
    model, tokenizer = load_model(args.model, "checkpoint", "cpu", trust_remote_code=args.trust_remote_code)
    original = model_fingerprint(model)
    reorder(model, orders)
    found = permutation_files.PermutationFile(orders, args.model, original, model_fingerprint(model))
    with atomic_write(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        write_json(beside / "permute.json", {"arguments": vars(args), "environment": environment(args.device),
                                             "summary": summary})
        with atomic_write(permutation) as file:
            permutation_files.save(file, found)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = refuse_existing(args.save_model, "choose another --save_model or remove it")
    permutation = refuse_existing(out.with_name(f"{out.name}.permutation.safetensors"),
                                  "choose another --save_model or remove it")
    set_seed(args.seed)
    started = time.time()
    orders, summary = search(args)
    for kind, numbers in summary["kinds"].items():
        before, after = numbers["before"] / numbers["total"], numbers["after"] / numbers["total"]
        print(f"{kind}: {numbers['orders']} orders of {numbers['channels']} channels, kept {before:.4f} -> {after:.4f} "
              f"({numbers['seconds']:.0f} s)")
    summary["seconds"] = round(time.time() - started, 1)
    write(args, orders, out, permutation, summary)
    print(f"reordered for {args.sparsity_type[0]}:{args.sparsity_type[1]} -> {out} and {permutation.name} "
          f"({permutation.stat().st_size / 1024:.0f} KiB; {time.time() - started:.0f} s, peak "
          f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB)")


if __name__ == "__main__":
    run_script(main)
