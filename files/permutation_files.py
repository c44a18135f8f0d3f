"""Permutation files: the order into which a model's channels were brought, one small .safetensors.

The tensors are the orders, set of channels -> uint16 `[groups, size]`. The metadata hold the model's name, its
fingerprint before it was reordered, and a checksum.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from files.errors import explained

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = {"format": "maskpro-permutation", "version": "1"}


@dataclass
class PermutationFile:
    """orders: set of channels -> int64 `[groups, size]`, which channel of its group comes to each place; model: name
    of the model that they reorder; model_fingerprint: its fingerprint before."""
    orders: dict[str, Tensor]
    model: str
    model_fingerprint: str


def save(path: str | Path, found: PermutationFile) -> None:
    """Write it to a temporary path, such as `atomic_write` gives."""
    packed = {name: order.cpu().to(torch.uint16 if order.shape[1] <= 2**16 else torch.int32).contiguous()
              for name, order in found.orders.items()}
    metadata = FORMAT | {"model": found.model, "model_fingerprint": found.model_fingerprint}
    save_file(packed, path, metadata | {"checksum": _digest(metadata, packed)})


def load(path: str | Path) -> PermutationFile:
    """Read the file and verify its checksum. UserError if it is missing, damaged or of another format."""
    with explained(path, "give the NAME.permutation.safetensors that permute.py wrote, or restore it"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if not FORMAT.items() <= metadata.items():
            raise ValueError("not in the format maskpro-permutation, version 1")
        if metadata.pop("checksum", None) != _digest(metadata, packed):
            raise ValueError("its contents do not match their checksum")
        return PermutationFile({name: order.long() for name, order in packed.items()}, metadata["model"],
                               metadata["model_fingerprint"])


def _digest(metadata: dict, packed: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(packed):
        sha.update(f"{name} {packed[name].dtype}".encode())
        sha.update(packed[name].numpy())
    return sha.hexdigest()
