"""Learns one mask with 1, 2, 3 and 4 processes: is the result the same, and how much is sent?

    python bench/scaling.py [--quick] [--json FILE]

The model has two layers and is made here. The processes communicate by gloo, have one thread each,
and share the cores of this machine, so this says nothing about speed. A step has 12 sequences,
split over the processes; with --shard, each process has a part of each layer's rows. Sent: bytes
that a process passes to torch.distributed per step; a ring sends up to twice as many. Collectives:
their number per step, of tensors and of numbers, as torch counts them; two decoder layers take
twice the gathers of one.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import common
from files import mask_files
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models import processes
from models.loading import load_model, model_fingerprint
from models.sharded_files import load_sharded
from training.straight_through import StraightThrough
from utils import run_script

import torch
from random_models import random_llama
from small_model import byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAYS = ("forward-only", "gradients")
SEQUENCES = 12  # per step
TOKENS = 24  # per sequence
WORDS = (
    "the a cat dog horse bird watches follows hears avoids small old quiet river morning before "
    "after near"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # because the processes share one machine's cores
    parser.add_argument(
        "--child",
        nargs=6,
        default=None,
        metavar=("INPUTS", "WAY", "SHARD", "STEPS", "DEVICE", "FOLDER"),
        help="learn in this process, and write the result to a folder",
    )
    return parser.parse_args(argv)


def make_inputs(folder: Path, seed: int) -> None:
    """Write three inputs to a folder: `dense`, a byte-level model whose random weights are so large
    that a mask changes the loss; text.jsonl, with twelve documents; and mask.safetensors, the 2:4
    mask by magnitude."""
    model = random_llama(
        "tiny",
        "cpu",
        torch.float32,
        seed,
        layers=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        max_position_embeddings=256,
    )
    model.save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    generator = random.Random(seed)
    documents = [" ".join(generator.choices(WORDS.split(), k=60)) for _ in range(12)]
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents)
    )
    mask_files.save(
        folder / "mask.safetensors",
        common.magnitude_masks(model),
        2,
        4,
        "dense",
        model_fingerprint(model),
    )


class Collectives(TorchDispatchMode):
    """Counts the collectives started inside its context, and the bytes that this process passes to
    them."""

    def __init__(self):
        super().__init__()
        self.number = self.sent_bytes = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            # the other collectives of c10d have their results as the first argument
            gives_first = function.namespace != "c10d" or "allreduce" in str(function)
            given = tree_leaves(args[0] if gives_first else args[1])
            self.number += 1
            self.sent_bytes += sum(
                tensor.nbytes for tensor in given if isinstance(tensor, torch.Tensor)
            )
        return function(*args, **(kwargs or {}))


def learn(inputs: Path, way: str, is_sharded: bool, steps: int, device: str) -> dict:
    """Learn in this process, one of several. Return the logits of all layers, the mask's
    fingerprint in the main process, and the bytes sent and collectives per step."""
    load = load_sharded if is_sharded else load_model
    model, _ = load(str(inputs / "dense"), "float32", device)
    masks = mask_files.load(inputs / "mask.safetensors", (2, 4)).masks
    masked = MaskedModel(model, masks, LinearSpace(2, 4), magnitude=1.0, backend="eager")
    learner = StraightThrough(masked) if way == "gradients" else None
    generator = torch.Generator().manual_seed(0)
    m0_loss = None
    with Collectives() as counted:
        for _ in range(steps):
            batch = processes.split(
                torch.randint(97, 123, (SEQUENCES, TOKENS), generator=generator)
            )
            if learner:
                learner.step(batch, 0.5, distill=[1.0] * len(batch))
                continue
            loss = processes.mean([masked.loss(batch)])
            m0_loss = loss if m0_loss is None else m0_loss
            masked.update(5.0 * (loss - m0_loss))
    logits = {name: layer.flatten().tolist() for name, layer in masked.whole_logits().items()}
    masks = masked.masks_of(masked.mode_bits())
    mask = mask_files.fingerprint(masks) if processes.is_main() else ""
    return {
        "logits": logits,
        "mask": mask,
        "sent_bytes": counted.sent_bytes / steps,
        "collectives": counted.number / steps,
    }


def compare(
    inputs: Path, way: str, counts: tuple[int, ...], steps: int, device: str = "cpu"
) -> list[dict]:
    """Return the table's rows for one way to learn, each compared with one process: these numbers
    of processes, without and with --shard, and on GPUs one process with its layers spread over
    all."""

    def run(number: int, is_sharded: bool, where: str = device) -> tuple[dict, torch.Tensor]:
        flags = ["--child", str(inputs), way, str(int(is_sharded)), str(steps), where]
        result = common.run_child(__file__, flags, number)[0]
        return result, torch.tensor(
            [logit for _, layer in sorted(result["logits"].items()) for logit in layer]
        )

    (result_alone, alone), rows = run(1, False), []
    cases = [(number, is_sharded, device) for is_sharded in (False, True) for number in counts]
    for number, is_sharded, where in cases + [(1, False, "auto")] * device.startswith("cuda"):
        result, logits = run(number, is_sharded, where)
        rows.append(
            {
                "learning": way + ", --shard" * is_sharded + ", spread" * (where == "auto"),
                "processes": number,
                "steps": steps,
                "logits apart from one process's, at most": float((logits - alone).abs().max()),
                "the same mask": int(result["mask"] == result_alone["mask"]),
                "sent a process and step (bytes)": round(result["sent_bytes"]),
                "collectives a step": result["collectives"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)  # as in the child processes, since the record states the threads
    if args.child:
        inputs, way, is_sharded, steps, device, folder = args.child
        with processes.joined(device) as own:
            common.hand_back(
                folder, learn(Path(inputs), way, bool(int(is_sharded)), int(steps), own)
            )
        return
    # in long runs a difference in the last bit changes a draw, and then all that follows
    steps = 4 if args.quick else 12
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.seed)
        most = torch.cuda.device_count() if args.device == "cuda" else 4  # one GPU per process
        counts = tuple(count for count in ((2,) if args.quick else (2, 3, 4)) if count <= most)
        rows = [
            row for way in WAYS for row in compare(Path(folder), way, counts, steps, args.device)
        ]
    common.report(
        rows, args, "the processes share the cores of one machine: no statement about speed"
    )


if __name__ == "__main__":
    run_script(main)
