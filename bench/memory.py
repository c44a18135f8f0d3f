"""Bytes of a training step: what is kept for each maskable weight, how far the peak goes over it, what gradients add.

    python bench/memory.py [--quick] [--json FILE] [--device cuda] [--shape llama2-7b]

Static: the distinct storages that training keeps for the masked layers (weights, logits, masks, scratch), counted.
Peak: of the process (CPU: resident, high-water mark reset after warm-up; GPU: allocated) over three steps, less what
was there before the step, beside the same for a plain forward, whose activations both share.

In all: each way of learning in a process of its own, three steps of 8 x 128 tokens, float32 logits; the most memory
that the process ever held from the loaded model on, less what Python and the libraries do.
"""
import gc
import os
import subprocess
import sys
from pathlib import Path

import common
import torch

import exchange
import layers
import masked_model
import pge
from straight_through import StraightThrough
from utils import DTYPES, UserError, batch_loss, reuse_freed_memory, run

WAYS = {  # checkpointing, distillation; None: forward passes only
    "forward-only": None, "straight_through, checkpointing": (True, 0.0),
    "straight_through, checkpointing, distillation": (True, 1.0),
    "the same from exchanges": (True, 1.0), "straight_through, distillation": (False, 1.0)}


def status(field: str) -> int:
    """Bytes by /proc/self/status: VmRSS now, VmHWM the most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def most_bytes(function, device: str) -> int:
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
    gc.collect()
    return torch.cuda.memory_allocated() if device.startswith("cuda") else status("VmRSS")


def growth_bytes(function, device: str) -> int:
    """The most memory a call takes over what was there before it."""
    before = present_bytes(device)
    return max(0, most_bytes(function, device) - before)


def storage_bytes(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def used_bytes(shape: str, way: str, logits_dtype: str, device: str, dtype: torch.dtype) -> int:
    """What a way of learning takes in this process, see the top."""
    def steps(shape):
        model = common.random_llama(shape, device, dtype)
        masks = {name: torch.arange(4).lt(2).expand(layers.weight_matrix(module).numel() // 4, 4)
                 .reshape(layers.weight_matrix(module).shape) for name, module in layers.find_layers(model).items()}
        masked = masked_model.MaskedModel(model, masks, pge.LinearSpace(2, 4), logits_dtype=DTYPES[logits_dtype],
                                          mode="eager")
        if way.endswith("from exchanges"):
            exchange.settle(masked, torch.randint(0, 256, (exchange.TOKENS // 128, 128)), 4.0)
        learner = WAYS[way] and StraightThrough(masked, "eager", WAYS[way][0], distill=WAYS[way][1])

        def run_steps(masks=masks):  # m0 stays in the host's memory, as in train.py
            for _ in range(3):
                batch = torch.randint(0, 256, (8, 128))
                if learner:
                    learner.step(batch, 0.01)
                else:
                    batch_loss(model, batch)
                    masked.update(0.01)
        return run_steps
    if device == "cpu":
        reuse_freed_memory()
    steps("tiny")()  # loads what is loaded at first use
    base = present_bytes(device)
    return most_bytes(steps(shape), device) - base


def measured_bytes(shape: str, way: str, logits_dtype: str = "float32", device: str = "cpu") -> int:
    """`used_bytes` in a process of its own, with one thread."""
    found = subprocess.run([sys.executable, __file__, "--used", way, "--shape", shape, "--logits_dtype", logits_dtype,
                            "--device", device], capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    if found.returncode:
        raise UserError(f"{shape} could not be measured: {found.stderr.strip().splitlines()[-1:]}")
    return int(found.stdout.split()[-1])


def static_rows(shape: str, args, dtype: torch.dtype) -> list[dict]:
    rows = []
    for name, logits_dtype in [("float16", torch.float16), ("float32", torch.float32)][:1 if args.quick else 2]:
        model = common.random_llama(shape, args.device, dtype, args.seed, 4 if args.quick else None)
        tokens = torch.randint(0, 32000, (32, 128), device=args.device)
        masks = common.magnitude_masks(model, 2, 4)

        @torch.no_grad()
        def forward(model=model, tokens=tokens):
            model(input_ids=tokens, use_cache=False)
        forward()
        plain = growth_bytes(forward, args.device)
        masked = masked_model.MaskedModel(model, masks, pge.LinearSpace(2, 4), logits_dtype=logits_dtype)
        kept = list(masked.layers.values())
        weights = sum(layer.weight.numel() for layer in kept)
        static = storage_bytes([tensor for layer in kept for tensor in (layer.weight, *layer.logits, layer.bits)])
        scratch = storage_bytes([layer.scratch for layer in kept])

        def steps(masked=masked, forward=forward):
            for _ in range(3):
                masked.update(0.01)
                forward()
        steps()
        ours = growth_bytes(steps, args.device)
        rows.append({"logits": name, "maskable weights (M)": weights / 1e6, "static bytes a weight": static / weights,
                     "textbook": 2 + 4 + 1.0, "scratch (MiB)": scratch / 2**20, "static (MiB)": static / 2**20,
                     "forward takes (MiB)": plain / 2**20, "training step takes (MiB)": ours / 2**20,
                     "peak / static, without activations": (static + scratch + max(0, ours - plain)) / static})
        del model, masked, kept
    return rows


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=list(common.SHAPES), default=None)
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float32", help="of --used")
    parser.add_argument("--used", choices=list(WAYS), default=None, help="print the bytes of one way of learning only")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    dtype, shape = torch.float16 if gpu else torch.bfloat16, args.shape or ("llama2-7b" if gpu else "smollm2-135m")
    if args.used:
        print(used_bytes(shape, args.used, args.logits_dtype, args.device, dtype))
        return
    static = static_rows(shape, args, dtype)
    common.report(static, args,
                  "textbook: 16-bit weight, float32 logit, bool mask; its masked copy is not counted")
    rows = []
    for way in list(WAYS)[:2] if args.quick else WAYS:
        used = measured_bytes(shape, way, device=args.device)
        rows.append({"learning": way, "in all (MiB)": used / 2**20})
        rows[-1]["of forward-only"] = used / 2**20 / rows[0]["in all (MiB)"]
    common.report(rows, args, "in all, the libraries left out; 8 x 128 tokens, float32 logits", before=static)


if __name__ == "__main__":
    run(main)
