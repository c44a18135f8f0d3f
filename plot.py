"""Plot learning curves of runs: the training loss, or its difference to m0's, and the held-out
loss.

    # -> results/RUN/plot.png and plot.svg
    python plot.py results/RUN
    # two runs in one picture -> a_b.png and a_b.svg
    python plot.py results/A results/B --out a_b

A dot is the loss of one step; the line is the mean of the last 32 steps. The difference is drawn if
all runs have baselines. Reads metrics.jsonl, also of a run in progress: an incomplete last line is
left out.
"""

import argparse
from pathlib import Path

from files.records import read_lines
from utils import UserError, begin_script, run_script, script_parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--out",
        default=None,
        metavar="PREFIX",
        help="path of the pictures without .png or .svg (default: RUN/plot, or comparison for "
        "several runs)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    begin_script(parse_args, "matplotlib")

from files.atomic import refuse_existing
from training import figures


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    runs = {}
    for run in args.runs:
        runs[run] = read_lines(Path(run) / "metrics.jsonl")
        if not runs[run]:
            raise UserError(
                f"{run}/metrics.jsonl has no step yet; wait for the first one, or give another run"
            )
    prefix = args.out or (f"{args.runs[0]}/plot" if len(args.runs) == 1 else "comparison")
    paths = [
        refuse_existing(f"{prefix}.{ending}", "choose another --out PREFIX, or remove it")
        for ending in ("png", "svg")
    ]
    for path in paths:
        figures.learning_curve(runs, path)
    print(f"pictures -> {paths[0]}, {paths[1]}")


if __name__ == "__main__":
    run_script(main)
