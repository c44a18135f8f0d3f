"""Several processes that learn one mask: what they exchange, and that they stay the same.

    torchrun --nproc_per_node 4 train.py ...         or, on GPUs, accelerate launch --num_processes 4 train.py ...

Forward-only learning needs a few numbers a process and step: its losses, its baseline, the time. From these every
process computes the same advantages and moves its own copy of all logits alike, to the bit: masks are drawn by numbers
that any process can compute again. straight_through averages each layer's gradient over the processes while backward
goes on. With --shard a process has its part of each layer's rows only, and the masked rows of all are gathered when it
computes.

The processes are started by torchrun or accelerate and talk through torch.distributed. Numbers go by gloo, which
notices a process that has gone and says so, where nccl would abort this one; tensors on GPUs go by nccl.
"""
import atexit
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean

from utils import UserError

import torch
from accelerate import PartialState
from torch import Tensor, distributed

# by their names in torch 2.13, or before
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


LOADING = timedelta(hours=12)  # for all processes to load a model, one after the other


class Shard:
    """One process's part of a 1-D tensor that all processes together have, as a state is saved and read."""

    def __init__(self, part: Tensor, group: "ProcessGroup"):
        self.part, self.group = part, group
        self.dtype, self.itemsize = part.dtype, part.itemsize
        self.shape, self.nbytes = [len(part) * group.size], part.nbytes * group.size

    def whole(self) -> Tensor:
        """Gathered; all processes have to ask at once."""
        return self.group.all_gather_tensor(self.part)

    def read(self, stored: Tensor) -> Tensor:
        """This process's part of what is stored of the whole, a tensor or a slice of a file."""
        return stored[len(self.part) * self.group.rank:len(self.part) * (self.group.rank + 1)]


class ProcessGroup:
    """This process, number `rank` of `size`; alone (0 of 1) where no launcher started it.

    device: the run's --device, None where it is left to the machine. timeout_s: how long a process that does not answer
    is waited for before the run ends with an error.
    """

    def __init__(self, device: str | None = None, timeout_s: float = 600.0):
        self.rank, self.size, self.device = 0, 1, None
        self.sent_bytes = 0  # handed to torch.distributed by this process
        self._finished = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._begin(not torch.cuda.is_available() or str(device).startswith("cpu"), timedelta(seconds=timeout_s))
            atexit.register(self._leave)

    def _begin(self, on_cpu: bool, timeout: timedelta) -> None:
        backend = {} if on_cpu else {"backend": "cpu:gloo,cuda:nccl"}
        with self._reported():
            state = PartialState(cpu=on_cpu, timeout=timeout, **backend)
            # a large model takes longer to load than a process may take to answer; one that has gone is noticed at once
            self._patient = distributed.new_group(timeout=LOADING, backend="gloo")
        self.rank, self.size, self.device = state.process_index, state.num_processes, state.device
        if self.device.type == "cpu":  # cpu:0 would be another device than cpu, to which everything is copied
            self.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def log(self, message: str) -> None:
        """To stderr, once however many processes there are."""
        if self.is_main:
            print(message, file=sys.stderr)

    # ----------------------------------------------------------------------------------------------------- in order

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_gather([0.0])

    @contextmanager
    def main_before_others(self) -> Iterator[None]:
        """Inside, the main process goes first; all leave together."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()
        self.barrier()

    @contextmanager
    def one_at_a_time(self, needed: bool = True) -> Iterator[None]:
        """Inside, one process at a time, in their order; all leave together."""
        for _ in range(self.rank if needed else 0):
            self._wait_for_turn()
        yield
        for _ in range(self.size - self.rank if needed else 0):
            self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        if self.size > 1:
            with self._reported():
                distributed.barrier(self._patient)

    # ------------------------------------------------------------------------------------------------------ numbers

    def split(self, items: Sequence | Tensor) -> Sequence | Tensor:
        """This process's part of a sequence that all of them have: the parts follow one another in their order."""
        size = len(items)
        return items[size * self.rank // self.size : size * (self.rank + 1) // self.size]

    def all_gather(self, values: list[float | None]) -> list[list[float | None]]:
        """The numbers of all processes, in their order; each process gives as many, float64, and None in the same
        places."""
        if self.size == 1:
            return [values]
        given = [0.0 if value is None else value for value in values]
        mine = torch.tensor(given, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self._reported():
            distributed.all_gather(everyone, mine)
        self.sent_bytes += mine.nbytes
        return [[None if value is None else number for value, number in zip(values, numbers.tolist())]
                for numbers in everyone]

    def mean(self, values: list[float]) -> float:
        """The mean of all numbers of all processes, which may give different numbers of them. It is rounded once, so
        that it does not depend on who gives which."""
        counts = [int(count) for count, in self.all_gather([len(values)])]
        found = self.all_gather([*values, *[0.0] * (max(counts) - len(values))])
        return fmean([value for numbers, count in zip(found, counts) for value in numbers[:count]])

    def check_same(self, text: str, what: str) -> None:
        """UserError unless this text is the same in all processes."""
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits are exact in float64
        found = self.all_gather([float(digest)])
        odd = [str(rank) for rank, numbers in enumerate(found) if numbers != found[0]]
        if odd:
            raise UserError(f"{what} of process {', '.join(odd)} differ from those of process 0; start all processes "
                            "with the same files, flags, library versions and kind of device")

    # ------------------------------------------------------------------------------------------------------ tensors

    def reduce_async(self, tensor: Tensor, scatter: bool = False) -> Callable[[], Tensor]:
        """Start to form a tensor's mean over the processes, in its place; call what is returned to wait for it and have
        it. `scatter`: only this process's part of it, the tensor divided evenly along its first dimension."""
        if self.size == 1:
            return lambda: tensor
        self.sent_bytes += tensor.nbytes
        tensor /= self.size
        mean = torch.empty_like(tensor[:len(tensor) // self.size]) if scatter else tensor
        with self._reported():
            work = (_reduce_scatter(mean, tensor, async_op=True) if scatter else
                    distributed.all_reduce(mean, async_op=True))

        def wait():
            with self._reported():
                work.wait()
            return mean
        return wait

    def all_gather_tensor(self, part: Tensor, whole: Tensor | None = None) -> Tensor:
        """All processes' parts, which are of one size, one after another, 1-D: in `whole`, of which this process's part
        may be a view, or in a new tensor."""
        whole = part.new_empty(part.numel() * self.size) if whole is None else whole
        self.sent_bytes += part.nbytes
        with self._reported():  # as bytes: not every backend knows every dtype
            _all_gather(whole.view(torch.uint8), part.reshape(-1).view(torch.uint8))
        return whole

    # ---------------------------------------------------------------------------------------------- beginning and end

    def __enter__(self):
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self.size > 1 and error is None:
            self.barrier()  # no process is the last that writes
            distributed.destroy_process_group()
            self._finished = True

    def _leave(self) -> None:
        """At the process's very end: torch's threads abort one process in twenty while C++ is torn down, and the
        launcher would call the run failed."""
        if self._finished:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)

    @contextmanager
    def _reported(self):
        """Turns a process that has gone or hangs into one line; the launcher ends the others."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"process {self.rank} has lost another, which has ended or hangs "
                            f"({str(error).strip().splitlines()[0][:160]})") from error
