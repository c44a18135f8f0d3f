"""Checks the kernels of one layer on a device: their results, number and speed. bench/gpu.py has
the command and the tables."""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import common
import pge
from masking.block_bits import as_words, mask_to_bits
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace
from models.machine import DTYPES

import torch
from torch import Tensor
from torch.autograd import DeviceType

GAPS = {(2, 4): [10, 0, 16], (1, 4): [10], (4, 8): [10]}  # N:M -> gaps of the logits of `draws`
NOT_MEASURED = "not measured"
MOST_BLOCKS_APART = 1e-4
MOST_ULPS = 256
LEAST_P = 1e-5
# (row: column -> cell, limits: column -> (lowest, highest))
Rows: TypeAlias = Iterator[tuple[dict, dict]]


class Layer:
    """Logits, bits, weight and gradient of one layer, the same on every device, with a method for
    each kernel of a step."""

    def __init__(
        self,
        shape: tuple[int, int],
        n: int,
        m: int,
        weight_dtype: torch.dtype,
        logits_dtype: torch.dtype,
        device: str,
        backend: str = "compiled",
    ):
        generator = torch.Generator().manual_seed(0)
        blocks = shape[0] * shape[1] // m
        mask = pge.mode(torch.rand(blocks, m, generator=generator), n)
        noise = torch.randn(blocks, m, generator=generator)
        self.kernels = Kernels(LinearSpace(n, m), backend)
        self.logits = [(3 * mask[:, i] + noise[:, i]).to(device, logits_dtype) for i in range(m)]
        self.bits = mask_to_bits(mask).to(device)
        self.weight = torch.randn(shape, generator=generator).to(device, weight_dtype)
        self.gradient = torch.randn(shape, generator=generator).to(device, weight_dtype)
        # the first block has a gradient that is not finite, so it must not move
        self.gradient.view(-1)[:2] = torch.tensor([torch.nan, torch.inf])
        self.out = torch.empty_like(self.weight).view(-1)
        self.key = layer_keys(0, 7, 1)[0].to(device)
        self.coefficient = torch.tensor(0.7, device=device)
        self.scale = torch.tensor([3.0, 0.05, 0.5], device=device)
        self.mean_squares = torch.rand(blocks, generator=generator).to(device, torch.bfloat16)

    def update(self) -> None:
        self.kernels.update(
            self.logits, self.bits, self.weight.view(-1), self.out, self.coefficient, self.key
        )

    def vjp(self) -> None:
        self.kernels.vjp(
            self.logits,
            self.bits,
            self.weight,
            self.gradient,
            self.mean_squares,
            self.scale,
            self.key,
        )

    def write_soft(self) -> None:
        self.kernels.write_soft(self.logits, self.weight.view(-1), self.out, self.scale[2])

    def passes(self) -> dict[str, Callable[[], None]]:
        """Return each kernel of a step, by its name."""
        return {"update": self.update, "vjp": self.vjp, "write soft": self.write_soft}


def ulps_apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, in units in the last place."""
    a = a.cpu()
    b = b.cpu()
    unit = torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()).float().clamp(min=1.0)
    return float(((a.float() - b.float()).abs() / unit).max())


def agreement(
    args: argparse.Namespace, n: int, m: int, weights: list[str], logits: list[str]
) -> Rows:
    """Compare compiled kernels on the device with eager ones there and on the CPU, after one pass
    each, for weights and logits of these dtypes."""
    shape = (256, 512) if args.quick else (2048, 5632)
    cases = [(DTYPES[weight], DTYPES[logit]) for weight in weights for logit in logits]
    for weight_dtype, logits_dtype in cases[:1] if args.quick else cases:
        found = [
            passes(Layer(shape, n, m, weight_dtype, logits_dtype, device, backend))
            for device, backend in (
                (args.device, "compiled"),
                (args.device, "eager"),
                ("cpu", "eager"),
            )
        ]
        row = {
            "what": f"{n}:{m}, weights {weight_dtype}, logits {logits_dtype}".replace("torch.", "")
        }
        limits = {}
        for name, other in zip(("eager", "the CPU"), found[1:]):
            same = found[0]["mask drawn"] == other["mask drawn"]
            for key, ours in found[0].items():
                theirs = other[key]
                is_integer = not ours.is_floating_point()
                is_weight = key == "masked weight"
                if is_weight:
                    ours = ours[same]
                    theirs = theirs[same]
                column = f"{key}: apart from {name}" + (" (share)" if is_integer else " (ulp)")
                row[column] = (
                    float((ours != theirs).float().mean())
                    if is_integer
                    else ulps_apart(ours, theirs)
                )
                limits[column] = (
                    0,
                    0 if is_weight else MOST_BLOCKS_APART if is_integer else MOST_ULPS,
                )
        yield row, limits


def passes(layer: Layer) -> dict[str, Tensor]:
    """Return the results of each kernel of a step, on the CPU."""
    found = {}
    layer.update()
    found |= {
        "mask drawn": layer.bits.cpu().clone(),
        "masked weight": as_words(layer.out, layer.kernels.space.m).cpu().clone(),
        "logits after an update": torch.stack([plane.cpu() for plane in layer.logits]),
    }
    layer.vjp()
    found |= {
        "logits after a vjp": torch.stack([plane.cpu() for plane in layer.logits]),
        "mask of them": layer.bits.cpu(),
    }
    layer.write_soft()
    return found | {"soft weight": layer.out.cpu()}


def draws(args: argparse.Namespace, n: int, m: int) -> Rows:
    """Compare the compiled step's draws with the exact probabilities of the patterns."""
    count, blocks = (4 * 10**6, 2**20) if args.quick else (10**9, 2**22)
    for gap in GAPS[n, m][:1] if args.quick else GAPS[n, m]:
        # the slope gives every pattern its own probability
        one = torch.tensor([float(gap)] * n + [0.0] * (m - n)) + torch.linspace(0, 0.5, m)
        rounds = math.ceil(count / blocks)
        seen = drawn_counts(one, n, blocks, rounds, args.seed, args.device)
        table = pge.patterns(n, m)
        probs = pge.log_prob(one.double().expand(len(table), m), table).exp()
        found, freedom, p = chi_square(
            seen[mask_to_bits(table).long()].double(), probs * blocks * rounds
        )
        yield (
            {
                "what": f"{n}:{m}, gap {gap}",
                "draws": blocks * rounds,
                "left m0 (expected)": float((1 - probs.max()) * blocks * rounds),
                "left m0 (seen)": int(blocks * rounds - seen.max()),
                "chi-square": found,
                "freedom": freedom,
                "p": p,
            },
            {"p": (LEAST_P, 1)},
        )


