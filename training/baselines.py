"""The baselines f(m0 * w, minibatch): cached in a file, which knows what decides them, or computed online.

A baseline file is an .npz of the losses and of everything they depend on, so that a stale one is refused by name.
"""
import json
import os
from collections.abc import Callable
from pathlib import Path

from utils import UserError

import numpy as np
from torch import Tensor, nn

import data
from files import mask_files
from files.atomic import atomic_write, refuse_existing
from masking.masked_model import MaskedModel
from models.loading import model_fingerprint
from models.loss import batch_loss

Baseline = Callable[[int, Tensor], float | None]  # a minibatch's number and its tokens -> f(m0 * w, minibatch), nats


def no_baseline(index: int, batch: Tensor) -> None:
    """For estimators that need none."""


def cached_baseline(losses: list[float]) -> Baseline:
    """From the losses of all minibatches, as `load` reads them."""
    return lambda index, batch: losses[index]


def online_baseline(masked: MaskedModel, microbatch: int = 32) -> Baseline:
    """By a second forward a step, of the model masked by m0, which `keep_initial` has kept."""
    def baseline(_index: int, batch: Tensor) -> float:
        with masked.use_initial():
            return batch_loss(masked.model, batch, microbatch)
    return baseline


# ---------------------------------------------------------------------------------------------------------------------
# the file

def default_path(dataset_size: int, batchsize: int, sqlen: int) -> str:
    """The authors' naming, without the dataset's."""
    return f"inference_loss_{dataset_size}_bs{batchsize}_sql{sqlen}.npz"


def conditions(model: nn.Module, masks: dict[str, Tensor], batches: Tensor, dataset: str) -> dict[str, str]:
    """Everything the losses of these minibatches depend on; call it while the model's weights are still its own."""
    minibatches, batchsize, sqlen = batches.shape
    return {"model": model_fingerprint(model), "mask": mask_files.fingerprint(masks),
            "tokens": data.fingerprint(batches), "dataset": dataset, "dataset_size": str(minibatches * batchsize),
            "batchsize": str(batchsize), "sqlen": str(sqlen), "dtype": str(model.dtype).removeprefix("torch.")}


def save(path: str | Path, losses: list[float], depends_on: dict[str, str]) -> None:
    """Write a new file: losses float64 `[minibatches]`, and the conditions as JSON."""
    refuse_existing(path, "choose another --save or remove it")
    with atomic_write(path) as beside, open(beside, "wb") as file:
        np.savez(file, losses=np.array(losses, np.float64), depends_on=np.array(json.dumps(depends_on)))


def load(path: str | Path, wanted: dict[str, str]) -> list[float]:
    """The losses of a file computed under exactly the wanted conditions; UserError naming what differs."""
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such baseline; run inference_loss.py with the same --model, --mask and "
                        "data flags first, or train with --baseline online")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            losses, found = arrays["losses"], json.loads(str(arrays["depends_on"]))
        if losses.ndim != 1 or losses.dtype != np.float64 or not isinstance(found, dict):
            raise ValueError("not losses with their conditions")
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} is not a baseline file ({type(error).__name__}: {str(error)[:200]}); make it "
                        "anew with inference_loss.py")
    stale = [f"{key} {str(found.get(key))[:80]} there, {value} here"
             for key, value in wanted.items() if found.get(key) != value]
    minibatches = int(wanted["dataset_size"]) // int(wanted["batchsize"])
    if not stale and len(losses) != minibatches:
        stale = [f"{len(losses)} minibatches there, {minibatches} here"]
    if stale:
        raise UserError(f"{path} is stale: {'; '.join(stale)}; run inference_loss.py again with these settings")
    if not np.isfinite(losses).all():
        raise UserError(f"{path} holds a loss that is not finite; make it anew with inference_loss.py --dtype bfloat16")
    return losses.tolist()
