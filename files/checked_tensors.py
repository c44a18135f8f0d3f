"""Tensors in a .safetensors file whose metadata hold a format, a version and a checksum of all
else."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from utils import UserError

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a temporary path, such as one of `atomic_write`."""
    save_file(tensors, path, metadata | {"checksum": _digest(metadata, tensors)})


def load(
    path: Path, kind: str, versions: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata from a file of format `kind` in one of these versions. Raises
    UserError for another format or version, other errors if the file is damaged."""
    # safe_open checks the header's offsets and shapes against the file's size
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names = file.keys()
        if metadata.get("format") != kind or metadata.get("version") not in versions:
            raise UserError(
                f"is not a {kind} file of version {' or '.join(versions)}: give one that this "
                "version of MaskPro can read"
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
