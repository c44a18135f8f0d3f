"""A model folder is not trusted: what its JSON claims is held against what lies there before it is loaded."""
import json
import re
from collections.abc import Iterator
from pathlib import Path

from utils import UserError

from safetensors import safe_open

from files.atomic import check_name

MOST_MODULES = 4096  # layers or experts, of a model that has not as many tensors
COUNTS = re.compile(r"n_?layers?|num_.*(layers|experts)|n_.*experts")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check(folder: Path, trust_remote_code: bool) -> None:
    """UserError for a folder that names files outside of it, asks for code that is not here unless that is trusted, or
    claims more layers than its files can hold. What transformers refuses itself is left to it."""
    for index in folder.glob("*.index.json"):
        files = (_json(index) or {}).get("weight_map")
        for name in sorted(set(map(str, files.values()))) if isinstance(files, dict) else []:
            check_name(name, index)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} is an adapter, which would bring a model from elsewhere along; merge it into its "
                        "model, save that and give its folder, or remove adapter_config.json")
    tensors = None
    for key, value in _items(_json(folder / "config.json")):
        if key in ATTENTION and "/" in str(value) and not trust_remote_code:
            raise UserError(f"{folder / 'config.json'} asks for the attention code {str(value)[:80]!r} of the Hub; "
                            f"take {key} out, or give --trust_remote_code if you trust it")
        if COUNTS.fullmatch(key) and type(value) is int and value > MOST_MODULES:
            tensors = sum(map(_tensors, folder.glob("*.safetensors"))) if tensors is None else tensors
            if value > tensors:
                raise UserError(f"{folder / 'config.json'} claims {key} {str(value)[:20]}, more than the {tensors} "
                                "tensors that are there: restore the folder")


def base_model(model: str) -> str:
    """The model that a folder was pruned from, by the prune.json that prune.py left in it; else the model itself."""
    record = Path(model) / "prune.json"
    try:
        name = json.loads(record.read_text())["arguments"]["model"] if record.is_file() else model
        name.encode()  # a string, then, and one that can be written to a file
        return name
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{record} is damaged; remove it, or prune anew with prune.py")


def _json(path: Path):
    """What a JSON file holds; None where it is not there or damaged, which transformers will say."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _items(config: object) -> Iterator[tuple[str, object]]:
    """Every key and value of a configuration and of those inside it."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield key, value
        yield from _items(value)


def _tensors(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return len(list(file.keys()))
    except Exception:  # damaged: transformers will say
        return 0
