"""The logs of a run: metrics.jsonl, a line a step, and layers.jsonl, a line an evaluation."""
import json
import os
from pathlib import Path

from files.atomic import sync
from files.records import cut_lines, lines_up_to
from models import processes

NAMES = ("metrics.jsonl", "layers.jsonl")


class Logs:
    """A run's logs, which the main process writes. A run that goes on has its lines up to where its state was saved;
    lines after it are cut off.

    sizes: bytes of the two files that the state knows of, (0, 0) for a new run.
    """

    def __init__(self, folder: Path, sizes: tuple[int, int] = (0, 0)):
        self.folder, self._files = folder, []
        self.metrics: list[dict] = lines_up_to(folder / NAMES[0], sizes[0])
        if processes.is_main():
            for name, size in zip(NAMES, sizes):
                cut_lines(folder / name, size)
            self._files = [open(folder / name, "a", buffering=1) for name in NAMES]

    def write(self, line: dict, layers: dict | None = None) -> None:
        """A step's line and, where the layers were evaluated, theirs."""
        self.metrics.append(line)
        for file, value in zip(self._files, (line, layers and {"step": line["step"], **layers})):
            if value is not None:
                file.write(json.dumps(value) + "\n")

    def sync(self) -> tuple[int, int]:
        """Have the disk hold the logs; their sizes in bytes."""
        for file in self._files:
            os.fsync(file.fileno())
        sync(self.folder)
        return tuple(file.tell() for file in self._files)

    def close(self) -> None:
        """OSError where the disk is full."""
        for file in self._files:
            file.close()
