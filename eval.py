"""Evaluate a model: perplexity on held-out text, zero-shot accuracy, and whether its layers are N:M
sparse.

    python eval.py --model results/RUN/checkpoint --sparsity_type 2:4 --ppl wikitext2 --seqlen 2048
    python eval.py --model BASE --mask results/RUN/mask.safetensors --ppl text.txt --seqlen 512
    python eval.py --model BASE --ppl none \\
        --tasks hellaswag,race,piqa,winogrande,arc_easy,arc_challenge,openbookqa
    # zero-shot on your own items
    python eval.py --model BASE --ppl none --task_file quiz.jsonl
    # for models that need a first token
    python eval.py --model BASE --ppl text.txt --seqlen 512 --bos
    # one table of earlier evaluations: files, or folders of them
    python eval.py --compare results/evaluations

Perplexity follows SparseGPT, Wanda and MaskLLM: one tokenizer call for the text, disjoint windows
of --seqlen tokens, the remainder dropped, cross entropy in float32, exp of the mean over windows.
It is perplexity per token; the harness's task wikitext computes it per word and is refused. Mean
acc is the mean of acc, not of acc_norm, over the tasks.

--tasks takes names, tags, groups and YAML files of lm-evaluation-harness. A tag or a group stands
for its tasks.

With --mask or --sparsity_type, a layer that breaks the pattern is an error.

--bos puts the beginning-of-text token before each window that does not begin with it. The same
tokens are scored as without it: all but the first of each window. Gemma and some other models need
it: the script recommends it if the token lowers the loss of a window by more than a tenth.
Published perplexities of Llama do not use it.

The numbers are written to a file in results/evaluations/, named by the model or mask and a hash of
all that decides them; --save names another file. An evaluation that exists already is shown, not
repeated.
"""

import argparse
from pathlib import Path

from files.records import of_run, short_hash, write_json
from utils import (
    UserError,
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
    add_model_arguments(parser, is_random=False)
    # fmt: off
    parser.add_argument("--mask", default=None,
                        help="mask file, RUN or folder of .pt masks, applied to --model")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=None,
                        help="N:M to verify (default: that of --mask, or 2:4 if it has none)")
    parser.add_argument("--targets", nargs="+", default=None,
                        help="layers to verify: parts of their names, or regular expressions")
    parser.add_argument("--ppl", default="wikitext2",
                        help="held-out text: wikitext2, c4, a file, or none")
    parser.add_argument("--seqlen", type=sequence_length, default=2048, help="tokens per window")
    parser.add_argument("--nwindows", type=positive_int, default=None,
                        help="maximum number of windows (default: all)")
    parser.add_argument("--bos", action="store_true",
                        help="put the beginning-of-text token, unscored, before each window")
    parser.add_argument("--tasks", default=[],
                        type=lambda text: [name.strip() for name in text.split(",")],
                        help="tasks of lm-evaluation-harness, separated by commas")
    parser.add_argument("--task_file", nargs="+", default=[],
                        help="multiple-choice items, see evaluation/zero_shot.py")
    parser.add_argument("--task_limit", type=positive_int, default=None,
                        help="number of items per task, the first ones (default: all)")
    parser.add_argument("--tasks_batchsize", type=positive_int, default=16,
                        help="choices per forward pass")
    parser.add_argument("--tasks_no_bos", action="store_true",
                        help="leave BOS out of task prompts, as for figures of older harnesses")
    parser.add_argument("--save", default=None,
                        help="JSON file to write the numbers to (default: see above)")
    parser.add_argument("--compare", nargs="+", metavar="PATH",
                        help="only print a table of these JSON files, or folders of them")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

import data
from evaluation.comparison import comparison, percent, read_evaluation
from evaluation.perplexity import evaluate_windows
from evaluation.zero_shot import check_tokenizer, load_file, load_harness, run_harness
from files import mask_files
from files.atomic import refuse_existing
from files.documents import check_paths
from masking.layers import apply_masks, check_sparsity, read_masks
from models.layers import find_layers, layers_to_mask
from models.loading import Tokenizer, check_length, load_model
from models.loss import bos_hint
from models.machine import checked_device, environment, fast_dtype

from torch import nn


def output_file(args: argparse.Namespace) -> Path:
    """Return the file for the numbers: --save, or results/evaluations/NAME_HASH.json. The hash
    changes if a file of the model, mask, text or tasks has been written since."""
    if args.save:
        return Path(args.save)
    mask = of_run(args.mask, "mask.safetensors") if args.mask else ""
    # --tasks may name YAML files
    inputs = of_run(args.model, "checkpoint"), mask, args.ppl, *args.task_file, *args.tasks
    local = [Path(path) for path in inputs if path]
    files = [file for path in local for file in [path, *sorted(path.glob("*"))] if file.is_file()]
    device = checked_device(args.device)
    hashed = {
        **vars(args),
        "device": device,
        "fast_dtype": str(fast_dtype(device)),
        "files": [(str(file), file.stat().st_mtime_ns) for file in files],
    }
    source = Path(args.mask or args.model)
    parts = source.relative_to(source.anchor).parts[-2:]
    return Path("results/evaluations") / f"{'_'.join(parts)}_{short_hash(hashed)}.json"


