"""A run's state on disk: everything that its next step depends on, so that a resumed run computes
the same bits.

    RUN/state/step00001250.pt     by torch.save: `tensors`, each 1-D (logits, the bits of the masks,
                                  mean squares, torch's random state), and `scalars`, everything
                                  else

A state is written to a temporary file, synced and renamed. Only then is the oldest state removed.
The checksums of the archive tell a truncated or damaged state, and the state before it is used.
Random numbers are hashes of the step (masking/random_bits.py): the state has the step, and the
random state of torch on the CPU for models that draw numbers.
"""

import sys
import time
import zipfile
from pathlib import Path

from files.atomic import atomic_write
from models.sharding import own_rows, whole
from utils import UserError

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

FORMAT = "maskpro-state 7"
KEPT = 2  # states of a run
# of a run's time that saving may take before its end where --checkpoint_every is in minutes
MOST_SHARE = 0.02


def give_shards(tensors: dict[str, Tensor]) -> None:
    """Send this process's parts of the sharded tensors, which are DTensors, to the main process,
    which saves them."""
    for tensor in tensors.values():
        if whole(tensor).is_cuda:  # no further ahead of the main process: nccl's patience ends
            torch.cuda.current_stream().synchronize()


def save(path: Path, scalars: dict, tensors: dict[str, Tensor]) -> None:
    """Write a state. torch.save takes tensors from a GPU one after another; sharded ones are
    gathered on the host: all other processes have to call `give_shards`. UserError if the file
    cannot be written; then nothing is left of it."""
    tensors = {
        name: (whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor).detach().reshape(-1)
        for name, tensor in tensors.items()
    }
    # torch reports a full disk as such to a file
    with atomic_write(path) as tmp, open(tmp, "wb") as file:
        try:
            torch.save({"format": FORMAT, "scalars": scalars, "tensors": tensors}, file)
        except RuntimeError as error:  # torch's own, over that of the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def is_whole(path: Path) -> bool:
    """Do the checksums fit? A flipped bit that they do not cover changes nothing that is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and bool(
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            )
    except Exception:  # of a damaged archive there are errors of every class
        return False


class StateFile:
    """A state whose checksums fit, opened: its scalars are here, its tensors are read when they are
    asked for."""

    def __init__(self, path: Path):
        self.path = path
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if state["format"] != FORMAT:
            raise UserError(
                f"{path} is a {state['format']}, this version reads {FORMAT}: start a new run"
            )
        self.scalars = state["scalars"]
        self.tensors = state["tensors"]

    def read(self, name: str, like: Tensor) -> Tensor:
        """The tensor of this name, 1-D, on the CPU; of a DTensor, this process's part of it.

        UserError unless dtype and number of elements are those of `like`.
        """
        found = self.tensors.get(name)
        if found is None or (found.dtype, found.numel()) != (like.dtype, like.numel()):
            raise UserError(
                f"{self.path} is the state of another run: its {name} is not of this model and "
                "these settings"
            )
        begin, end = own_rows(like)
        width = like.shape[1:].numel()
        return found[begin * width : end * width]


class Checkpoints:
    """The newest states of a run, and when the next is due.

    every: '500' for steps, '10m' for minutes.
    """

    def __init__(self, folder: Path, every: str):
        self.folder = folder
        self.steps = None if every.endswith("m") else int(every)
        self.minutes = float(every[:-1]) if every.endswith("m") else None
        # of the last one
        self.step = None
        self.saved_at = 0.0
        self.cost_s = 0.0

    def due(self, step: int, seconds: float) -> bool:
        """Is it time to save, after so many steps and seconds of the run? With `every` in minutes
        saving takes at most MOST_SHARE of the run's time."""
        if self.steps:
            return step % self.steps == 0
        waited = seconds - self.saved_at
        return waited * MOST_SHARE >= self.cost_s and waited >= 60 * self.minutes

    def path(self, step: int) -> Path:
        """Where the state after so many steps is."""
        return self.folder / f"step{step:08d}.pt"

    def paths(self) -> list[Path]:
        """The states that are there, oldest first."""
        return sorted(self.folder.glob("step*.pt"))

    def save(self, step: int, seconds: float, scalars: dict, tensors: dict[str, Tensor]) -> None:
        """Save the state after so many steps and seconds of the run, then remove the oldest states
        beyond KEPT."""
        started = time.monotonic()
        save(self.path(step), scalars, tensors)
        for path in self.paths()[:-KEPT]:
            path.unlink()
        self.step = step
        self.saved_at = seconds
        self.cost_s = time.monotonic() - started

    def newest(self) -> StateFile | None:
        """The newest state whose checksums fit, None if there is none. Damaged ones are named and
        renamed."""
        if earlier := sorted(self.folder.glob("step*.safetensors")):
            raise UserError(
                f"{earlier[-1]} is of an earlier version: go on with it there, or start a new run"
            )
        for path in reversed(self.paths()):
            if is_whole(path):
                return StateFile(path)
            print(f"{path} is torn or damaged and passed over", file=sys.stderr)
            # a damaged one must not count as one of the newest
            path.rename(path.with_suffix(".damaged"))
        return None
