"""A run's folder, kept so that a run is hard to lose: claimed, locked, recorded, logged, resumed.

    run.json         arguments, fingerprints of what was read, environment; once the run is finished, its summary
    metrics.jsonl    one line a step          layers.jsonl    one line a look at the layers
    state/           checkpoints, until the run is finished
    lock             held by the process that writes here; the system frees that of a dead one

Of several processes (parallel.py) the first one writes; the others read.

A run that ends before its first step leaves nothing. SIGTERM, SIGHUP and Ctrl-C end a run after the step it is at, with
its state saved; a second one ends it at once.
"""
import errno
import json
import os
import platform
import secrets
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import tracking
from checkpoint import Checkpoints, join
from files import check_disk, refuse_existing, sync, write_json
from parallel import Ranks
from settings import read_record
from utils import UserError, environment

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs in one folder are not told apart there
    fcntl = None

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
BAD_LOSSES = 3  # in a row end a run
ASIDE = ("out", "resume", "repeat")  # arguments that say where a run is, not what it is


@dataclass
class Position:
    """Where a run is. Saved with every state."""
    step: int = 0  # steps done
    minibatches: int = 0  # that the run has gone through
    done: float = 0.0  # share of the run, 0 to 1
    looks: int = 0  # at the layers and the held-out minibatches
    skipped: int = 0  # steps whose loss was not finite
    skipped_in_a_row: int = 0
    diverged: int | None = None  # the step at which that was announced
    seconds: float = 0.0  # of the loop
    seconds_exchanging: float = 0.0  # before it
    seconds_saving: float = 0.0  # of them, for states
    metrics_bytes: int = 0
    layers_bytes: int = 0


def is_finished(run: str | Path) -> bool:
    """Has this run delivered? Then nothing is left of its state either."""
    if "summary" not in read_record(Path(run)):
        return False
    shutil.rmtree(Path(run) / "state", ignore_errors=True)
    Path(run, "lock").unlink(missing_ok=True)
    return True