def apply_and_verify(
    model: nn.Module,
    mask: str | None,
    sparsity_type: tuple[int, int] | None,
    targets: list[str] | None,
) -> dict:
    """Apply the mask, if there is one, to a loaded model, verify the N:M of its layers, and print
    and return their sparsity."""
    layers = find_layers(model, targets)
    fingerprint = None
    if mask:
        mask_file = read_masks(mask, model, sparsity_type)
        sparsity_type = (mask_file.n, mask_file.m)
        fingerprint = mask_files.fingerprint(mask_file.masks)
        apply_masks(find_layers(model), mask_file.masks)
        layers = {name: module for name, module in layers.items() if name in mask_file.masks}
        if not layers:
            raise UserError(f"{mask} has no mask for the layers that --targets name")
    elif sparsity_type:
        layers = layers_to_mask(model, targets, sparsity_type[1])
    density = check_sparsity(layers, sparsity_type)
    pattern = "{}:{}".format(*sparsity_type) if sparsity_type else None
    print(f"density {density:.6f}" + (f", {pattern} in every masked layer" if pattern else ""))
    return {"sparsity_type": pattern, "mask_fingerprint": fingerprint, "density": density}


def evaluate_text(
    model: nn.Module, tokenizer: Tokenizer, ppl: str, seqlen: int, nwindows: int | None, bos: bool
) -> dict:
    """Compute and print the perplexity on a text; return it with the fields of the record that
    describe it."""
    check_length(model, seqlen)
    token = data.wanted_bos(tokenizer) if bos else None
    windows, text_tokens = data.perplexity_windows(tokenizer, ppl, seqlen, nwindows)
    result = {
        "text": ppl,
        "seqlen": seqlen,
        "windows": len(windows),
        "tokens": windows.numel(),
        "text_tokens": text_tokens,
        "bos": bos,
        "fingerprint": data.fingerprint(windows),
        **evaluate_windows(model, windows, token),
    }
    print(
        f"perplexity {result['ppl']:.3f} on {ppl} ({result['windows']} windows of {seqlen} tokens"
        f"{' after BOS' if bos else ''} from a text of {result['text_tokens']:,})"
    )
    if not bos and (hint := bos_hint(model, tokenizer, windows, "window")):
        print(hint)
    return result


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: dict,
    batchsize: int,
    bos: bool,
    limit: int | None,
) -> dict:
    """Run these tasks (name -> lm_eval's task); print and return their results and mean acc."""
    results = run_harness(model, tokenizer, tasks, batchsize, limit, bos)
    for name, task in results.items():
        metrics = [
            f"{metric} {percent(task, metric)} %"
            for metric in ("acc", "acc_norm")
            if metric in task
        ]
        print(f"{name}: {', '.join(metrics)} ({'first ' if limit else ''}{task['items']} items)")
    mean_acc = sum(task["acc"] for task in results.values()) / len(results)
    print(f"mean acc {100 * mean_acc:.2f} % (acc, not acc_norm; tasks: {len(results)})")
    return {"tasks": results, "mean_acc": mean_acc, "task_limit": limit}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        files = [
            file
            for path in map(Path, args.compare)
            for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
        ]
        if not files:
            raise UserError(
                f"--compare {' '.join(args.compare)}: there are no evaluations; give JSON files "
                "of eval.py"
            )
        print(comparison([read_evaluation(file) for file in files]))
        return
    out = output_file(args)
    if out.is_file() and not args.save:
        print(
            f"{comparison([read_evaluation(out)])}\nmeasured earlier; remove {out} to measure it "
            "again"
        )
        return
    refuse_existing(out, "remove it, or choose another --save")
    check_paths([args.mask, *args.task_file], [args.ppl])
    tasks = load_harness(args.tasks)
    files = {Path(path).stem: load_file(path) for path in args.task_file}
    if len(files) < len(args.task_file) or files.keys() & tasks.keys():
        raise UserError("two tasks have one name; rename a file of --task_file, or give it once")
    model, tokenizer = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    if tasks or files:
        check_tokenizer(tokenizer)  # before the perplexity, which takes long
    result = {
        "model": args.model,
        "mask": args.mask,
        "dtype": str(model.dtype).removeprefix("torch."),
        **apply_and_verify(model, args.mask, args.sparsity_type, args.targets),
    }
    if args.ppl != "none":
        result |= evaluate_text(model, tokenizer, args.ppl, args.seqlen, args.nwindows, args.bos)
    if tasks or files:
        result |= evaluate_tasks(
            model,
            tokenizer,
            tasks | files,
            args.tasks_batchsize,
            not args.tasks_no_bos,
            args.task_limit,
        )
    write_json(out, {**result, "environment": environment(args.device)})
    print(f"written to {out}")


if __name__ == "__main__":
    run_script(main)
