"""Make the initial sparse model: one-shot pruning of a dense model, N:M or unstructured.

    python prune.py --model meta-llama/Llama-2-7b-hf --prune_method wanda --sparsity_type 2:4 --save_model out
    python prune.py --model MODEL --prune_method wanda --dataset text.jsonl --nsamples 128 --seqlen 512
    python prune.py --model MODEL --prune_method magnitude --sparsity_type 4:8 --dtype auto
    python prune.py --model MODEL --prune_method sparsegpt --true_sequential --dataset text.jsonl --seqlen 512
    python prune.py --model MODEL --prune_method wanda --swaps 6 --true_sequential --dataset text.jsonl --seqlen 512
    python prune.py --model MODEL --prune_method wanda --sparsity_type unstructured --sparsity_ratio 0.5

Of every M consecutive weights of a row the N with the largest score are kept, unchanged (pruning/one_shot.py):

    magnitude   |w_ij|
    wanda       |w_ij| * ||x_j||      ||x_j||: norm of input feature j over the calibration tokens (arXiv 2306.11695)
    ria         (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||^(1/2)      (Zhang et al., ICLR 2024)

With `--sparsity_type unstructured` the smallest go instead, the share --sparsity_ratio of a whole layer (magnitude), of
each output row (wanda, ria) or of each --blocksize columns (sparsegpt).

sparsegpt (pruning/sparsegpt.py) also changes the kept weights, to make up for the pruned; its mask alone, for the
original weights, is what get_mask.py takes from its model.

--swaps goes on from the score's mask, weights still unchanged: weights of a block change places as long as the layer's
output comes closer to the dense one's (pruning/swaps.py). It does most with --true_sequential.

Calibration is the field's `get_c4`: --nsamples random crops of --seqlen tokens. The input norms of all layers come from
passes through the dense model, a sequence at a time. sparsegpt, --swaps and --true_sequential instead send all
sequences through the decoder in one pass and prune a layer when the pass reaches it: one Hessian in memory at a time,
and with --true_sequential the later layers see the pruned earlier ones. Lower --nsamples or --seqlen if that pass is
too large.

Crops begin anywhere, as in `get_c4`, so that published masks can be made again. --bos begins each with the
beginning-of-text token instead, in place of its last token. Models of the Gemma kind, which fall apart without that
token, need it; a line says so where it lowers the loss of the first crop by more than a tenth.

Writes a plain Hugging Face folder with zeros in it, and prune.json beside the weights; next: `python get_mask.py`.
"""
import argparse
import time

from utils import (
    add_model_arguments,
    add_old_name,
    arguments_of,
    environment,
    finite,
    peak_memory,
    positive_int,
    run_script,
    script_parser,
    set_seed,
    sparsity_type,
)

import data
from files.atomic import atomic_write, check_disk, refuse_existing
from files.records import write_json
from models.layers import check_divisible, find_layers
from models.loading import check_length, devices_of, load_model
from models.loss import bos_hint, check_tokens
from pruning.one_shot import METHODS, OneShot, prune_model


def pattern(text: str) -> tuple[int, int] | None:
    """'N:M' -> (N, M), 'unstructured' -> None; for argparse."""
    return None if text == "unstructured" else sparsity_type(text)


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 1")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--prune_method", choices=METHODS, default="wanda",
                        help="what decides which weights stay")
    parser.add_argument("--sparsity_type", type=pattern, default=(2, 4),
                        help="N:M, keep N of every M weights; or unstructured")
    parser.add_argument("--sparsity_ratio", type=share, default=None,
                        help="unstructured: share of the weights to prune (default: 0.5)")
    parser.add_argument("--dataset", default="allenai/c4", help="calibration text: hub id, file or folder")
    parser.add_argument("--nsamples", type=positive_int, default=128, help="calibration sequences")
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens in a calibration sequence")
    parser.add_argument("--bos", action="store_true",
                        help="begin each calibration sequence with the beginning-of-text token")
    parser.add_argument("--true_sequential", action="store_true", help="later layers see the earlier ones pruned")
    parser.add_argument("--swaps", type=positive_int, default=0, metavar="SWEEPS",
                        help="improve the score's mask by swaps within blocks, so many sweeps at most")
    parser.add_argument("--percdamp", type=finite(0), default=0.01,
                        help="sparsegpt: damping, as a share of the Hessian's mean diagonal")
    parser.add_argument("--blocksize", type=positive_int, default=128, help="sparsegpt: columns decided in one run")
    parser.add_argument("--targets", nargs="+", default=None, help="prune the layers whose names contain one of these")
    parser.add_argument("--save_model", default="out", help="folder of the sparse model, must be new")
    add_old_name(parser, "exchange", "swaps")
    args = parser.parse_args(argv)
    implied = 1 - args.sparsity_type[0] / args.sparsity_type[1] if args.sparsity_type else None
    if implied and args.sparsity_ratio not in (None, implied):
        parser.error(f"--sparsity_ratio {args.sparsity_ratio:g} is not that of the --sparsity_type; leave it out, or "
                     "give --sparsity_type unstructured")
    if args.swaps and (args.prune_method == "sparsegpt" or not args.sparsity_type):
        parser.error("--swaps improves an N:M mask of unchanged weights: choose another --prune_method than sparsegpt, "
                     "and N:M as --sparsity_type")
    args.sparsity_ratio = args.sparsity_ratio or implied or 0.5
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = refuse_existing(args.save_model, "choose another --save_model or remove it")
    set_seed(args.seed)
    started = time.time()
    model, tokenizer = load_model(**arguments_of(load_model, args))
    way = OneShot(**arguments_of(OneShot, args))
    layers = find_layers(model, args.targets)
    if args.sparsity_type:
        check_divisible(layers, args.sparsity_type[1])
    check_disk(out, sum(parameter.nbytes for parameter in model.parameters()) + 2**24)  # 16 MiB for the tokenizer
    samples = None
    if way.needs_text:
        check_length(model, args.seqlen, "--seqlen")
        bos = data.wanted_bos(tokenizer) if args.bos else None
        samples = data.calibration_samples(tokenizer, args.dataset, args.nsamples, args.seqlen, args.seed, bos)
        check_tokens(model, samples)
        if not args.bos and (hint := bos_hint(model, tokenizer, samples, "calibration sequence")):
            print(hint)
    if missed := prune_model(model, layers, samples, way):
        print(f"note: the text does not reach {len(missed)} of {len(layers)} layers, {missed[0]} among them; these are "
              "pruned by magnitude")
    with atomic_write(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        summary = {"seconds": round(time.time() - started, 1), **peak_memory(devices_of(model))}
        write_json(beside / "prune.json", {"arguments": vars(args), "environment": environment(args.device),
                                           "summary": summary})
    weights = sum(module.weight.numel() for module in layers.values())
    what = "{}:{}".format(*args.sparsity_type) if args.sparsity_type else f"unstructured {args.sparsity_ratio:g}"
    print(f"{args.prune_method} {what} of {len(layers)} layers, {weights / 1e6:.1f} M weights -> {out}  "
          f"({time.time() - started:.0f} s, peak {summary['peak_memory_bytes'] / 2**30:.2f} GiB)")


if __name__ == "__main__":
    run_script(main)
