"""Rows of gpu.py about runs of train.py: again, killed and resumed, in a process group, offloaded, without Triton."""
import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common

import torch
from accelerate import dispatch_model
from scaling import make_inputs

from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.loss import batch_loss

FLAGS = ("--model {w}/dense --mask {w}/mask.safetensors --dataset {w}/text.jsonl --sqlen 24 --batchsize 4 --logits 1 "
         "--dtype {dtype} --device {device} --skip_checkpoint --num_evals 2 --max_step {steps}")
WAYS = {"forward-only": "--baseline online --dataset_size 8 --lr 5",
        "straight_through": "--estimator straight_through --tokens 2000 --epoch 9 --distill 1 --lr 0.5"}
WRONG = ("NOT THE SAME", "NOT SAID")  # cells that are faults
HIDE_TRITON = """
import runpy, sys
sys.modules["triton"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _flags(args: argparse.Namespace, w: Path, out: Path, way: str, more: str = "") -> list[str]:
    gpu = args.device.startswith("cuda")
    common_flags = FLAGS.format(w=w, device=args.device, dtype="bfloat16" if gpu else "float32",
                                steps=8 if args.quick else 30)
    return f"{common_flags} {WAYS[way]} --step {'eager' if args.quick else 'compiled'} --out {out} {more}".split()


def _train(flags: list[str], launcher: list[str] = (), wait: bool = True) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(common.ROOT / "train.py"), *flags]
    process = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if wait:
        process.said = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(process.said[-500:])
    return process


def _fingerprint(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["summary"]["mask_fingerprint"]


def _killed(flags: list[str], out: Path) -> bool:
    """Start a run, kill it after its third step, and go on with it; False where it had ended before."""
    process, log = _train([*flags, "--checkpoint_every", "1"], wait=False), out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return False
    _train(["--resume", str(out)])
    return True


def runs(args: argparse.Namespace) -> Iterator[dict]:
    """The same seed twice, and once killed and resumed, with --deterministic: the same masks?"""
    with tempfile.TemporaryDirectory() as folder:
        w = Path(folder)
        make_inputs(w, args.seed)
        for way in WAYS:
            outs = [w / f"{way}{number}" for number in range(3)]
            for out in outs[:2]:
                _train(_flags(args, w, out, way, "--deterministic"))
            killed = _killed(_flags(args, w, outs[2], way, "--deterministic"), outs[2])
            once, again, resumed = map(_fingerprint, outs)
            yield {"what": way, "the same seed": "same" if again == once else WRONG[0], "killed and resumed":
                   WRONG[0] if resumed != once else "same" if killed else "it ended before it could be killed"}


NCCL = """
import os, sys
from datetime import timedelta
sys.path.insert(0, {root!r})
from models.processes import ProcessGroup
import torch
from torch import distributed
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
group = ProcessGroup.__new__(ProcessGroup)
group.rank, group.size, group.sent_bytes = 0, 1, 0
group._begin({on_cpu}, timedelta(seconds=60))
part = torch.arange(8, dtype=torch.bfloat16, device=group.device)
distributed.all_reduce(part)
numbers = torch.ones(2, dtype=torch.float64)
distributed.all_reduce(numbers)
print(distributed.get_backend(), group.device)
distributed.destroy_process_group()
"""


def processes(args: argparse.Namespace) -> Iterator[dict]:
    """A group of one process: tensors by nccl on a GPU, numbers by gloo."""
    code = NCCL.format(root=str(common.ROOT), on_cpu=not args.device.startswith("cuda"))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr.strip()[-500:])
    yield {"what": "one process", "backend, device": found.stdout.split("\n")[-2]}


def _losses(args: argparse.Namespace, placed: bool) -> list[float]:
    """Of some steps on a small Llama, with half of its layers lent by the host, or whole on the device."""
    model = common.random_llama("tiny", args.device, torch.float32, args.seed, 4)
    if placed:
        layers = {f"model.layers.{i}": "cpu" if i % 2 else args.device for i in range(4)}
        rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), args.device)
        model = dispatch_model(model, {**layers, **rest}, main_device=args.device)
    masked = MaskedModel(model, common.magnitude_masks(model, 2, 4), LinearSpace(2, 4), 1.0, mode="eager")
    batch, losses = torch.arange(256).view(4, 64), []
    for _ in range(4):
        losses.append(batch_loss(model, batch))
        masked.update(5.0)
    return losses


def offload(args: argparse.Namespace) -> Iterator[dict]:
    """Half of the layers in the host's memory, lent to the device for each pass: are losses those without?"""
    if not args.device.startswith("cuda"):
        yield {"what": "half of the layers on the host", "loss apart": "not measured"}
        return
    apart = max(abs(a - b) for a, b in zip(_losses(args, True), _losses(args, False)))
    yield {"what": "half of the layers on the host", "loss apart": apart}


def no_triton(args: argparse.Namespace) -> Iterator[dict]:
    """A run that finds no Triton says so in a line and goes on, eagerly."""
    with tempfile.TemporaryDirectory() as folder:
        w = Path(folder)
        make_inputs(w, args.seed)
        flags = [flag if flag != "eager" else "compiled" for flag in _flags(args, w, w / "run", "forward-only")]
        said = _train(flags, ["-c", HIDE_TRITON]).said
        notes = [line for line in said.splitlines() if line.startswith("note: no working compiler")]
        yield {"what": "Triton hidden", "note": notes[0][:120] if notes else
               WRONG[1] if args.device.startswith("cuda") else "none: a CPU needs no Triton"}

