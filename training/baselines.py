"""The baselines f(m0 * w, minibatch): read from a file or computed online.

A baseline file is an .npz of the losses and of everything they depend on, so that a stale file is
refused with the reason.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import data
from files import mask_files
from files.atomic import atomic_write, refuse_existing
from masking.masked_model import MaskedModel
from models.loading import model_fingerprint
from utils import UserError, as_user_error

import numpy as np
from torch import Tensor, nn


class OnlineBaseline:
    """Losses under m0 in nats by minibatch number, computed by a second forward pass when a
    minibatch first comes.

    m0 is the mask in use when this object is made. batches: int64 `[minibatches, sequences,
    tokens]`. All processes make such a second pass in the same steps.
    """

    def __init__(self, masked: MaskedModel, batches: Tensor):
        self.masked = masked
        self.batches = batches
        self.bits = masked.bits()
        self.losses = {}

    def __getitem__(self, index: int) -> float:
        if index not in self.losses:
            with self.masked.use_masks(self.bits):
                self.losses[index] = self.masked.loss(self.batches[index])
        return self.losses[index]


Baseline = Sequence[float] | OnlineBaseline | None  # minibatch number -> f(m0 * w, minibatch), nats


def default_path(dataset_size: int, batchsize: int, seqlen: int) -> str:
    """Return the authors' file name, without their dataset name."""
    return f"inference_loss_{dataset_size}_bs{batchsize}_sql{seqlen}.npz"


def conditions(model: nn.Module, masks: dict[str, Tensor], batches: Tensor) -> dict[str, str]:
    """Return everything that the losses of these minibatches depend on, by name. Call it while the
    model still has its dense weights."""
    minibatches, batchsize, seqlen = batches.shape
    return {
        "model": model_fingerprint(model),
        "mask": mask_files.fingerprint(masks),
        "tokens": data.fingerprint(batches),
        "dataset_size": str(minibatches * batchsize),
        "batchsize": str(batchsize),
        "sqlen": str(seqlen),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def save(path: str | Path, losses: list[float], depends_on: dict[str, str]) -> None:
    """Write a new file with the losses, float64 `[minibatches]`, and the conditions as JSON."""
    refuse_existing(path, "choose another --save or remove it")
    with atomic_write(path) as tmp, open(tmp, "wb") as file:
        np.savez(
            file, losses=np.array(losses, np.float64), depends_on=np.array(json.dumps(depends_on))
        )


def find(source: str, dataset_size: int, batchsize: int, seqlen: int) -> str:
    """Return the path of the file that --baseline names; for "cached", the one of the default name.
    Raises UserError if there is none."""
    path = default_path(dataset_size, batchsize, seqlen) if source == "cached" else source
    if not Path(path).exists():
        raise UserError(
            f"{path}: no such baseline file; run inference_loss.py with the same --model, "
            "--mask and data flags first, or train with --baseline online"
        )
    return path


def load(path: str, wanted: dict[str, str]) -> list[float]:
    """Read the losses of the minibatches from a file. Raises UserError if the file's conditions
    differ from `wanted` (see `conditions`), naming those that do."""
    minibatches = int(wanted["dataset_size"]) // int(wanted["batchsize"])
    with (
        as_user_error(path, "make it again with inference_loss.py"),
        np.load(path, allow_pickle=False) as arrays,
    ):
        losses = arrays["losses"].astype(np.float64)
        recorded = dict(json.loads(str(arrays["depends_on"])))
    stale = [
        f"{key.replace('sqlen', 'seqlen')} {str(recorded.get(key))[:80]} there, {value} here"
        for key, value in wanted.items()
        if recorded.get(key) != value
    ]
    if not stale and len(losses) != minibatches:
        stale = [f"{len(losses)} minibatches there, {minibatches} here"]
    if stale:
        raise UserError(
            f"{path} is stale: {'; '.join(stale)}; run inference_loss.py again with these settings"
        )
    if not np.isfinite(losses).all():
        raise UserError(
            f"{path} holds a loss that is not finite; make it again with inference_loss.py --dtype "
            "bfloat16"
        )
    return losses.tolist()
