"""Estimators compared on the small model: the same forward passes, the same time, several seeds.

    python bench/small_model.py --steps 1200             # first: the model, two minutes
    python bench/estimators.py [--quick] [--json FILE] [--passes 480] [--seeds 3] [--rows paper,preset] [--figure PNG]
    python bench/estimators.py --long 10000 --rows long  # passes until the preset is as good as the paper's long run
    python bench/estimators.py --patterns                # the preset at 1:4, 2:4, 4:8 and 8:16

All rows (estimator_rows.py) start from the same Wanda mask and are evaluated by their most probable mask on held-out
text. A forward pass is one of 32 x 128 bytes; a backward counts as two, and swaps as a pass of their text. Printed are
the losses after all passes, after a tenth of them, after the time that the fastest row took, and the lowest on the way.
Seconds are the processor's, so that a busy machine does not matter. --figure draws the curves over passes and over
seconds. --runs FILE keeps each run as it ends, and takes the runs from there that it has: what was cut off goes on.

`paper` rows are the authors' estimator, with their settings or others; the rest are this project's additions: forward
only, then with gradients, from the plain straight-through estimator to the preset, one change a row, and at last what
train.py does not have (variants.py).
"""
import argparse
import statistics

import common
from utils import run_script

from estimator_figure import draw
from estimator_rows import LONG, PATTERNS, PRESET, ROWS
from estimator_runs import Point, Problem, RunsFile


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # seconds are the processor's
    parser.add_argument("--model", default="demo/small", help="folder that bench/small_model.py wrote")
    parser.add_argument("--passes", type=int, default=480, help="forward passes of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_evals", type=int, default=10, help="evaluations on the held-out text, in a run")
    parser.add_argument("--windows", type=int, default=256, help="of 128 bytes, of held-out text")
    parser.add_argument("--rows", default="", help="only the rows whose names contain one of these, by commas")
    parser.add_argument("--long", type=int, default=0, help="add rows: the paper's with so many passes, forward-only "
                                                            "with a fifth of them, the preset with a fiftieth")
    parser.add_argument("--patterns", action="store_true", help="the preset at several N:M instead")
    parser.add_argument("--runs", default=None, help="file that keeps the runs done, .jsonl")
    parser.add_argument("--figure", default=None, help="draw the curves to this .png or .svg")
    args = parser.parse_args(argv)
    if args.quick:
        args.passes, args.seeds, args.num_evals, args.windows = 12, 1, 2, 32
    return args


def loss_after(points: list[Point], limit: float, name: str = "passes") -> float | None:
    """The held-out loss at the last point within so many passes, or seconds; None where the swaps took longer."""
    losses = [point.loss for point in points if getattr(point, name) <= limit * 1.001]
    return losses[-1] if losses else None


def lowest(points: list[Point]) -> float:
    """The lowest held-out loss on the way."""
    return min(point.loss for point in points)


def mean_and_deviation(losses: list[float | None]) -> str:
    """A cell of the table."""
    if None in losses:
        return "swapping"
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) if len(losses) > 1 else 0:.4f}"


def passes_to(runs: list[list[Point]], loss: float) -> str:
    """The passes after which the mean over runs is first at or below a loss."""
    for points in zip(*runs):
        if statistics.mean(point.loss for point in points) <= loss:
            return f"{points[0].passes:.0f}"
    return "not reached"


def compare_patterns(args: argparse.Namespace, kept: RunsFile) -> list[dict]:
    """The table's rows of the preset, an N:M each."""
    rows = []
    for pattern in PATTERNS:
        problem, name = Problem(args.model, pattern, args.windows, args.device), f"{pattern[0]}:{pattern[1]}"
        losses = [kept.get(problem, f"the preset, {name}", PRESET, args.passes, seed, args.num_evals)[-1].loss
                  for seed in range(args.seed, args.seed + args.seeds)]
        gained = problem.m0_loss - statistics.mean(losses)
        rows.append({"N:M": name, "dense": f"{problem.dense_loss:.4f}", "m0": f"{problem.m0_loss:.4f}",
                     "the preset": mean_and_deviation(losses), "passes": args.passes, "seeds": args.seeds,
                     "of the gap": f"{gained / (problem.m0_loss - problem.dense_loss):.0%}"})
    return rows


def planned_rows(passes: int, long: int, parts: str) -> dict[str, tuple[dict, int]]:
    """The rows that are wanted: name -> setting and passes."""
    planned = {name: (setting, passes) for name, setting in ROWS.items()}
    if long:
        planned.update({name: (setting, round(long * share)) for name, (setting, share) in LONG.items()})
    return {name: planned[name] for name in common.chosen(planned, parts)}


def compare_estimators(args: argparse.Namespace, kept: RunsFile) -> list[dict]:
    """The table's rows of the estimators; --figure draws them."""
    planned, seeds = planned_rows(args.passes, args.long, args.rows), range(args.seed, args.seed + args.seeds)
    problem = Problem(args.model, (2, 4), args.windows, args.device)
    curves = {name: [kept.get(problem, name, *plan, seed, args.num_evals) for seed in seeds]
              for name, plan in planned.items()}
    short = {name: curves[name] for name, (_, passes) in planned.items() if passes == args.passes} or curves
    limit_s = min(points[-1].seconds for runs in short.values() for points in runs)
    goals = [statistics.mean(map(lowest, curves[name])) for name in curves if name.startswith("long: paper")]
    rows = [{"estimator": name, "all passes": f"{loss:.4f}"} for name, loss in
            (("dense", problem.dense_loss), ("m0", problem.m0_loss))]
    for name, runs in curves.items():
        passes = planned[name][1]
        rows.append({"estimator": name, "passes": passes, "seeds": args.seeds,
                     "a tenth of the passes": mean_and_deviation([loss_after(points, passes / 10) for points in runs]),
                     "all passes": mean_and_deviation([points[-1].loss for points in runs]),
                     "lowest": mean_and_deviation([lowest(points) for points in runs]),
                     f"after {limit_s:.0f} s": mean_and_deviation([loss_after(points, limit_s, "seconds")
                                                                   for points in runs]),
                     "seconds": statistics.median(points[-1].seconds for points in runs),
                     **{f"passes to {goal:.4f}": passes_to(runs, goal) for goal in goals}})
    if args.figure:
        draw(short, args.figure)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    compare = compare_patterns if args.patterns else compare_estimators
    common.report(compare(args, RunsFile(args.runs)), args,
                  "held-out loss of the most probable mask, nats a byte, mean ± deviation over seeds")


if __name__ == "__main__":
    run_script(main)
