"""Shared parts of the benches: flags, timing, masks, a learning step of each kind, child processes,
the defaults of sparsify.py, and the Markdown table that each bench prints."""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils

utils.use_short_spins()

from evaluation.comparison import markdown_table
from files.records import write_json
from masking import compiler
from masking.masked_model import MaskedModel
from models.layers import find_layers, weight_matrix
from models.machine import commit, default_device, environment
from pruning.one_shot import OneShot
from training.defaults import GENERATED_SHARE, LOGITS, STEP_SIZE
from training.straight_through import StraightThrough
from utils import UserError

import torch
from torch import Tensor, nn

COMMIT = commit()  # read at the start, since files may change while a bench runs
# the defaults of sparsify.py for text that it generates
DEFAULTS = dict(lr=STEP_SIZE, logits=LOGITS, distill=GENERATED_SHARE, batchsize=8)


def parser(docstring: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every bench has, and the bench's docstring as its
    description."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller measurement, to try it out")
    parser.add_argument(
        "--json", default=None, help="also write the rows of the table to this file"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default=default_device(),
        help="CUDA_VISIBLE_DEVICES selects another card than the first",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    return parser


def chosen(names: Iterable[str], parts: str) -> list[str]:
    """Return the names that contain one of the comma-separated parts, or all names if `parts` is
    empty. A part that is a complete name selects only that name. Raises UserError if no name is
    selected."""
    names = list(names)
    # a name may also contain commas
    wanted = [parts] if parts in names else [part for part in parts.split(",") if part]
    found = [
        name
        for name in names
        if not wanted
        or any(part == name or (part not in names and part in name) for part in wanted)
    ]
    if not found:
        raise UserError(f"no row's name contains {parts}")
    return found


def median_s(
    function: Callable[[], object], device: str, repeats: int = 5, warm_up: int = 1
) -> float:
    """Return the median seconds of a call, including the wait for the device."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    times = []
    for turn in range(warm_up + repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if turn >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def queued_s(function: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Return the seconds of one call in a queue of calls. A GPU starts only when all are queued, so
    launch times do not count. On a CPU this is `median_s`."""
    if not device.startswith("cuda"):
        return median_s(function, device, repeats)
    function()
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)  # clock cycles
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def free_memory(device: str) -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()  # models have reference cycles
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def magnitude_masks(model: nn.Module, n: int = 2, m: int = 4) -> dict[str, Tensor]:
    """Return N:M masks of all layers of a model by weight magnitude: layer name -> bool
    `[out, in]`, on the CPU."""
    way = OneShot("magnitude", (n, m))
    return {
        name: way.mask(weight_matrix(module).float(), None).cpu()
        for name, module in find_layers(model).items()
    }


def forward_step(masked: MaskedModel) -> Callable[[Tensor], float]:
    """Return a function that takes one small step from forward passes on a batch, int64
    `[sequences, tokens]`, and returns the loss in nats."""

    def step(batch: Tensor) -> float:
        loss = masked.loss(batch)
        masked.update(0.01)
        return loss

    return step


def gradient_step(
    learner: StraightThrough, distill: float = 0.0, temperature: float = 0.0
) -> Callable[[Tensor], float]:
    """Return a function that takes one small step from gradients on a batch, int64
    `[sequences, tokens]`, and returns the loss in nats."""
    return lambda batch: learner.step(batch, 0.01, [distill] * len(batch), temperature).loss


def run_child(bench: str, flags: list[str], processes: int = 1) -> list:
    """Run a bench in a separate process, or in several by torchrun, with one thread each. Return
    the results that the processes write with `hand_back`; the folder for these is appended to the
    flags. Raises UserError if the bench fails."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ] * (processes > 1)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *launcher, bench, *flags, folder],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise UserError(
                f"{Path(bench).name} failed in a child process: {done.stderr.strip()[-500:]}"
            )
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(processes)]


def hand_back(folder: str, result: object) -> None:
    """Write the result of a process of `run_child` to the folder, in a file per process, because
    one stdout would mix the lines of several processes."""
    Path(folder, os.environ.get("RANK", "0")).write_text(json.dumps(result))


def print_table(rows: list[dict]) -> None:
    """Print rows, each column -> cell, as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[row.get(column, "") for column in columns] for row in rows]
    print(
        "\n"
        + markdown_table(
            columns,
            [
                [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line]
                for line in lines
            ],
        )
    )


def conditions_of(args: argparse.Namespace) -> dict:
    """Return the conditions that a record stores with its numbers."""
    return {
        **environment(args.device),
        "commit": COMMIT,
        "device": args.device,
        "seed": args.seed,
        "command": " ".join(
            ["python", Path(sys.argv[0]).parent.name + "/" + Path(sys.argv[0]).name, *sys.argv[1:]]
        ),
    }


def print_report(rows: list[dict], args: argparse.Namespace, note: str = "") -> None:
    """Print a line of conditions, the rows (column -> cell) as a Markdown table, and a note."""
    conditions = conditions_of(args)
    print(
        f"\n{conditions['command']}  ({conditions['hardware']}, torch {conditions['torch']}, "
        f"commit {conditions['commit']}, seed {args.seed})"
    )
    print_table(rows)
    if compiler.failures:
        note += f"\nWRONG: eager, since torch.compile failed: {', '.join(compiler.failures)}"
    if note:
        print("\n" + note)


def report(rows: list[dict], args: argparse.Namespace, note: str = "") -> None:
    """Print rows as `print_report` does. With --json, also write them, each with the conditions."""
    print_report(rows, args, note)
    if args.json:
        write_json(args.json, [{**row, **conditions_of(args)} for row in rows])
