"""The baseline losses f(m0 * w, minibatch): what decides them, and their file.

A baseline file is an .npz of the losses and of everything they depend on, so that a stale one is refused by name.
"""
import json
import os
from pathlib import Path

import numpy as np
from torch import Tensor

import data
import npz
from files import refuse_existing, written_beside
from utils import UserError, mask_fingerprint, model_fingerprint

MOST_BYTES = {"losses": 8 * 2**22, "depends_on": 4 * 2**16}  # four million minibatches, and as JSON what they are of


def default_path(args) -> str:
    """The authors' naming, without the dataset's."""
    return f"inference_loss_{args.dataset_size}_bs{args.batchsize}_sql{args.sqlen}.npz"


def conditions(args, model, masks: dict[str, Tensor], batches: Tensor) -> dict[str, str]:
    """Everything the losses depend on; call it while the model's weights are still those of --model."""
    return {"model": model_fingerprint(model), "mask": mask_fingerprint(masks), "tokens": data.fingerprint(batches),
            "dataset": args.dataset, "dataset_size": str(args.dataset_size), "batchsize": str(args.batchsize),
            "sqlen": str(args.sqlen), "dtype": str(model.dtype).removeprefix("torch.")}


def save(path: str | Path, losses: list[float], depends_on: dict[str, str]) -> None:
    """Write a new file: losses float64 `[minibatches]`, and the conditions as JSON."""
    refuse_existing(path, "choose another --save or remove it")
    with written_beside(path) as beside:
        with open(beside, "wb") as file:
            np.savez(file, losses=np.array(losses, np.float64), depends_on=np.array(json.dumps(depends_on)))


def load(path: str | Path, wanted: dict[str, str]) -> list[float]:
    """The losses of a file computed under exactly the wanted conditions; UserError naming what differs."""
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such baseline; run inference_loss.py with the same --model, --mask and "
                        "data flags first, or train with --baseline online")
    try:
        arrays = dict(npz.read(path, lambda name: MOST_BYTES[name]))
        losses, found = arrays["losses"], json.loads(str(arrays["depends_on"]))
        if losses.ndim != 1 or losses.dtype != np.float64 or not isinstance(found, dict):
            raise ValueError("not losses with their conditions")
    except Exception as error:  # a hostile or torn file fails in many ways, all of them the file's
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
