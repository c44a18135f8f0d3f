"""Records of scripts: prune.json, a run's run.json, and its logs, a JSON object a line."""

import hashlib
import json
from pathlib import Path

from files.atomic import atomic_write
from utils import as_user_error

GENERATED = "generated.jsonl"  # text that a run's model wrote


def write_json(path: str | Path, value: object) -> None:
    """Write a file, whole or not at all."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n")


def short_hash(settings: dict) -> str:
    """6 hex digits that name these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]


def read_record(run: str | Path) -> dict:
    """A run's run.json; UserError where there is none or it is damaged."""
    path = Path(run) / "run.json"
    with as_user_error(path, "give the folder of a run of train.py or sparsify.py"):
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
            raise ValueError("it names no arguments")
        return record


def of_run(path: str | Path, name: str) -> Path:
    """What a run's folder has of this name, where the path is such a folder; else the path."""
    path = Path(path).expanduser()
    return path / name if (path / "run.json").is_file() and (path / name).exists() else path


def base_model(model: str) -> str:
    """The model that a folder was pruned from, by the prune.json that prune.py left in it; else the
    model itself."""
    path = Path(model).expanduser() / "prune.json"
    if not path.is_file():
        return model
    with as_user_error(path, "remove it, or prune the model again"):
        return json.loads(path.read_bytes())["arguments"]["model"]


def read_lines(path: Path, size_bytes: int | None = None) -> list[dict]:
    """The objects of a .jsonl file, without a last line that is still being written, or those up to
    the bytes that a state knows of. UserError where it is damaged, or shorter."""
    with as_user_error(path, "give run folders, or bring it back as the run left it"):
        found = path.read_bytes()
        if size_bytes and len(found) < size_bytes:
            raise ValueError("lines are missing")
        return [json.loads(line) for line in found[:size_bytes].split(b"\n")[:-1]]
