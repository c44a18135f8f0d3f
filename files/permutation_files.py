"""Permutation files: the order into which a model's channels were brought, one small .safetensors.

The tensors are the orders, set of channels -> int32 `[groups, size]`: which channel of its group
comes to each place. The metadata hold these names, which the checksum is of as well, the model's
name (of a folder its name alone), and its fingerprint before it was reordered.
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
    """Write the orders, integers `[groups, size]`, of a model to a temporary path, such as
    `atomic_write` gives."""
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
    """Orders, int64 `[groups, size]`, model and model_fingerprint of a file whose checksum is
    right. UserError if it is missing, damaged or of another format."""
    with as_user_error(
        path, "give the NAME.permutation.safetensors that permute.py wrote, or restore it"
    ):
        packed, metadata = checked_tensors.load(path, KIND, ("2",))
        return (
            {name: packed[name].long() for name in json.loads(metadata["sets"])},
            metadata["model"],
            metadata["model_fingerprint"],
        )
