"""One mask learned by 1, 2 and 4 processes: the same result, and what goes over the wire.

    python bench/scaling.py [--quick] [--json FILE]

A model of two layers (tests/tiny.py), gloo on the CPU, one thread a process. The processes share this machine's cores,
so this shows that they agree and what they send, not how fast several machines would be. `--samples 4`: four masks a
step, shared out. Minibatches: one mask, 8 rows a step, shared out. The wire: bytes that a process hands to
torch.distributed a step, start, checks and held-out losses included; a ring sends up to twice as many.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import kill
from safetensors.torch import load_file

from settings import read_record
from utils import UserError, run

ROOT = Path(__file__).parent.parent
WAYS = {
    "forward-only, --samples 4": "--baseline online --debias_tracker --lr 5 --samples 4 --batchsize 8",
    "forward-only, minibatches": "--baseline online --debias_tracker --lr 5 --batchsize {rows}",
    "forward-only, minibatches, --shard": "--baseline online --debias_tracker --lr 5 --batchsize {rows} --shard",
    "straight_through, --shard": "--estimator straight_through --distill 1 --lr 3 --batchsize {rows} --shard",
    "straight_through": "--estimator straight_through --distill 1 --lr 3 --batchsize {rows}"}


def learn(folder: Path, processes: int, flags: str, steps: int, name: str) -> tuple[dict, dict]:
    """A run's summary and its logits."""
    out = folder / f"{name}{processes}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               "train.py", *f"--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl "
               f"--dtype float32 --device cpu --sqlen 24 --step eager --skip_checkpoint --save --logits 1 --looks 4 "
               f"--dataset_size 8 --epoch 1000 --max_step {steps} --out {out} {flags}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{processes} processes failed: {done.stderr.strip()[-500:]}")
    return read_record(out)["summary"], load_file(out / "logits.safetensors")


def main():
    args = common.parser(__doc__).parse_args()
    steps, rows = 4 if args.quick else 12, []  # in many, a mask is drawn differently for a last bit, and all follows
    with tempfile.TemporaryDirectory() as folder:
        kill.workshop(Path(folder))
        for number, (way, flags) in enumerate(WAYS.items()):
            for processes in (1, 2) if args.quick else (1, 2, 4):
                summary, logits = learn(Path(folder), processes, flags.format(rows=8 // processes), steps,
                                        f"run{number}_")
                if processes == 1:
                    alone, mask = logits, summary["mask_fingerprint"]
                apart = max(float((logits[name] - alone[name]).abs().max()) for name in alone)
                rows.append({"learning": way, "processes": processes, "steps": summary["steps"],
                             "logits apart from one process's, at most": apart,
                             "the same mask": "yes" if summary["mask_fingerprint"] == mask else "no",
                             "sent a process and step (bytes)": round(summary["sent_bytes"] / summary["steps"])})
    common.report(rows, args, "the processes share the cores of one machine: no statement about speed")


if __name__ == "__main__":
    run(main)
