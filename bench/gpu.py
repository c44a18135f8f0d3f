"""Checks and times this code on a GPU: correctness, speed and memory.

    # in a call of ten minutes
    python bench/gpu.py --json gpu.json --budget_s 560
    # the same measurements, smaller, without a card
    python bench/gpu.py --device cpu --quick
    # only measurements whose names contain "draws"
    python bench/gpu.py --rows draws

The most important measurements come first: those that decide whether learning is correct, then time
and memory, then other patterns.

    agreement      compares compiled kernels on the device with eager ones there and on the CPU.
                   share: share of the blocks that differ. ulp: largest difference, in units in the
                   last place. If a block's masks agree, its weights must be equal to the bit.
    draws          compares the compiled step's draws with the exact probabilities of the patterns,
                   by chi-square. Rare flips are the whole learning signal, so the tails must be
                   right: N logits are at `gap`, the others at 0.
    learning       compares a few compiled steps of a small model on the device, with all options of
                   sparsify.py, with eager ones on the CPU in float32.
    runs           whole runs of both scripts: the same seed twice, and once killed and resumed. Is
                   the mask the same? (On a GPU only train.py is judged: backward passes may round
                   differently.)
    deterministic  train.py's step with deterministic algorithms: does it give the same bits twice,
                   and which operations have no such algorithm?
    float16        a weight's gradient whose sum over tokens overflows float16, so it has to be
                   computed in float32.
    step           whole model, 2:4: a step from forward passes on 32 x 128 tokens, and steps from
                   gradients with checkpointing and distillation on 8 x 128 and 32 x 128.
    profile        the number of kernels and copies that one layer's pass launches, by torch's
                   profiler.
    kernels        time of each pass, compared with a copy of the bytes that it reads and writes.
    stages         time of a sweep of swaps, generation, saving a state, and SparseGPT.
    processes      two processes on two GPUs: replicas and --shard compared with one process
                   (bench/scaling.py); and one of two killed: the run ends, and resumes to the same
                   mask. Needs two GPUs, or --device cpu.

Each row with limits gets a verdict, which lists the values outside of them (for step only on a GPU
and without --quick). Every row is written to --json at once, and the budget is checked before each
row, so a time limit loses at most one row. After a failure, the next measurement starts and the
exit code is 1.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import common
from files.records import write_json
from masking import compiler
from utils import run_script

from gpu_layer import NOT_MEASURED, agreement, draws, kernels, profile
from gpu_model import deterministic, float16_gradient, learning
from gpu_runs import processes, runs
from gpu_speed import stages, step

ALL = ["float32", "float16", "bfloat16"]
OTHERS = [(1, 4), (2, 8), (4, 8)]  # 4:8 is last because it compiles longest


def measurements(quick: bool) -> dict[str, Callable]:
    """Return the measurements in their order: name -> function of the flags that yields (row,
    limits)."""
    found = {
        "agreement 2:4": partial(
            agreement, n=2, m=4, weights=["bfloat16", "float16"], logits=["float32"]
        ),
        "draws 2:4": partial(draws, n=2, m=4),
        "learning": learning,
        "runs": runs,
        "deterministic": deterministic,
        "float16": float16_gradient,
        "step": step,
        "profile 2:4": partial(profile, n=2, m=4),
        "kernels 2:4": partial(kernels, n=2, m=4),
        "stages": stages,
        "processes": processes,
        "agreement 2:4, all dtypes": partial(agreement, n=2, m=4, weights=ALL, logits=ALL),
    }
    for n, m in OTHERS[:1] if quick else OTHERS:
        pattern = f"{n}:{m}"
        found[f"agreement {pattern}"] = partial(
            agreement, n=n, m=m, weights=["bfloat16"], logits=["float32"]
        )
        if (n, m) != (2, 8):
            found[f"draws {pattern}"] = partial(draws, n=n, m=m)
        found[f"profile {pattern}"] = partial(profile, n=n, m=m)
        found[f"kernels {pattern}"] = partial(kernels, n=n, m=m)
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--rows",
        default="",
        help="run only measurements whose names contain one of these, separated by commas",
    )
    parser.add_argument(
        "--budget_s",
        type=float,
        default=float("inf"),
        help="start no row after this many seconds",
    )
    return parser.parse_args(argv)


def verdict(row: dict, limits: dict) -> str:
    """Return a row's verdict: which of its values are outside of their limits, column -> (lowest,
    highest); "" if it has no limits."""
    wrong = [
        f"{column} is {row[column]:.4g}, not {low:g} to {high:g}"
        for column, (low, high) in limits.items()
        if row[column] != NOT_MEASURED and not low <= row[column] <= high
    ]
    if wrong:
        return "WRONG: " + "; ".join(wrong)
    return "right" if limits else ""


def rows_of(
    name: str, measured: Iterator[tuple[dict, dict]], is_judged: bool, end: float
) -> Iterator[dict]:
    """Yield the rows of a measurement with their verdicts, until the time `end`. A failure becomes
    the last row."""
    while True:
        if time.monotonic() > end:
            yield {"what": "the rest", "verdict": "no time left"}
            return
        try:
            found = next(measured, None)
        except Exception as error:  # the other measurements are still worth running
            said = " ".join(f"WRONG: {type(error).__name__}: {error}".split())
            yield {"what": name, "verdict": said[:500]}
            return
        if found is None:
            return
        row, limits = found
        yield {**row, "verdict": verdict(row, limits if is_judged else {})}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    end = time.monotonic() + args.budget_s
    conditions = common.conditions_of(args)
    has_limits = args.device.startswith("cuda") and not args.quick  # limits of time and memory
    everything: list[dict] = []
    works = measurements(args.quick)
    for name in common.chosen(works, args.rows):
        rows: list[dict] = []
        for row in rows_of(name, works[name](args), name != "step" or has_limits, end):
            rows.append(row)
            everything.append({"table": name, **row, **conditions})
            if args.json:
                write_json(args.json, everything)
        common.free_memory(args.device)  # for the child processes of the next measurement
        print(f"\n{name}", flush=True)
        common.print_table(rows)
    failed = [
        f"{row['table']} ({row['what']})"
        for row in everything
        if row["verdict"].startswith("WRONG")
    ]
    failed += [f"not compiled: {name}" for name in compiler.failures]  # these ran eagerly
    print(f"failed: {', '.join(failed) or 'nothing'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    run_script(main)
