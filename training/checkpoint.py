"""A run's state on disk: everything that its next step depends on, so that a resumed run makes the same bits.

    RUN/state/step00001250.safetensors      tensors: logits, masks drawn and the best one, mean squares, random state
                                            metadata: the rest as JSON, and a SHA-256 of the whole file

A state is written beside, synced and renamed, and only then is the oldest one removed. One that is torn or damaged all
the same is told by its checksum, and the one before it is used. Random numbers are hashes of the step
(masking/random_bits.py), so that they need a count and no state; torch's generator for the CPU is saved for models that
draw some.
"""
import hashlib
import json
import sys
import time
from pathlib import Path

from utils import UserError

import torch
from safetensors import safe_open
from torch import Tensor

from files.atomic import atomic_write
from models.sharding import Shard

START = b'{"__metadata__": {"checksum": "'
VERSION = "3"
CHUNK_BYTES = 2**24
MOST_SHARE = 0.02  # of a run's time that saving may take where --checkpoint_every is in minutes
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint8: "U8"}


def aligned(tensors: dict[str, Tensor | Shard]) -> dict[str, Tensor | Shard]:
    """In the order in which they are written: safetensors wants them aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))


def give_shards(tensors: dict[str, Tensor | Shard]) -> None:
    """What the other processes do while the main one saves: give their shards."""
    for tensor in aligned(tensors).values():
        if isinstance(tensor, Shard):
            tensor.whole()


def save(path: Path, scalars: dict, tensors: dict[str, Tensor | Shard]) -> None:
    """Write one .safetensors of contiguous tensors, each streamed from where it is: no second copy of them all.

    UserError where it cannot be written; then nothing is left of it.
    """
    tensors = aligned(tensors)
    header, end = {"__metadata__": {"checksum": "0" * 64, "format": "maskpro-state", "version": VERSION,
                                    "scalars": json.dumps(scalars)}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(head)
    with atomic_write(path) as beside, open(beside, "wb") as file:
        file.write(head)
        for tensor in tensors.values():
            tensor = tensor.whole() if isinstance(tensor, Shard) else tensor
            for chunk in tensor.detach().reshape(-1).view(torch.uint8).split(CHUNK_BYTES):
                data = chunk.cpu().numpy().data
                digest.update(data)
                file.write(data)
        file.seek(8 + len(START))
        file.write(digest.hexdigest().encode())


def is_whole(path: Path) -> bool:
    """Does the file's checksum fit?"""
    try:
        with open(path, "rb") as file:
            length, start, checksum = file.read(8), file.read(len(START)), file.read(64)
            digest = hashlib.sha256(length + start + b"0" * 64)
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
            return digest.hexdigest().encode() == checksum
    except OSError:
        return False


class StateFile:
    """A state file that is whole, opened: its scalars, and its tensors as they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
            metadata = self.file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != ("maskpro-state", VERSION):
                raise ValueError(f"no maskpro-state of version {VERSION}")
            self.scalars, self.names = json.loads(metadata["scalars"]), set(self.file.keys())
        except Exception as error:  # its checksum fits, so another version or hand made it
            raise UserError(f"{path} is no state that this version can read ({error}); remove it to use the one before")

    def read(self, name: str, like: Tensor | Shard) -> Tensor:
        """The tensor of this name, or this process's part of it, on the CPU; UserError unless its shape and dtype are
        those of `like`."""
        if name in self.names:
            found = self.file.get_slice(name)
            if (found.get_dtype(), found.get_shape()) == (NAMES[like.dtype], list(like.shape)):
                return like.read(found) if isinstance(like, Shard) else self.file.get_tensor(name)
        raise UserError(f"{self.path} is the state of another run: its {name} is not of this model and these settings")


class Checkpoints:
    """The state files of a run, the newest `keep` of them, and when the next is due.

    every: '500', steps, or '10m', minutes.
    """

    def __init__(self, folder: Path, every: str, keep: int = 2):
        self.folder, self.keep = folder, keep
        self.steps = None if every.endswith("m") else int(every)
        self.minutes = float(every[:-1]) if every.endswith("m") else None
        self.step, self.saved_at, self.cost_s = None, 0.0, 0.0  # of the last one

    def due(self, step: int, seconds: float, last: bool = False) -> bool:
        """Is it time, after so many steps and seconds of the run? `last`: there will be no later time, so only the cost
        counts."""
        if self.steps:
            return step % self.steps == 0
        waited = seconds - self.saved_at
        return waited * MOST_SHARE >= self.cost_s and (waited >= 60 * self.minutes or (last and self.step))

    def paths(self) -> list[Path]:
        """The state files there are, oldest first."""
        return sorted(self.folder.glob("step*.safetensors"))

    @property
    def missing(self) -> int:
        """How many more files there will be, the one being written included."""
        return max(0, self.keep + 1 - len(self.paths()))

    def save(self, step: int, seconds: float, scalars: dict, tensors: dict[str, Tensor | Shard]) -> None:
        """Save the state after so many steps and seconds; then remove the oldest beyond `keep`."""
        started = time.monotonic()
        save(self.folder / f"step{step:08d}.safetensors", scalars, tensors)
        for path in self.paths()[:-self.keep]:
            path.unlink()
        self.step, self.saved_at, self.cost_s = step, seconds, time.monotonic() - started

    def newest(self) -> StateFile | None:
        """The newest state that is whole, None if there is none; damaged ones are named and set aside."""
        for path in reversed(self.paths()):
            if is_whole(path):
                return StateFile(path)
            print(f"{path} is torn or damaged: the state before it is used", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))  # else it would count as one of the newest
        return None
