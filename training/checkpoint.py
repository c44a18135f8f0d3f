"""A run's state on disk: everything that its next step depends on, so that a resumed run computes
the same bits.

    RUN/state/step00001250.pt     written by torch.save: `tensors`, each 1-D (logits, the bits of
                                  the masks, mean squares, torch's random state), and `scalars`,
                                  everything else

A state is written to a temporary file, synced and renamed; only then is the oldest state removed.
The archive's checksums reveal a truncated or damaged state, and the state before it is used
instead. Random numbers are hashes of the step (masking/random_bits.py), so the state needs only the
step, and torch's CPU random state for models that draw numbers.
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
KEPT = 2  # states kept per run
# largest share of a run's time spent on saving, if --checkpoint_every is in minutes
MOST_SHARE = 0.02


def give_shards(tensors: dict[str, Tensor]) -> None:
    """Send this process's parts of the sharded tensors (DTensors) to the main process, which saves
    them."""
    for tensor in tensors.values():
        if whole(tensor).is_cuda:  # do not run ahead of the main process: nccl would time out
            torch.cuda.current_stream().synchronize()


def save(path: Path, scalars: dict, tensors: dict[str, Tensor]) -> None:
    """Write a state. Tensors on a GPU are copied one after another; sharded ones are gathered on
    the host, so all other processes must call `give_shards`. Raises UserError if the file cannot be
    written; nothing is left of it then."""
    tensors = {
        name: (whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor).detach().reshape(-1)
        for name, tensor in tensors.items()
    }
    # torch.save reports a full disk as such only if it is given an open file
    with atomic_write(path) as tmp, open(tmp, "wb") as file:
        try:
            torch.save({"format": FORMAT, "scalars": scalars, "tensors": tensors}, file)
        except RuntimeError as error:  # torch's error hides that of the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def is_whole(path: Path) -> bool:
    """Return whether the archive's checksums match. A flipped bit outside the data that they cover
    changes nothing that is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and bool(
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            )
    except Exception:  # a damaged archive raises errors of every class
        return False


class StateFile:
    """An opened state whose checksums match. Scalars are loaded; tensors are read on demand."""

    def __init__(self, path: Path):
        self.path = path
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if state["format"] != FORMAT:
            raise UserError(
                f"{path} is a {state['format']}, this version reads {FORMAT}: start a new run"
            )
        self.scalars = state["scalars"]
        self.tensors = state["tensors"]

    def read(self, name: str, expected: Tensor) -> Tensor:
        """Return the tensor `name`, 1-D, on the CPU; for a DTensor, this process's part of it.

        Raises UserError if its dtype or number of elements differ from those of `expected`.
        """
        stored = self.tensors.get(name)
        if stored is None or (stored.dtype, stored.numel()) != (expected.dtype, expected.numel()):
            raise UserError(
                f"{self.path} is the state of another run or version: its {name} does not fit "
                "this model and these settings"
            )
        begin, end = own_rows(expected)
        width = expected.shape[1:].numel()
        return stored[begin * width : end * width]


class Checkpoints:
    """The newest states of a run, and when the next one is due.

    every: interval, '500' for steps or '10m' for minutes.
    """

    def __init__(self, folder: Path, every: str):
        self.folder = folder
        self.steps = None if every.endswith("m") else int(every)
        self.minutes = float(every[:-1]) if every.endswith("m") else None
        # of the last saved state
        self.step = None
        self.saved_at = 0.0
        self.cost_s = 0.0

    def due(self, step: int, seconds: float) -> bool:
        """Return whether to save after `step` steps and `seconds` of the run. If `every` is in
        minutes, saving takes at most MOST_SHARE of the run's time."""
        if self.steps:
            return step % self.steps == 0
        since_save_s = seconds - self.saved_at
        return since_save_s * MOST_SHARE >= self.cost_s and since_save_s >= 60 * self.minutes

    def path(self, step: int) -> Path:
        """Return the path of the state after `step` steps."""
        return self.folder / f"step{step:08d}.pt"

    def paths(self) -> list[Path]:
        """Return the existing states, oldest first."""
        return sorted(self.folder.glob("step*.pt"))

    def save(self, step: int, seconds: float, scalars: dict, tensors: dict[str, Tensor]) -> None:
        """Save the state after `step` steps and `seconds` of the run, then remove all but the
        newest KEPT states."""
        started = time.monotonic()
        save(self.path(step), scalars, tensors)
        for path in self.paths()[:-KEPT]:
            path.unlink()
        self.step = step
        self.saved_at = seconds
        self.cost_s = time.monotonic() - started

    def newest(self) -> StateFile | None:
        """Return the newest state whose checksums match, or None. Damaged states are reported and
        renamed."""
        if earlier := sorted(self.folder.glob("step*.safetensors")):
            raise UserError(
                f"{earlier[-1]} is of an earlier version: resume it there, or start a new run"
            )
        for path in reversed(self.paths()):
            if is_whole(path):
                return StateFile(path)
            print(f"{path} is truncated or damaged, and skipped", file=sys.stderr)
            # a damaged state must not count among the newest KEPT
            path.rename(path.with_suffix(".damaged"))
        return None