class RunFolder:
    """The folder that `args.out` names, new or, with --resume, one that a run has left. A context manager: inside, the
    folder is this process's own, or that of the first of several `ranks`."""

    def __init__(self, args, ranks: Ranks):
        self.args, self.path, self.ranks = args, Path(args.out), ranks
        self.position, self.metrics, self.parts, self.trackers = Position(), [], {}, []
        self.signalled, self.stopped_by, self.stepped, self._stepping = 0, 0, False, False
        self._lock, self._logs, self._handlers, self._made = None, [], {}, []
        self.checkpoints = Checkpoints(self.path / "state", args.checkpoint_every, args.keep_checkpoints)
        self.resume_command = f"python train.py --resume {self.path}" + (
            " --trust_remote_code" if args.trust_remote_code else "")

    # ------------------------------------------------------------------------------------------- claimed and locked

    def __enter__(self):
        if not self.args.resume and self.ranks.first:
            self._make()
        try:
            if self.ranks.first:
                self._lock = lock(self.path)
            arguments = {**vars(self.args), "resume": None}
            self.record = (read_record(self.path) if self.args.resume else
                           {"id": secrets.token_hex(4), "arguments": arguments, "environment": self.here()})
            if not self.args.resume:
                self._write_record()
            for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, or a shell's background
                    self._handlers[number] = signal.signal(number, self._on_signal)
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

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
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
        then = f"; go on with: {self.resume_command}" if self.stepped and self.path.exists() else ""
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free some space{then}") from error
        if isinstance(error, UserError) and then:
            raise UserError(f"{error}{then}") from error
        if error is not None and then:
            print(then.removeprefix("; "), file=sys.stderr)

    def _on_signal(self, number: int, frame) -> None:
        if self._stepping and not self.signalled:
            self.signalled = number  # `agree` tells the others, and `steps` sees it when the step is done
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            sys.exit(128 + number)

    def agree(self, losses: list[float], reference: float | None) -> tuple[list[float], list[float | None], float]:
        """The losses of all processes in this step and what each is to be compared with, in their order, and the time
        in seconds that all take as theirs. Here they also learn of a signal that one of them got."""
        found = self.ranks.gather([self.seconds(), float(self.signalled), reference or 0.0, *losses])
        self.stopped_by = int(max(row[1] for row in found))
        references = [None if reference is None else row[2] for row in found for _ in losses]
        return [loss for row in found for loss in row[3:]], references, found[0][0]

    def steps(self, total: int):
        """Yield the progress bar for each step there is still to do. When a step is done its state is saved if that is
        due, or if a signal came, which then ends the process as it would have at once."""
        self._stepping, self.stepped = True, True
        self.started = time.monotonic() - self.position.seconds
        progress = tqdm(total=total, initial=self.position.step, desc="learning", unit="step",
                        disable=None if self.ranks.first else True)
        with progress:
            while self.position.done < 1:
                yield progress
                progress.update()
                due = self.checkpoints.due(self.position.step, self.seconds(), last=self.position.done == 1.0)
                if self.args.shard:  # all give their parts of the state
                    due = self.ranks.gather([float(bool(due))])[0][0]
                if due or self.stopped_by:
                    self.save()
                if self.stopped_by:
                    self.say(f"stopped after step {self.position.step}, with its state saved")
                    sys.exit(128 + self.stopped_by)
        self._stepping = False

    # ------------------------------------------------------------------------------------------------------ recorded

    def confirm(self, fingerprints: dict[str, str]) -> None:
        """Record what the run reads, or hold it against what a run to be resumed or repeated has read. UserError naming
        what is no longer the same; other software or hardware is only pointed out."""
        source = Path(self.args.repeat) if self.args.repeat else self.path
        before = read_record(source) if self.args.repeat else self.record
        known = before.get("fingerprints") or {}
        changed = [f"{name} ({known[name]} there, {value} here)" for name, value in fingerprints.items()
                   if name in known and known[name] != value]
        if changed:
            raise UserError(f"{source} was made from another {', '.join(changed)}: bring back what it read, or start a "
                            "new run")
        if self.args.resume or self.args.repeat:
            there = before.get("environment") or {}
            for name, value in self.here().items():
                if there.get(name) != value:
                    self.say(f"note: {name} was {there.get(name)} and is {value}: the bits may differ")
        self.record["fingerprints"] = fingerprints
        self._write_record()

    def compare(self) -> None:
        """UserError unless all processes have read and been told the same."""
        self.ranks.check_same(json.dumps([self.record["fingerprints"], self._settings(), environment()],
                                         sort_keys=True), "model, mask, text, flags or versions")

    def finish(self, summary: dict) -> None:
        """The last of a run's files, which says that all others are whole; a repeated run is compared."""
        if self.args.repeat and "summary" in (before := read_record(Path(self.args.repeat))):
            same = before["summary"].get("mask_fingerprint") == summary["mask_fingerprint"]
            print(f"the mask is {'the same as' if same else 'not the same as'} that of {self.args.repeat}")
        self.record["summary"] = summary
        self._write_record()

    def _write_record(self) -> None:
        if self.ranks.first:
            write_json(self.path / "run.json", self.record)

    def here(self) -> dict:
        """The environment, and what else decides the bits."""
        return {**environment(), "threads": torch.get_num_threads(), "processes": self.ranks.count}

    def say(self, message: str) -> None:
        """To stderr, once however many processes there are."""
        if self.ranks.first:
            print(message, file=sys.stderr)

    # -------------------------------------------------------------------------------------------- logged and resumed

    def seconds(self) -> float:
        """Since the run's start, without the time in which it was stopped."""
        return time.monotonic() - self.started

    def restore(self, parts: dict) -> bool:
        """Put the run, these parts of it included, where its newest state is; False: there is none, it starts.

        parts: name -> what has `state()`, (scalars, tensors), and `restore(scalars, read)`.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        with self.ranks.first_before_others():
            return self._restore()

    def _restore(self) -> bool:
        saved = None
        if self.args.resume:
            if self.ranks.first:
                self._tidy()
            saved = self.checkpoints.newest()
        if saved:
            self._check_settings(saved)
            try:
                self.position = Position(**saved.scalars["position"])
                for name, part in self.parts.items():
                    part.restore(saved.scalars[name], lambda key, like, name=name: saved.read(f"{name}.{key}", like))
                torch.set_rng_state(saved.read("random", torch.get_rng_state()))
            except (KeyError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{saved.path} is a state of another version ({reason}); start a new run")
        self.checkpoints.saved_at = self.position.seconds
        self.metrics = lines_up_to(self.path / "metrics.jsonl", self.position.metrics_bytes)
        if self.ranks.first:
            cut(self.path / "metrics.jsonl", self.position.metrics_bytes)
            cut(self.path / "layers.jsonl", self.position.layers_bytes)
            self._logs = [open(self.path / name, "a", buffering=1) for name in ("metrics.jsonl", "layers.jsonl")]
        if self.args.resume:
            self.say(f"going on after step {self.position.step} of {self.path}")
        return bool(saved)

    def check_disk(self, results_bytes: float) -> None:
        """UserError unless there is room for results of so many bytes and the states that are kept, the one being
        written included."""
        tensors = [tensor for part in self.parts.values() for tensor in part.state()[1].values()]
        states = max(0, self.checkpoints.keep + 1 - len(self.checkpoints.paths()))
        check_disk(self.path, results_bytes + states * sum(tensor.nbytes for tensor in tensors))

    def _check_settings(self, saved) -> None:
        there, here = saved.scalars.get("arguments"), self._settings()
        if there != here:
            changed = [f"--{name} {there.get(name)} there, {value} here" for name, value in here.items()
                       if there.get(name) != value] if isinstance(there, dict) else ["all of them"]
            raise UserError(f"{self.path / 'run.json'} was changed since {saved.path} was saved: {'; '.join(changed)}; "
                            "undo that, or start a new run")

    def _settings(self) -> dict:
        """The arguments as JSON gives them back."""
        arguments = {name: value for name, value in vars(self.args).items() if name not in ASIDE}
        return json.loads(json.dumps(arguments))

    def _tidy(self) -> None:
        """Remove what a killed process left: files it had begun, and results, which are made again."""
        for path in [*self.path.glob(".*.tmp"), *(self.path / "state").glob(".*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("mask.safetensors", "logits.safetensors", "curve.png", "checkpoint"):
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def log(self, line: dict, layers: dict | None = None) -> None:
        """A line for metrics.jsonl and the trackers and, where the layers were looked at, for layers.jsonl."""
        self.metrics.append(line)
        for log, value in zip(self._logs, (line, layers and {"step": line["step"], **layers})):
            if value is not None:
                log.write(json.dumps(value) + "\n")
        for tracker in self.trackers:
            tracker.log(line["step"], tracking.scalars(line, layers))

    def skip(self, loss: float, advice: str) -> None:
        """Count a step whose loss is not finite. UserError after BAD_LOSSES in a row, with the state saved."""
        at = self.position
        at.skipped, at.skipped_in_a_row = at.skipped + 1, at.skipped_in_a_row + 1
        if at.skipped_in_a_row < BAD_LOSSES and (self.metrics or at.done < 1):
            self.say(f"the loss is {loss} at step {at.step}: skipped")
            return
        first, at.skipped_in_a_row = at.step - at.skipped_in_a_row + 1, 0  # resumed, the run goes on after them
        if self.metrics:
            self.save()
            advice += f"; nothing has moved since step {first - 1}, and that is saved"
        raise UserError(f"the loss is {loss} at step {first} and at all up to step {at.step}; {advice}")

    def save(self) -> None:
        """Save the state. The logs are synced first: a state that is there has its lines there."""
        states = {name: part.state() for name, part in self.parts.items()}
        tensors = {f"{name}.{key}": tensor for name, (_, found) in states.items() for key, tensor in found.items()}
        if not self.ranks.first:
            join(tensors)
            return
        for tracker in self.trackers:
            tracker.flush()
        for log in self._logs:
            os.fsync(log.fileno())
        sync(self.path)
        self.position.metrics_bytes, self.position.layers_bytes = (log.tell() for log in self._logs)
        self.position.seconds = self.seconds()
        scalars = {"position": asdict(self.position), "arguments": self._settings(),
                   **{name: found for name, (found, _) in states.items()}}
        tensors["random"] = torch.get_rng_state()
        self.checkpoints.save(self.position.step, self.position.seconds, scalars, tensors)
        self.position.seconds_saving += self.checkpoints.cost


def lock(folder: Path):
    """The folder's lock, an open file; UserError where a living process holds it."""
    while True:
        file = open(folder / "lock", "a+")
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


def lines_up_to(path: Path, size: int) -> list[dict]:
    """The lines of a .jsonl up to the bytes that a state knows of. UserError where it is not whole up to there."""
    if not size:
        return []
    try:
        with open(path, "rb") as file:
            found = file.read(size)
        if len(found) < size:
            raise ValueError("lines are missing")
        return [json.loads(line) for line in found.decode().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not as the run left it ({error}): bring it back, or start a new run")


def cut(path: Path, size: int) -> None:
    """Shorten a .jsonl to the bytes that a state knows of; UserError as `lines_up_to`."""
    lines_up_to(path, size)
    if size:
        os.truncate(path, size)
    else:
        path.unlink(missing_ok=True)
