"""A run's folder, kept so that a run is hard to lose: claimed, locked, recorded.

    run.json         script, arguments, fingerprints of what was read, environment; at the end the
                     summary
    metrics.jsonl    one line a step (log.py)
    state/           checkpoints, until the run is finished (checkpoint.py)
    lock             held by the process that writes here; the system frees that of a dead one

Of several processes (models/processes.py) the main one writes; the others read. A run that has made
nothing yet, no step and no text, leaves nothing.
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
ORDER = "order.permutation.safetensors"  # of the channels, of a run with --permute
RESULTS = ("mask.safetensors", "logits.safetensors", "curve.png", "checkpoint", "report.json")


def is_finished(run: str | Path) -> bool:
    """Has this run delivered?"""
    return "summary" in read_record(run)


def remove_state(run: str | Path) -> None:
    """What only a run that goes on needs."""
    shutil.rmtree(Path(run) / "state", ignore_errors=True)
    Path(run, "lock").unlink(missing_ok=True)


class RunFolder:
    """A run's folder, new or, `is_resumed`, one that a run has left. A context manager: inside, the
    folder is this process's own, or that of the main one of several.

    arguments: of the run, as they are recorded; script: that goes on with it.
    """

    def __init__(self, path: str | Path, arguments: dict, script: str, is_resumed: bool = False):
        self.path = Path(path)
        self.is_resumed = is_resumed
        arguments = {
            name: value for name, value in arguments.items() if name not in ("out", "resume")
        }
        self.arguments = json.loads(json.dumps(arguments))  # as JSON gives them back
        self.checkpoints = Checkpoints(self.path / "state", arguments["checkpoint_every"])
        start = (
            "python"
            if processes.world_size() == 1
            else f"torchrun --nproc_per_node {processes.world_size()}"
        )
        self.script = script
        self.resume_command = f"{start} {script} --resume {shlex.quote(str(self.path))}"
        self._lock = None

    def __enter__(self):
        # takes seconds on a GPU; a folder that is killed meanwhile has nothing to go on with
        here = self._here
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
                else {"script": self.script, "arguments": self.arguments, "environment": here}
            )
            if self.is_resumed and processes.is_main():
                self._remove_leftovers()
            self.note()
        except BaseException:
            self.__exit__(*sys.exc_info())  # which python calls for what is inside alone
            raise
        return self

    def _make(self) -> None:
        remedy = "choose another --out or remove it"
        if (
            (self.path / "run.json").is_file()
            and not is_finished(self.path)
            and (read_record(self.path)["arguments"] == self.arguments)
        ):
            remedy = f"go on with it: {self.resume_command}, or {remedy}"
        refuse_existing(self.path, remedy)
        self.path.mkdir(parents=True, exist_ok=True)  # of two at once the lock refuses one
        sync(self.path.parent)

    def _remove_leftovers(self) -> None:
        """Files that a killed process had begun, and its results, which are made again."""
        for path in [
            *self.path.glob(".*.tmp"),
            *(self.path / "state").glob(".*.tmp"),
            *(self.path / name for name in RESULTS),
        ]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self._lock is None:
            return
        made = [path for path in self.path.glob("[!.]*") if path.name not in ("run.json", "lock")]
        kept = self.is_resumed or any(path.stat().st_size for path in made)  # text, a step, a mask
        if not kept:
            shutil.rmtree(self.path)
        elif error is None:
            remove_state(self.path)
        self._lock.release()
        then = f"; go on with: {self.resume_command}" if kept and self.path.exists() else ""
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); free some space{then}"
            ) from error
        if isinstance(error, UserError) and then:
            raise UserError(f"{error}{then}") from error
        if error is not None and then:
            print(then.removeprefix("; "), file=sys.stderr)

    # ------------------------------------------------------------------------------------- recorded

    def check_inputs(self, **fingerprints: str) -> None:
        """Record what the run reads or, of a run that goes on, compare. UserError naming what is no
        longer the same, here or between the processes; other software or hardware is only pointed
        out."""
        known = self.record.get("fingerprints") or {}
        changed = [
            f"{name} ({known[name]} there, {value} here)"
            for name, value in fingerprints.items()
            if known.get(name, value) != value
        ]
        if changed:
            raise UserError(
                f"{self.path} was made from another {', '.join(changed)}: bring back what it "
                "read, or start a new run"
            )
        if self.is_resumed:
            there = self.record.get("environment") or {}
            for name, value in self._here.items():
                if there.get(name) != value:
                    processes.log(
                        f"note: {name} was {there.get(name)} and is {value}: the bits may differ"
                    )
        fingerprints = {**known, **fingerprints}
        processes.check_same(
            json.dumps([fingerprints, self.arguments, self._here], sort_keys=True),
            "model, mask, text, flags or versions",
        )
        self.note(fingerprints=fingerprints)

    def newest_state(self) -> StateFile | None:
        """The newest state that is whole, of a run that goes on; None: it starts."""
        if not self.is_resumed:
            return None
        found = None
        with processes.main_process_first():  # which alone reads it all, and decides
            if processes.is_main():
                found = self.checkpoints.newest()
        step = processes.broadcast_float(found.scalars["progress"]["step"] if found else math.nan)
        return (
            found
            if processes.is_main() or math.isnan(step)
            else StateFile(self.checkpoints.path(int(step)))
        )

    def finish(self, summary: dict) -> None:
        """The last of a run's files, which says that all others are whole."""
        self.note(summary=summary)

    def note(self, **facts: object) -> None:
        """Put these facts into the record, run.json, which the main process writes. Nothing else
        changes it."""
        self.record |= facts
        if processes.is_main():
            write_json(self.path / "run.json", self.record)

    @cached_property
    def _here(self) -> dict:
        """The environment, and what else decides the bits."""
        device = self.arguments.get("device")
        return {
            **environment(device),
            "threads": torch.get_num_threads(),
            "processes": processes.world_size(),
        }


def lock(folder: Path) -> FileLock:
    """The folder's lock, held; UserError where a living process holds it."""
    held = FileLock(folder / "lock", timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is being written by another run; wait for its end or choose another --out"
        )
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); resume a copy of it that can be"
        )
    return held
