"""Bytes of a training step: what is kept for each maskable weight, how far the peak goes over it, what gradients add.

    python bench/memory.py [--quick] [--json FILE] [--device cuda] [--shape llama2-7b]

Static: the distinct storages that training keeps for the masked layers (weights, logits, masks, scratch), counted.
Peak: of the process (CPU: resident, high-water mark reset after warm-up; GPU: allocated) over three steps, less what
was there before the step, beside the same for a plain forward, whose activations both share.

In all: each way of learning in a process of its own, three steps of 8 x 128 tokens, float32 logits; the most memory
that the process ever held from the loaded model on, less what Python and the libraries do.
"""
import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

import common
from utils import DTYPES, UserError, reuse_freed_memory, run_script

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from files import mask_files
from files.packing import pack
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers, weight_matrix
from models.loss import batch_loss
from models.processes import ProcessGroup
from models.sharding import own_weight, shard
from training.initialize import TOKENS, init_from_swaps
from training.straight_through import StraightThrough

WAYS = {  # checkpointing, distillation; None: forward passes only
    "forward-only": None, "straight_through, checkpointing": (True, 0.0),
    "straight_through, checkpointing, distillation": (True, 1.0),
    "the same from swaps": (True, 1.0), "straight_through, distillation": (False, 1.0)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=list(common.SHAPES), default=None)
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float32", help="of --used")
    parser.add_argument("--used", choices=list(WAYS), default=None, help="print the bytes of one way of learning only; "
                        "under torchrun: of a sharded model, in each process")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# bytes of this process

def status(field: str) -> int:
    """Bytes by /proc/self/status: VmRSS now, VmHWM the most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def most_bytes(function: Callable[[], object], device: str) -> int:
    """The most memory there is during a call, in all."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return status("VmHWM")


def present_bytes(device: str) -> int:
    """The memory there is now."""
    gc.collect()
    return torch.cuda.memory_allocated() if device.startswith("cuda") else status("VmRSS")


def free(device: str) -> None:
    """Give back what nobody uses: a model goes with its cycles, and a cache would be missed by a child process."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def growth_bytes(function: Callable[[], object], device: str) -> int:
    """The most memory a call takes over what was there before it."""
    before = present_bytes(device)
    return max(0, most_bytes(function, device) - before)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages that tensors have, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# ---------------------------------------------------------------------------------------------------------------------
# in all: a way of learning in a process of its own

def first_half_masks(model: nn.Module) -> mask_files.PackedMasks:
    """2:4 masks that keep the first two weights of each block: layer name -> bool `[out, in]`, on the CPU."""
    shapes = {name: tuple(weight_matrix(module).shape) for name, module in find_layers(model).items()}
    packed = {name: pack(torch.arange(4).lt(2).expand(prod(shape) // 4, 4).reshape(shape), 2, 4)
              for name, shape in shapes.items()}
    return mask_files.PackedMasks(packed, shapes, 2, 4)


def sharded_llama(shape: str, device: str, dtype: torch.dtype, group: ProcessGroup) -> nn.Module:
    """A Llama of random weights whose layers are shared out to the processes, as train.py --shard has it."""
    with init_empty_weights(include_buffers=False):
        model = common.random_llama(shape, device, dtype)
    shard(model, torch.device(device), group.size)
    layers = find_layers(model)
    for tensor in [*map(own_weight, layers.values()), *(parameter for parameter in model.parameters()
                                                        if not isinstance(parameter, DTensor))]:
        tensor.data.normal_(std=0.02)
    return model


def prepare_learning(shape: str, way: str, logits_dtype: str, device: str, dtype: torch.dtype,
                     group: ProcessGroup) -> Callable[[], None]:
    """Load a model of random weights for a way of learning; returns a function that takes three steps."""
    model = (sharded_llama(shape, device, dtype, group) if group.size > 1 else
             common.random_llama(shape, device, dtype))
    masks = first_half_masks(model)
    masked = MaskedModel(model, masks, LinearSpace(2, 4), logits_dtype=DTYPES[logits_dtype], mode="eager")
    if way.endswith("from swaps"):
        init_from_swaps(masked, torch.randint(0, 256, (TOKENS // 128, 128)), 4.0)
    learner = None
    if WAYS[way]:
        checkpointing, distill = WAYS[way]
        learner = StraightThrough(masked, checkpointing=checkpointing, distill=distill, group=group)

    def run_steps() -> None:
        for _ in range(3):
            batch = torch.randint(0, 256, (8, 128))
            if learner:
                learner.learn(batch, 0.01)
            else:
                batch_loss(model, batch)
                masked.update(0.01)
    run_steps.m0 = masks  # stays in the host's memory, as in train.py, packed
    return run_steps


def used_bytes(shape: str, way: str, logits_dtype: str, device: str, dtype: torch.dtype) -> int:
    """What a way of learning takes in this process, see the top."""
    if device == "cpu":
        reuse_freed_memory()
    with ProcessGroup(device) as group:
        prepare_learning("tiny", way, logits_dtype, device, dtype, group)()  # loads what is loaded at first use
        base = present_bytes(device)

        def learn() -> None:  # with the swaps
            prepare_learning(shape, way, logits_dtype, device, dtype, group)()
        return most_bytes(learn, device) - base


def measured_bytes(shape: str, way: str, logits_dtype: str = "float32", device: str = "cpu", processes: int = 1) -> int:
    """`used_bytes` in a process of its own, with one thread; of several that share the layers, the most of any."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    found = subprocess.run([sys.executable, *launcher * (processes > 1), __file__, "--used", way, "--shape", shape,
                            "--logits_dtype", logits_dtype, "--device", device], capture_output=True, text=True,
                           check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if found.returncode:
        raise UserError(f"{shape} could not be measured: {found.stderr.strip().splitlines()[-1:]}")
    return max(map(int, found.stdout.split()[-processes:]))


