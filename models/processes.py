"""Several processes that learn one mask: what they exchange, and that they stay the same.

    torchrun --nproc_per_node 4 train.py ...         or, on GPUs, accelerate launch --num_processes 4 train.py ...

Forward-only learning needs a few numbers a process and step: its losses, its baseline, the time. From these every
process computes the same advantages and moves its own copy of all logits alike, to the bit: masks are drawn by numbers
that any process can compute again. straight_through averages each layer's gradient over the processes while backward
goes on. With --shard a process has its part of each layer's rows only (models/sharding.py).

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

FETCHING = timedelta(hours=12)  # for the main process to fetch a model


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
        self._timeout = timeout
        with self.reported():
            state = PartialState(cpu=on_cpu, timeout=timeout, **backend)
            # a model takes longer to fetch than a process may take to answer; one that has gone is noticed at once
            self._patient = distributed.new_group(timeout=FETCHING, backend="gloo")
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

    @contextmanager
    def main_before_others(self) -> Iterator[None]:
        """Inside, the main process goes first, as long as it takes; all leave together."""
        if not self.is_main:
            self.wait_for_main()
        yield
        if self.is_main:
            self.wait_for_main()
        self.wait_for_all()

    def wait_for_main(self) -> None:
        """The others wait for the main process, however long it is writing; it waits for them as long as `timeout_s`,
        as they have nothing else to do."""
        if self.size > 1:
            distributed.monitored_barrier(self._patient, self._timeout if self.is_main else FETCHING)

    def wait_for_all(self) -> None:
        """Wait for all processes, however long each takes."""
        if self.size > 1:
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

    def reduce_async(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to form a tensor's mean over the processes, in its place; call what is returned to wait for it and have
        it."""
        if self.size == 1:
            return lambda: tensor
        self.sent_bytes += tensor.nbytes
        tensor /= self.size
        work = distributed.all_reduce(tensor, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor
        return wait

    # ---------------------------------------------------------------------------------------------- beginning and end

    def __enter__(self):
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self.size > 1 and error is None:
            self.wait_for_main()  # no process is the last that writes
            distributed.destroy_process_group()
            self._finished = True

    def _leave(self) -> None:
        """At the process's very end: torch's threads abort one process in twenty while C++ is torn down, and the
        launcher would call the run failed."""
        if self._finished:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Inside, a process that has gone or hangs is reported by one line; the launcher ends the others."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
                raise
            raise UserError(f"process {self.rank} has lost another, which has ended or hangs "
                            f"({str(error).strip().splitlines()[0][:160]})") from error
