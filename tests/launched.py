"""Commands that run in several processes under torchrun, as a user starts them."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Launched:
    """A command in so many processes, under torchrun."""

    def __init__(self, processes: int, command: list[str], log: Path):
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                 *map(str, command)], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=120)
        finally:
            self.process.kill()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def pid_of(self, rank: int) -> int:
        """The process that torchrun has started as that rank."""
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if (f"PPid:\t{self.process.pid}\n" in status.read_text()
                        and f"\0RANK={rank}\0" in (status.parent / "environ").read_text()):
                    return int(status.parent.name)
            except OSError:
                pass  # ended meanwhile
        raise AssertionError(f"no process of rank {rank}: {self.said}")
