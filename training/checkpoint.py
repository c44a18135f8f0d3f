"""A run's state on disk: everything that its next step depends on, so that a resumed run computes the same bits.

    RUN/state/step00001250.safetensors      tensors: logits, the bits of the masks, mean squares, torch's random state,
                                            each 1-D, and last `sha256`, the checksum of all bytes before it
                                            metadata: everything else, as JSON

A state is written to a temporary file, synced and renamed. Only then is the oldest state removed. The checksum tells a
truncated or damaged state, and the state before it is used. Random numbers are hashes of the step
(masking/random_bits.py): the state has the step, and the random state of torch on the CPU for models that draw numbers.
"""
import hashlib
import json
import sys
import time
from pathlib import Path

from files.atomic import atomic_write
from models.sharding import own_rows, whole
from utils import UserError

import torch
from safetensors import safe_open
from torch import Tensor

FORMAT = "maskpro-state 5"
CHUNK_BYTES = 2**24
CHECKSUM_BYTES = 32
KEPT = 2  # states of a run
MOST_SHARE = 0.02  # of a run's time that saving may take before its end where --checkpoint_every is in minutes
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint8: "U8"}


def aligned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the order of the file, the widest dtypes first: safetensors wants each tensor aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))


def give_shards(tensors: dict[str, Tensor]) -> None:
    """Send this process's parts of the sharded tensors, which are DTensors, to the main process, which saves them."""
    for tensor in aligned(tensors).values():
        if whole(tensor).is_cuda:  # no further ahead of the main process's disk: nccl's patience ends
            torch.cuda.current_stream().synchronize()


def save(path: Path, scalars: dict, tensors: dict[str, Tensor]) -> None:
    """Write a state. Tensors are written one after another, so that there is no second copy of them all in memory.

    Sharded tensors are gathered: all other processes have to call `give_shards`. UserError where the file cannot be
    written; then nothing is left of it.
    """
    tensors = aligned(tensors)
    header, end = {"__metadata__": {"format": FORMAT, "scalars": json.dumps(scalars)}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [begin, end]}
    header["sha256"] = {"dtype": "U8", "shape": [CHECKSUM_BYTES], "data_offsets": [end, end + CHECKSUM_BYTES]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(head)
    with atomic_write(path) as beside, open(beside, "wb") as file:
        file.write(head)
        for tensor in tensors.values():
            for chunk in whole(tensor).detach().reshape(-1).view(torch.uint8).split(CHUNK_BYTES):
                data = chunk.cpu().numpy().data
                digest.update(data)
                file.write(data)
        file.write(digest.digest())


def is_whole(path: Path) -> bool:
    """Does the checksum fit?"""
    try:
        with open(path, "rb") as file:
            digest, end = hashlib.sha256(), path.stat().st_size - CHECKSUM_BYTES
            while chunk := file.read(max(0, min(CHUNK_BYTES, end - file.tell()))):
                digest.update(chunk)
            return file.read() == digest.digest()
    except OSError:
        return False


class StateFile:
    """A state whose checksum fits, opened: its scalars are here, its tensors are read one at a time."""

    def __init__(self, path: Path):
        self.path, self.file = path, safe_open(path, framework="pt")
        metadata = self.file.metadata()
        if metadata["format"] != FORMAT:
            raise UserError(f"{path} is a {metadata['format']}, this version reads {FORMAT}: start a new run")
        self.scalars, self.names = json.loads(metadata["scalars"]), set(self.file.keys())

    def read(self, name: str, like: Tensor) -> Tensor:
        """The tensor of this name, 1-D, on the CPU; where `like` is a DTensor, this process's part of it.

        UserError unless dtype and number of elements are those of `like`.
        """
        if name in self.names:
            found = self.file.get_slice(name)
            if (found.get_dtype(), found.get_shape()) == (NAMES[like.dtype], [like.numel()]):
                begin, end = own_rows(like)
                width = like.shape[1:].numel()
                return found[begin * width:end * width]
        raise UserError(f"{self.path} is the state of another run: its {name} is not of this model and these settings")


class Checkpoints:
    """The newest states of a run, and when the next is due.

    every: '500' for steps, '10m' for minutes.
    """

    def __init__(self, folder: Path, every: str):
        self.folder = folder
        self.steps = None if every.endswith("m") else int(every)
        self.minutes = float(every[:-1]) if every.endswith("m") else None
        self.step, self.saved_at, self.cost_s = None, 0.0, 0.0  # of the last one

    def due(self, step: int, seconds: float) -> bool:
        """Is it time to save, after so many steps and seconds of the run? With `every` in minutes saving takes at most
        MOST_SHARE of the run's time."""
        if self.steps:
            return step % self.steps == 0
        waited = seconds - self.saved_at
        return waited * MOST_SHARE >= self.cost_s and waited >= 60 * self.minutes

    def path(self, step: int) -> Path:
        """Where the state after so many steps is."""
        return self.folder / f"step{step:08d}.safetensors"

    def paths(self) -> list[Path]:
        """The states that are there, oldest first."""
        return sorted(self.folder.glob("step*.safetensors"))

    def save(self, step: int, seconds: float, scalars: dict, tensors: dict[str, Tensor]) -> None:
        """Save the state after so many steps and seconds of the run, then remove the oldest states beyond KEPT."""
        started = time.monotonic()
        save(self.path(step), scalars, tensors)
        for path in self.paths()[:-KEPT]:
            path.unlink()
        self.step, self.saved_at, self.cost_s = step, seconds, time.monotonic() - started

    def newest(self) -> StateFile | None:
        """The newest state whose checksum fits, None if there is none. Damaged ones are named and renamed."""
        for path in reversed(self.paths()):
            if is_whole(path):
                return StateFile(path)
            print(f"{path} is torn or damaged and passed over", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))  # a damaged one must not count as one of the newest
        return None
