"""Checks whole runs of both scripts on a device: repeated, killed and resumed, and in two
processes. bench/gpu.py has the command."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import torch
from gpu_layer import NOT_MEASURED, Rows
from scaling import WAYS, compare, make_inputs

PATIENCE_S = 300  # for three small steps, including the start and compilation
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
COMMON = (
    "--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl "
    "--dtype auto --seqlen 24 --batchsize 4 --skip_checkpoint "
)
SCRIPTS = {
    "train.py": COMMON + "--dataset_size 12 --baseline online --lr 5 --logits 1 --max_step {steps}",
    "sparsify.py": COMMON + "--steps {steps}",
}


def runs(args: argparse.Namespace) -> Rows:
    """Run both scripts with the same seed twice, and once killed and resumed, and compare the
    masks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args.seed)
        for script, flags in list(SCRIPTS.items())[: 1 if args.quick else None]:
            outs = [folder / f"{script}{number}" for number in range(3)]
            commands = [
                [
                    script,
                    *filled(flags, folder, 8 if args.quick else 30),
                    "--device",
                    args.device,
                    "--out",
                    str(out),
                ]
                for out in outs
            ]
            for command in commands[:2]:
                run(command)
            killed = kill(commands[2], outs[2])
            if killed:
                run([script, "--resume", str(outs[2])])
            once, again, resumed = (
                json.loads((out / "run.json").read_text())["summary"]["mask_fingerprint"]
                for out in outs
            )
            yield (
                {
                    "what": script,
                    "the same seed twice": int(again == once),
                    "killed": int(killed),
                    "resumed, the same": int(resumed == once),
                },
                {
                    "killed": (1, 1),
                    **same_bits(args, script, "the same seed twice", "resumed, the same"),
                },
            )


def processes(args: argparse.Namespace) -> Rows:
    """Compare two processes with one, and a run of which one process was killed with one that was
    not."""
    if args.device.startswith("cuda") and torch.cuda.device_count() < 2:
        yield {"what": "two GPUs", "the same mask": NOT_MEASURED}, {}
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.seed)
        for way in WAYS:
            for row in compare(Path(folder), way, (2,), 4, args.device):
                limits = {"logits apart from one process's, at most": (0, 2e-3)}
                if args.device == "cpu":  # a GPU may round differently with fewer sequences
                    limits["the same mask"] = (1, 1)
                yield {"what": row.pop("learning"), **row}, limits
        for script, flags in SCRIPTS.items():
            outs = [Path(folder, script, name) for name in ("once", "killed")]
            place = ["--device", "cpu"] if args.device == "cpu" else []
            once, killed = (
                [
                    *TWO,
                    script,
                    *filled(flags, folder, 8),
                    "--shard",
                    "--dtype",
                    "float32",
                    *place,
                    "--out",
                    str(out),
                ]
                for out in outs
            )
            run(once)
            is_killed = kill(killed, outs[1], rank=1)
            run([*TWO, script, "--resume", str(outs[1])])
            first, second = (
                json.loads((out / "run.json").read_text())["summary"]["mask_fingerprint"]
                for out in outs
            )
            yield (
                {
                    "what": f"{script} --shard",
                    "one killed": int(is_killed),
                    "the same mask": int(first == second),
                },
                {"one killed": (1, 1), **same_bits(args, script, "the same mask")},
            )


def same_bits(args: argparse.Namespace, what: str, *columns: str) -> dict:
    """Return limits that require the same masks in these columns, or none if the masks come from a
    GPU's backward passes, which may round differently."""
    is_exact = args.device == "cpu" or what != "sparsify.py"
    return dict.fromkeys(columns, (1, 1)) if is_exact else {}


def filled(flags: str, folder: str | Path, steps: int) -> list[str]:
    """Return the flags of a script of SCRIPTS as a list, filled in after the split because the
    folder's path may have spaces."""
    return [flag.format(folder=folder, steps=steps) for flag in flags.split()]


def run(command: list[str]) -> None:
    """Run a script. Raises RuntimeError with the end of its messages if it fails."""
    done = subprocess.run(
        [sys.executable, *command], cwd=common.ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])


def kill(command: list[str], out: Path, rank: int | None = None) -> bool:
    """Start a run and kill it after its third step, or only its launcher's process number `rank`.
    Return False if the run ended before that."""
    process = subprocess.Popen(
        [sys.executable, *command, "--checkpoint_every", "1"],
        cwd=common.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = out / "metrics.jsonl"
    began = time.monotonic()
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        if time.monotonic() - began > PATIENCE_S:
            process.kill()
            raise RuntimeError(f"{command} has not made three steps in {PATIENCE_S} s")
        time.sleep(0.02)
    if rank is None:
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    if process.poll() is None:
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[rank]), signal.SIGKILL)
    return process.wait() != 0  # exit code of the launcher
