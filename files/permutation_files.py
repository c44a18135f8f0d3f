"""Permutation files: which order a model's channels were brought into; one small .safetensors, verified when read.

Its tensors are orders, set of channels -> uint16 `[groups, size]`; its metadata hold the model's name, its fingerprint
before and after, and a checksum. Files are not trusted: each order is held against the model's channels.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from utils import UserError

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = {"format": "maskpro-permutation", "version": "1"}


@dataclass
class PermutationFile:
    """orders: set -> int64 `[groups, size]`, which channel of its group comes to each place."""
    orders: dict[str, Tensor]
    model: str
    model_fingerprint: str
    permuted_fingerprint: str


def save(path: str | Path, found: PermutationFile) -> None:
    """Write it, into a folder that nobody reads yet."""
    packed = {name: order.cpu().to(torch.uint16 if order.shape[1] <= 2**16 else torch.int32).contiguous()
              for name, order in found.orders.items()}
    metadata = FORMAT | {"model": found.model, "model_fingerprint": found.model_fingerprint,
                         "permuted_fingerprint": found.permuted_fingerprint}
    save_file(packed, path, metadata | {"checksum": _digest(metadata, packed)})


def load(path: str | Path, shapes: dict[str, tuple[int, int]]) -> PermutationFile:
    """Read and verify; shapes: set -> (groups, size) of the model. UserError: no such file, damaged, of other sets."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError("no such file; permute.py writes NAME.permutation.safetensors beside the model")
        with safe_open(path, framework="pt") as file:  # it checks the header against the file's size
            metadata = file.metadata() or {}
            if not FORMAT.items() <= metadata.items():
                raise UserError("is no maskpro-permutation of version 1: give the file that permute.py wrote")
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if metadata.pop("checksum", None) != _digest(metadata, packed):
            raise UserError("its contents do not match their checksum, the file is damaged: restore it")
        for name, order in packed.items():
            if name not in shapes or tuple(order.shape) != tuple(shapes[name]):
                raise UserError(f"is of another model: it orders {name} {list(order.shape)}")
            if not (order.long().sort(dim=1).values == torch.arange(order.shape[1])).all():
                raise UserError(f"its order of {name} names a channel twice: restore it")
        return PermutationFile({name: order.long() for name, order in packed.items()}, metadata["model"],
                               metadata["model_fingerprint"], metadata["permuted_fingerprint"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a parser makes of a damaged file is the file's fault
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is damaged or no permutation file ({reason}): restore it") from error


def _digest(metadata: dict, packed: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(packed):
        sha.update(f"{name} {packed[name].dtype}".encode())
        sha.update(packed[name].numpy())
    return sha.hexdigest()
