"""A run's folder, kept so that a run is hard to lose: claimed, locked, recorded, logged.

    run.json         arguments, fingerprints of what was read, environment; once the run is finished, its summary
    metrics.jsonl    one line a step          layers.jsonl    one line an evaluation
    state/           checkpoints, until the run is finished (checkpoint.py)
    lock             held by the process that writes here; the system frees that of a dead one

Of several processes (models/processes.py) the main one writes; the others read. A run that ends before its first
step leaves nothing.
"""
import errno
import json
import os
import platform
import secrets
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from utils import UserError, environment

import torch

from files.atomic import check_disk, refuse_existing, sync
from files.records import cut_lines, lines_up_to, read_record, write_json
from models.processes import ProcessGroup
from training import tracking
from training.checkpoint import Checkpoints, StateFile

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs in one folder are not told apart there
    fcntl = None

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
ASIDE = ("out", "resume", "repeat", "timeout_s")  # arguments that say where a run is and waits, not what it is


def is_finished(run: str | Path) -> bool:
    """Has this run delivered? Then nothing is left of its state either."""
    if "summary" not in read_record(run):
        return False
    shutil.rmtree(Path(run) / "state", ignore_errors=True)
    Path(run, "lock").unlink(missing_ok=True)
    return True


def _without_aside(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name not in ASIDE}


