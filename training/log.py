"""The log of a run: metrics.jsonl, a line a step."""

import json
import os
from pathlib import Path

from files.atomic import sync
from files.records import read_lines
from models import processes


class Log:
    """A run's log, which the main process writes. A run that goes on has its lines up to where its
    state was saved; lines after it are cut off.

    size_bytes: of the file, that the state knows of; 0 for a new run.
    """

    def __init__(self, folder: Path, size_bytes: int = 0):
        path = folder / "metrics.jsonl"
        self._file = None
        self.lines: list[dict] = read_lines(path, size_bytes) if size_bytes else []
        if processes.is_main():
            self._file = open(path, "a", buffering=1)
            self._file.truncate(size_bytes)

    def write(self, line: dict) -> None:
        """A step's line."""
        self.lines.append(line)
        if self._file:
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> int:
        """Have the disk hold the log; its size in bytes."""
        os.fsync(self._file.fileno())
        sync(Path(self._file.name).parent)
        return os.fstat(self._file.fileno()).st_size  # `tell` is where it was before a truncation
