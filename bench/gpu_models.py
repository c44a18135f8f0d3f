"""Rows of gpu.py about whole models: seconds, memory and waiting of a step, and methods that run before learning."""
import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import common

import torch
from torch import Tensor, nn

from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers, weight_matrix
from models.loss import batch_loss
from pruning import sparsegpt, swaps
from pruning.one_shot import largest
from training.straight_through import StraightThrough


def _timed(function: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device waited for."""
    return common.median_s(function, device, repeats=1, warm_up=0)


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """2:4 masks that cost nothing to make: the first two weights of each block."""
    shapes = {name: weight_matrix(module).shape for name, module in find_layers(model).items()}
    return {name: torch.arange(shape[1]).remainder(4).lt(2).expand(shape) for name, shape in shapes.items()}


def _memory(device: str) -> dict:
    if not device.startswith("cuda"):
        return {"allocated (GiB)": "not measured", "reserved (GiB)": "not measured"}
    return {"allocated (GiB)": torch.cuda.max_memory_allocated() / 2**30,
            "reserved (GiB)": torch.cuda.max_memory_reserved() / 2**30}


def _waits(function: Callable[[], object], device: str) -> int | str:
    """How often the host waits for the device in one call."""
    if not device.startswith("cuda"):
        return "not measured"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        function()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def _model(args: argparse.Namespace) -> tuple[nn.Module, str]:
    shape = "tiny" if args.quick else "llama2-7b" if args.device.startswith("cuda") else "smollm2-135m"
    dtype = torch.float16 if args.device.startswith("cuda") else torch.bfloat16
    if args.device.startswith("cuda"):
        gc.collect()  # a model goes with its cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return common.random_llama(shape, args.device, dtype, args.seed), shape


def step(args: argparse.Namespace) -> Iterator[dict]:
    """Forward-only learning as in the paper: 32 x 128 tokens, float16 logits."""
    model, shape = _model(args)
    tokens = torch.randint(0, 256, (4 if args.quick else 32, 128), device=args.device)
    forward_s = common.median_s(lambda: batch_loss(model, tokens), args.device)
    began = time.perf_counter()
    masked = MaskedModel(model, _masks(model), LinearSpace(2, 4), logits_dtype=torch.float16)
    made_s = time.perf_counter() - began

    def learn() -> None:
        masked.update(0.01)
        batch_loss(model, tokens)
    compile_s, step_s = _timed(learn, args.device), common.median_s(learn, args.device)
    yield {"what": f"{shape}: {tokens.numel()} tokens", "masked model made (s)": made_s,
           "first step, compiling (s)": compile_s, "forward (s)": forward_s, "step (s)": step_s,
           "of a forward": step_s / forward_s, "waits": _waits(learn, args.device), **_memory(args.device)}


def gradients(args: argparse.Namespace) -> Iterator[dict]:
    """straight_through with checkpointing and distillation: 8 x 128 tokens, float32 logits."""
    model, shape = _model(args)
    batch = torch.randint(0, 256, (2 if args.quick else 8, 128), device=args.device)
    masked = MaskedModel(model, _masks(model), LinearSpace(2, 4))
    learner = StraightThrough(masked, checkpointing=True, distill=1.0)
    compile_s = _timed(lambda: learner.learn(batch, 0.01), args.device)
    step_s = common.median_s(lambda: learner.learn(batch, 0.01), args.device, repeats=3)
    yield {"what": f"{shape}: {batch.numel()} tokens", "first step, compiling (s)": compile_s, "step (s)": step_s,
           "blocks not finite": int(learner._not_finite), "waits": _waits(lambda: learner.learn(batch, 0.01),
                                                                         args.device), **_memory(args.device)}


class Stack(nn.Module):
    """Linears of nine shapes, one after another, and a head: what MaskedModel and StraightThrough want of a model."""

    def __init__(self, device: str, dtype: torch.dtype):
        super().__init__()
        widths = [64, 96, 128, 160, 192, 224, 256, 320, 384, 448]
        self.embeddings, self.config = nn.Embedding(256, widths[0]), SimpleNamespace(max_position_embeddings=None)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], 256, bias=False)
        self.to(device, dtype).requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return SimpleNamespace(logits=self.head(x))


def shapes(args: argparse.Namespace) -> Iterator[dict]:
    """Nine shapes of layers, learned from gradients: more than torch compiles of one function by itself."""
    torch.manual_seed(args.seed)
    model = Stack(args.device, torch.bfloat16)
    masked = MaskedModel(model, _masks(model), LinearSpace(2, 4), magnitude=1.0)
    learner, counters = StraightThrough(masked), torch._dynamo.utils.counters
    counters.clear()
    batch = torch.randint(0, 256, (2, 32), device=args.device)
    losses = [learner.learn(batch, 0.5) for _ in range(4)]
    yield {"what": "nine shapes", "compiled": counters["stats"]["unique_graphs"], "loss": losses[0], "after 3 steps":
           losses[-1]}


def pruning(args: argparse.Namespace) -> Iterator[dict]:
    """Seconds of the methods that run before learning, on one square layer."""
    size = 128 if args.quick else 4096
    generator = torch.Generator(args.device).manual_seed(args.seed)
    weight = torch.randn(size, size, generator=generator, device=args.device)
    inputs = torch.randn(2 * size, size, generator=generator, device=args.device)
    hessian = inputs.T @ inputs
    mask = largest(weight.abs() * inputs.norm(dim=0), 2, 4)
    for name, run in (("swaps, one sweep", lambda: swaps.refine_by_swaps(weight, mask, hessian, 4, 1)),
                      ("SparseGPT", lambda: sparsegpt.solve(weight, hessian, (2, 4)))):
        yield {"what": f"{name}, {size} x {size}", "s": common.median_s(run, args.device, repeats=2)}
