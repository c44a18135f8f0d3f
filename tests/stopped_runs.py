"""Runs in the workshop of tests/faults/kill.py, made to stop where a test wants it."""
import json
from pathlib import Path

VANILLA = "--estimator vanilla --lr 0.1"


def arguments(workshop: Path, out: Path, flags: str = "") -> list[str]:
    return (f"--model {workshop}/dense --mask {workshop}/mask.safetensors --dataset {workshop}/text.jsonl "
            "--dtype float32 --device cpu --dataset_size 8 --batchsize 2 --sqlen 24 --step eager --logits 1 --lr 5 "
            "--baseline online --max_step 6 --targets q_proj --skip_checkpoint --checkpoint_every 1 "
            f"--out {out} {flags}").split()


def raises(error):
    def function():
        raise error
    return function


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def states_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "state").iterdir())
