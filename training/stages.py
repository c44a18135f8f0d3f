"""The stages of a long run, each done once. The run's record keeps the time and memory of each."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from models import processes
from models.machine import peak_memory_bytes, reset_peak_memory
from training.run_folder import RunFolder


class Stages:
    """Announces and times the stages of a run. Finished stages are listed in `done`, so that a
    resumed run can skip them."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.done: dict[str, dict] = folder.record.get("stages", {})

    @contextmanager
    def stage(self, name: str, description: str, earlier_s: float = 0.0) -> Iterator[None]:
        """Run the block as a stage, and record it as done if it raises nothing. earlier_s: seconds
        that an earlier part of the stage took, if the run is resumed within it."""
        processes.log(f"[{name}] {description}")
        reset_peak_memory()
        start = time.monotonic()
        yield
        earlier = self.done.get(name, {"seconds": 0.0, "peak_memory_bytes": 0})
        seconds = max(earlier["seconds"], earlier_s) + time.monotonic() - start
        peak = max(earlier["peak_memory_bytes"], peak_memory_bytes())
        self.done[name] = {"seconds": round(seconds, 1), "peak_memory_bytes": peak}
        self.folder.note(stages=self.done)
        processes.log(f"[{name}] {seconds / 60:.1f} minutes, peak memory {peak / 2**30:.2f} GiB")
