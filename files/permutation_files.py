"""Permutation files: the order into which a model's channels were brought, one small .safetensors.

The tensors are the orders, set of channels -> uint16 `[groups, size]`, int32 where a set has more than 65,536. The
metadata hold the model's name (of a folder its name alone), its fingerprint before it was reordered, and a checksum.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from files import checked_tensors
from files.errors import explained
from files.mask_files import public_name

import torch
from torch import Tensor

KIND = "maskpro-permutation"


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
    checked_tensors.save(path, packed, {"format": KIND, "version": "2", "sets": json.dumps(sorted(packed)),
                                        "model": public_name(found.model),
                                        "model_fingerprint": found.model_fingerprint})


def load(path: str | Path) -> PermutationFile:
    """Read the file and verify its checksum. UserError if it is missing, damaged or of another format."""
    with explained(path, "give the NAME.permutation.safetensors that permute.py wrote, or restore it"):
        packed, metadata = checked_tensors.load(path, KIND, ("2",))
        return PermutationFile({name: packed[name].long() for name in json.loads(metadata["sets"])}, metadata["model"],
                               metadata["model_fingerprint"])
