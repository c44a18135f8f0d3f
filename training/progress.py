"""How far a run is: its steps and their clock, the signals that end it, when an evaluation or a state is due.

SIGTERM, SIGHUP and Ctrl-C end a run after the step it is at, with its state saved; a second one ends it at once.
"""
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from utils import UserError, progress_bar

import torch

from models.processes import ProcessGroup
from training.checkpoint import StateFile, give_shards
from training.run_folder import RunFolder
from training.validation import Validation

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
BAD_LOSSES = 3  # in a row end a run


@dataclass
class StepResult:
    """What a learner's step came to, the same in all processes: the losses of its masks, nats, what each is compared
    with, and the advantage that moved the logits, if one did."""
    losses: Sequence[float]
    references: Sequence[float | None] = ()
    advantage: float | None = None
    delta: float | None = None
    not_finite: int | None = None  # blocks whose gradient was not

    @property
    def loss(self) -> float:
        """Their mean."""
        return fmean(self.losses)

    @property
    def reference(self) -> float | None:
        """Their mean, None where they are not wanted."""
        return None if None in self.references or not self.references else fmean(self.references)

    @property
    def is_finite(self) -> bool:
        """Whether anything can be learned from it."""
        return math.isfinite(self.loss + (self.reference or 0))


@dataclass
class Position:
    """Where a run is. Saved with every state."""
    step: int = 0  # steps done
    minibatches: int = 0  # that the run has gone through
    progress: float = 0.0  # share of the run, 0 to 1
    evaluations: int = 0  # of the layers and of the held-out loss
    skipped: int = 0  # steps whose loss was not finite
    skipped_in_a_row: int = 0
    diverged: int | None = None  # the step at which that was announced
    seconds: float = 0.0  # of the loop
    seconds_swapping: float = 0.0  # before it
    seconds_saving: float = 0.0  # of the loop, for states
    metrics_bytes: int = 0
    layers_bytes: int = 0


def lr_multiplier(schedule: str, progress: float) -> float:
    """The share of --lr in force after this share of the run; a decaying schedule warms up in its first fiftieth."""
    if schedule == "constant":
        return 1.0
    decay = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return decay * min(1.0, (progress + 1e-3) / 0.02)


class StopSignals:
    """A context manager: inside, a signal ends the process at once or, while `deferred`, is kept in `received`."""

    def __init__(self):
        self.received, self.deferred = 0, False
        self._before = {}

    def __enter__(self):
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, or a shell's background
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.deferred and not self.received:
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            sys.exit(128 + number)