class RunFolder:
    """A run's folder, new or, `resume`, one that a run has left. A context manager: inside, the folder is this
    process's own, or that of the main one of several.

    arguments: of the run, as they are recorded; repeat: the folder of a run that this one does again.
    """

    def __init__(self, path: str | Path, arguments: dict, group: ProcessGroup, resume: bool = False,
                 repeat: str | None = None):
        self.path, self.group, self.is_resumed = Path(path), group, resume
        self._recorded = {**arguments, "resume": None}
        self.arguments = json.loads(json.dumps(_without_aside(arguments)))  # as JSON gives them back
        self._device = group.device or arguments.get("device")
        self._repeated = Path(repeat) if repeat else None
        self.checkpoints = Checkpoints(self.path / "state", arguments["checkpoint_every"],
                                       arguments["keep_checkpoints"])
        self.metrics: list[dict] = []
        self.trackers: list = []
        self.has_begun = False  # its first step
        self._lock, self._logs, self._made = None, [], []
        self.resume_command = f"python train.py --resume {self.path}" + (
            " --trust_remote_code" if arguments.get("trust_remote_code") else "")

    # ------------------------------------------------------------------------------------------- claimed and locked

    def __enter__(self):
        if not self.is_resumed and self.group.is_main:
            self._make()
        try:
            if self.group.is_main:
                self._lock = lock(self.path)
            self.record = (read_record(self.path) if self.is_resumed else
                           {"id": secrets.token_hex(4), "arguments": self._recorded, "environment": self._here()})
            if not self.is_resumed:
                self._write_record()
        except BaseException:
            self.__exit__(*sys.exc_info())  # which python calls for what is inside alone
            raise
        return self

    def _make(self) -> None:
        remedy = "choose another --out or remove it"
        if (self.path / "run.json").is_file():
            remedy = f"go on with it: {self.resume_command}, or {remedy}"
        refuse_existing(self.path, remedy)
        above = [parent for parent in self.path.parents if not parent.exists()]
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{self.path} exists already; choose another --out")
        self._made = [self.path, *above]
        for made in self._made:
            sync(made.parent)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        for opened in (*self._logs, *self.trackers):
            with suppress(OSError):  # of a full disk, said already
                opened.close()
        if self._lock is None:
            return
        if self._made and not self.metrics:
            shutil.rmtree(self.path)  # nothing has come of it
            for parent in self._made[1:]:
                if not any(parent.iterdir()):
                    parent.rmdir()
        elif error is None:
            shutil.rmtree(self.path / "state", ignore_errors=True)
            (self.path / "lock").unlink(missing_ok=True)
        self._lock.close()
        then = f"; go on with: {self.resume_command}" if self.has_begun and self.path.exists() else ""
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free some space{then}") from error
        if isinstance(error, UserError) and then:
            raise UserError(f"{error}{then}") from error
        if error is not None and then:
            print(then.removeprefix("; "), file=sys.stderr)

    # ------------------------------------------------------------------------------------------------------ recorded

    def check_inputs(self, fingerprints: dict[str, str]) -> None:
        """Record what the run reads, or compare it with what a run to be resumed or repeated has read. UserError naming
        what is no longer the same, here or between the processes; other software or hardware is only pointed out."""
        source = self._repeated or self.path
        before = read_record(source) if self._repeated else self.record
        known = before.get("fingerprints") or {}
        changed = [f"{name} ({known[name]} there, {value} here)" for name, value in fingerprints.items()
                   if name in known and known[name] != value]
        if changed:
            raise UserError(f"{source} was made from another {', '.join(changed)}: bring back what it read, or start a "
                            "new run")
        if self.is_resumed or self._repeated:
            there = before.get("environment") or {}
            for name, value in self._here().items():
                if there.get(name) != value:
                    self.group.log(f"note: {name} was {there.get(name)} and is {value}: the bits may differ")
        self.record["fingerprints"] = fingerprints
        self._write_record()

    def check_processes(self) -> None:
        """UserError unless all processes have read and been told the same."""
        self.group.check_same(json.dumps([self.record["fingerprints"], self.arguments, environment(self._device)],
                                         sort_keys=True), "model, mask, text, flags or versions")

    def check_arguments(self, there: dict | None, state: Path) -> None:
        """UserError unless a state was saved under the arguments that run.json has now."""
        if isinstance(there, dict):
            there = _without_aside(there)
        if there != self.arguments:
            changed = [f"--{name} {there.get(name)} there, {value} here" for name, value in self.arguments.items()
                       if there.get(name) != value] if isinstance(there, dict) else ["all of them"]
            raise UserError(f"{self.path / 'run.json'} was changed since {state} was saved: {'; '.join(changed)}; "
                            "undo that, or start a new run")

    def check_disk(self, needed_bytes: float) -> None:
        """UserError unless there is room for so many bytes."""
        check_disk(self.path, needed_bytes)

    def finish(self, summary: dict) -> None:
        """The last of a run's files, which says that all others are whole; a repeated run is compared."""
        if self._repeated and "summary" in (before := read_record(self._repeated)):
            same = before["summary"].get("mask_fingerprint") == summary["mask_fingerprint"]
            print(f"the mask is {'the same as' if same else 'not the same as'} that of {self._repeated}")
        self.record["summary"] = summary
        self._write_record()

    def _write_record(self) -> None:
        if self.group.is_main:
            write_json(self.path / "run.json", self.record)

    def _here(self) -> dict:
        """The environment, and what else decides the bits."""
        return {**environment(self._device), "threads": torch.get_num_threads(), "processes": self.group.size}

    # -------------------------------------------------------------------------------------------- resumed and logged

    def newest_state(self) -> StateFile | None:
        """The newest state that is whole, of a run that goes on; None: it starts."""
        if not self.is_resumed:
            return None
        with self.group.main_before_others():
            return self.checkpoints.newest()

    def open_logs(self, metrics_bytes: int, layers_bytes: int) -> None:
        """Go on with the logs where a state has left them; what came after it is cut off. What a killed process left
        beside them, files it had begun and results, which are made again, is removed."""
        if self.is_resumed and self.group.is_main:
            self._remove_leftovers()
        self.metrics = lines_up_to(self.path / "metrics.jsonl", metrics_bytes)
        if self.group.is_main:
            cut_lines(self.path / "metrics.jsonl", metrics_bytes)
            cut_lines(self.path / "layers.jsonl", layers_bytes)
            self._logs = [open(self.path / name, "a", buffering=1) for name in ("metrics.jsonl", "layers.jsonl")]

    def _remove_leftovers(self) -> None:
        for path in [*self.path.glob(".*.tmp"), *(self.path / "state").glob(".*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("mask.safetensors", "logits.safetensors", "curve.png", "checkpoint"):
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def start_trackers(self, trackers: list[type], step: int) -> None:
        """Let the experiment trackers go on where so many steps are done; the main process has them."""
        if self.group.is_main:
            self.trackers = [tracker(self.path, self._recorded, self.record["id"], step) for tracker in trackers]

    def log(self, line: dict, layers: dict | None = None) -> None:
        """A line for metrics.jsonl and the trackers and, where the layers were evaluated, for layers.jsonl."""
        self.metrics.append(line)
        for log, value in zip(self._logs, (line, layers and {"step": line["step"], **layers})):
            if value is not None:
                log.write(json.dumps(value) + "\n")
        for tracker in self.trackers:
            tracker.log(line["step"], tracking.scalars(line, layers))

    def sync_logs(self) -> tuple[int, int]:
        """Have the disk hold the logs; their sizes in bytes."""
        for tracker in self.trackers:
            tracker.flush()
        for log in self._logs:
            os.fsync(log.fileno())
        sync(self.path)
        return tuple(log.tell() for log in self._logs)


def lock(folder: Path) -> TextIO:
    """The folder's lock, an open file; UserError where a living process holds it."""
    while True:
        try:
            file = open(folder / "lock", "a+")
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); resume a copy of it that can be")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip()
            file.close()
            raise UserError(f"{folder} is being written by another run ({holder}); wait for its end or choose another "
                            "--out")
        if os.path.exists(file.name) and os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()  # the run that held it has finished just now and removed the file
