"""Judge a model: perplexity on held-out text, zero-shot accuracy, and that its layers are N:M sparse.

    python evaluate.py --model results/RUN/checkpoint --sparsity_type 2:4 --ppl wikitext2 --seqlen 2048
    python evaluate.py --model BASE --mask results/RUN/mask.safetensors --ppl text.txt --seqlen 512
    python evaluate.py --model BASE --ppl none --tasks hellaswag,race,piqa,winogrande,arc_easy,arc_challenge,openbookqa
    python evaluate.py --model BASE --ppl none --task_file quiz.jsonl       # zero-shot without the Hub, see tasks.py
    python evaluate.py --compare BASE results/RUN/checkpoint other.json     # one table of what was written before

Perplexity is the field's (SparseGPT, Wanda, MaskLLM): the text in one tokenizer call, disjoint windows of --seqlen
tokens, the remainder dropped, cross entropy in float32, exp of the mean over windows. It is by token; the task wikitext
of the harness is by word, and refused. With --mask or --sparsity_type a layer that breaks the pattern, or whose zeros
are not +0.0, is an error. Mean acc is the plain mean over the tasks of acc, not of acc_norm.

The numbers go to evaluation.json in the folder of the model, or to NAME.evaluation.json beside the mask NAME.
"""
import json
import math
import os
import time
from pathlib import Path

from tqdm import tqdm

import data
from files import check_disk, refuse_existing, write_json
from layers import apply_masks, check_divisible, check_sparsity, find_layers, read_masks
from tasks import load_harness, read_items, run_harness, score_items
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
    run,
    script_parser,
    sparsity_type,
)


def parse_args(argv=None):
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--mask", default=None, help="mask file or folder of .pt masks to put on --model")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=None,
                        help="N:M to verify (default: that of --mask; without either, nothing is verified)")
    parser.add_argument("--targets", nargs="+", default=None, help="verify the layers whose names contain one of these")
    parser.add_argument("--ppl", default="wikitext2", help="held-out text: wikitext2, c4, a file, or none")
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens in a window")
    parser.add_argument("--nwindows", type=positive_int, default=None, help="windows, at most (default: all)")
    parser.add_argument("--tasks", default=None, help="tasks of lm-evaluation-harness, names or YAML files, by commas")
    parser.add_argument("--task_file", nargs="+", default=[], help="files of multiple-choice items, see tasks.py")
    parser.add_argument("--task_limit", type=positive_int, default=None, help="the first items of each task only")
    parser.add_argument("--tasks_batchsize", type=positive_int, default=16, help="choices in one forward pass")
    parser.add_argument("--tasks_no_bos", action="store_true",
                        help="task prompts without BOS, the default of lm_eval before 0.4.9.2 and so of older figures")
    parser.add_argument("--save", default=None,
                        help="write the numbers to this JSON file, must be new (default: see above)")
    parser.add_argument("--compare", nargs="+", default=None, metavar="PATH",
                        help="only print a table of such JSON files, or of folders that hold evaluation.json")
    return parser.parse_args(argv)


def output_file(args) -> tuple[Path | None, str]:
    """Where the numbers go, refused if it exists, or None and why they are only printed."""
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
    return refuse_existing(out, "choose another file with --save, or remove it"), ""


def judge_text(args, model, tokenizer) -> dict:
    """Perplexity, mean loss in nats, and what they were measured on; UserError where they are not finite."""
    windows, text_tokens = data.windows_and_tokens(tokenizer, args.ppl, args.seqlen, args.nwindows)
    losses = [batch_loss(model, window[None])
              for window in tqdm(windows, desc="perplexity", unit="window", disable=None)]
    if not math.isfinite(perplexity(losses)):
        raise UserError(f"the perplexity is not finite; {model.dtype} may overflow: try --dtype bfloat16 or float32")
    return {"ppl": perplexity(losses), "nats": sum(losses) / len(losses), "text": args.ppl, "seqlen": args.seqlen,
            "windows": len(losses), "tokens": windows.numel(), "text_tokens": text_tokens,
            "fingerprint": data.fingerprint(windows)}


def judge_tasks(args, model, tokenizer, files, harness) -> dict:
    """The results of `files` (name -> items) and `harness` (name -> lm_eval's task) by task, printed, and mean acc."""
    how = {"batchsize": args.tasks_batchsize, "bos": not args.tasks_no_bos}
    tasks = {name: score_items(model, tokenizer, items, **how) for name, items in files.items()}
    if harness:
        tasks |= run_harness(model, tokenizer, harness, limit=args.task_limit, **how)
    for name, task in tasks.items():
        metrics = [f"{metric} {percent(task, metric)} %" for metric in ("acc", "acc_norm") if metric in task]
        print(f"{name}: {', '.join(metrics)} ({'first ' if args.task_limit else ''}{task['items']} items)")
    return {"tasks": tasks, "mean_acc": sum(task["acc"] for task in tasks.values()) / len(tasks),
            "task_limit": args.task_limit}


