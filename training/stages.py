"""The stages of a long run, each done once: what each took is kept in the run's record."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from models import processes
from models.machine import peak_memory_bytes, reset_peak_memory
from training.run_folder import RunFolder


class Stages:
    """Announces and times the stages of a run. A stage that is done is known to be when the run
    goes on."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.done: dict[str, dict] = folder.record.get("stages", {})

    @contextmanager
    def stage(self, name: str, doing: str, earlier_s: float = 0.0) -> Iterator[None]:
        """Inside is this stage; when it ends well it is recorded as done. It may have been done in
        part before, in these `earlier_s` of it."""
        processes.log(f"[{name}] {doing}")
        reset_peak_memory()
        began = time.monotonic()
        yield
        before = self.done.get(name, {"seconds": 0.0, "peak_memory_bytes": 0})
        seconds = max(before["seconds"], earlier_s) + time.monotonic() - began
        peak = max(before["peak_memory_bytes"], peak_memory_bytes())
        self.done[name] = {"seconds": round(seconds, 1), "peak_memory_bytes": peak}
        self.folder.note(stages=self.done)
        processes.log(f"[{name}] {seconds / 60:.1f} minutes, peak memory {peak / 2**30:.2f} GiB")
