"""Measures the memory that learning takes, and compares it with the prediction of bench/plan.py.

    python bench/memory.py [--quick] [--json FILE] [--device cuda] [--shape llama2-7b]

Each way to learn runs three steps of 8 x 128 tokens in a separate process; on a CPU also in two
processes that split each layer's rows (--shard). Kept: bytes per masked weight that stay between
two steps (weight, logits, mask), counted. Used: peak memory, including the model and m0 but not the
libraries. It is resident memory with eager kernels on a CPU, and allocated memory with compiled
kernels on a GPU.
"""

import argparse
import gc
from collections.abc import Callable
from math import prod
from pathlib import Path

import common
from files import mask_files
from files.packing import pack
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models import processes
from models.layers import find_layers, weight_matrix
from models.machine import DTYPES, peak_memory_bytes, reset_peak_memory, reuse_freed_memory
from models.sharding import own_weight, shard
from training.initialize import TOKENS, from_swaps
from training.plan import SWEEPS
from training.straight_through import StraightThrough
from utils import run_script

import plan
import torch
from accelerate import init_empty_weights
from random_models import SHAPES, random_llama
from torch import nn
from torch.distributed.tensor import DTensor

WAYS = {  # name -> settings of the gradients; None: forward passes only
    "forward-only": None,
    "gradients, checkpointing, distillation": dict(checkpointing=True, distill=1.0),
    "gradients, checkpointing": dict(checkpointing=True),
    "gradients, distillation": dict(distill=1.0),
    "gradients, checkpointing, distillation, from swaps": dict(checkpointing=True, distill=1.0),
}
PREDICTED = list(WAYS)[:2]  # the ways that bench/plan.py predicts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default=None)
    parser.add_argument(
        "--child",
        nargs=3,
        default=None,
        metavar=("WAY", "LOGITS_DTYPE", "FOLDER"),
        help="measure one way in this process, and write the result to a folder",
    )
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# bytes of this process


def present_bytes(device: str) -> int:
    """Return the memory in use now."""
    gc.collect()
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def most_bytes(function: Callable[[], object]) -> int:
    """Return the peak memory in use during a call."""
    gc.collect()
    reset_peak_memory()
    function()
    return peak_memory_bytes()


# --------------------------------------------------------------------------------------------------
# one way to learn, in this process


