"""Writes the record of the results that the scripts with SMALL=1 have made so far, and prints its
table.

    # as the scripts call it
    python reproduce/record.py results/reproduce-small
    # to keep the record
    python reproduce/record.py results/reproduce-small --out reproduce/records/small_model.json
    # of one run, which may be unfinished
    python reproduce/record.py results/RUN --out record.json

It reads the evaluations of eval.py, FOLDER/dense.json and FOLDER/NofM/ROW.json, and for each the
run in the folder FOLDER/NofM/ROW, if there is one. Rows that differ only by -seedN become one row
with several seeds. For each seed the record has the evaluation (nats, perplexity, windows, dtype,
fingerprint of the tokens). For a run it also has:

    arguments, summary      as the run wrote them
    environment             commit, hardware, versions
    fingerprints            of model, mask and text
    seconds, loop_s         of all stages of sparsify.py; of the steps alone
    curve                   mean losses over POINTS equal parts of its steps
    residuals               the same for loss minus baseline

The record also has the sha256 of model and texts. An existing record is extended: its other rows
and seeds stay, provided they are of the same files and were evaluated on the same tokens.
reproduce/tables.py makes the tables of the docs from it. Columns of the table:

    nats                    loss per token on the held-out text, mean and standard deviation over
                            the seeds
    of the gap (%)          share of the gap in nats, between the wanda.json of the same folder and
                            dense, that is closed
    first, last steps       loss of the sampled masks in the first and in the last STEPS steps, at
                            most half a run each, on the training text
    blocks changed (%)      share of blocks that differ from m0 in the final mask
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.comparison import markdown_table
from files.atomic import refuse_existing
from files.records import GENERATED, read_lines, read_record, write_json
from utils import UserError, as_user_error, run_script

import numpy as np

STEPS = 512  # maximum number of steps in a mean of the sampled masks' losses
POINTS = 40  # points of each curve
HEADING = [
    "mask",
    "seeds",
    "nats",
    "of the gap (%)",
    "sampled masks, first steps",
    "last steps",
    "blocks changed (%)",
    "seconds",
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="OUT folder of the scripts, or a run's folder")
    parser.add_argument("--out", default=None, help="record to write (default: FOLDER/record.json)")
    return parser.parse_args(argv)


def read_run(folder: Path) -> dict:
    """Return the part of a run that a record keeps. The summary is empty if the run is unfinished.
    Raises UserError if the run has no step yet."""
    record = read_record(folder)
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder} has no step yet; wait for one")
    losses = [line["loss"] for line in lines]
    loop_s = lines[-1]["seconds"]
    few = max(1, min(STEPS, len(losses) // 2))
    seconds = sum(stage["seconds"] for stage in record.get("stages", {}).values()) or loop_s
    run = {
        **{
            key: record[key]
            for key in ("arguments", "environment", "fingerprints", "rival", "nats")
            if key in record
        },
        "summary": record.get("summary", {}),
        "steps": len(lines),
        "seconds": seconds,
        "loop_s": loop_s,
        "first": statistics.mean(losses[:few]),
        "last": statistics.mean(losses[-few:]),
        "curve": thinned(losses),
    }
    if lines[-1].get("baseline") is not None:
        run["residuals"] = thinned([line["loss"] - line["baseline"] for line in lines])
    return run


def thinned(values: list[float]) -> list[float]:
    """Return the means of POINTS equal parts of the values, or all values if they are fewer."""
    return [
        round(float(part.mean()), 5)
        for part in np.array_split(np.array(values), min(POINTS, len(values)))
    ]


def make_record(folder: Path) -> dict:
    """Return the record of a folder: `rows`, name -> seeds, and the `sha256` of models and texts.
    Raises UserError if the evaluations are not of the same tokens, items and dtype."""
    rows = {}
    files = set()
    for file in [folder / "dense.json", *sorted(folder.glob("*of*/*.json"))]:
        with as_user_error(file, "make it with eval.py"):
            evaluation = json.loads(file.read_text(encoding="utf-8"))
            seed = {
                key: evaluation[key]
                for key in (
                    "nats",
                    "ppl",
                    "text",
                    "windows",
                    "seqlen",
                    "dtype",
                    "fingerprint",
                    "environment",
                )
            }
        if "mean_acc" in evaluation:
            seed |= {
                "mean_acc": evaluation["mean_acc"],
                "tasks": {name: task["source"] for name, task in evaluation["tasks"].items()},
            }
        if rows and not same_items(seed, rows["dense"][0]):
            raise UserError(
                f"{file} was evaluated on other tokens or items than dense.json, or in another "
                "dtype: evaluate both anew"
            )
        if file.with_suffix("").is_dir() and (file.with_suffix("") / "run.json").exists():
            seed["run"] = read_run(file.with_suffix(""))
            given = seed["run"]["arguments"]
            dataset = given["dataset"] or []
            files.update(
                [dataset] if isinstance(dataset, str) else dataset,
                filter(None, [given.get("after")]),
            )
        name = re.sub(r"-seed\d+$", "", str(file.relative_to(folder).with_suffix("")))
        seed["seed"] = seed["run"]["arguments"]["seed"] if "run" in seed else None
        rows.setdefault(name, []).append(seed)
        weights = (
            {str(Path(evaluation["model"], "model.safetensors"))} if file.stem == "dense" else set()
        )
        files |= {seed["text"]} | weights
    for seeds in rows.values():
        seeds.sort(key=lambda seed: seed["seed"] or 0)
    return {
        "sha256": {
            name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
            for name in sorted(files)
            if Path(name).is_file()
        },
        "rows": rows,
    }


def same_items(seed: dict, other: dict) -> bool:
    """Return whether both were evaluated in the same dtype, on the same tokens and, if both have
    tasks, on the same items."""
    return all(
        seed[key] == other[key]
        for key in ("dtype", "fingerprint", "tasks")
        if key in seed and key in other
    )


def added(old: dict, new: dict) -> dict:
    """Return a record extended by a newer one. Raises UserError if they are of different files, or
    were evaluated on different tokens or items."""
    for name, digest in new["sha256"].items():
        if old["sha256"].get(name, digest) != digest and not name.endswith(GENERATED):
            raise UserError(f"{name} is not the one of that record: give another --out")
    if not same_items(old["rows"]["dense"][0], new["rows"]["dense"][0]):
        raise UserError(
            "that record was evaluated on other tokens or items, or in another dtype: give "
            "another --out"
        )
    if "mean_acc" in old["rows"]["dense"][0] and "mean_acc" not in new["rows"]["dense"][0]:
        raise UserError(
            "that record has accuracies, and these results have none: give TASK_FILES, or another "
            "--out"
        )
    rows = dict(old["rows"])
    for name, seeds in new["rows"].items():
        of_seed = {seed["seed"]: seed for seed in [*rows.get(name, []), *seeds]}
        rows[name] = sorted(of_seed.values(), key=lambda seed: seed["seed"] or 0)
    return {"sha256": old["sha256"] | new["sha256"], "rows": dict(sorted(rows.items()))}


def cell(values: list[float], digits: int) -> str:
    """Format the mean of the values: '1.2345', or '1.2345 ± 0.0012' for several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}{spread}"  # 0, not -0


