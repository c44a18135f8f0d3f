"""torch.compile for functions that run on many shapes, from any thread, with or without a working
compiler.

TORCH_COMPILE_DISABLE=1 in the environment, PyTorch's own switch, has everything run eagerly.
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

MOST_SHAPES = 64  # shapes x dtypes of a model; a function that meets more runs eagerly
# in the names of torch's errors, from 2.6 on and before
TOO_MANY_SHAPES = "RecompileLimit", "CacheLimit"
SLOW_S = 20  # of a compilation, from which on it is told
_thread = threading.local()
eagerly = threading.Event()  # set: everything runs eagerly from here on
failures: list[str] = []  # functions that could not be compiled


def _allow_shapes() -> None:
    """Set torch's limit, which from torch 2.13 on belongs to a thread: backward has threads of its
    own on a GPU."""
    if not getattr(_thread, "allowed", False):
        config = torch._dynamo.config
        # its name until torch 2.6, and another one of recompile_limit since
        config.cache_size_limit = max(config.cache_size_limit, MOST_SHAPES)
        _thread.allowed = True


@lru_cache
def compiled(function: Callable, eager: Callable, any_size: bool = False) -> Callable:
    """`function`, compiled for each shape, or once for all sizes if `any_size`; `eager` if the
    environment says so.

    An error of the compiler is a UserError if an argument is on a GPU, where `eager` takes 25 times
    as long. On a CPU, and where a function meets more than MOST_SHAPES, `eager` runs from then on,
    with a note. A mistake in the function itself is one in `eager`, too, which raises it.
    """
    if "1" in (os.environ.get("TORCH_COMPILE_DISABLE"), os.environ.get("TORCHDYNAMO_DISABLE")):
        return eager
    options = {"max_fusion_size": 10_000}  # one loop, no temporaries
    fast = torch.compile(function, dynamic=any_size, fullgraph=True, options=options)
    broken = []

    def run(*args, **names):
        if not (broken or eagerly.is_set()):
            _allow_shapes()
            began = time.monotonic()
            try:
                result = fast(*args, **names)
                seconds = time.monotonic() - began
                if seconds > SLOW_S:
                    others = "" if any_size else "; other shapes take as long"
                    processes.log(f"{function.__qualname__}: {seconds:.0f} s to compile{others}")
                return result
            except _StopRecomputationError:  # by which checkpointing ends what it recomputes
                raise
            # no compiler, none that works, no Triton, a bug of torch: each has its class
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                broken.append(error)
                failures.append(function.__qualname__)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                if on_gpu(args) and not any(
                    name in type(error).__name__ for name in TOO_MANY_SHAPES
                ):
                    raise UserError(
                        f"torch.compile failed on the GPU ({reason}): install gcc and Python's "
                        "headers (python3-dev), or set TORCH_COMPILE_DISABLE=1 to go on without "
                        "it, which takes 25 times as long"
                    ) from error
                print(
                    f"note: torch.compile failed ({reason}): {function.__qualname__} runs "
                    "eagerly, several times slower; only without a C++ compiler is this expected",
                    file=sys.stderr,
                )
        return eager(*args, **names)

    return run


def on_gpu(given: object) -> bool:
    """Whether an argument, or one in a list or tuple of them, is a tensor on a GPU."""
    if isinstance(given, (list, tuple)):
        return any(on_gpu(one) for one in given)
    return isinstance(given, Tensor) and given.is_cuda


def agree(device: str | None) -> None:
    """Try it in all processes: where one cannot compile, all run eagerly, since compiled functions
    may round otherwise and processes that keep copies of the logits must move them alike."""
    # raised where compiling failed
    compiled(torch.neg, lambda *_: eagerly.set())(torch.ones(2, device=device))
    if [1.0] in processes.all_gather([float(eagerly.is_set())]):
        eagerly.set()
