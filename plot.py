"""Pictures of runs: what train.py recorded of each step, and in which layers the mask changed.

    python plot.py results/RUN                          # -> results/RUN/plot.png, plot.svg, layers.png, layers.svg
    python plot.py results/A results/B --out a_b        # runs beside each other -> a_b.png, a_b-layers.png and .svg

One picture has a panel each for the loss of the sampled masks, that loss less the loss of m0, the tracker, the share of
blocks that changed from m0, the entropy of the distributions, and the held-out loss, as far as the runs have them. The
other maps the changes, kind of layer by depth. Reads metrics.jsonl, run.json and, where there is one, layers.jsonl. A
run may be going on still: a torn last line is left out.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from utils import UserError, run_script, script_parser

from files.atomic import refuse_existing
from files.records import read_lines
from training import figures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders that train.py wrote")
    parser.add_argument("--out", default=None, metavar="PREFIX",
                        help="path of the pictures without its ending (default: inside a single RUN, else comparison)")
    return parser.parse_args(argv)


def is_number(value: object) -> bool:
    """Is this a number that can be drawn?"""
    return type(value) in (int, float) and abs(value) < 1e30  # more is no result, and too much to draw


def is_step(line: object) -> bool:
    """Is this a line of metrics.jsonl?"""
    return (isinstance(line, dict) and is_number(line.get("step")) and is_number(line.get("loss"))
            and all(line.get(key) is None or is_number(line[key]) for key in ("baseline", "delta", "heldout")))


def is_state(line: object) -> bool:
    """Is this a line of layers.jsonl?"""
    if not isinstance(line, dict) or not is_number(line.get("step")):
        return False
    tables = [line.get(key) for key in ("blocks", "changed", "entropy")]
    return (all(isinstance(table, dict) and table and table.keys() == tables[0].keys() for table in tables)
            and all(len(name) < 1000 for name in tables[0])
            and all(is_number(value) for table in tables for value in table.values())
            and all(count > 0 for count in tables[0].values()))


def most_nats(path: Path) -> float:
    """log C(M,N), the greatest entropy of a block, by the arguments in run.json."""
    try:
        n, m = json.loads(path.read_text(encoding="utf-8"))["arguments"]["sparsity_type"]
        if not 1 <= n < m <= 16:
            raise ValueError
        return math.log(math.comb(m, n))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give run folders that train.py wrote")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: its arguments have no sparsity_type [N, M]; give another run")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folders = {Path(folder).resolve().name: Path(folder) for folder in args.runs}
    if len(folders) < len(args.runs):  # of one name in several places
        folders = {folder: Path(folder) for folder in args.runs}
    metrics, layers = {}, {}
    for name, folder in folders.items():
        metrics[name] = read_lines(folder / "metrics.jsonl", is_step)
        if not metrics[name]:
            raise UserError(f"{folder / 'metrics.jsonl'} holds no step yet; wait for the first, or give another run")
        recorded = folder / "layers.jsonl"
        layers[name] = read_lines(recorded, is_state) if recorded.exists() else []
        if not layers[name]:
            print(f"{recorded} has no line: the run's changes and entropy are left out", file=sys.stderr)
    most = {most_nats(folder / "run.json") for folder in folders.values()}
    last = {name: lines[-1] for name, lines in layers.items() if lines}

    prefix = args.out or ("comparison" if len(folders) > 1 else None)
    curves, maps = (prefix, f"{prefix}-layers") if prefix else (f"{args.runs[0]}/plot", f"{args.runs[0]}/layers")
    paths = [refuse_existing(f"{path}.{ending}", "choose another --out PREFIX or remove it")
             for path in (curves, maps) for ending in ("png", "svg")]
    figures.panels(metrics, layers, most.pop() if len(most) == 1 else None, paths[:2])
    if last:
        figures.layer_maps(last, paths[2:])
    print("pictures -> " + ", ".join(str(path) for path in (paths if last else paths[:2])))


if __name__ == "__main__":
    run_script(main)
