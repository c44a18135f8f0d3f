"""The tables of SMALL=1: what runs learned, from the records that eval.py left and from the runs themselves.

    python reproduce/learned_table.py DENSE.json FOLDER/wanda.json FOLDER/RUN.json FOLDER/RUN-seed1.json

A record RUN.json beside a folder RUN is of the run in it; runs that differ by their -seedN alone are one row, mean and
standard deviation. Columns: perplexity and loss in nats, by token, of the held-out text; the share of the gap in loss
between the wanda.json of the same folder, m0, and the first record, dense, that is closed; the loss of the sampled
masks in the first and in the last 512 steps, on the minibatches that were learned from; the share of blocks that the
final mask changes; seconds of learning.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from files.records import read_lines, read_record
from utils import UserError, run_script

STEPS = 512  # that a mean of the sampled masks' losses goes over
COLUMNS = ("mask", "seeds", "perplexity", "nats", "of the gap (%)", "sampled masks, first steps", "last steps",
           "blocks changed (%)", "seconds")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="RECORD",
                        help="JSON files of eval.py, the dense model's first")
    return parser.parse_args(argv)


def read_nats(record: Path) -> tuple[float, float]:
    """Perplexity and nats; UserError where a record has none."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        return float(found["ppl"]), float(found["nats"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is no record of eval.py ({type(error).__name__}); make it with eval.py")


def cell(values: list[float], digits: int) -> str:
    """'1.2345', or '1.2345 ± 0.0012' of several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def run_cells(folders: list[Path]) -> list[str]:
    """The cells that only a run has, over its seeds; empty ones where there is no run."""
    folders = [folder for folder in folders if (folder / "run.json").exists()]
    if not folders:
        return ["", "", "", ""]
    losses = [[line["loss"] for line in read_lines(folder / "metrics.jsonl")] for folder in folders]
    summaries = [read_record(folder)["summary"] for folder in folders]
    return [cell([statistics.mean(run[:STEPS]) for run in losses], 4),
            cell([statistics.mean(run[-STEPS:]) for run in losses], 4),
            cell([100 * found["blocks_changed"] / found["blocks"] for found in summaries], 2),
            cell([found["seconds"] for found in summaries], 0)]


def table(records: list[Path]) -> str:
    """The records as a Markdown table, a row for those that differ by their seed alone."""
    rows: dict[Path, list[Path]] = {}
    for record in records:
        rows.setdefault(record.with_name(re.sub(r"-seed\d+(?=\.json$)", "", record.name)), []).append(record)
    dense = read_nats(records[0])[1]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, seeds in rows.items():
        ppls, nats = zip(*map(read_nats, seeds))
        m0 = name.with_name("wanda.json")
        gap = ""
        if m0.exists() and m0 != name:
            gap = cell([100 * (1 - (loss - dense) / (read_nats(m0)[1] - dense)) for loss in nats], 1)
        cells = [f"{name.parent.name}/{name.stem}", str(len(seeds)), cell(ppls, 4), cell(nats, 4), gap,
                 *run_cells([seed.with_suffix("") for seed in seeds])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    print(table([Path(record) for record in parse_args(argv).records]))


if __name__ == "__main__":
    run_script(main)
