"""The log of a run: metrics.jsonl, one line per step."""

import json
import os
from pathlib import Path

from files.atomic import sync
from files.records import read_lines
from models import processes


class Log:
    """A run's log, written by the main process. A resumed run keeps the lines up to its saved
    state; later lines are cut off.

    size_bytes: size of the file when the state was saved; 0 for a new run.
    """

    def __init__(self, folder: Path, size_bytes: int = 0):
        path = folder / "metrics.jsonl"
        self._file = None
        self.lines: list[dict] = read_lines(path, size_bytes) if size_bytes else []
        if processes.is_main():
            self._file = open(path, "a", buffering=1)
            self._file.truncate(size_bytes)

    def write(self, line: dict) -> None:
        """Append the line of a step."""
        self.lines.append(line)
        if self._file:
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> int:
        """Flush the log to disk and return its size in bytes."""
        os.fsync(self._file.fileno())
        sync(Path(self._file.name).parent)
        return os.fstat(self._file.fileno()).st_size  # `tell` ignores the truncation
