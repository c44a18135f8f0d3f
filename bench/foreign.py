"""Does an implementation that is not ours prune alike? llmcompressor's Wanda and SparseGPT at 2:4, on the same tokens.

    python -m venv .venv-foreign && .venv-foreign/bin/pip install -r bench/requirements-foreign.txt && \\
        .venv-foreign/bin/python bench/foreign.py [--quick] [--json FILE] [--model FOLDER] [--dataset FILE]

Needs what `make demo DEMO_FLAGS=--quick` leaves in demo/. What a layer keeps depends on the inputs it is shown, so four
comparisons are made, in float32, on the same samples in the same order:

    dense        the inputs in the dense model: ours by default, theirs with pipeline="basic"
    each layer   those in a model whose earlier layers are pruned: ours with --true_sequential, theirs with
                 pipeline="sequential" and every Linear a step of its own. Rounding that flips one bit of an early layer
                 moves the inputs of all later ones
    its inputs   the same, but ours sees the earlier layers as theirs pruned them: every layer judged by itself
    each block   theirs by default, earlier decoder blocks pruned and the rest of this one dense, against ours of "each
                 layer": prune.py has no such way, and the row shows what the choice of inputs does

Equal bits, equal blocks: the share of the mask's bits, and of its blocks of 4, that agree. Weights apart:
||ours - theirs|| / ||theirs|| over all pruned layers. --quick prunes the first of 30 decoder blocks only.
"""
import os
from importlib.metadata import version
from importlib.util import find_spec

import common
import torch

import data
import prune
from importance import Hessians, reach_in_order
from layers import find_layers, weight_matrix
from utils import UserError, batch_loss, load_model, perplexity, run

WAYS = (  # our flags; the arguments of theirs for each row that they are compared with
    ([], {"dense": dict(pipeline="basic")}),
    (["--true_sequential"], {"each layer": dict(pipeline="sequential", sequential_targets=["Linear"]),
                             "each block": dict(pipeline="sequential")}))


def foreign_prune(model, tokenizer, samples, method: str, ignore: list[str], **way) -> None:
    """llmcompressor's pruning in place, its other settings as prune.py has them (percdamp 0.01, blocksize 128)."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # else it fills stdout
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    rows = Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()})
    oneshot(model=model, tokenizer=tokenizer, dataset=rows, num_calibration_samples=len(samples),
            max_seq_length=samples.shape[1], shuffle_calibration_samples=False,
            recipe=modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=ignore), **way)


def weights_of(model, targets) -> dict[str, torch.Tensor]:
    return {name: weight_matrix(module) for name, module in find_layers(model, targets).items()}


@torch.no_grad()
def ours_on_their_inputs(model, theirs: dict, samples, args) -> dict[str, torch.Tensor]:
    """Our weights of each layer of the dense `model`, `[out, in]`, the layers before it pruned as in `theirs`."""
    ours, layers, hessians = {}, find_layers(model, args.targets), Hessians()

    def reach(name, inputs):
        weight = weight_matrix(layers[name])
        ours[name] = prune.pruned_weight(weight, inputs, hessians, args)
        weight.copy_(theirs[name])
    reach_in_order(model, layers, samples, reach, "comparing")
    return ours


def compare(ours: dict, theirs: dict) -> dict:
    bits, blocks, total, apart, size = 0, 0, 0, 0.0, 0.0
    for name, weight in ours.items():
        equal = ((weight != 0) == (theirs[name] != 0)).reshape(-1, 4)
        bits, blocks, total = bits + int(equal.sum()), blocks + int(equal.all(1).sum()), total + weight.numel()
        apart += float((weight - theirs[name]).square().sum())
        size += float(theirs[name].square().sum())
    return {"equal bits": f"{bits / total:.4%}", "equal blocks": f"{4 * blocks / total:.4%}",
            "weights apart": (apart / size) ** 0.5}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/model", help="folder of a causal LM")
    parser.add_argument("--dataset", default="demo/train.jsonl", help="calibration text")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration rows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a calibration row")
    parser.add_argument("--ppl", default="demo/heldout.txt", help="held-out text")
    parser.add_argument("--nwindows", type=int, default=32, help="windows of --ppl")
    args = parser.parse_args()
    if not find_spec("llmcompressor"):
        raise UserError("llmcompressor is missing; `pip install -r bench/requirements-foreign.txt` where it may change "
                        "the versions of other packages")
    shared = ["--model", args.model, "--dtype", "float32", "--device", args.device, "--seed", str(args.seed),
              *(["--targets", "layers.0."] if args.quick else [])]
    ignore = ["re:.*lm_head", *([r"re:.*layers\.[1-9]"] if args.quick else [])]
    dense, tokenizer = load_model(prune.parse_args(shared))
    nsamples, nwindows = (4, 2) if args.quick else (args.nsamples, args.nwindows)
    samples = data.calibration_samples(tokenizer, args.dataset, nsamples, args.seqlen, args.seed)
    windows = data.perplexity_windows(tokenizer, args.ppl, min(512, dense.config.max_position_embeddings), nwindows)

    def judge(model) -> float:
        return perplexity([batch_loss(model, window[None]) for window in windows])
    rows = []
    for method in ("wanda", "sparsegpt"):
        for flags, ways in WAYS:
            parsed = prune.parse_args([*shared, "--prune_method", method, *flags])
            ours, _ = load_model(parsed)
            prune.prune_model(ours, find_layers(ours, parsed.targets), samples, parsed)
            ppl = judge(ours)
            for way, arguments in ways.items():
                model, _ = load_model(parsed)
                foreign_prune(model, tokenizer, samples, method, ignore, **arguments)
                theirs = weights_of(model, parsed.targets)
                rows.append({"method": method, "inputs": way, **compare(weights_of(ours, parsed.targets), theirs),
                             "our perplexity": ppl, "theirs": judge(model)})
                if way == "each layer":
                    fresh, _ = load_model(parsed)
                    same = ours_on_their_inputs(fresh, theirs, samples, parsed)
                    rows.append({"method": method, "inputs": "its inputs", **compare(same, theirs)})
    release = version("llmcompressor")
    common.report(rows, args, f"llmcompressor {release}; {args.model}, float32, calibrated on {nsamples} x "
                              f"{args.seqlen} tokens; {args.ppl}, {nwindows} windows, dense {judge(dense):.4g}")


if __name__ == "__main__":
    run(main)
