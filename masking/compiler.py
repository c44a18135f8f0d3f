"""torch.compile for functions that run on many shapes, from any thread, with or without a working
compiler.

With TORCH_COMPILE_DISABLE=1 in the environment, PyTorch's own switch, everything runs eagerly.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache

from models import processes
from utils import UserError, is_out_of_memory

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

MOST_SHAPES = 64  # combinations of shapes and dtypes; a function that meets more runs eagerly
# parts of the names of torch's errors: since torch 2.6, and before
TOO_MANY_SHAPES = "RecompileLimit", "CacheLimit"
SLOW_S = 20  # seconds; compilations that take longer are reported
_thread = threading.local()
eagerly = threading.Event()  # once set, everything runs eagerly
failures: list[str] = []  # functions that could not be compiled


def _allow_shapes() -> None:
    """Raise torch's limit on recompilations. Since torch 2.13 it is per thread, and backward passes
    on a GPU have threads of their own."""
    if not getattr(_thread, "allowed", False):
        config = torch._dynamo.config
        # an alias of recompile_limit since torch 2.6
        config.cache_size_limit = max(config.cache_size_limit, MOST_SHAPES)
        _thread.allowed = True


@lru_cache
def compiled(function: Callable, eager: Callable, any_size: bool = False) -> Callable:
    """Return `function` compiled for each shape, or once for all sizes if `any_size`. Return
    `eager` if the environment disables compilation.

    Raises UserError if the compiler fails and an argument is on a GPU, where `eager` takes 25 times
    as long. If the compiler fails on a CPU, or the function meets more than MOST_SHAPES, `eager`
    runs from then on, and a note is printed. An error in the function itself is raised by `eager`.
    """
    if "1" in (os.environ.get("TORCH_COMPILE_DISABLE"), os.environ.get("TORCHDYNAMO_DISABLE")):
        return eager
    options = {"max_fusion_size": 10_000}  # one loop, no temporaries
    fast = torch.compile(function, dynamic=any_size, fullgraph=True, options=options)
    errors = []

    def run(*args, **kwargs):
        if not (errors or eagerly.is_set()):
            _allow_shapes()
            start = time.monotonic()
            try:
                result = fast(*args, **kwargs)
                seconds = time.monotonic() - start
                if seconds > SLOW_S:
                    others = "" if any_size else "; other shapes take as long"
                    processes.log(f"{function.__qualname__}: {seconds:.0f} s to compile{others}")
                return result
            except _StopRecomputationError:  # how checkpointing ends a recomputation
                raise
            # a missing or broken compiler, no Triton, a bug in torch: each has its own class
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                errors.append(error)
                failures.append(function.__qualname__)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                if on_gpu(args) and not any(
                    name in type(error).__name__ for name in TOO_MANY_SHAPES
                ):
                    raise UserError(
                        f"torch.compile failed on the GPU ({reason}): install gcc and Python's "
                        "headers (python3-dev), or set TORCH_COMPILE_DISABLE=1 to run without it, "
                        "which takes 25 times as long"
                    ) from error
                print(
                    f"note: torch.compile failed ({reason}): {function.__qualname__} runs "
                    "eagerly, several times slower; this is expected only without a C++ compiler",
                    file=sys.stderr,
                )
        return eager(*args, **kwargs)

    return run


def on_gpu(argument: object) -> bool:
    """Return whether an argument is a tensor on a GPU, or a list or tuple that contains one."""
    if isinstance(argument, (list, tuple)):
        return any(on_gpu(item) for item in argument)
    return isinstance(argument, Tensor) and argument.is_cuda


def agree(device: str | None) -> None:
    """Try to compile in all processes; if one of them cannot, make all run eagerly. Compiled
    functions may round differently, and processes with copies of the logits must move them alike.
    """
    # the eager function sets the event if compilation fails
    compiled(torch.neg, lambda *_: eagerly.set())(torch.ones(2, device=device))
    if [1.0] in processes.all_gather([float(eagerly.is_set())]):
        eagerly.set()