def percent(task: dict, metric: str) -> str:
    """'56.40 ± 0.31', without the error where a single item has none."""
    stderr = task[f"{metric}_stderr"]
    return f"{100 * number(task[metric]):.2f}" + (f" ± {100 * number(stderr):.2f}" if stderr is not None else "")


def main(argv=None):
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
    model, tokenizer = load_model(args)
    if args.ppl != "none":
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
    density, weights = check_sparsity(layers, pattern), sum(module.weight.numel() for module in layers.values())
    result = {"model": args.model, "mask": args.mask, "sparsity_type": "{}:{}".format(*pattern) if pattern else None,
              "density": density, "dtype": str(model.dtype).removeprefix("torch.")}
    checked = (f"{result['sparsity_type']} in every masked layer, " if pattern else "") + (
        f"density {density:.6f}, {round(density * weights):,} of {weights:,} weights not zero")
    if args.ppl == "none":
        print(checked)
    else:
        result |= judge_text(args, model, tokenizer)
        print(f"perplexity {result['ppl']:.3f} on {args.ppl} ({result['windows']} windows of {args.seqlen} tokens); "
              f"{checked}\n{result['tokens']:,} tokens in the windows, {result['text_tokens']:,} in the text")
    if files or harness:
        result |= judge_tasks(args, model, tokenizer, files, harness)
        print(f"mean acc {100 * result['mean_acc']:.2f} % (acc, not acc_norm; tasks: {len(result['tasks'])})")
    result |= {"seconds": round(time.time() - started, 1), "peak_memory_bytes": peak_memory_bytes()}
    if out:
        write_json(out, {**result, "environment": environment()})
    print(f"written to {out}" if out else f"not written: {unsaved}; --save FILE keeps the numbers")


# ---------------------------------------------------------------------------------------------------------------------
# --compare

def cells(record: dict) -> dict[tuple, str]:
    """(order, heading, what else must be equal for numbers to compare) -> cell."""
    row, tasks = {}, record.get("tasks", {})
    if "ppl" in record:
        heading = f"perplexity, {Path(record['text']).name}, {record['windows']} windows of {record['seqlen']} tokens"
        row[0, heading, str(record.get("fingerprint"))] = f"{number(record['ppl']):.3f}"
    for name, task in tasks.items():
        row |= {(1, f"{name} {metric} (%, {task['items']} items)", str(task["source"])): percent(task, metric)
                for metric in ("acc", "acc_norm") if metric in task}
    if len(tasks) > 1:
        same = sorted((name, str(task["items"]), str(task["source"])) for name, task in tasks.items())
        row[2, f"mean acc (%, {len(tasks)} tasks)", str(same)] = f"{100 * number(record['mean_acc']):.2f}"
    return row


def number(value) -> float:
    """A number that a record holds; ValueError for what is none."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is no result")
    return value


def plain(cell: str) -> str:
    """What ends neither a cell nor a line of a Markdown table."""
    return " ".join(cell.replace("|", "/").split())


def read_row(path: str) -> tuple[list[str], dict]:
    """Name, sparsity and density, and the `cells`, of a record; UserError where there is none."""
    file = Path(path) / "evaluation.json" if Path(path).is_dir() else Path(path)
    name = file.parent if file.name == "evaluation.json" else file
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return [str(name).removesuffix(".json").removesuffix(".evaluation"), str(record["sparsity_type"] or ""),
                f"{number(record['density']):.6f}"], cells(record)
    except Exception as error:  # a damaged record fails in many ways, all of them the record's
        raise UserError(f"--compare {path}: {file} is no record of evaluate.py ({type(error).__name__}: "
                        f"{str(error)[:200]}); make it with evaluate.py")


def comparison(paths: list[str]) -> str:
    """Records as one Markdown table; what is in one column was measured on the same tokens or items."""
    heads, rows = zip(*map(read_row, paths))
    columns = sorted({key: None for row in rows for key in row}, key=lambda key: key[0])
    headings = [heading for _, heading, _ in columns]
    shown = [f"{heading} [{headings[:i + 1].count(heading)}]" if headings.count(heading) > 1 else heading
             for i, heading in enumerate(headings)]
    lines = [["model", "sparsity", "density", *shown], ["---"] * (3 + len(shown)),
             *([*head, *(row.get(key, "") for key in columns)] for head, row in zip(heads, rows))]
    table = "\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines)
    if all(len(row) == len(columns) for row in rows):
        return table
    return (f"{table}\n\nNot all were measured alike: numbers compare within a column only. Where headings differ in "
            "[1] and [2] alone, the tokens, the items, BOS or the version of the harness do.")


if __name__ == "__main__":
    run(main)