def recovered(rows: dict[str, list[dict]], name: str, nats: float) -> float:
    """Return the share of the gap, in percent, that a loss of `nats` closes. The gap is between
    Wanda at the row's pattern and dense, in nats."""
    dense = rows["dense"][0]["nats"]
    m0 = rows[f"{name.rpartition('/')[0]}/wanda"][0]["nats"]
    return 100 * (m0 - nats) / (m0 - dense)


def row_cells(rows: dict[str, list[dict]], name: str, seeds: int | None = None) -> list[str]:
    """Return the cells of a row after its name, over its first `seeds` seeds (None: all). The cells
    of a run are empty if there is none."""
    found = rows[name][:seeds]
    pattern = name.rpartition("/")[0]
    nats = [seed["nats"] for seed in found]
    gap = ""
    of_run = [""] * 4
    if f"{pattern}/wanda" in rows and not name.endswith("wanda"):
        gap = cell([recovered(rows, name, loss) for loss in nats], 1)
    if "run" in found[0]:
        runs = [seed["run"] for seed in found]
        changed = [
            100 * run["summary"]["blocks_changed"] / run["summary"]["blocks"] for run in runs
        ]
        of_run = [
            cell([run["first"] for run in runs], 4),
            cell([run["last"] for run in runs], 4),
            cell(changed, 2),
            cell([run["seconds"] for run in runs], 0),
        ]
    return [str(len(found)), cell(nats, 4), gap, *of_run]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if (Path(args.folder) / "run.json").exists():
        out = (
            refuse_existing(args.out, "remove it first")
            if args.out
            else Path(args.folder, "record.json")
        )
        write_json(out, read_run(Path(args.folder)))
        return
    record = make_record(Path(args.folder))
    out = Path(args.out or Path(args.folder, "record.json"))
    if args.out and out.exists():
        with as_user_error(out, "give another --out"):
            record = added(json.loads(out.read_text(encoding="utf-8")), record)
    write_json(out, record)
    print(
        markdown_table(
            HEADING, [[name, *row_cells(record["rows"], name)] for name in record["rows"]]
        )
    )


if __name__ == "__main__":
    run_script(main)
