"""Several processes that learn one mask: what they exchange, and that they stay the same.

    torchrun --nproc_per_node 4 train.py ...
    accelerate launch --num_processes 4 train.py ...     # on GPUs

Forward-only learning needs a few numbers a process and step: its losses, its baseline, the time.
From these every process computes the same advantages and moves its own copy of all logits alike, to
the bit: masks are drawn by numbers that any process can compute again. sparsify.py averages each
layer's gradient over the processes while backward goes on. With --shard a process has its part of
each layer's rows only (sharding.py).

torchrun or accelerate starts the processes; they talk through torch.distributed, whose state this
module is a view of: without a launcher a process is alone, number 0 of 1. Numbers go by gloo, which
notices a process that has gone and says so, where nccl would abort this one; tensors on GPUs go by
nccl.
"""

import atexit
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean

from utils import UserError, note

import torch
from accelerate import PartialState
from torch import Tensor, distributed

# a process that does not answer for so long has gone; some compile for many minutes
TIMEOUT = timedelta(minutes=30)
# for the main process to fetch a model, generate text or write a state
FETCHING = timedelta(hours=12)

# patient: of all processes, with FETCHING as its timeout
_groups: dict[str, distributed.ProcessGroup] = {}


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Inside, this process is one of those that the launcher has started, if one did. Yields the
    device it is to use: `device` itself where it is alone. A process that has gone or hangs is
    reported by one line."""
    if started() == 1:
        yield device
        return
    if device == "auto":
        raise UserError(
            "--device auto gives all GPUs to one process: leave it out, or start one process"
        )
    with _reported():
        yield _begin(on_cpu=not torch.cuda.is_available() or str(device).startswith("cpu"))
    wait_for_main()  # no process is the last that writes
    distributed.destroy_process_group()
    # torch's threads abort one process in twenty while C++ is torn down, and the launcher would
    # call the run failed
    atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(0)))


def _begin(on_cpu: bool) -> str:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if not on_cpu and 1 < gpus < here:  # where one is seen, each may see its own
        raise UserError(
            f"{here} processes were started on a machine of {gpus} GPUs: start at most one for "
            "each GPU"
        )
    state = PartialState(
        cpu=on_cpu, timeout=TIMEOUT, **({} if on_cpu else {"backend": "cpu:gloo,cuda:nccl"})
    )
    _groups["patient"] = distributed.new_group(timeout=FETCHING, backend="gloo")
    # cpu:0 would be another device than cpu, to which everything is copied
    return "cpu" if state.device.type == "cpu" else str(state.device)


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        said = str(error).strip().splitlines()  # of nccl the last line has the reason
        raise UserError(
            f"process {rank()} has lost another, which has ended, hangs or uses the same GPU "
            f"({'; '.join(line[:160] for line in dict.fromkeys((said[0], said[-1])))})"
        ) from error


def started() -> int:
    """How many processes the launcher has started, joined or not; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def log(message: str) -> None:
    """To stderr, once however many processes there are."""
    note(message)


# --------------------------------------------------------------------------------------------------
# in order


@contextmanager
def main_process_first() -> Iterator[None]:
    """Inside, the main process goes first, as long as it takes; all leave together."""
    if not is_main():
        wait_for_main()
    yield
    if is_main():
        wait_for_main()
    wait_for_all()


def wait_for_main() -> None:
    """The others wait for the main process, however long it is writing; it waits TIMEOUT for them,
    as they have nothing else to do."""
    if world_size() > 1:
        distributed.monitored_barrier(_groups["patient"], TIMEOUT if is_main() else FETCHING)


def wait_for_all() -> None:
    """Wait for all processes, however long each takes."""
    if world_size() > 1:
        distributed.barrier(_groups["patient"])


# --------------------------------------------------------------------------------------------------
# numbers and tensors


def split(items: Sequence | Tensor) -> Sequence | Tensor:
    """This process's part of a sequence that all of them have: the parts follow one another in
    their order."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def all_gather(values: list[float]) -> list[list[float]]:
    """The numbers of all processes, in their order; each gives as many, float64."""
    if world_size() == 1:
        return [values]
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    distributed.all_gather(everyone, mine)
    return [numbers.tolist() for numbers in everyone]


def broadcast_float(value: float) -> float:
    """The main process's value, such as a time, in all processes."""
    return all_gather([value])[0][0]


def mean(values: list[float]) -> float:
    """The mean of all numbers of all processes, which may give different numbers of them. It is
    rounded once, so that it does not depend on who gives which."""
    counts = [int(count) for (count,) in all_gather([len(values)])]
    found = all_gather([*values, *[0.0] * (max(counts) - len(values))])
    return fmean([value for numbers, count in zip(found, counts) for value in numbers[:count]])


def check_same(text: str, what: str) -> None:
    """UserError unless this text is the same in all processes."""
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits are exact in float64
    found = all_gather([float(digest)])
    odd = [str(number) for number, values in enumerate(found) if values != found[0]]
    if odd:
        raise UserError(
            f"{what} of process {', '.join(odd)} differ from those of process 0; start all "
            "processes with the same files, flags, library versions and kind of device"
        )


def broadcast_(tensor: Tensor) -> None:
    """Make a contiguous tensor the main process's in all processes, in place."""
    if world_size() > 1:
        distributed.broadcast(tensor.view(torch.uint8), 0)


def all_reduce_mean_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to form a tensor's mean over the processes, in place; call what is returned to wait for
    it and have it."""
    tensor /= world_size()
    work = distributed.all_reduce(tensor, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return tensor

    return wait
