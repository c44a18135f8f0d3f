"""Permutation files: the new order of a model's channels, in a small .safetensors.

The tensors are the orders, set of channels -> int32 `[groups, size]`: for each position, the
channel of its group that moves there. The metadata hold the names of the sets, the model's name
(only the last part of a folder's path) and its fingerprint before reordering. The checksum covers
them too.
"""

import json
from pathlib import Path

from files import checked_tensors
from files.mask_files import public_name
from utils import as_user_error

import torch
from torch import Tensor

KIND = "maskpro-permutation"


def save(path: str | Path, orders: dict[str, Tensor], model: str, model_fingerprint: str) -> None:
    """Write a model's orders, integers `[groups, size]`, to a temporary path, such as one of
    `atomic_write`."""
    packed = {name: order.cpu().to(torch.int32).contiguous() for name, order in orders.items()}
    checked_tensors.save(
        path,
        packed,
        {
            "format": KIND,
            "version": "2",
            "sets": json.dumps(sorted(packed)),
            "model": public_name(model),
            "model_fingerprint": model_fingerprint,
        },
    )


def load(path: str | Path) -> tuple[dict[str, Tensor], str, str]:
    """Read (orders, model, model_fingerprint) from a file and verify its checksum; orders are int64
    `[groups, size]`. Raises UserError if it is missing, damaged or of another format."""
    with as_user_error(
        path, "give the NAME.permutation.safetensors that permute.py wrote, or restore it"
    ):
        packed, metadata = checked_tensors.load(path, KIND, ("2",))
        return (
            {name: packed[name].long() for name in json.loads(metadata["sets"])},
            metadata["model"],
            metadata["model_fingerprint"],
        )
