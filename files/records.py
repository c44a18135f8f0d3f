"""Records of runs: a run's run.json, and its logs, a JSON object a line."""
import json
import os
from pathlib import Path

from utils import UserError

from files.atomic import atomic_write


def write_json(path: str | Path, value: object) -> None:
    """Write a file, whole or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")


def read_record(run: str | Path) -> dict:
    """A run's run.json; UserError where there is none or it is damaged."""
    path = Path(run) / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
            raise ValueError("no arguments")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"{path} cannot be read ({reason}); give the folder of a run of train.py")
    return record


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, without a last line that is still being written; UserError where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return [json.loads(line) for line in text.split("\n")[:-1]]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"{path} cannot be read ({reason}); give run folders")


def lines_up_to(path: Path, size_bytes: int) -> list[dict]:
    """The lines of a .jsonl up to the bytes that a state knows of. UserError where it is not whole up to there."""
    if not size_bytes:
        return []
    try:
        with open(path, "rb") as file:
            found = file.read(size_bytes)
        if len(found) < size_bytes:
            raise ValueError("lines are missing")
        return [json.loads(line) for line in found.decode().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not as the run left it ({error}): bring it back, or start a new run")


def cut_lines(path: Path, size_bytes: int) -> None:
    """Shorten a .jsonl to the bytes that a state knows of; UserError as `lines_up_to`."""
    lines_up_to(path, size_bytes)
    if size_bytes:
        os.truncate(path, size_bytes)
    else:
        path.unlink(missing_ok=True)
