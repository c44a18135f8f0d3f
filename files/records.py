"""Records that scripts write: prune.json, a run's run.json, and logs with one JSON object per
line."""

import hashlib
import json
from pathlib import Path

from files.atomic import atomic_write
from utils import as_user_error

GENERATED = "generated.jsonl"  # text that a run's model generated


def write_json(path: str | Path, value: object) -> None:
    """Write a value to a JSON file, atomically."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n")


def short_hash(settings: dict) -> str:
    """Return 6 hex digits that identify these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


def read_record(run: str | Path) -> dict:
    """Read a run's run.json. Raises UserError if it is missing or damaged."""
    path = Path(run) / "run.json"
    with as_user_error(path, "give the folder of a run of train.py or sparsify.py"):
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
            raise ValueError("it has no arguments")
        return record


def of_run(path: str | Path, name: str) -> Path:
    """Return path/name if the path is a run's folder that contains `name`, otherwise the path."""
    path = Path(path).expanduser()
    return path / name if (path / "run.json").is_file() and (path / name).exists() else path


def base_model(model: str) -> str:
    """Return the model that a folder was pruned from, according to the prune.json of prune.py in
    it, or `model` itself if there is none."""
    path = Path(model).expanduser() / "prune.json"
    if not path.is_file():
        return model
    with as_user_error(path, "remove it, or prune the model again"):
        return json.loads(path.read_bytes())["arguments"]["model"]


def read_lines(path: Path, size_bytes: int | None = None) -> list[dict]:
    """Read the objects of a .jsonl file, except a last line that is still being written, or only
    those in its first `size_bytes` bytes. Raises UserError if it is damaged or shorter."""
    with as_user_error(path, "give run folders, or restore it as the run left it"):
        content = path.read_bytes()
        if size_bytes and len(content) < size_bytes:
            raise ValueError("lines are missing")
        return [json.loads(line) for line in content[:size_bytes].split(b"\n")[:-1]]
