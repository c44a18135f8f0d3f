"""Make the initial sparse model: one-shot N:M pruning of a dense model, no weight is changed but to zero.

    python prune.py --model meta-llama/Llama-2-7b-hf --prune_method wanda --sparsity_type 2:4 --save_model out
    python prune.py --model MODEL --prune_method wanda --dataset text.jsonl --nsamples 128 --seqlen 512
    python prune.py --model MODEL --prune_method magnitude --sparsity_type 4:8 --dtype auto

Of every M consecutive weights of a row the N with the largest metric are kept:

    magnitude   |w_ij|
    wanda       |w_ij| * ||x_j||      ||x_j||: norm of input feature j over the calibration tokens (arXiv 2306.11695)

Calibration is the field's `get_c4`: --nsamples random crops of --seqlen tokens. The input norms of all layers come from
one pass through the dense model. Writes a plain Hugging Face folder with zeros in it, and prune.json beside the
weights; next: `python get_mask.py`.
"""
import time

import torch
from tqdm import tqdm

import data
import pge
from layers import apply_masks, check_divisible, find_layers, weight_matrix
from utils import (
    UserError,
    add_model_arguments,
    check_length,
    environment,
    input_device,
    load_model,
    peak_memory_bytes,
    positive_int,
    refuse_existing,
    run,
    script_parser,
    set_seed,
    sparsity_type,
    write_json,
    written_beside,
)


def parse_args(argv=None):
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--prune_method", choices=list(METRICS), default="wanda", help="what decides which stay")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=(2, 4), help="N:M, keep N of every M weights")
    parser.add_argument("--dataset", default="allenai/c4", help="calibration text: hub id, file or folder")
    parser.add_argument("--nsamples", type=positive_int, default=128, help="calibration rows")
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens in a calibration row")
    parser.add_argument("--targets", nargs="+", default=None, help="prune the layers whose names contain one of these")
    parser.add_argument("--save_model", default="out", help="folder of the sparse model, must be new")
    return parser.parse_args(argv)


@torch.no_grad()
def input_norms(model, layers: dict, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """||x_j|| of every layer's input features over the tokens of samples `[rows, tokens]`; float32 `[in]` each."""
    squares = {name: torch.zeros(weight_matrix(module).shape[1], device=module.weight.device)
               for name, module in layers.items()}

    def watch(name):
        def hook(module, inputs):
            squares[name] += inputs[0].detach().float().flatten(0, -2).square().sum(0)
        return hook
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    for row in tqdm(samples, desc="calibrating", unit="row", disable=None):
        model(input_ids=row[None].to(input_device(model)), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: square.sqrt() for name, square in squares.items()}


def magnitude(weight: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
    return weight.abs()


def wanda(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return weight.abs() * norms


METRICS = {"magnitude": magnitude, "wanda": wanda}


def best_mask(metric: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n largest of every m along a row, ties to the lower index; float `[out, in]` -> bool `[out, in]`."""
    return pge.mode(metric.reshape(-1, m), n).view(metric.shape)


def main(argv=None):
    args = parse_args(argv)
    n, m = args.sparsity_type
    out = refuse_existing(args.save_model, "choose another --save_model or remove it")
    set_seed(args.seed)
    started = time.time()
    model, tokenizer = load_model(args)
    layers = find_layers(model, args.targets)
    check_divisible(layers, m)
    norms = {}
    if args.prune_method != "magnitude":
        check_length(model, args.seqlen, "--seqlen")
        samples = data.calibration_samples(tokenizer, args.dataset, args.nsamples, args.seqlen, args.seed)
        norms = input_norms(model, layers, samples)
        for name, norm in norms.items():
            if not norm.isfinite().all():
                raise UserError(f"the inputs of {name} are not finite; {model.dtype} may overflow here: try --dtype "
                                "bfloat16 or float32")
    for name, module in tqdm(layers.items(), desc="pruning", unit="layer", disable=None):
        metric = METRICS[args.prune_method](weight_matrix(module).float(), norms.get(name))
        apply_masks(layers, {name: best_mask(metric, n, m)})
    with written_beside(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        summary = {"seconds": round(time.time() - started, 1), "peak_memory_bytes": peak_memory_bytes()}
        write_json(beside / "prune.json", {"arguments": vars(args), "environment": environment(), "summary": summary})
    weights = sum(module.weight.numel() for module in layers.values())
    print(f"{args.prune_method} {n}:{m} of {len(layers)} layers, {weights / 1e6:.1f} M weights -> {out}  "
          f"({time.time() - started:.0f} s, peak {peak_memory_bytes() / 2**30:.2f} GiB)")


if __name__ == "__main__":
    run(main)