def learning_rows(ways: list[str], shape: str, device: str) -> list[dict]:
    """The table's rows of ways of learning, the first of which the others are compared with."""
    rows = []
    for way in ways:
        used = measured_bytes(shape, way, device=device) / 2**20
        rows.append({"learning": way, "in all (MiB)": used})
        rows[-1]["of forward-only"] = used / rows[0]["in all (MiB)"]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# static, and the peak of a step

def static_row(shape: str, logits_dtype: str, device: str, dtype: torch.dtype, seed: int, depth: int | None) -> dict:
    """The table's row of logits of one dtype; depth: decoder layers, if not the shape's."""
    free(device)  # of the row before
    model = common.random_llama(shape, device, dtype, seed, depth)
    tokens = torch.randint(0, min(32000, model.config.vocab_size), (32, 128), device=device)
    masks = common.magnitude_masks(model, 2, 4)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=tokens, use_cache=False)
    forward()
    plain = growth_bytes(forward, device)
    masked = MaskedModel(model, masks, LinearSpace(2, 4), logits_dtype=DTYPES[logits_dtype])
    kept = list(masked.layers.values())
    weights = sum(layer.weight.numel() for layer in kept)
    static = storage_bytes([tensor for layer in kept for tensor in (layer.weight, *layer.logits, layer.bits)])
    scratch = storage_bytes([layer.scratch for layer in kept])

    def steps() -> None:
        for _ in range(3):
            masked.update(0.01)
            forward()
    steps()
    ours = growth_bytes(steps, device)
    return {"logits": logits_dtype, "maskable weights (M)": weights / 1e6, "static bytes a weight": static / weights,
            "naive": 2 + 4 + 1.0, "scratch (MiB)": scratch / 2**20, "static (MiB)": static / 2**20,
            "forward takes (MiB)": plain / 2**20, "training step takes (MiB)": ours / 2**20,
            "peak / static, without activations": (static + scratch + max(0, ours - plain)) / static}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    gpu = args.device.startswith("cuda")
    dtype, shape = torch.float16 if gpu else torch.bfloat16, args.shape or ("llama2-7b" if gpu else "smollm2-135m")
    if args.used:
        print(used_bytes(shape, args.used, args.logits_dtype, args.device, dtype))
        return
    logits_dtypes, depth = (["float16"], 4) if args.quick else (["float16", "float32"], None)
    static = [static_row(shape, logits_dtype, args.device, dtype, args.seed, depth) for logits_dtype in logits_dtypes]
    common.report(static, args, "naive: 16-bit weight, float32 logit, bool mask; its masked copy is not counted")
    free(args.device)
    rows = learning_rows(list(WAYS)[:2] if args.quick else list(WAYS), shape, args.device)
    common.report(rows, args, "in all, the libraries left out; 8 x 128 tokens, float32 logits", before=static)


if __name__ == "__main__":
    run_script(main)
