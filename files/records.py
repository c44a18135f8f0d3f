"""Records of runs: a run's run.json, and its logs, a JSON object a line."""
import json
import os
from collections.abc import Callable
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


def read_lines(path: Path, fits: Callable[[object], bool]) -> list[dict]:
    """The objects of a .jsonl file, each of which must fit; without the last line where it is torn."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give run folders that train.py wrote")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            found.append(None)
        if not fits(found[-1]):
            raise UserError(f"{path}: line {number} is damaged; delete it to draw the others")
    return found


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
