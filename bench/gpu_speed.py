"""Times whole models on a device, in this process: a step, and the stages around it.

bench/gpu.py has the command and the tables.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.generation import generate
from models.layers import find_layers
from models.machine import peak_memory_bytes
from pruning.one_shot import OneShot, prune_model
from training import checkpoint
from training.plan import sweep_s
from training.straight_through import StraightThrough

import torch
from gpu_layer import NOT_MEASURED, Rows
from gpu_model import a_model, is_gpu
from small_model import byte_tokenizer
from torch._inductor.codecache import PyCodeCache
from torch.autograd import DeviceType


def step(args: argparse.Namespace) -> Rows:
    """Measure a step from forward passes on 32 x 128 tokens, and steps from gradients with
    checkpointing and distillation on 8 x 128 and 32 x 128."""
    yield (
        step_row(args, "forward-only", 32, torch.float16),
        {"of a forward": (1, 1.6), "step (s)": (0, 0.25), "allocated (GiB)": (0, 30)},
    )
    for sequences, most in ((8, 8), (32, 6)):
        yield (
            step_row(args, "gradients", sequences, torch.float32),
            {"of a forward": (1, most), "spilled (bytes)": (0, 256)},
        )


def step_row(
    args: argparse.Namespace, what: str, sequences: int, logits_dtype: torch.dtype
) -> dict:
    """Return the row of a way to learn (`what`) on `sequences` sequences of 128 tokens, a quarter
    of them with --quick."""
    dtype = torch.float16 if is_gpu(args) and what == "forward-only" else torch.bfloat16
    shape, model = a_model(args, "llama2-7b", dtype)
    batch = torch.randint(
        0, 256, (sequences // 4 if args.quick else sequences, 128), device=args.device
    )
    masked = MaskedModel(
        model, common.magnitude_masks(model), LinearSpace(2, 4), logits_dtype=logits_dtype
    )
    learn = (
        common.forward_step(masked)
        if what == "forward-only"
        else common.gradient_step(StraightThrough(masked, checkpointing=True), distill=1.0)
    )

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=batch, use_cache=False)

    compile_s = common.median_s(lambda: learn(batch), args.device, repeats=1, warm_up=0)
    with masked.use_dense():
        forward()  # warms up
    forwards_s = []
    steps_s = []
    for _ in range(5):  # in turns, so that changes of the machine's speed affect both
        with masked.use_dense():
            forwards_s.append(common.median_s(forward, args.device, repeats=1, warm_up=0))
        steps_s.append(common.median_s(lambda: learn(batch), args.device, repeats=1, warm_up=0))
    forward_s = statistics.median(forwards_s)
    step_s = statistics.median(steps_s)
    row = {
        "what": f"{what}, {shape}, {batch.numel()} tokens",
        "first step, compiling (s)": compile_s,
        "forward (s)": forward_s,
        "step (s)": step_s,
        "of a forward": step_s / forward_s,
    }
    names = "GPU busy (share)", "spilled (bytes)", "allocated (GiB)", "reserved (GiB)"
    if not is_gpu(args):
        return row | dict.fromkeys(names, NOT_MEASURED)
    return row | dict(
        zip(
            names,
            (
                busy_s(lambda: learn(batch)) / step_s,
                most_spilled_bytes(),
                torch.cuda.max_memory_allocated() / 2**30,
                torch.cuda.max_memory_reserved() / 2**30,
            ),
        )
    )


def busy_s(work: Callable[[], object]) -> float:
    """Return the seconds of a call in which a GPU computes or copies; the rest of the time it waits
    for the host."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return (
        sum(
            event.device_time_total
            for event in found.events()
            if event.device_type == DeviceType.CUDA
        )
        / 1e6
    )


def most_spilled_bytes() -> int:
    """Return the largest number of bytes that a thread spills, over the generated kernels that have
    run, in their chosen configurations."""
    kernels = [
        one
        for module in PyCodeCache.modules
        for one in vars(module).values()
        if hasattr(one, "launchers")
    ]
    return max(
        (4 * (launcher.n_spills or 0) for kernel in kernels for launcher in kernel.launchers),
        default=0,
    )


def stages(args: argparse.Namespace) -> Rows:
    """Time the stages around the steps: a sweep of swaps, generation, saving and reading a state,
    SparseGPT's mask."""
    shape, model = a_model(args, "llama3.2-1b", torch.bfloat16)
    weights = sum(layer.weight.numel() for layer in find_layers(model).values())
    yield {"what": f"a sweep of swaps, {shape}", "s": sweep_s(model, (2, 4))}, {}
    documents, length = (4, 8) if args.quick else (128, 128)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token_id = 10  # the end of a line
    generate_s = common.median_s(
        lambda: generate(model, tokenizer, documents, length), args.device, repeats=1
    )
    yield (
        {
            "what": f"generation, {documents} documents, {shape}",
            "s": generate_s,
            "tokens per s": documents * length / generate_s,
        },
        {},
    )
    masked = MaskedModel(model, common.magnitude_masks(model), LinearSpace(2, 4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.pt")
        began = time.perf_counter()
        checkpoint.save(path, *masked.state())
        saved_s = time.perf_counter() - began
        masked.restore({"steps": 0}, checkpoint.StateFile(path).read)
        size = path.stat().st_size
        yield (
            {
                "what": f"a state saved, {shape}",
                "s": saved_s,
                "GB per s": size / saved_s / 1e9,
                "read again (s)": time.perf_counter() - began - saved_s,
                "bytes per weight": size / weights,
            },
            {},
        )
    del masked
    shape, model = a_model(args, "llama2-7b", torch.bfloat16)
    held = peak_memory_bytes()
    samples = torch.randint(0, 256, (4 if args.quick else 128, 128))
    began = time.perf_counter()
    prune_model(model, find_layers(model), samples, OneShot("sparsegpt", (2, 4)))
    yield (
        {
            "what": f"SparseGPT, {shape}, {samples.numel()} tokens",
            "s": time.perf_counter() - began,
            "memory beside the model (GiB)": (peak_memory_bytes() - held) / 2**30,
        },
        {},
    )