class Run:
    """The loop's frame: what comes before a step and after it. All processes have the same one.

    minibatches: how many there are; width: how many a step takes; epoch, max_step, max_minutes: whichever comes first
    ends the run. validation: says whether the run diverges.
    """

    def __init__(self, folder: RunFolder, group: ProcessGroup, signals: StopSignals, validation: Validation,
                 minibatches: int, width: int, epoch: int, max_step: int, max_minutes: float | None, num_evals: int):
        self.folder, self.group, self.signals = folder, group, signals
        self.checkpoints, self.validation = folder.checkpoints, validation
        self.minibatches, self.width = minibatches, width
        self.passes, self.max_step, self.num_evals = epoch * minibatches, max_step, num_evals
        self.max_s = 60 * (max_minutes or math.inf)
        self.position, self.parts = Position(), {}
        self.seconds = 0.0  # of the loop, as all processes agree
        self._stats: dict | None = None
        self._heldout: float | None = None
        self._stopped_by = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.position.step

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.position.progress

    @property
    def total_steps(self) -> int:
        """Steps in all, if time does not end the run."""
        position = self.position
        return min(self.max_step, position.step + math.ceil((self.passes - position.minibatches) / self.width))

    def expected_steps(self) -> float:
        """Steps in all, by how fast it has gone."""
        return round(self.step / self.progress) if self.progress else self.total_steps

    # ---------------------------------------------------------------------------------------------------------- steps

    def steps(self) -> Iterator[int]:
        """Yield each step there is still to do. When it is done the state is saved if that is due, or if a signal came,
        which then ends the process as it would have at once."""
        self.signals.deferred = self.folder.has_begun = True
        self._started = time.monotonic() - self.position.seconds
        self._bar = progress_bar(total=self.total_steps, initial=self.step, desc="learning", unit="step",
                                 disable=not self.group.is_main)
        with self._bar:
            while self.progress < 1:
                yield self.step
                self._bar.update()
                due = self.group.is_main and self.checkpoints.due(self.step, self._elapsed_s(),
                                                                  last=self.progress == 1.0)
                due = self.group.all_gather([float(bool(due))])[0][0]  # as the main process says
                if due or self._stopped_by:
                    self.save()
                    self.group.wait_for_main()  # writing may take longer than a process may take to answer
                if self._stopped_by:
                    self.group.log(f"stopped after step {self.step}, with its state saved")
                    sys.exit(128 + self._stopped_by)
        self.signals.deferred = False

    def next_batches(self) -> list[int]:
        """The minibatches of the step to come, one for each process or one for all."""
        return [(self.position.minibatches + i) % self.minibatches for i in range(self.width)]

    def _elapsed_s(self) -> float:
        """Since the run's start, without the time in which it was stopped."""
        return time.monotonic() - self._started

    def advance(self, result: StepResult) -> bool:
        """Count a step; False where its loss is not finite, and UserError after BAD_LOSSES of these in a row. Here all
        processes take one time as theirs, and learn of a signal that one of them got."""
        found = self.group.all_gather([self._elapsed_s(), float(self.signals.received)])
        self.seconds, self._stopped_by = found[0][0], int(max(received for _, received in found))
        position = self.position
        position.step += 1
        position.minibatches += self.width
        position.progress = min(1.0, max(position.step / self.max_step, position.minibatches / self.passes,
                                         self.seconds / self.max_s))
        if result.is_finite:
            position.skipped_in_a_row = 0
            return True
        self._skip(result.loss + (result.reference or 0))
        return False

    def _skip(self, loss: float) -> None:
        position = self.position
        position.skipped += 1
        position.skipped_in_a_row += 1
        if position.skipped_in_a_row < BAD_LOSSES and (self.folder.metrics or self.progress < 1):
            self.group.log(f"the loss is {loss} at step {self.step}: skipped")
            return
        begin = self.step - position.skipped_in_a_row + 1
        position.skipped_in_a_row = 0  # resumed, the run goes on after them
        saved = ""
        if self.folder.metrics:
            self.save()
            self.group.wait_for_main()
            saved = "; the state is saved"
        raise UserError(f"the loss is {loss} at step {begin} and at all up to step {self.step}; lower --lr, or use "
                        f"--dtype bfloat16 if the model overflows in its dtype{saved}")

    # --------------------------------------------------------------------------------------------- evaluated and logged

    def evaluation_due(self) -> bool:
        """Is it time for one of the evaluations, which are evenly spread over the run? Counts it."""
        before, self.position.evaluations = self.position.evaluations, int(self.progress * self.num_evals)
        return self.position.evaluations > before

    def log_evaluation(self, stats: dict, heldout: float | None) -> None:
        """Statistics of the layers' blocks and the held-out loss, nats, for the step's line."""
        self._stats, self._heldout = stats, heldout

    def log(self, result: StepResult) -> None:
        """A step's line in the logs, after its evaluation if one was due; says so where the run diverges."""
        line = {"step": self.step, "loss": result.loss, "baseline": result.reference, "advantage": result.advantage,
                "delta": result.delta, "seconds": round(self.seconds, 3)}
        if result.not_finite is not None:
            line["blocks_not_finite"] = result.not_finite
        stats, self._stats = self._stats, None
        if stats and self.validation.has_text:
            line["heldout"] = self._heldout
        self.folder.log(line, stats)
        improvement = "" if result.reference is None else f" ({result.reference - result.loss:+.4f} against m0)"
        self._bar.set_postfix_str(f"loss {result.loss:.4f}{improvement}", refresh=False)
        if stats and self.position.diverged is None:
            self._warn_of_divergence()

    def _warn_of_divergence(self) -> None:
        if warning := self.validation.divergence(self.folder.metrics, self.minibatches):
            self.position.diverged = self.step
            self.group.log(f"\nat step {self.step} {warning}")

    # ----------------------------------------------------------------------------------------------- saved and restored

    def restore(self, saved: StateFile | None, **parts) -> bool:
        """Put the run, these parts of it included, where a state is; False: there is none, it starts.

        parts: what has `state()`, (scalars, tensors), and `restore(scalars, read)`.
        """
        self.parts = parts
        with self.group.main_before_others():
            if saved:
                self._restore(saved)
            self.checkpoints.step, self.checkpoints.saved_at = self.position.step, self.position.seconds
            self.folder.open_logs(self.position.metrics_bytes, self.position.layers_bytes)
            if self.folder.is_resumed:
                self.group.log(f"going on after step {self.step} of {self.folder.path}")
        return bool(saved)

    def _restore(self, saved: StateFile) -> None:
        self.folder.check_arguments(saved.scalars.get("arguments"), saved.path)
        try:
            self.position = Position(**saved.scalars["position"])
            for name, part in self.parts.items():
                part.restore(saved.scalars[name], lambda key, like, name=name: saved.read(f"{name}.{key}", like))
            torch.set_rng_state(saved.read("random", torch.get_rng_state()))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{saved.path} is a state of another version ({reason}); start a new run")

    def save(self) -> None:
        """Save the state. The logs are synced first: a state that is there has its lines there."""
        states = {name: part.state() for name, part in self.parts.items()}
        tensors = {f"{name}.{key}": tensor for name, (_, found) in states.items() for key, tensor in found.items()}
        if not self.group.is_main:
            give_shards(tensors)
            return
        self.position.metrics_bytes, self.position.layers_bytes = self.folder.sync_logs()
        self.position.seconds = self._elapsed_s()
        scalars = {"position": asdict(self.position), "arguments": self.folder.arguments,
                   **{name: found for name, (found, _) in states.items()}}
        tensors["random"] = torch.get_rng_state()
        self.checkpoints.save(self.step, self.position.seconds, scalars, tensors)
        self.position.seconds_saving += self.checkpoints.cost_s

    def state_bytes(self) -> int:
        """Of the states that are kept, those that are not there yet, the one being written included."""
        tensors = [tensor for part in self.parts.values() for tensor in part.state()[1].values()]
        return self.checkpoints.missing * sum(tensor.nbytes for tensor in tensors)

    def elapsed_s(self) -> float:
        """Seconds of the whole run, swaps included."""
        return self._elapsed_s() + self.position.seconds_swapping
