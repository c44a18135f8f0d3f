"""Rows of gpu.py about one layer: do kernels agree, are draws right, how many are launched, how long do they take."""
import argparse
from collections.abc import Callable, Iterator

import common
from utils import DTYPES

import torch
from distribution import measure
from torch import Tensor

import pge
from masking.block_bits import mask_to_bits
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace

PATTERNS = [(1, 4), (2, 4), (2, 8), (4, 8)]


class Layer:
    """Logits, bits, weight and gradient of one layer, the same on every device."""

    def __init__(self, shape: tuple[int, int], n: int, m: int, weight_dtype: torch.dtype, logits_dtype: torch.dtype,
                 device: str, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        blocks = shape[0] * shape[1] // m
        mask = pge.mode(torch.rand(blocks, m, generator=generator), n)
        noise = torch.randn(blocks, m, generator=generator)
        self.logits = [(3 * mask[:, i] + noise[:, i]).to(device, logits_dtype) for i in range(m)]
        self.bits = mask_to_bits(mask).to(device)
        self.weight = torch.randn(shape, generator=generator).to(device, weight_dtype)
        self.gradient = torch.randn(shape, generator=generator).to(device, weight_dtype)
        self.out = torch.empty_like(self.weight).view(-1)
        self.key = torch.nn.functional.pad(layer_keys(seed, 7, 1), (0, 2))[0].to(device)
        self.coefficient = torch.tensor(0.7, device=device)
        self.scale = torch.tensor([3.0, 0.05, 1.0, 0.95], device=device)
        self.mean_squares = torch.full((blocks,), -1.0, device=device)

    def update(self, kernels: Kernels) -> None:
        kernels.update(self.logits, self.bits, self.weight.view(-1), self.out, self.coefficient, self.key)

    def vjp(self, kernels: Kernels) -> Tensor:
        return kernels.vjp(self.logits, self.bits, self.weight, self.gradient, None, self.scale, self.key)

    def vjp_by_block(self, kernels: Kernels) -> Tensor:
        return kernels.vjp(self.logits, self.bits, self.weight, self.gradient, self.mean_squares, self.scale, self.key)

    def write_soft(self, kernels: Kernels) -> None:
        kernels.write_soft(self.logits, self.weight.view(-1), self.out, self.coefficient)

    def passes(self) -> list[tuple[str, Callable[[Kernels], object]]]:
        """Each kernel of a step, by its name."""
        return [("update", self.update), ("vjp", self.vjp), ("vjp by block", self.vjp_by_block),
                ("soft weights", self.write_soft)]


def _ulps(a: Tensor, b: Tensor) -> float:
    """The most units in the last place that two tensors are apart."""
    a, b = a.cpu(), b.cpu()
    unit = torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()).float().clamp(min=1.0)
    return float(((a.float() - b.float()).abs() / unit).max())


def agreement(args: argparse.Namespace) -> Iterator[dict]:
    """Compiled on the device against eager there and on the CPU: masks that differ, logits apart, weights written."""
    shape = (256, 512) if args.quick else (2048, 5632)
    dtypes = [torch.float32] if args.quick else list(DTYPES.values())
    for n, m in PATTERNS[1:2] if args.quick else PATTERNS:
        for weight_dtype in dtypes:
            for logits_dtype in dtypes:
                found = []
                for device, mode in ((args.device, "compiled"), (args.device, "eager"), ("cpu", "eager")):
                    layer, kernels = Layer(shape, n, m, weight_dtype, logits_dtype, device), None
                    kernels = Kernels(LinearSpace(n, m), mode)
                    layer.update(kernels)
                    drawn = layer.bits.cpu().clone()
                    layer.vjp(kernels)
                    layer.write_soft(kernels)
                    found.append((drawn, layer.logits, layer.bits.cpu(), layer.out))
                ours, eager, cpu = found
                yield {"what": f"{n}:{m}, weights {weight_dtype}, logits {logits_dtype}".replace("torch.", ""),
                       "masks apart from eager": float((ours[0] != eager[0]).float().mean()),
                       "from the CPU's": float((ours[0] != cpu[0]).float().mean()),
                       "logits apart, ulp": max(map(_ulps, ours[1], eager[1])),
                       "from the CPU's, ulp": max(map(_ulps, ours[1], cpu[1])),
                       "most probable masks apart": float((ours[2] != cpu[2]).float().mean()),
                       "soft weights from the CPU's, ulp": _ulps(ours[3], cpu[3])}


def draws(args: argparse.Namespace) -> Iterator[dict]:
    """Draws of the compiled kernel against exact probabilities."""
    count, blocks = (2 * 10**6, 2**20) if args.quick else (10**8, 2**22)
    for case in [(2, 4, 10)] if args.quick else [(2, 4, 0), (2, 4, 10), (1, 4, 10), (4, 8, 10)]:
        yield measure(*case, count, blocks, args.seed, args.device)


def profile(args: argparse.Namespace) -> Iterator[dict]:
    """Kernels and copies that one pass launches, counted by the profiler."""
    if not args.device.startswith("cuda"):
        yield {"what": "update and vjp", "kernels": "not measured", "copies": "not measured"}
        return
    for n, m, dtype in [(2, 4, torch.bfloat16), (4, 8, torch.bfloat16), (2, 4, torch.float32)]:
        layer, kernels = Layer((1024, 1024), n, m, dtype, torch.float32, args.device), Kernels(LinearSpace(n, m))
        for name, run in layer.passes():
            run(kernels)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                run(kernels)
                torch.cuda.synchronize()
            events = [event.name for event in found.events()]
            copies = sum("memcpy" in event.lower() or "memset" in event.lower() for event in events)
            yield {"what": f"{name}, {n}:{m}, {str(dtype).removeprefix('torch.')}", "kernels": len(events) - copies,
                   "copies": copies}


def kernels(args: argparse.Namespace) -> Iterator[dict]:
    """A kernel's time, calls queued one after another, beside that of a copy of the bytes that it reads and writes."""
    shape, repeats = ((512, 512), 3) if args.quick else ((4096, 11008), 20)
    for n, m in [(2, 4)] if args.quick else PATTERNS:
        layer = Layer(shape, n, m, torch.bfloat16, torch.float16, args.device)
        ours = Kernels(LinearSpace(n, m))
        copies = [(tensor, tensor.clone()) for tensor in (*layer.logits, layer.bits, layer.weight)]
        weights = shape[0] * shape[1]
        copy_s = common.queued_s(lambda copies=copies: [a.copy_(b) for a, b in copies], args.device, repeats)
        for name, run in layer.passes():
            kernel_s = common.queued_s(lambda run=run, ours=ours: run(ours), args.device, repeats)
            yield {"what": f"{name}, {n}:{m}, {shape[0]} x {shape[1]}", "ms": 1e3 * kernel_s, "of a copy":
                   kernel_s / copy_s, "ns a weight": 1e9 * kernel_s / weights}
