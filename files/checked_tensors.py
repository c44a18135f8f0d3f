"""Tensors in a .safetensors file whose metadata have a format, a version and a checksum of all the
rest."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from utils import UserError

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write them to a temporary path, such as `atomic_write` gives."""
    save_file(tensors, path, metadata | {"checksum": _digest(metadata, tensors)})


def load(
    path: Path, kind: str, versions: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of this format, in one of these versions; raises an error
    where it is another or damaged."""
    # it checks the header's offsets and shapes against the file's size
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names = file.keys()
        if metadata.get("format") != kind or metadata.get("version") not in versions:
            raise UserError(
                f"is no {kind} of version {' or '.join(versions)}: give one that this version can "
                "read"
            )
        tensors = {name: file.get_tensor(name) for name in names}
    if metadata.pop("checksum") != _digest(metadata, tensors):
        raise ValueError("its contents do not match their checksum")
    return tensors, metadata


def _digest(metadata: dict, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(tensors[name].numpy())
    return sha.hexdigest()
