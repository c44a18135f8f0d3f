"""The record of what the scripts with SMALL=1 have made so far, and its table.

    # as those scripts call it
    python reproduce/record.py results/reproduce-small
    # to be kept
    python reproduce/record.py results/reproduce-small --out reproduce/records/small_model.json
    # of one run, also of one that has not ended
    python reproduce/record.py results/RUN --out record.json

Reads the evaluations that eval.py left, FOLDER/dense.json and FOLDER/NofM/ROW.json, and the run of
each beside it, the folder FOLDER/NofM/ROW. Rows that differ by their -seedN alone are one row of
several seeds. The record has, of each seed, the evaluation (nats, perplexity, windows, dtype,
fingerprint of the tokens) and of a run its arguments, environment (commit, hardware, versions),
fingerprints of model, mask and text, summary, seconds (of sparsify.py all stages; loop_s are of the
steps alone) and curve, the mean losses of POINTS stretches of its steps; `residuals` is the same of
loss less baseline. With it go the sha256 of model and texts. A record that is there is added to:
its other rows and seeds stay, where they are of the same files and evaluated on the same tokens.
reproduce/tables.py makes the tables of the docs from it. Columns of the table:

    nats                    by token, of the held-out text, mean and standard deviation over the
                            seeds
    of the gap (%)          share of the gap in nats between the wanda.json of the same folder and
                            dense that is closed
    first, last steps       loss of the sampled masks in the first and in the last STEPS steps, at
                            most half a run, on the training text
    blocks changed (%)      in the final mask
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

STEPS = 512  # that a mean of the sampled masks' losses goes over, at most
POINTS = 40  # of a curve
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
    parser.add_argument("folder", help="OUT of the scripts, or a run")
    parser.add_argument("--out", default=None, help="record to write (default: FOLDER/record.json)")
    return parser.parse_args(argv)


def read_run(folder: Path) -> dict:
    """What a record keeps of a run; the summary is empty where it has not ended."""
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
            for key in ("arguments", "environment", "fingerprints", "rival")
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
    """The means of POINTS stretches."""
    return [
        round(float(part.mean()), 5)
        for part in np.array_split(np.array(values), min(POINTS, len(values)))
    ]


def make_record(folder: Path) -> dict:
    """The record of a folder: `rows`, name -> seeds, and the `sha256` of what they are of."""
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
    """Were both evaluated in the same dtype, on the same tokens and, where both know their items,
    on these?"""
    return all(
        seed[key] == other[key]
        for key in ("dtype", "fingerprint", "tasks")
        if key in seed and key in other
    )


def added(old: dict, new: dict) -> dict:
    """A record and what was made since. UserError where they are of other files, or evaluated on
    others."""
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
    """'1.2345', or '1.2345 ± 0.0012' of several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}{spread}"  # 0, not -0


def recovered(rows: dict[str, list[dict]], name: str, nats: float) -> float:
    """Share of the gap in nats between the wanda of a row's pattern and dense that these nats
    close, in percent."""
    dense = rows["dense"][0]["nats"]
    m0 = rows[f"{name.rpartition('/')[0]}/wanda"][0]["nats"]
    return 100 * (m0 - nats) / (m0 - dense)


def row_cells(rows: dict[str, list[dict]], name: str, seeds: int | None = None) -> list[str]:
    """The cells of a row after its name, of its first seeds; empty ones where there is no run."""
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
