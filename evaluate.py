"""Evaluate a model: perplexity on held-out text, zero-shot accuracy, and that its layers are N:M sparse.

    python evaluate.py --model results/RUN/checkpoint --sparsity_type 2:4 --ppl wikitext2 --seqlen 2048
    python evaluate.py --model BASE --mask results/RUN/mask.safetensors --ppl text.txt --seqlen 512
    python evaluate.py --model BASE --ppl none --tasks hellaswag,race,piqa,winogrande,arc_easy,arc_challenge,openbookqa
    python evaluate.py --model BASE --ppl none --task_file quiz.jsonl       # zero-shot without the Hub
    python evaluate.py --model BASE --ppl text.txt --seqlen 512 --bos       # for models that need their first token
    python evaluate.py --compare BASE results/RUN/checkpoint other.json     # one table of what was written before

Perplexity is the field's (SparseGPT, Wanda, MaskLLM): the text in one tokenizer call, disjoint windows of --seqlen
tokens, the remainder dropped, cross entropy in float32, exp of the mean over windows. It is by token; the task wikitext
of the harness is by word, and refused. With --mask or --sparsity_type a layer that breaks the pattern, or whose zeros
are not +0.0, is an error. Mean acc is the plain mean over the tasks of acc, not of acc_norm.

--bos puts the beginning-of-text token before each window that does not begin with it. Scored are the same tokens as
without it: all but the first of each window. Models of the Gemma kind need it; a line says so where it lowers the loss
of the first such window by more than a tenth. Published figures of Llama are without it.

The numbers go to evaluation.json in the folder of the model, or to NAME.evaluation.json beside the mask NAME. Further
evaluations, on other texts or tasks, are added there (under `later`), and --compare shows them all in one row.
"""
import argparse
import math
import os
import time
from pathlib import Path

from utils import (
    UserError,
    add_model_arguments,
    arguments_of,
    environment,
    peak_memory,
    positive_int,
    progress_bar,
    run_script,
    script_parser,
    sparsity_type,
)

from torch import Tensor, nn

import data
from evaluation.comparison import comparison, percent
from evaluation.evaluation_file import add_evaluation, check_new
from evaluation.zero_shot import load_harness, read_items, run_harness, score_items
from files import mask_files
from files.atomic import check_disk, refuse_existing
from masking.layers import apply_masks, check_sparsity, read_masks
from models.layers import check_divisible, find_layers
from models.loading import Tokenizer, check_length, devices_of, load_model
from models.loss import batch_loss, bos_hint, perplexity
from pruning.channels import apply_permutation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--mask", default=None, help="mask file or folder of .pt masks to put on --model")
    parser.add_argument("--permutation", default=None, help="permute.py's file, to reorder --model's channels by first")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=None,
                        help="N:M to verify (default: that of --mask; without either, nothing is verified)")
    parser.add_argument("--targets", nargs="+", default=None, help="verify the layers whose names contain one of these")
    parser.add_argument("--ppl", default="wikitext2", help="held-out text: wikitext2, c4, a file, or none")
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens in a window")
    parser.add_argument("--nwindows", type=positive_int, default=None, help="windows, at most (default: all)")
    parser.add_argument("--bos", action="store_true",
                        help="put the beginning-of-text token, which is not scored, before each window")
    parser.add_argument("--tasks", default=None, help="tasks of lm-evaluation-harness, names or YAML files, by commas")
    parser.add_argument("--task_file", nargs="+", default=[],
                        help="files of multiple-choice items, see evaluation/zero_shot.py")
    parser.add_argument("--task_limit", type=positive_int, default=None, help="the first items of each task only")
    parser.add_argument("--tasks_batchsize", type=positive_int, default=16, help="choices in one forward pass")
    parser.add_argument("--tasks_no_bos", action="store_true",
                        help="task prompts without BOS, the default of lm_eval before 0.4.9.2 and so of older figures")
    parser.add_argument("--save", default=None,
                        help="write the numbers to this JSON file, must be new (default: see above)")
    parser.add_argument("--compare", nargs="+", default=None, metavar="PATH",
                        help="only print a table of such JSON files, or of folders that hold evaluation.json")
    return parser.parse_args(argv)


def output_file(args: argparse.Namespace) -> tuple[Path | None, str]:
    """Where the numbers go, refused if it exists and nothing can be added, or None and why they are only printed."""
    if args.save:
        return refuse_existing(args.save, "choose another --save or remove it"), ""
    if args.mask:
        mask = Path(args.mask).resolve()
        out = mask.with_name(f"{mask.name if mask.is_dir() else mask.stem}.evaluation.json")
    elif not Path(args.model).expanduser().is_dir():
        return None, f"{args.model} is no folder here"
    else:
        out = Path(args.model).expanduser() / "evaluation.json"
    if not os.access(out.parent, os.W_OK):
        return None, f"{out.parent} cannot be written to"
    if args.ppl == "none" and not (args.tasks or args.task_file):
        return refuse_existing(out, "choose another file with --save, or remove it"), ""
    return out, ""


def read_text(tokenizer: Tokenizer, ppl: str, seqlen: int, nwindows: int | None, bos: bool) -> tuple[Tensor, dict]:
    """Windows, int64 `[windows, seqlen]`, and what a record says of them."""
    windows, text_tokens = data.windows_and_tokens(tokenizer, ppl, seqlen, nwindows)
    return windows, {"text": ppl, "seqlen": seqlen, "windows": len(windows), "tokens": windows.numel(),
                     "text_tokens": text_tokens, "bos": bos, "fingerprint": data.fingerprint(windows)}


