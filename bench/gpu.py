"""What this code does on a GPU, in ten minutes: that it is right there, how fast it is, what it takes.

    python bench/gpu.py --json gpu.json               # on a card, whole
    python bench/gpu.py --device cpu --quick          # the same rows, small, where there is none
    python bench/gpu.py --rows draws,profile          # only those whose names contain one of these

Tables are printed as they are found and their rows written to --json each time, so that a time limit loses none; a
table that fails says why, and the next goes on. Without a GPU and without --device cpu it says what it would measure.
"""
import argparse
import subprocess
import time
from collections.abc import Callable, Iterator

import common
from utils import environment, run_script

import gpu_kernels
import gpu_models
import gpu_runs
import torch
from gpu_runs import WRONG

from files.records import write_json


def versions(args: argparse.Namespace) -> Iterator[dict]:
    """The card, its clocks and driver, and the versions."""
    yield {"what": "versions", **environment(args.device)}
    if args.device.startswith("cuda"):
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total"
        found = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True,
                               text=True, check=False)
        yield {"what": query, "hardware": found.stdout.strip() or found.stderr.strip()}


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[dict]]] = {  # in this order
    "versions": versions, "agreement": gpu_kernels.agreement, "draws": gpu_kernels.draws,
    "profile": gpu_kernels.profile, "kernels": gpu_kernels.kernels, "step": gpu_models.step,
    "gradients": gpu_models.gradients, "shapes": gpu_models.shapes, "runs": gpu_runs.runs,
    "pruning": gpu_models.pruning, "processes": gpu_runs.processes, "offload": gpu_runs.offload,
    "no_triton": gpu_runs.no_triton}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", default="", help=f"tables whose names contain one of these, of {', '.join(TABLES)}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    chosen = common.chosen(TABLES, args.rows)
    if args.device == "cpu" and not torch.cuda.is_available() and not args.quick:
        print("There is no GPU here. On one this would measure:\n")
        for name in chosen:
            print(f"    {name:10} {TABLES[name].__doc__.strip().splitlines()[0]}")
        print("\n--device cpu --quick runs the same rows, small.")
        return
    everything, failed = [], []
    for name in chosen:
        began, rows = time.perf_counter(), []
        try:
            for row in TABLES[name](args):
                rows.append(row)
                print(f"{name}: {row}", flush=True)
        except Exception as error:  # whatever it is, the rows that are left are worth having
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            rows.append({"what": "failed", "error": reason})
            failed.append(name)
        if any(value in WRONG for row in rows for value in row.values()):
            failed.append(name)
        common.print_table(rows)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        everything += [{"table": name, **row} for row in rows]
        if args.json:
            write_json(args.json, [{**row, **environment(args.device)} for row in everything])
    print(f"failed: {', '.join(failed) or 'nothing'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