def first_half_masks(model: nn.Module) -> mask_files.PackedMasks:
    """Return 2:4 masks that keep the first two weights of each block: layer name -> bool
    `[out, in]`, on the CPU."""
    shapes = {
        name: tuple(weight_matrix(module).shape) for name, module in find_layers(model).items()
    }
    packed = {
        name: pack(torch.arange(4).lt(2).expand(prod(shape) // 4, 4).reshape(shape), 2, 4)
        for name, shape in shapes.items()
    }
    return mask_files.PackedMasks(packed, shapes, 2, 4)


def sharded_llama(shape: str, device: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """Return a Llama with random weights, of which each process has a part of each layer's rows."""
    with init_empty_weights(include_buffers=False):
        model = random_llama(shape, device, dtype, seed)
    shard(model, torch.device(device), processes.world_size())
    layers = find_layers(model)
    for tensor in [
        *map(own_weight, layers.values()),
        *(parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)),
    ]:
        tensor.data.normal_(std=0.02)
    return model


class Learning:
    """A model with random weights and a way to learn its mask."""

    def __init__(
        self, shape: str, way: str, logits_dtype: str, device: str, dtype: torch.dtype, seed: int
    ):
        make = sharded_llama if processes.world_size() > 1 else random_llama
        model = make(shape, device, dtype, seed)
        self.m0 = first_half_masks(model)  # stays in the host's memory, packed, as in a run
        self.masked = MaskedModel(
            model,
            self.m0,
            LinearSpace(2, 4),
            logits_dtype=DTYPES[logits_dtype],
            backend="compiled" if device.startswith("cuda") else "eager",
        )
        if way.endswith("from swaps"):
            from_swaps(
                self.masked,
                common.DEFAULTS["logits"],
                torch.randint(0, 256, (TOKENS // 128, 128)),
                SWEEPS,
            )
        settings = WAYS[way]
        self.learner = None
        self.learn = common.forward_step(self.masked)
        if settings is not None:
            self.learner = StraightThrough(
                self.masked, checkpointing=settings.get("checkpointing", False)
            )
            self.learn = common.gradient_step(self.learner, settings.get("distill", 0.0))

    def take_steps(self) -> None:
        """Take three steps."""
        for _ in range(3):
            self.learn(torch.randint(0, 256, (8, 128)))

    def kept_bytes(self) -> float:
        """Return the bytes per masked weight that stay between two steps in this process."""
        layers = list(self.masked.layers.values())
        kept = sum(
            tensor.nbytes
            for layer in layers
            for tensor in (layer.weight, *layer.logits, layer.bits)
        )
        if self.learner:
            means = self.learner.normalization.of_blocks
            kept += sum(tensor.nbytes for tensor in means.values())
        return kept / sum(layer.weight.numel() for layer in layers)


def measure(
    shape: str, way: str, logits_dtype: str, device: str, dtype: torch.dtype, seed: int
) -> dict[str, float]:
    """Return the bytes that a way to learn uses in this process (`used`), and that it keeps per
    masked weight (`kept`)."""
    if device == "cpu":
        reuse_freed_memory()
    with processes.joined(device) as device:
        Learning("tiny", way, logits_dtype, device, dtype, seed).take_steps()  # loads libraries
        base = present_bytes(device)
        found = {}

        def learn() -> None:
            learning = Learning(shape, way, logits_dtype, device, dtype, seed)
            learning.take_steps()
            found["kept"] = learning.kept_bytes()

        return {"used": most_bytes(learn) - base, **found}


# --------------------------------------------------------------------------------------------------
# the table


def table_row(shape: str, way: str, logits_dtype: str, number: int, device: str, seed: int) -> dict:
    """Return a row of the table, measured in `number` processes; the one that uses most counts."""
    flags = [
        "--shape",
        shape,
        "--device",
        device,
        "--seed",
        str(seed),
        "--child",
        way,
        logits_dtype,
    ]
    most = max(common.run_child(__file__, flags, number), key=lambda result: result["used"])
    row = {
        "learning": way,
        "logits": logits_dtype,
        "processes": number,
        "kept (bytes a weight)": most["kept"],
        "used (MiB)": most["used"] / 2**20,
    }
    if way in PREDICTED:
        size = plan.ModelSize.of(plan.described(shape))
        settings = plan.Settings(
            batchsize=8, microbatch=8, seqlen=128, m=4, logits_dtype=logits_dtype
        )
        parts = plan.memory_bytes(size, settings, WAYS[way] is not None, number)
        host = 0 if device.startswith("cuda") else plan.packed_bytes(size)
        row["predicted (MiB)"] = (sum(parts.values()) + host) / 2**20
        row["predicted / used"] = row["predicted (MiB)"] / row["used (MiB)"]
    return row


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)  # as in the child processes, since the record states the threads
    gpu = args.device.startswith("cuda")
    dtype = torch.float16 if gpu else torch.bfloat16
    shape = args.shape or ("llama2-7b" if gpu else "smollm2-135m")
    if args.child:
        way, logits_dtype, folder = args.child
        common.hand_back(folder, measure(shape, way, logits_dtype, args.device, dtype, args.seed))
        return
    planned = [(way, "float32", 1) for way in WAYS] + [("forward-only", "float16", 1)]
    if not gpu:
        planned += [(way, "float32", 2) for way in PREDICTED]
    if args.quick:
        planned = planned[:1]
    common.report(
        [table_row(shape, *row, args.device, args.seed) for row in planned],
        args,
        f"{shape}, {dtype} weights, 2:4, three steps of 8 x 128 tokens",
    )


if __name__ == "__main__":
    run_script(main)