def evaluate_text(model: nn.Module, windows: Tensor, bos: int | None) -> dict:
    """Perplexity and mean loss in nats; bos: token to put before the windows that do not begin with it. UserError where
    they are not finite."""
    losses = [batch_loss(model, window[None], bos=None if window[0] == bos else bos)
              for window in progress_bar(windows, desc="perplexity", unit="window")]
    if not math.isfinite(perplexity(losses)):
        raise UserError(f"the perplexity is not finite; {model.dtype} may overflow: try --dtype bfloat16 or float32")
    return {"ppl": perplexity(losses), "nats": sum(losses) / len(losses)}


def evaluate_tasks(model: nn.Module, tokenizer: Tokenizer, files: dict, harness: dict,
                   tasks_batchsize: int, tasks_no_bos: bool, task_limit: int | None) -> dict:
    """The results of `files` (name -> items) and `harness` (name -> lm_eval's task) by task, printed, and mean acc."""
    how = {"batchsize": tasks_batchsize, "bos": not tasks_no_bos}
    tasks = {name: score_items(model, tokenizer, items, **how) for name, items in files.items()}
    if harness:
        tasks |= run_harness(model, tokenizer, harness, limit=task_limit, **how)
    for name, task in tasks.items():
        metrics = [f"{metric} {percent(task, metric)} %" for metric in ("acc", "acc_norm") if metric in task]
        print(f"{name}: {', '.join(metrics)} ({'first ' if task_limit else ''}{task['items']} items)")
    return {"tasks": tasks, "mean_acc": sum(task["acc"] for task in tasks.values()) / len(tasks),
            "task_limit": task_limit}


def mask_model(loaded: nn.Module, mask: str | None, permutation: str | None, sparsity_type: tuple[int, int] | None,
               targets: list[str] | None) -> tuple[dict[str, nn.Module], tuple[int, int] | None, mask_files.Masks]:
    """Reorder and mask a loaded model; the layers to verify, their N:M if it is known, and the masks put on."""
    if permutation:
        apply_permutation(loaded, permutation)
    layers, masks = find_layers(loaded, targets=targets or [""]), {}
    if mask:
        found = read_masks(mask, loaded, *(sparsity_type or (None, None)))
        sparsity_type, masks = (found.n, found.m), found.masks
        apply_masks(find_layers(loaded, targets=[""]), masks)
        layers = {name: module for name, module in layers.items() if name in masks}
        if not layers:
            raise UserError(f"{mask} has no mask for the layers that --targets name")
    if sparsity_type:
        check_divisible(layers, sparsity_type[1])
    return layers, sparsity_type, masks


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        print(comparison(args.compare))
        return
    started = time.time()
    out, unsaved = output_file(args)
    if out:
        check_disk(out.parent, 2**20)
    files = {Path(path).stem: read_items(path)[:args.task_limit] for path in args.task_file}
    harness = load_harness(args.tasks.split(","), args.trust_remote_code) if args.tasks else {}
    if len(files) < len(args.task_file) or files.keys() & harness.keys():
        raise UserError("two tasks have one name; rename a file of --task_file, or name it once")
    tasks = {"tasks": {**files, **harness}}
    if out:
        check_new(out, tasks)
    model, tokenizer = load_model(**arguments_of(load_model, args))
    bos, windows, text = None, None, {}
    if args.ppl != "none":
        check_length(model, args.seqlen, "--seqlen")
        bos = data.wanted_bos(tokenizer) if args.bos else None
        windows, text = read_text(tokenizer, **arguments_of(read_text, args))
    layers, pattern, masks = mask_model(model, **arguments_of(mask_model, args))
    density, weights = check_sparsity(layers, pattern), sum(module.weight.numel() for module in layers.values())
    result = {"model": args.model, "mask": args.mask, "sparsity_type": "{}:{}".format(*pattern) if pattern else None,
              "mask_fingerprint": mask_files.fingerprint(masks) if masks else None, "density": density,
              "dtype": str(model.dtype).removeprefix("torch."), **text}
    if out:
        check_new(out, result | tasks)
    checked = (f"{result['sparsity_type']} in every masked layer, " if pattern else "") + (
        f"density {density:.6f}, {round(density * weights):,} of {weights:,} weights not zero")
    if args.ppl == "none":
        print(checked)
    else:
        result |= evaluate_text(model, windows, bos)
        print(f"perplexity {result['ppl']:.3f} on {args.ppl} ({result['windows']} windows of {args.seqlen} tokens"
              f"{' after BOS' if args.bos else ''}); {checked}\n{result['tokens']:,} tokens in the windows, "
              f"{result['text_tokens']:,} in the text")
        if not args.bos and (hint := bos_hint(model, tokenizer, windows, "window")):
            print(hint)
    if files or harness:
        result |= evaluate_tasks(model, tokenizer, files, harness, args.tasks_batchsize, args.tasks_no_bos,
                                 args.task_limit)
        print(f"mean acc {100 * result['mean_acc']:.2f} % (acc, not acc_norm; tasks: {len(result['tasks'])})")
    result |= {"seconds": round(time.time() - started, 1), **peak_memory(devices_of(model))}
    if out:
        add_evaluation(out, {**result, "environment": environment(args.device)})
    print(f"written to {out}" if out else f"not written: {unsaved}; --save FILE keeps the numbers")


if __name__ == "__main__":
    run_script(main)
