"""A run's folder: locked, recorded, and hard to lose.

    run.json         script, arguments, fingerprints of the inputs, environment; at the end also the
                     summary
    metrics.jsonl    one line per step (log.py)
    state/           checkpoints, until the run is finished (checkpoint.py)
    lock             held by the process that writes here; the system releases a dead process's lock

If there are several processes (models/processes.py), the main one writes and the others read. A run
that ends before it has produced any step or text leaves no folder.
"""

import errno
import json
import math
import shlex
import shutil
import sys
from functools import cached_property
from pathlib import Path

from files.atomic import refuse_existing, sync
from files.records import read_record, write_json
from models import processes
from models.machine import environment
from training.arguments import of_another_script
from training.checkpoint import Checkpoints, StateFile
from utils import UserError

import torch
from filelock import FileLock, Timeout

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
ORDER = "order.permutation.safetensors"  # channel order of a run with --permute
RESULTS = ("mask.safetensors", "logits.safetensors", "curve.png", "checkpoint", "report.json")


def is_finished(run: str | Path) -> bool:
    """Return whether this run has delivered its results."""
    return "summary" in read_record(run)


def remove_state(run: str | Path) -> None:
    """Remove the files that only a resumed run needs."""
    shutil.rmtree(Path(run) / "state", ignore_errors=True)
    Path(run, "lock").unlink(missing_ok=True)


class RunFolder:
    """A run's folder: a new one or, if `is_resumed`, that of a stopped run. As a context manager it
    keeps the folder locked for this run.

    arguments: those of the run, to be recorded; script: the script that resumes it.
    """

    def __init__(self, path: str | Path, arguments: dict, script: str, is_resumed: bool = False):
        self.path = Path(path)
        self.is_resumed = is_resumed
        arguments = {
            name: value for name, value in arguments.items() if name not in ("out", "resume")
        }
        self.arguments = json.loads(json.dumps(arguments))  # as they will be read from JSON
        self.checkpoints = Checkpoints(self.path / "state", arguments["checkpoint_every"])
        launcher = (
            "python"
            if processes.world_size() == 1
            else f"torchrun --nproc_per_node {processes.world_size()}"
        )
        self.script = script
        self.resume_command = f"{launcher} {script} --resume {shlex.quote(str(self.path))}"
        self._lock = None

    def __enter__(self):
        # takes seconds on a GPU; a folder left by a run killed meanwhile could not be resumed
        environment_now = self._environment
        if self.is_resumed:
            record = read_record(self.path)
            if record.get("script", self.script) != self.script:
                raise of_another_script(self.path, record, self.script)
        elif processes.is_main():
            self._make()
        try:
            if processes.is_main():
                self._lock = lock(self.path)
            self.record = (
                read_record(self.path)
                if self.is_resumed
                else {
                    "script": self.script,
                    "arguments": self.arguments,
                    "environment": environment_now,
                }
            )
            if self.is_resumed and processes.is_main():
                self._remove_leftovers()
            self.note()
        except BaseException:
            self.__exit__(*sys.exc_info())  # Python calls it only for errors in the `with` block
            raise
        return self

    def _make(self) -> None:
        remedy = "choose another --out or remove it"
        if (
            (self.path / "run.json").is_file()
            and not is_finished(self.path)
            and (read_record(self.path)["arguments"] == self.arguments)
        ):
            remedy = f"resume it: {self.resume_command}, or {remedy}"
        refuse_existing(self.path, remedy)
        self.path.mkdir(parents=True, exist_ok=True)  # if two runs get here, the lock refuses one
        sync(self.path.parent)

    def _remove_leftovers(self) -> None:
        """Remove temporary files of a killed process, and its results, which are made again."""
        for path in [
            *self.path.glob(".*.tmp"),
            *(self.path / "state").glob(".*.tmp"),
            *(self.path / name for name in RESULTS),
        ]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self._lock is None:
            return
        # text, log lines, a mask
        outputs = [
            file for file in self.path.glob("[!.]*") if file.name not in ("run.json", "lock")
        ]
        is_kept = self.is_resumed or any(file.stat().st_size for file in outputs)
        if not is_kept:
            shutil.rmtree(self.path)
        elif error is None:
            remove_state(self.path)
        self._lock.release()
        advice = f"; resume with: {self.resume_command}" if is_kept and self.path.exists() else ""
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); free some space{advice}"
            ) from error
        if isinstance(error, UserError) and advice:
            raise UserError(f"{error}{advice}") from error
        if error is not None and advice:
            print(advice.removeprefix("; "), file=sys.stderr)

    # ----------------------------------------------------------------------------------- the record

    def check_inputs(self, **fingerprints: str) -> None:
        """Record the fingerprints of the run's inputs or, if it is resumed, compare them with the
        recorded ones.

        Raises UserError naming what has changed or differs between processes. Other software or
        hardware is only reported.
        """
        recorded = self.record.get("fingerprints") or {}
        changed = [
            f"{name} ({recorded[name]} there, {value} here)"
            for name, value in fingerprints.items()
            if recorded.get(name, value) != value
        ]
        if changed:
            raise UserError(
                f"{self.path} was made from another {', '.join(changed)}: restore the inputs "
                "that it read, or start a new run"
            )
        if self.is_resumed:
            recorded_environment = self.record.get("environment") or {}
            for name, value in self._environment.items():
                if recorded_environment.get(name) != value:
                    processes.log(
                        f"note: {name} was {recorded_environment.get(name)} and is now {value}: "
                        "results may differ in bits"
                    )
        fingerprints = {**recorded, **fingerprints}
        processes.check_same(
            json.dumps([fingerprints, self.arguments, self._environment], sort_keys=True),
            "model, mask, text, flags or versions",
        )
        self.note(fingerprints=fingerprints)

    def newest_state(self) -> StateFile | None:
        """Return the newest intact state of a resumed run; None if the run starts."""
        if not self.is_resumed:
            return None
        state = None
        with processes.main_process_first():  # it alone checks the whole file
            if processes.is_main():
                state = self.checkpoints.newest()
        step = processes.broadcast_float(state.scalars["progress"]["step"] if state else math.nan)
        return (
            state
            if processes.is_main() or math.isnan(step)
            else StateFile(self.checkpoints.path(int(step)))
        )

    def finish(self, summary: dict) -> None:
        """Record the summary. It is written last, so it marks all other files as complete."""
        self.note(summary=summary)

    def note(self, **facts: object) -> None:
        """Add facts to the record, run.json, which the main process writes. Nothing else changes
        the record."""
        self.record |= facts
        if processes.is_main():
            write_json(self.path / "run.json", self.record)

    @cached_property
    def _environment(self) -> dict:
        """The environment and everything else that decides the bits."""
        device = self.arguments.get("device")
        return {
            **environment(device),
            "threads": torch.get_num_threads(),
            "processes": processes.world_size(),
        }


def lock(folder: Path) -> FileLock:
    """Lock the folder and return the lock. Raises UserError if a living process holds it."""
    held = FileLock(folder / "lock", timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is being written by another run; wait until it ends or choose another --out"
        )
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); resume a writable copy of it"
        )
    return held
