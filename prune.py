"""Make the initial sparse model: N:M pruning of a dense model by a one-shot method.

    python prune.py --model meta-llama/Llama-2-7b-hf --prune_method wanda --sparsity_type 2:4 \\
        --save_model out
    python prune.py --model MODEL --prune_method wanda --dataset text.jsonl --nsamples 128 \\
        --seqlen 512
    python prune.py --model MODEL --prune_method magnitude --sparsity_type 4:8
    python prune.py --model MODEL --prune_method sparsegpt --true_sequential \\
        --dataset text.jsonl --seqlen 512
    python prune.py --model MODEL --prune_method wanda --swaps 6 --true_sequential \\
        --dataset text.jsonl --seqlen 512

Of every M consecutive weights of a row, the N with the largest scores stay, unchanged
(pruning/one_shot.py):

    magnitude   |w_ij|
    wanda       |w_ij| * ||x_j||      ||x_j||: norm of input feature j over the calibration tokens
                (arXiv 2306.11695)

sparsegpt (pruning/sparsegpt.py) also updates the weights that stay, to make up for the pruned ones.
get_mask.py takes only the mask from the sparse model, to be used with the original weights.

--swaps improves the score's mask: within a block, a pruned and a kept weight change places if that
lowers the error of the layer's output (pruning/swaps.py). The weights stay unchanged. It helps most
with --true_sequential.

The calibration text is that of `get_c4` in Wanda and SparseGPT: --nsamples random crops of --seqlen
tokens. The scores need one pass of each sequence through the dense model. sparsegpt, --swaps and
--true_sequential send all sequences through the decoder together, and prune a layer when the pass
reaches it. So only one Hessian is in memory at a time, and with --true_sequential the later layers
see the earlier ones pruned. If that pass needs too much memory, lower --nsamples or --seqlen.

Crops begin anywhere, as in `get_c4`. With --bos the beginning-of-text token is put before each
crop, which then ends a token earlier. Gemma models need that token. If it lowers the loss of the
first crop by more than a tenth, the script recommends --bos.

The script writes a plain Hugging Face folder with zeros in it, and prune.json beside the weights.
Next: `python get_mask.py`.
"""

import argparse
import time

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
        "--prune_method",
        choices=["magnitude", "wanda", "sparsegpt"],
        default="wanda",
        help="how to choose the weights that stay",
    )
    parser.add_argument(
        "--sparsity_type", type=sparsity_type, default="2:4", help="N:M, keep N of every M weights"
    )
    parser.add_argument(
        "--dataset", default="allenai/c4", help="calibration text: hub id, file or folder"
    )
    parser.add_argument("--nsamples", type=positive_int, default=128, help="calibration sequences")
    parser.add_argument(
        "--seqlen", type=sequence_length, default=2048, help="tokens per calibration sequence"
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="begin each calibration sequence with the beginning-of-text token",
    )
    parser.add_argument(
        "--true_sequential", action="store_true", help="let later layers see earlier ones pruned"
    )
    parser.add_argument(
        "--swaps",
        type=positive_int,
        default=0,
        metavar="SWEEPS",
        help="improve the score's mask by swaps within blocks, in at most SWEEPS sweeps",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=None,
        help="prune only these layers: parts of their names, or regular expressions",
    )
    parser.add_argument(
        "--save_model", default="out", help="folder of the sparse model, must be new"
    )
    args = parser.parse_args(argv)
    if args.swaps and args.prune_method == "sparsegpt":
        parser.error(
            "--swaps improves a mask of unchanged weights, and sparsegpt changes them: choose "
            "another --prune_method"
        )
    return args


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

import data
from files.atomic import atomic_write, refuse_existing
from files.documents import check_paths
from masking.layers import note_sparse
from models.layers import layers_to_mask
from models.loading import check_length, load_model
from models.loss import bos_hint, check_tokens
from models.machine import environment, peak_memory_bytes, set_seed
from pruning.one_shot import OneShot, prune_model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = refuse_existing(args.save_model, "choose another --save_model or remove it")
    check_paths([], [args.dataset])
    set_seed(args.seed)
    started = time.time()
    model, tokenizer = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    settings = OneShot(args.prune_method, args.sparsity_type, args.true_sequential, args.swaps)
    layers = layers_to_mask(model, args.targets, args.sparsity_type[1])
    note_sparse(layers)
    samples = None
    if settings.needs_text:
        check_length(model, args.seqlen)
        bos = data.wanted_bos(tokenizer) if args.bos else None
        samples = data.calibration_samples(
            tokenizer, args.dataset, args.nsamples, args.seqlen, args.seed, bos
        )
        check_tokens(model, samples)
        if not args.bos and (hint := bos_hint(model, tokenizer, samples, "calibration sequence")):
            print(hint)
    prune_model(model, layers, samples, settings)
    with atomic_write(out) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        summary = {
            "seconds": round(time.time() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(
            tmp / "prune.json",
            {"arguments": vars(args), "environment": environment(args.device), "summary": summary},
        )
    weights = sum(module.weight.numel() for module in layers.values())
    print(
        "{} {}:{}".format(args.prune_method, *args.sparsity_type),
        f"of {len(layers)} layers, {weights / 1e6:.1f} M weights -> {out}  "
        f"({time.time() - started:.0f} s, peak {summary['peak_memory_bytes'] / 2**30:.2f} GiB)",
    )


if __name__ == "__main__":
    run_script(main)
