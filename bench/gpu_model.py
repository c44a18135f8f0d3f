"""Checks whole models on a device, in this process: results compared with the CPU.

bench/gpu.py has the command and the tables.
"""

import argparse
import warnings

import common
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.machine import reset_peak_memory
from training.straight_through import StraightThrough, weight_gradient

import torch
from gpu_layer import Rows
from random_models import random_llama
from torch import nn

CASES = [  # name, dtype, settings of StraightThrough
    ("forward passes", torch.float32, None),
    ("gradients", torch.float32, {}),
    ("gradients", torch.bfloat16, {}),
    ("gradients", torch.float16, {}),
    ("gradients, checkpointing", torch.float32, {"checkpointing": True}),
]


def is_gpu(args: argparse.Namespace) -> bool:
    """Return whether the device is a GPU."""
    return args.device.startswith("cuda")


def a_model(args: argparse.Namespace, gpu_shape: str, dtype: torch.dtype) -> tuple[str, nn.Module]:
    """Return a shape's name and a model of it; the shape is smaller without a GPU and with
    --quick."""
    common.free_memory(args.device)  # frees the model of the row before
    reset_peak_memory()
    shape = "tiny" if args.quick else gpu_shape if is_gpu(args) else "smollm2-135m"
    return shape, random_llama(shape, args.device, dtype, args.seed)


def learning(args: argparse.Namespace) -> Rows:
    """Compare a few compiled steps of a small model on the device with eager ones on the CPU in
    float32."""
    common.free_memory(args.device)
    batches = torch.randint(0, 256, (4, 8, 64), generator=torch.Generator().manual_seed(args.seed))
    for name, dtype, flags in CASES[:2] if args.quick else CASES:
        found = []
        for device, weights, backend in (
            (args.device, dtype, "compiled"),
            ("cpu", torch.float32, "eager"),
        ):
            model = (
                random_llama("tiny", "cpu", torch.float32, args.seed).to(dtype).to(device, weights)
            )
            masked = MaskedModel(
                model, common.magnitude_masks(model), LinearSpace(2, 4), 1.0, backend=backend
            )
            if flags is None:
                losses = [common.forward_step(masked)(batch) for batch in batches]
            else:
                learner = StraightThrough(masked, **flags)
                losses = [learner.step(batch, 0.3, [1.0] * 8).loss for batch in batches]
            masked.flush()
            found.append((losses, torch.cat([bits.cpu() for bits in masked.bits().values()])))
        (ours, mask), (expected, other) = found
        is_exact = dtype == torch.float32
        yield (
            {
                "what": f"{name}, {dtype}".replace("torch.", ""),
                "masks apart from the CPU (share)": float((mask != other).float().mean()),
                "losses apart (nats)": max(abs(a - b) for a, b in zip(ours, expected)),
            },
            {
                "masks apart from the CPU (share)": (0, 0.002 if is_exact else 0.1),
                "losses apart (nats)": (0, 1e-4 if is_exact else 0.05),
            },
        )


def deterministic(args: argparse.Namespace) -> Rows:
    """Run the step of train.py with deterministic algorithms, as it runs there, twice: compare the
    bits, and time it."""
    dtype = torch.float16 if is_gpu(args) else torch.float32
    batch = torch.randint(
        0, 256, (8, 64 if args.quick else 128), generator=torch.Generator().manual_seed(args.seed)
    )
    results = []
    seconds = []

    def steps() -> str:
        shape, model = a_model(args, "llama3.2-1b", dtype)
        masked = MaskedModel(model, common.magnitude_masks(model), LinearSpace(2, 4), 1.0)
        learn = common.forward_step(masked)
        losses = [learn(batch) for _ in range(3)]
        seconds.append(common.median_s(lambda: learn(batch), args.device))
        bits = torch.cat([bits.cpu() for bits in masked.bits().values()])
        results.append((losses, bits))
        return shape

    shape = steps()  # without deterministic algorithms
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            steps()
            steps()
    finally:
        torch.use_deterministic_algorithms(False)
    (losses, bits), (again, other) = results[1:]
    nondeterministic = [str(one.message) for one in warned if "deterministic" in str(one.message)]
    yield (
        {
            "what": f"train.py's step, {shape}",
            "the same losses twice": int(losses == again),
            "the same masks twice": int(torch.equal(bits, other)),
            "warnings of operations": len(nondeterministic),
            "step (s)": seconds[1],
            "of a step without": seconds[1] / seconds[0],
        },
        {
            "the same losses twice": (1, 1),
            "the same masks twice": (1, 1),
            "warnings of operations": (0, 0),
        },
    )


def float16_gradient(args: argparse.Namespace) -> Rows:
    """Compare a weight's gradient, of float16 tensors whose sum over tokens overflows float16, with
    float64."""
    generator = torch.Generator().manual_seed(args.seed)
    tokens, outputs, inputs = (256, 64, 32) if args.quick else (4096, 1024, 512)
    upstream = (torch.randn(tokens, outputs, generator=generator) + 4).half().mul_(50)
    x = (torch.randn(tokens, inputs, generator=generator) + 4).half().mul_(10)
    exact = upstream.double().T @ x.double()
    found = weight_gradient(upstream.to(args.device), x.to(args.device)).cpu().double()
    yield (
        {
            "what": "float16, sums beyond 65504",
            "largest": float(exact.abs().max()),
            "apart (relative)": float(((found - exact).abs() / exact.abs().max()).max()),
        },
        {"apart (relative)": (0, 1e-4), "largest": (65505, float("inf"))},
    )
