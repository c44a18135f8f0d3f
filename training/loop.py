"""The frame of the training loop: bookkeeping before and after each step, the same in all
processes."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from models import processes
from training.checkpoint import give_shards
from training.log import Log
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.validation import Validation
from utils import UserError, progress_bar

import torch

BAD_LOSSES = 3  # losses in a row that are not finite and end a run
EVALUATIONS = 20  # of the share of blocks changed and of the held-out loss, per run
MANY = 0.01  # share of blocks without a finite gradient that is worth a message


@dataclass
class StepResult:
    """Result of a learner's step, the same in all processes: the mean loss of their minibatches in
    nats, the mean baseline that it is compared with, and the advantage that moved the logits, if
    any."""

    loss: float
    baseline: float | None = None
    advantage: float | None = None
    delta: float | None = None
    not_finite: int | None = None  # blocks whose gradient was not finite

    @property
    def is_finite(self) -> bool:
        """Whether the step's loss and baseline are finite, so that something can be learned from
        them."""
        return math.isfinite(self.loss + (self.baseline or 0))


@dataclass
class Progress:
    """How far a run has come. Saved with every state."""

    step: int = 0  # steps done
    minibatches: int = 0  # minibatches used, by all processes
    evaluations: int = 0  # of the share of blocks changed and of the held-out loss
    skipped: int = 0  # steps whose loss was not finite
    skipped_in_a_row: int = 0
    seconds: float = 0.0  # spent in the loop
    seconds_saving: float = 0.0  # spent on saving states
    log_bytes: int = 0


class Run:
    """A run's steps: which minibatch comes next, when the run ends, what is logged and saved.

    minibatches: how many there are; each process takes one per step. The run ends after max_step
    steps or `epoch` passes through the minibatches, whichever comes first. validation: evaluates
    the masks. evaluations: how many times, evenly spread over the run.
    """

    def __init__(
        self,
        folder: RunFolder,
        signals: StopSignals,
        validation: Validation,
        minibatches: int,
        max_step: float = math.inf,
        epoch: float = math.inf,
        evaluations: int = EVALUATIONS,
    ):
        self.folder = folder
        self.signals = signals
        self.validation = validation
        self.checkpoints = folder.checkpoints
        self.epoch_minibatches = minibatches
        self.total_steps = max_step
        if epoch < math.inf:
            self.total_steps = min(
                max_step, math.ceil(epoch * minibatches / processes.world_size())
            )
        self.evaluations = evaluations
        self.progress = Progress()
        self.parts = {}
        self.log: Log | None = None  # opened by `restore`
        self._stopped_by = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def share_done(self) -> float:
        """Share of the steps that are done, 0 to 1."""
        return self.step / self.total_steps

    # ---------------------------------------------------------------------------------------- steps

    def steps(self) -> Iterator[int]:
        """Yield the number of this process's minibatch for each remaining step.

        After a step the state is saved if that is due, if the step is the last, or if a signal
        came; the signal then ends the process. While steps run, signals are deferred.
        """
        self.signals.deferred = True
        self._started = time.monotonic() - self.progress.seconds
        self._bar = progress_bar(
            total=self.total_steps,
            initial=self.step,
            desc="learning",
            unit="step",
            disable=not processes.is_main(),
        )
        with self._bar:
            while self.share_done < 1:
                yield (self.progress.minibatches + processes.rank()) % self.epoch_minibatches
                self._bar.update()
                due = processes.broadcast_float(
                    float(self.checkpoints.due(self.step, self.elapsed_s()))
                )
                if self._stopped_by:
                    self._stop(self._stopped_by)
                if due or self.share_done == 1:
                    self.save()
        self.signals.deferred = False
        # a signal may have come while the last state was saved
        gathered = processes.all_gather([float(self.signals.received)])
        if received := int(max(received for (received,) in gathered)):
            self._stop(received)

    def _stop(self, signal: int) -> None:
        processes.log("\nstopping: saving the state; a second signal ends the run without it")
        self.save()
        processes.log(f"stopped after step {self.step}; its state is saved")
        sys.exit(128 + signal)

    def elapsed_s(self) -> float:
        """Return the seconds spent in the loop, without the time for which the run was stopped."""
        return time.monotonic() - self._started

    def advance(self, result: StepResult) -> None:
        """Count a step, evaluate the mask if that is due, and log the step.

        A loss that is not finite is not logged. Raises UserError if BAD_LOSSES of them come in a
        row. All processes use the main process's time, and learn of a signal that any of them
        received.
        """
        gathered = processes.all_gather([self.elapsed_s(), float(self.signals.received)])
        seconds = gathered[0][0]
        self._stopped_by = int(max(received for _, received in gathered))
        progress = self.progress
        progress.step += 1
        progress.minibatches += processes.world_size()
        if not result.is_finite:
            self._skip(result.loss + (result.baseline or 0))
            return
        progress.skipped_in_a_row = 0
        line = {
            "step": self.step,
            "loss": result.loss,
            "baseline": result.baseline,
            "advantage": result.advantage,
            "delta": result.delta,
            "seconds": round(seconds, 3),
        }
        if result.not_finite is not None:
            line["blocks_not_finite"] = result.not_finite
        before = progress.evaluations
        progress.evaluations = int(self.share_done * self.evaluations)
        if progress.evaluations > before:  # evenly spread over the run
            line["changed"] = self.validation.learner.changed()
            if (result.not_finite or 0) > MANY * self.validation.masked.blocks:
                processes.log(
                    f"\nat step {self.step} the gradients of {result.not_finite:,} blocks are not "
                    "finite and are left out: --dtype bfloat16 does not overflow"
                )
            heldout = self.validation.evaluate(self.step)
            line |= {"heldout": heldout} if self.validation.has_text else {}
        self.log.write(line)
        residual = (
            "" if result.baseline is None else f" ({result.loss - result.baseline:+.4f} against m0)"
        )
        self._bar.set_postfix_str(f"loss {result.loss:.4f}{residual}", refresh=False)

    def _skip(self, loss: float) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row < BAD_LOSSES and (self.log.lines or self.share_done < 1):
            processes.log(f"the loss is {loss} at step {self.step}: skipped")
            if self.share_done == 1:  # the last mask may still be the best, though not logged
                self.validation.evaluate(self.step)
            return
        begin = self.step - progress.skipped_in_a_row + 1
        progress.skipped_in_a_row = 0  # a resumed run continues after them
        saved = ""
        if self.log.lines:
            self.save()
            saved = "; the state is saved"
        raise UserError(
            f"the loss is {loss} at step {begin} and at all steps up to {self.step}; start a new "
            "run with a smaller --lr or --step_size, or with --dtype bfloat16 if the model "
            f"overflows in its dtype{saved}"
        )

    # ----------------------------------------------------------------------------- save and restore

    def restore(self, **parts) -> bool:
        """Restore the run and these parts of it from the newest state. Returns False if there is
        none: the run starts.

        parts: objects with `state()`, which returns (scalars, tensors), and `restore(scalars,
        read)`.
        """
        self.parts, saved = parts, self.folder.newest_state()
        with processes.main_process_first():
            if saved:
                self.progress = Progress(**saved.scalars["progress"])
                for name, part in parts.items():
                    part.restore(
                        saved.scalars[name],
                        lambda key, expected, name=name: saved.read(f"{name}.{key}", expected),
                    )
                torch.set_rng_state(saved.read("random", torch.get_rng_state()))
                self.checkpoints.step = self.step
                self.checkpoints.saved_at = self.progress.seconds
            self.log = Log(self.folder.path, self.progress.log_bytes)
        if saved:
            processes.log(f"resuming after step {self.step} of {self.folder.path}")
        return bool(saved)

    def save(self) -> None:
        """Save the state of this step, unless that is done. The other processes wait for the main
        one, as writing may exceed the timeout of an exchange. The log is synced first, so that a
        saved state always has its log lines."""
        if self.checkpoints.step == self.step:
            return
        states = {name: part.state() for name, part in self.parts.items()}
        tensors = {
            f"{name}.{key}": tensor
            for name, (_, part_tensors) in states.items()
            for key, tensor in part_tensors.items()
        }
        if processes.is_main():
            self.progress.log_bytes = self.log.sync()
            if self.step:
                self.progress.seconds = self.elapsed_s()
            scalars = {
                "progress": asdict(self.progress),
                **{name: part_scalars for name, (part_scalars, _) in states.items()},
            }
            tensors["random"] = torch.get_rng_state()
            self.checkpoints.save(self.step, self.progress.seconds, scalars, tensors)
            self.progress.seconds_saving += self.checkpoints.cost_s
        else:
            give_shards(tensors)
            self.checkpoints.step = self.step
        processes.wait_for_main()
