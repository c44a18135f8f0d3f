"""Does an implementation that is not ours prune alike? llmcompressor's Wanda and SparseGPT at 2:4, on the same tokens.

    python -m venv .venv-llmcompressor
    .venv-llmcompressor/bin/pip install -r bench/requirements-llmcompressor.txt
    .venv-llmcompressor/bin/python bench/llmcompressor_comparison.py [--quick] [--json FILE] [--model FOLDER] \\
        [--dataset FILE]

Needs what `make demo DEMO_FLAGS=--quick` leaves in demo/. What a layer keeps depends on the inputs it is shown, so four
comparisons are made, in float32, on the same samples in the same order:

    dense        the inputs in the dense model: ours by default, theirs with pipeline="basic"
    each layer   those in a model whose earlier layers are pruned: ours with --true_sequential, theirs with
                 pipeline="sequential" and every Linear a step of its own. Rounding that flips one bit of an early layer
                 moves the inputs of all later ones
    its inputs   the same, but ours sees the earlier layers as theirs pruned them: every layer compared by itself
    each block   theirs by default, earlier decoder blocks pruned and the rest of this one dense, against ours of "each
                 layer": prune.py has no such way, and the row shows what the choice of inputs does

Equal bits, equal blocks: the share of the mask's bits, and of its blocks of 4, that agree. Weights apart:
||ours - theirs|| / ||theirs|| over all pruned layers. --quick prunes the first of 30 decoder blocks only.
"""
import argparse
import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import common
from utils import UserError, run_script

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import data
from models.layers import find_layers, weight_matrix
from models.loading import load_model
from models.loss import batch_loss, perplexity
from pruning.calibration import Hessians, visit_in_order
from pruning.one_shot import OneShot, prune_model

WAYS = (  # ours, by OneShot; the arguments of theirs for each row that they are compared with
    ({}, {"dense": dict(pipeline="basic")}),
    ({"true_sequential": True}, {"each layer": dict(pipeline="sequential", sequential_targets=["Linear"]),
                                 "each block": dict(pipeline="sequential")}))
Weights = dict[str, Tensor]  # layer name -> [out, in]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/model", help="folder of a causal LM")
    parser.add_argument("--dataset", default="demo/train.jsonl", help="calibration text")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a calibration sequence")
    parser.add_argument("--ppl", default="demo/heldout.txt", help="held-out text")
    parser.add_argument("--nwindows", type=int, default=32, help="windows of --ppl")
    return parser.parse_args(argv)


def prune_by_llmcompressor(model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Tensor, method: str,
                           ignore: list[str], **way) -> None:
    """Their pruning in place, the other settings as prune.py has them (percdamp 0.01, blocksize 128). samples: int64
    `[sequences, tokens]`; ignore: layers left dense; way: further arguments of oneshot."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # else it fills stdout
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    dataset = Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()})
    oneshot(model=model, tokenizer=tokenizer, dataset=dataset, num_calibration_samples=len(samples),
            max_seq_length=samples.shape[1], shuffle_calibration_samples=False,
            recipe=modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=ignore), **way)


def weights_of(model: nn.Module, targets: list[str] | None) -> Weights:
    """Of the layers that are pruned."""
    return {name: weight_matrix(module) for name, module in find_layers(model, targets).items()}


@torch.no_grad()
def ours_on_their_inputs(model: nn.Module, theirs: Weights, samples: Tensor, way: OneShot) -> Weights:
    """Our weights of each layer of the dense `model` that they have pruned, the layers before it as in `theirs`."""
    modules, hessians = find_layers(model, [""]), Hessians()
    ours, layers = {}, {name: modules[name] for name in theirs}

    def visit(name: str, inputs: Tensor) -> None:
        weight = weight_matrix(layers[name])
        ours[name] = way.pruned_weight(weight, inputs, hessians)
        weight.copy_(theirs[name])
    visit_in_order(model, layers, samples, visit, "comparing")
    return ours


def compare(ours: Weights, theirs: Weights) -> dict:
    """The table's cells."""
    bits, blocks, total, apart, size = 0, 0, 0, 0.0, 0.0
    for name, weight in ours.items():
        equal = ((weight != 0) == (theirs[name] != 0)).reshape(-1, 4)
        bits, blocks, total = bits + int(equal.sum()), blocks + int(equal.all(1).sum()), total + weight.numel()
        apart += float((weight - theirs[name]).square().sum())
        size += float(theirs[name].square().sum())
    return {"equal bits": f"{bits / total:.4%}", "equal blocks": f"{4 * blocks / total:.4%}",
            "weights apart": (apart / size) ** 0.5}


def method_rows(method: str, load: Callable[[], nn.Module], tokenizer: PreTrainedTokenizerBase, samples: Tensor,
                evaluate: Callable[[nn.Module], float], targets: list[str] | None, ignore: list[str]) -> list[dict]:
    """The table's rows of wanda or sparsegpt. load: gives the dense model."""
    rows = []
    for settings, their_ways in WAYS:
        way, ours = OneShot(method, (2, 4), **settings), load()
        prune_model(ours, find_layers(ours, targets), samples, way)
        ppl = evaluate(ours)
        for name, arguments in their_ways.items():
            model = load()
            prune_by_llmcompressor(model, tokenizer, samples, method, ignore, **arguments)
            theirs = weights_of(model, targets)
            rows.append({"method": method, "inputs": name, **compare(weights_of(ours, targets), theirs),
                         "our perplexity": ppl, "theirs": evaluate(model)})
            if name == "each layer":
                same = ours_on_their_inputs(load(), theirs, samples, way)
                rows.append({"method": method, "inputs": "its inputs", **compare(same, theirs)})
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not find_spec("llmcompressor"):
        raise UserError("llmcompressor is missing; `pip install -r bench/requirements-llmcompressor.txt` where it may "
                        "change the versions of other packages")
    targets, ignore = (["layers.0."], [r"re:.*layers\.[1-9]"]) if args.quick else (None, [])
    nsamples, nwindows = (4, 2) if args.quick else (args.nsamples, args.nwindows)
    dense, tokenizer = load_model(args.model, "float32", args.device)
    samples = data.calibration_samples(tokenizer, args.dataset, nsamples, args.seqlen, args.seed)
    windows = data.perplexity_windows(tokenizer, args.ppl, min(512, dense.config.max_position_embeddings), nwindows)

    def evaluate(model: nn.Module) -> float:
        return perplexity([batch_loss(model, window[None]) for window in windows])
    rows = []
    for method in ("wanda", "sparsegpt"):
        rows += method_rows(method, lambda: load_model(args.model, "float32", args.device)[0], tokenizer, samples,
                            evaluate, targets, ["re:.*lm_head", *ignore])
    common.report(rows, args, f"llmcompressor {version('llmcompressor')}; {args.model}, float32, calibrated on "
                              f"{nsamples} x {args.seqlen} tokens; {args.ppl}, {nwindows} windows, "
                              f"dense {evaluate(dense):.4g}")


if __name__ == "__main__":
    run_script(main)
