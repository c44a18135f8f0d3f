"""Bytes of a training step: what is kept for each maskable weight, and how far the peak goes over it.

    python bench/memory.py [--quick] [--json FILE] [--device cuda] [--shape llama2-7b]

Static: the distinct storages that training keeps for the masked layers (weights, logits, masks, scratch), counted.
Peak: of the process (CPU: resident, high-water mark reset after warm-up; GPU: allocated) over three steps, less what
was there before the step, beside the same for a plain forward, whose activations both share.
"""
import gc
from pathlib import Path

import common
import torch

import layers
import pge

parser = common.parser(__doc__)
parser.add_argument("--shape", choices=list(common.SHAPES), default=None)
args = parser.parse_args()
gpu = args.device.startswith("cuda")
dtype = torch.float16 if gpu else torch.bfloat16
shape = args.shape or ("llama2-7b" if gpu else "smollm2-135m")


def status(field: str) -> int:
    """Bytes by /proc/self/status: VmRSS now, VmHWM the most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def growth_bytes(function) -> int:
    """The most memory a call takes over what was there before it."""
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return max(0, status("VmHWM") - before)


def storage_bytes(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


rows = []
for name, logits_dtype in [("float16", torch.float16), ("float32", torch.float32)][:1 if args.quick else 2]:
    model = common.random_llama(shape, args.device, dtype, args.seed, 4 if args.quick else None)
    tokens = torch.randint(0, 32000, (32, 128), device=args.device)
    masks = common.magnitude_masks(model, 2, 4)

    @torch.no_grad()
    def forward(model=model, tokens=tokens):
        model(input_ids=tokens, use_cache=False)
    forward()
    plain = growth_bytes(forward)
    masked = layers.MaskedModel(model, masks, pge.LinearSpace(2, 4), logits_dtype=logits_dtype)
    kept = list(masked.layers.values())
    weights = sum(layer.weight.numel() for layer in kept)
    static = storage_bytes([tensor for layer in kept for tensor in (layer.weight, *layer.logits, layer.bits)])
    scratch = storage_bytes([layer.scratch for layer in kept])

    def steps(masked=masked, forward=forward):
        for _ in range(3):
            masked.update(0.01)
            forward()
    steps()
    ours = growth_bytes(steps)
    rows.append({"logits": name, "maskable weights (M)": weights / 1e6, "static bytes a weight": static / weights,
                 "textbook": 2 + 4 + 1.0, "scratch (MiB)": scratch / 2**20, "static (MiB)": static / 2**20,
                 "forward takes (MiB)": plain / 2**20, "training step takes (MiB)": ours / 2**20,
                 "peak / static, without activations": (static + scratch + max(0, ours - plain)) / static})
    del model, masked, kept
common.report(rows, args, "textbook: 16-bit weight, float32 logit, bool mask; its masked copy is not counted")