def drawn_counts(one: Tensor, n: int, blocks: int, rounds: int, seed: int, device: str) -> Tensor:
    """Return how often each pattern is drawn, int64 `[2^M]` indexed by the pattern's bits, on the
    CPU. Each round draws for `blocks` blocks that all have the logits `one`, `[M]`."""
    m = len(one)
    logits = [torch.full((blocks,), value, device=device) for value in one.tolist()]
    bits = mask_to_bits(pge.patterns(n, m)[:1]).expand(blocks).contiguous().to(device)
    weight = torch.ones(blocks * m, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(weight)
    nothing = torch.zeros((), device=device)
    kernels = Kernels(LinearSpace(n, m))
    counts = torch.zeros(2**m, dtype=torch.long, device=device)
    for t in range(rounds):
        kernels.update(logits, bits, weight, out, nothing, layer_keys(seed, t, 1)[0].to(device))
        counts += torch.bincount(bits.int(), minlength=2**m)
    return counts.cpu()


def chi_square(seen: Tensor, expected: Tensor) -> tuple[float, int, float]:
    """Return the chi-square of counts `[patterns]`, its degrees of freedom, and the probability of
    a larger one. Patterns with fewer than 5 expected counts are pooled."""
    kept = expected >= 5
    seen = torch.cat([seen[kept], seen[~kept].sum()[None]])
    expected = torch.cat([expected[kept], expected[~kept].sum()[None]])
    seen = seen[expected >= 5]
    expected = expected[expected >= 5]
    found = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(seen) - 1
    p = torch.special.gammaincc(
        torch.tensor(freedom / 2).double(), torch.tensor(found / 2).double()
    )
    return found, freedom, float(p)


def profile(args: argparse.Namespace, n: int, m: int) -> Rows:
    """Count the kernels and copies that one layer's pass launches: at 2:4 in 16 bits one kernel and
    no copy."""
    if not args.device.startswith("cuda"):
        yield (
            {"what": f"update and vjp, {n}:{m}", "kernels": NOT_MEASURED, "copies": NOT_MEASURED},
            {},
        )
        return
    for dtype in (torch.bfloat16, torch.float32):
        layer = Layer((1024, 1024), n, m, dtype, torch.float32, args.device)
        for name, run in layer.passes().items():
            run()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                run()
                torch.cuda.synchronize()
            events = [
                event.name.lower()
                for event in found.events()
                if event.device_type == DeviceType.CUDA
            ]
            copies = sum("memcpy" in event or "memset" in event for event in events)
            limits = (
                {"kernels": (1, 1), "copies": (0, 0)} if (m, dtype) == (4, torch.bfloat16) else {}
            )
            yield (
                {
                    "what": f"{name}, {n}:{m}, {str(dtype).removeprefix('torch.')}",
                    "kernels": len(events) - copies,
                    "copies": copies,
                },
                limits,
            )


def kernels(args: argparse.Namespace, n: int, m: int) -> Rows:
    """Time each pass, and compare it with a copy of the bytes that it reads and writes."""
    shape, repeats = ((512, 512), 3) if args.quick else ((4096, 11008), 20)
    layer = Layer(shape, n, m, torch.bfloat16, torch.float16, args.device)
    copies = [(tensor, tensor.clone()) for tensor in (*layer.logits, layer.bits, layer.weight)]
    copy_s = common.queued_s(lambda: [a.copy_(b) for a, b in copies], args.device, repeats)
    for name, run in layer.passes().items():
        kernel_s = common.queued_s(run, args.device, repeats)
        yield (
            {
                "what": f"{name}, {n}:{m}, {shape[0]} x {shape[1]}",
                "ms": 1e3 * kernel_s,
                "of a copy": kernel_s / copy_s,
                "ns per weight": 1e9 * kernel_s / layer.weight.numel(),
            },
            {},
        )
