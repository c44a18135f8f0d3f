"""Several processes that learn one mask: what they exchange, and that they stay the same.

    torchrun --nproc_per_node 4 train.py ...         or, on GPUs, accelerate launch --num_processes 4 train.py ...

Forward-only learning needs three numbers a process and step: its loss, its baseline, the time. From these every process
computes the same advantages and moves its own copy of all logits alike, to the bit: masks are drawn by numbers that any
process can compute again. straight_through averages each layer's gradient over the processes while backward goes on.
With --shard a process has its part of each layer's rows only, and the masked rows of all are gathered when it computes.

The processes are started by torchrun or accelerate and talk through torch.distributed: gloo on CPUs, nccl on GPUs.
"""
import atexit
import hashlib
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean

import torch
from torch import Tensor, distributed

from utils import UserError

# by their names in torch 2.13, or before
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Part:
    """One process's part of a 1-D tensor that all processes together have, as a state is saved and read."""

    def __init__(self, part: Tensor, ranks: "Ranks"):
        self.part, self.ranks = part, ranks
        self.dtype, self.itemsize = part.dtype, part.itemsize
        self.shape, self.nbytes = [len(part) * ranks.count], part.nbytes * ranks.count

    def whole(self) -> Tensor:
        """Gathered; all processes have to ask at once."""
        return self.ranks.join(self.part)

    def read(self, stored) -> Tensor:
        """This process's part of what is stored of the whole."""
        return stored[len(self.part) * self.ranks.rank:len(self.part) * (self.ranks.rank + 1)]


class Ranks:
    """This process, number `rank` of `count`; alone (0 of 1) where no launcher started it.

    device: the run's --device, None where it is left to the machine. timeout_s: how long a process that does not answer
    is waited for before the run ends with an error.
    """

    def __init__(self, device: str | None = None, timeout_s: float = 600.0):
        self.rank, self.count, self.device = 0, 1, None
        self.sent_bytes = 0  # handed to torch.distributed by this process
        self._finished = False
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState
            on_cpu = not torch.cuda.is_available() or str(device).startswith("cpu")
            with self._reported():
                state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_s))
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device
            if self.device.type == "cpu":  # cpu:0 would be another device than cpu, to which everything is copied
                self.device = torch.device("cpu")
            atexit.register(self._leave)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @contextmanager
    def first_before_others(self):
        """Inside, the first process goes first; all leave together."""
        if not self.first:
            self.gather([0.0])
        yield
        if self.first:
            self.gather([0.0])
        self.gather([0.0])

    def await_turn(self) -> None:
        """From here on one process at a time, in their order, until each has called `pass_turn`; all leave together."""
        for _ in range(self.rank):
            self.gather([0.0])

    def pass_turn(self) -> None:
        for _ in range(self.count - self.rank):
            self.gather([0.0])

    def share(self, items):
        """This process's part of a sequence that all of them have: the parts follow one another in their order."""
        size = len(items)
        return items[size * self.rank // self.count : size * (self.rank + 1) // self.count]

    def gather(self, values: list[float]) -> list[list[float]]:
        """The numbers of all processes, in their order; each process gives as many, float64."""
        if self.count == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        with self._reported():
            distributed.all_gather(everyone, mine)
        self.sent_bytes += mine.nbytes
        return [row.tolist() for row in everyone]

    def mean(self, values: list[float]) -> float:
        """The mean of all numbers of all processes, which may give different numbers of them. It is rounded once, so
        that it does not depend on who gives which."""
        counts = [int(count) for count, in self.gather([len(values)])]
        rows = self.gather([*values, *[0.0] * (max(counts) - len(values))])
        return fmean([value for row, count in zip(rows, counts) for value in row[:count]])

    def begin_mean(self, tensor: Tensor, of_part: bool = False):
        """Start to form a tensor's mean over the processes, in its place; call what is returned to wait for it and have
        it. `of_part`: only of this process's part, the tensor divided evenly along its first dimension."""
        if self.count == 1:
            return lambda: tensor
        self.sent_bytes += tensor.nbytes
        tensor /= self.count
        mean = torch.empty_like(tensor[:len(tensor) // self.count]) if of_part else tensor
        with self._reported():
            work = (reduce_scatter(mean, tensor, async_op=True) if of_part else
                    distributed.all_reduce(mean, async_op=True))

        def wait():
            with self._reported():
                work.wait()
            return mean
        return wait

    def join(self, part: Tensor, whole: Tensor | None = None) -> Tensor:
        """All processes' parts, which are of one size, one after another, 1-D: in `whole`, of which this process's part
        may be a view, or in a new tensor."""
        whole = part.new_empty(part.numel() * self.count) if whole is None else whole
        self.sent_bytes += part.nbytes
        with self._reported():  # as bytes: not every backend knows every dtype
            all_gather(whole.view(torch.uint8), part.reshape(-1).view(torch.uint8))
        return whole

    def check_same(self, text: str, what: str) -> None:
        """UserError unless this text is the same in all processes."""
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits are exact in float64
        found = self.gather([float(digest)])
        odd = [str(rank) for rank, row in enumerate(found) if row != found[0]]
        if odd:
            raise UserError(f"{what} of process {', '.join(odd)} differ from those of process 0; start all processes "
                            "with the same files, flags, library versions and kind of device")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.count > 1 and error is None:
            self.gather([0.0])  # no process is the last that writes
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
