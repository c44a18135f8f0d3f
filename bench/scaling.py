"""One mask learned by 1, 2, 3 and 4 processes: the same result, and what goes over the wire.

    python bench/scaling.py [--quick] [--json FILE]

A model of two layers, made here, gloo on the CPU, one thread a process. The processes share this machine's cores, so
this shows that they agree and what they send, not how fast several machines would be. `--samples 12`: twelve masks a
step, split over the processes. Minibatches: one mask, 12 sequences a step, split over them. The wire: bytes that a
process hands to torch.distributed a step, start, checks and held-out losses included; a ring sends up to twice as many.
Collectives: of a step with --shard, of tensors and of numbers, counted by torch.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from utils import UserError, run_script

import memory
import torch
from safetensors.torch import load_file
from small_model import byte_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from files import mask_files
from files.records import read_record
from models.loading import model_fingerprint
from models.processes import ProcessGroup

ROOT = Path(__file__).parent.parent
WAYS = {
    "forward-only, --samples 12": "--baseline online --debias_tracker --lr 5 --samples 12 --batchsize 12",
    "forward-only, minibatches": "--baseline online --debias_tracker --lr 5 --batchsize {batchsize}",
    "forward-only, minibatches, --shard": "--baseline online --debias_tracker --lr 5 --batchsize {batchsize} --shard",
    "straight_through, --shard": "--estimator straight_through --distill 1 --lr 3 --batchsize {batchsize} --shard",
    "straight_through": "--estimator straight_through --distill 1 --lr 3 --batchsize {batchsize}"}
WORDS = "the a cat dog horse bird watches follows hears avoids small old quiet river morning before after near"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # that is what it measures
    parser.add_argument("--count", action="store_true", help="under torchrun: print the collectives of a step only")
    return parser.parse_args(argv)


def make_inputs(folder: Path, seed: int) -> None:
    """In a folder: `dense`, a byte-level model of random weights, spread widely so that a mask moves the loss;
    text.jsonl, twelve documents of such words; and mask.safetensors, the weights' 2:4 mask by magnitude."""
    model = common.random_llama("tiny", "cpu", torch.float32, seed, layers=2, num_key_value_heads=2,
                                initializer_range=0.2, tie_word_embeddings=False, max_position_embeddings=256)
    model.save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    generator = random.Random(seed)
    documents = [" ".join(generator.choices(WORDS.split(), k=60)) for _ in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    mask_files.save(folder / "mask.safetensors", common.magnitude_masks(model, 2, 4), 2, 4, "dense",
                    model_fingerprint(model))


def learn(folder: Path, processes: int, flags: str, steps: int, name: str) -> tuple[dict, dict[str, Tensor]]:
    """A run's summary and its logits, layer name -> `[width, blocks]`."""
    out = folder / f"{name}{processes}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               "train.py", *f"--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl "
               "--dtype float32 --device cpu --sqlen 24 --step eager --skip_checkpoint --save --logits 1 "
               f"--num_evals 4 --dataset_size 12 --epoch 1000 --max_step {steps} --out {out} {flags}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{processes} processes failed: {done.stderr.strip()[-500:]}")
    return read_record(out)["summary"], load_file(out / "logits.safetensors")


class Collectives(TorchDispatchMode):
    """Counts those that are started inside."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: object, types: object, args: tuple = (), kwargs: dict | None = None):
        self.number += function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function)
        return function(*args, **(kwargs or {}))


def collectives_here() -> dict[str, float]:
    """Way of learning -> collectives of a step of a sharded model of one decoder layer, in this process of several."""
    found = {}
    with ProcessGroup("cpu") as group:
        for way in ("forward-only", "straight_through, checkpointing, distillation"):
            run_steps = memory.prepare_learning("tiny", way, "float32", "cpu", torch.float32, group)
            run_steps()
            with Collectives() as counted:
                run_steps()
            found[way.split(",")[0]] = counted.number / 3
    return found


def count_collectives(processes: int) -> dict[str, float]:
    """`collectives_here` of so many processes."""
    found = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                            str(processes), __file__, "--count"], capture_output=True, text=True, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(found.stdout.strip().splitlines()[-1])


def compare(folder: Path, number: int, way: str, counts: tuple[int, ...], steps: int) -> list[dict]:
    """The table's rows of one way of learning, with these numbers of processes, of which the first is 1."""
    rows, alone, mask = [], {}, ""
    collectives = count_collectives(2) if "--shard" in way else {}
    for processes in counts:
        flags = WAYS[way].format(batchsize=12 // processes)
        summary, logits = learn(folder, processes, flags, steps, f"run{number}_")
        if processes == 1:
            alone, mask = logits, summary["mask_fingerprint"]
        apart = max(float((logits[name] - alone[name]).abs().max()) for name in alone)
        rows.append({"learning": way, "processes": processes, "steps": summary["steps"],
                     "logits apart from one process's, at most": apart,
                     "the same mask": "yes" if summary["mask_fingerprint"] == mask else "no",
                     "sent a process and step (bytes)": round(summary["sent_bytes"] / summary["steps"]),
                     "collectives a step": collectives.get(way.split(",")[0], "") if processes > 1 else ""})
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.count:
        print(json.dumps(collectives_here()))
        return
    steps = 4 if args.quick else 12  # in many, a mask is drawn differently for a last bit, and all follows
    counts = (1, 2) if args.quick else (1, 2, 3, 4)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.seed)
        rows = [row for number, way in enumerate(WAYS) for row in compare(Path(folder), number, way, counts, steps)]
    common.report(rows, args, "the processes share the cores of one machine: no statement about speed")


if __name__ == "__main__":
    run_script(main)
