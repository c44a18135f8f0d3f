"""Commands that run in several processes, as torchrun starts them; but forked from one that has
imported torch.

A new interpreter takes seconds to import torch and transformers. Here multiprocessing's fork server
does it once, and forks; in the fork runs torchrun's own agent, which forks the processes. What
torchrun itself makes of a command is tests/test_same_bits.py's, and a user's.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
import uuid
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

from models import processes

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [  # what transformers lacks in other versions is left out
        "train",
        "sparsify",
        "torch.distributed.launcher.api",
        "matplotlib.figure",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.tokenization_llama",
    ]
)


class Launched:
    """A command, a script and its flags, in so many processes; both streams of all go to `log`.

    timeout_s: after which a process that does not answer has gone.
    """

    def __init__(self, processes: int, command: list, log: Path, timeout_s: float = 600):
        self.log = log
        log.write_text("")
        self.process = FORKS.Process(
            target=launch, args=(processes, [str(word) for word in command], log, timeout_s)
        )
        self.process.start()

    def wait(self) -> int:
        try:
            assert wait([self.process.sentinel], timeout=300), self.said
            self.process.join()
            return self.process.exitcode
        finally:
            self.process.kill()

    def wait_until(self, condition) -> None:
        """Condition of no argument; an error where the command ends before it holds."""
        for _ in range(2000):
            if condition():
                return
            assert self.process.exitcode is None, self.said
            time.sleep(0.1)
        raise AssertionError(self.said)

    def send_signal(self, number: int) -> None:
        """To torchrun's agent, which passes it on."""
        os.kill(self.process.pid, number)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def pid_of(self, rank: int) -> int:
        return int(pid_file(self.log, rank).read_text())


def pid_file(log: Path, rank: int | str) -> Path:
    return log.with_name(f"{log.name}.{rank}")


def launch(count: int, command: list[str], log: Path, timeout_s: float) -> None:
    """What `torchrun --standalone` does, in the fork."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(ROOT)
    elastic_launch(
        LaunchConfig(
            1,
            1,
            count,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            start_method="fork",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        ),
        run,
    )(command, log, timeout_s)


def run(command: list[str], log: Path, timeout_s: float) -> None:
    """What python does with a script, in one of the processes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's own came with the fork
    torch.set_num_threads(1)
    processes.TIMEOUT = timedelta(seconds=timeout_s)
    pid_file(log, os.environ["RANK"]).write_text(str(os.getpid()))
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent), str(ROOT)]
    runpy.run_path(command[0], run_name="__main__")
