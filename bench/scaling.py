"""One mask learned by 1, 2, 3 and 4 processes: whether the result is the same, and what goes over the wire.

    python bench/scaling.py [--quick] [--json FILE]

A model of two layers is made here. The processes communicate by gloo, have one thread each, and share the cores of this
machine, so this says nothing about speed. A step has 12 sequences, split over the processes. The wire: bytes that a
process hands to torch.distributed a step, with those of the start, of checks and of held-out losses; a ring sends up to
twice as many. Collectives: in a step with --shard, of tensors and of numbers, as torch counts them.
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

SCRIPTS = {"forward-only": "train.py --baseline online --debias_tracker --lr 5",
           "gradients": "train.py --estimator straight_through --distill 1 --lr 3"}
FLAGS = ("--model {folder}/dense --mask {folder}/mask.safetensors --dataset {folder}/text.jsonl --dtype float32 "
         "--sqlen 24 --dataset_size 12 --logits 1 --step eager --num_evals 4 --epoch 1000 --skip_checkpoint --save")
WORDS = "the a cat dog horse bird watches follows hears avoids small old quiet river morning before after near"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # the processes share one machine's cores
    parser.add_argument("--child", default=None, metavar="FOLDER",
                        help="under torchrun: count the collectives of a step, and write the counts to a folder")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# small runs of the scripts, for bench/gpu.py, too

def make_inputs(folder: Path, seed: int) -> None:
    """Write to a folder: `dense`, a byte-level model whose random weights vary so much that a mask moves the loss;
    text.jsonl, twelve documents; and mask.safetensors, the 2:4 mask by magnitude."""
    model = common.random_llama("tiny", "cpu", torch.float32, seed, layers=2, num_key_value_heads=2,
                                initializer_range=0.2, tie_word_embeddings=False, max_position_embeddings=256)
    model.save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    generator = random.Random(seed)
    documents = [" ".join(generator.choices(WORDS.split(), k=60)) for _ in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    mask_files.save(folder / "mask.safetensors", common.magnitude_masks(model), 2, 4, "dense", model_fingerprint(model))


def command(folder: Path, way: str, steps: int, out: Path, device: str, batchsize: int = 4) -> list[str]:
    """The words of a command that learns a mask from the files of `make_inputs`; way: a key of SCRIPTS."""
    return [*SCRIPTS[way].split(), *FLAGS.format(folder=folder).split(), "--device", device, "--batchsize",
            str(batchsize), "--max_step", str(steps), "--out", str(out)]


def run(command: list[str]) -> None:
    """Run a command with one thread. UserError with the end of its messages if it fails."""
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"a run failed: {done.stderr.strip()[-500:]}")


# ---------------------------------------------------------------------------------------------------------------------
# processes

def learn(folder: Path, way: str, processes: int, is_sharded: bool, steps: int) -> tuple[dict, dict[str, Tensor]]:
    """The summary of a run by so many processes, and its logits: layer name -> `[M, blocks]`."""
    out = folder / f"{way}{processes}{'sharded' * is_sharded}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    run([sys.executable, *launcher, *command(folder, way, steps, out, "cpu", batchsize=12 // processes),
         *["--shard"] * is_sharded])
    return read_record(out)["summary"], load_file(out / "logits.safetensors")


class Collectives(TorchDispatchMode):
    """A context that counts the collectives started inside."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: object, types: object, args: tuple = (), kwargs: dict | None = None):
        self.number += function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function)
        return function(*args, **(kwargs or {}))


def collectives_here() -> dict[str, float]:
    """Way to learn -> collectives in a step of a sharded model of one decoder layer, in this process of several."""
    found = {}
    with ProcessGroup("cpu") as group:
        for way, name in zip(SCRIPTS, memory.PREDICTED):
            learning = memory.Learning("tiny", name, "float32", "cpu", torch.float32, group)
            learning.take_steps()
            with Collectives() as counted:
                learning.take_steps()
            found[way] = counted.number / 3
    return found


def compare(folder: Path, way: str, counts: tuple[int, ...], steps: int, collectives: float) -> list[dict]:
    """The table's rows of one way to learn: one process, then these numbers of processes, without and with --shard."""
    alone, logits_alone = learn(folder, way, 1, False, steps)
    rows = [{"learning": way, "processes": 1, "steps": alone["steps"]}]
    for is_sharded in (False, True):
        for processes in counts:
            summary, logits = learn(folder, way, processes, is_sharded, steps)
            apart = max(float((logits[name] - logits_alone[name]).abs().max()) for name in logits)
            is_same = summary["mask_fingerprint"] == alone["mask_fingerprint"]
            rows.append({"learning": way + ", --shard" * is_sharded, "processes": processes, "steps": summary["steps"],
                         "logits apart from one process's, at most": apart, "the same mask": "yes" if is_same else "no",
                         "sent a process and step (bytes)": round(summary["sent_bytes"] / summary["steps"]),
                         "collectives a step": collectives if is_sharded else ""})
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.child:
        common.hand_back(args.child, collectives_here())
        return
    steps = 4 if args.quick else 12  # in long runs a last bit changes a draw, and then everything after it
    counts = (2,) if args.quick else (2, 3, 4)
    collectives = common.run_child(__file__, ["--child"], 2)[0]
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.seed)
        rows = [row for way in SCRIPTS for row in compare(Path(folder), way, counts, steps, collectives[way])]
    common.report(rows, args, "the processes share the cores of one machine: no statement about speed")


if __name__ == "__main__":
    run_script(main)
