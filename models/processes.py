"""Several processes that learn one mask: what they exchange and how they stay identical.

    torchrun --nproc_per_node 4 train.py ...
    accelerate launch --num_processes 4 train.py ...     # on GPUs

Forward-only learning exchanges a few numbers per process and step: losses, baseline, time. From
these every process computes the same advantages and updates its own copy of all logits, identical
to the bit: any process can recompute the random numbers that draw the masks. sparsify.py averages
each layer's gradient over the processes while backward continues. With --shard, a process has only
its part of each layer's rows (sharding.py).

torchrun or accelerate starts the processes. This module reads its state from torch.distributed;
without a launcher, a process is rank 0 of 1. Numbers are sent by gloo, which reports a process that
has ended, whereas nccl would abort the others. Tensors on GPUs are sent by nccl.
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

# a process that does not answer for this long counts as lost; some compile for many minutes
TIMEOUT = timedelta(minutes=30)
# the main process may take this long to download a model, generate text or write a state
FETCHING = timedelta(hours=12)

# patient: the group of all processes with FETCHING as its timeout
_groups: dict[str, distributed.ProcessGroup] = {}


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Join the processes of the launcher, if there is one, for the duration of the block.

    Yields the device that this process has to use: `device` itself if it is alone. Raises UserError
    for device "auto" with several processes, and if another process is lost or hangs.
    """
    if started() == 1:
        yield device
        return
    if device == "auto":
        raise UserError(
            "--device auto gives all GPUs to one process: leave it out, or start one process"
        )
    with _reported():
        yield _begin(on_cpu=not torch.cuda.is_available() or str(device).startswith("cpu"))
    wait_for_main()  # the main process may still be writing
    distributed.destroy_process_group()
    # torch's threads abort one process in twenty during C++ teardown, and the launcher would report
    # the run as failed
    atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(0)))


def _begin(on_cpu: bool) -> str:
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if not on_cpu and 1 < gpus < local_processes:  # if gpus is 1, each process may see its own
        raise UserError(
            f"{local_processes} processes were started on a machine with {gpus} GPUs: start at "
            "most one per GPU"
        )
    state = PartialState(
        cpu=on_cpu, timeout=TIMEOUT, **({} if on_cpu else {"backend": "cpu:gloo,cuda:nccl"})
    )
    _groups["patient"] = distributed.new_group(timeout=FETCHING, backend="gloo")
    # everything is copied to "cpu", and "cpu:0" would count as a different device
    return "cpu" if state.device.type == "cpu" else str(state.device)


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        lines = str(error).strip().splitlines()  # nccl gives the reason in the last
        raise UserError(
            f"process {rank()} lost another process, which has ended, hangs or uses the same GPU "
            f"({'; '.join(line[:160] for line in dict.fromkeys((lines[0], lines[-1])))})"
        ) from error


def started() -> int:
    """Return how many processes the launcher started, joined or not; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that have joined; 1 without a launcher."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the main process, which writes files and messages."""
    return rank() == 0


def log(message: str) -> None:
    """Print a message to stderr, once for all processes."""
    note(message)


# --------------------------------------------------------------------------------------------------
# in order


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process run the block first, however long it takes, then the others; all leave
    it together."""
    if not is_main():
        wait_for_main()
    yield
    if is_main():
        wait_for_main()
    wait_for_all()


def wait_for_main() -> None:
    """Have the other processes wait for the main one, up to FETCHING, for instance while it writes.
    The main process waits only TIMEOUT for them, since they do nothing else."""
    if world_size() > 1:
        distributed.monitored_barrier(_groups["patient"], TIMEOUT if is_main() else FETCHING)


def wait_for_all() -> None:
    """Wait until all processes arrive, each up to FETCHING."""
    if world_size() > 1:
        distributed.barrier(_groups["patient"])


# --------------------------------------------------------------------------------------------------
# numbers and tensors


def split(items: Sequence | Tensor) -> Sequence | Tensor:
    """Return this process's part of a sequence that all processes have. The parts are contiguous,
    in the order of the processes."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def all_gather(values: list[float]) -> list[list[float]]:
    """Return the values of all processes, in their order, as float64. Every process has to give
    equally many."""
    if world_size() == 1:
        return [values]
    own_values = torch.tensor(values, dtype=torch.float64)
    gathered = [torch.empty_like(own_values) for _ in range(world_size())]
    distributed.all_gather(gathered, own_values)
    return [numbers.tolist() for numbers in gathered]


def broadcast_float(value: float) -> float:
    """Return the main process's value, such as a time, in all processes."""
    return all_gather([value])[0][0]


def mean(values: list[float]) -> float:
    """Return the mean of the values of all processes, which may give different numbers of values.
    The mean is rounded once, so it does not depend on which process gives which value."""
    counts = [int(count) for (count,) in all_gather([len(values)])]
    gathered = all_gather([*values, *[0.0] * (max(counts) - len(values))])
    return fmean([value for numbers, count in zip(gathered, counts) for value in numbers[:count]])


def check_same(text: str, what: str) -> None:
    """Raise UserError unless this text is the same in all processes. what: its name in the
    message."""
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits are exact in float64
    digests = all_gather([float(digest)])
    differing = [str(number) for number, values in enumerate(digests) if values != digests[0]]
    if differing:
        raise UserError(
            f"{what} of process {', '.join(differing)} differ from those of process 0; start all "
            "processes with the same files, flags, library versions and kind of device"
        )


def broadcast_(tensor: Tensor) -> None:
    """Copy the main process's values of a contiguous tensor to all processes, in place."""
    if world_size() > 1:
        distributed.broadcast(tensor.view(torch.uint8), 0)


def all_reduce_mean_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to average a tensor over the processes, in place. Return a function that waits for the
    result and returns it."""
    tensor /= world_size()
    work = distributed.all_reduce(tensor, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return tensor

    return wait
