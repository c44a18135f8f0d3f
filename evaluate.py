"""Judge a sparse model: perplexity on held-out text, and that its layers are N:M sparse.

    python evaluate.py --model results/RUN/checkpoint --sparsity_type 2:4 --ppl wikitext2 --seqlen 2048
    python evaluate.py --model BASE --mask results/RUN/mask.safetensors --ppl text.txt --seqlen 512
    python evaluate.py --model BASE --ppl text.txt --save dense.json         # a dense model

Perplexity is the field's (SparseGPT, Wanda, MaskLLM): the text in one tokenizer call, disjoint windows of --seqlen
tokens, the remainder dropped, cross entropy in float32, exp of the mean over windows. With --mask or --sparsity_type a
layer that breaks the pattern, or whose zeros are not +0.0, is an error.
"""
import math
import time

from tqdm import tqdm

import data
from layers import apply_masks, check_divisible, check_sparsity, find_layers, read_masks
from utils import (
    UserError,
    add_model_arguments,
    batch_loss,
    check_length,
    environment,
    load_model,
    peak_memory_bytes,
    perplexity,
    positive_int,
    refuse_existing,
    run,
    script_parser,
    sparsity_type,
    write_json,
)


def parse_args(argv=None):
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--mask", default=None, help="mask file or folder of .pt masks to put on --model")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=None,
                        help="N:M to verify (default: that of --mask; without either, nothing is verified)")
    parser.add_argument("--targets", nargs="+", default=None, help="verify the layers whose names contain one of these")
    parser.add_argument("--ppl", default="wikitext2", help="held-out text: wikitext2, c4, or a file")
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens in a window")
    parser.add_argument("--nwindows", type=positive_int, default=None, help="windows, at most (default: all)")
    parser.add_argument("--save", default=None, help="write the numbers to this JSON file, must be new")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.save:
        refuse_existing(args.save, "choose another --save or remove it")
    started = time.time()
    model, tokenizer = load_model(args)
    check_length(model, args.seqlen, "--seqlen")
    layers = find_layers(model, targets=args.targets or [""])
    pattern = args.sparsity_type
    if args.mask:
        mask_file = read_masks(args.mask, model, *(pattern or (None, None)))
        pattern = mask_file.n, mask_file.m
        apply_masks(find_layers(model, targets=[""]), mask_file.masks)
        layers = {name: module for name, module in layers.items() if name in mask_file.masks}
        if not layers:
            raise UserError(f"{args.mask} has no mask for the layers that --targets name")
    if pattern:
        check_divisible(layers, pattern[1])
    density = check_sparsity(layers, pattern)
    windows = data.perplexity_windows(tokenizer, args.ppl, args.seqlen, args.nwindows)
    losses = [batch_loss(model, window[None])
              for window in tqdm(windows, desc="perplexity", unit="window", disable=None)]
    result = {"model": args.model, "mask": args.mask, "sparsity_type": "{}:{}".format(*pattern) if pattern else None,
              "density": density, "ppl": perplexity(losses), "nats": sum(losses) / len(losses), "text": args.ppl,
              "seqlen": args.seqlen, "windows": len(losses), "tokens": windows.numel(),
              "seconds": round(time.time() - started, 1), "peak_memory_bytes": peak_memory_bytes()}
    if not math.isfinite(result["ppl"]):
        raise UserError(f"the perplexity is not finite; {model.dtype} may overflow: try --dtype bfloat16 or float32")
    if args.save:
        write_json(args.save, {**result, "environment": environment()})
    checked = f"{result['sparsity_type']} in every masked layer, " if pattern else ""
    print(f"perplexity {result['ppl']:.3f} on {args.ppl} ({result['windows']} windows of {args.seqlen} tokens); "
          f"{checked}density {density:.6f}")


if __name__ == "__main__":
    run(main)
