"""One run of bench/estimators.py: what is learned on, how a row's setting takes a step, and runs kept in a file."""
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common
from utils import progress_bar

from small_model import HELDOUT, TEXT, load_small
from torch import Tensor, nn
from training.progress import lr_multiplier
from variants import ControlVariate, LeaveOneOut, Momentum, Sign, sharpen

import data
import pge
from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loading import model_fingerprint
from models.loss import batch_loss
from training.curvature import EVERY, SEQUENCES, Curvature
from training.initialize import TOKENS, init_from_scores, init_from_swaps, wanda_norms
from training.straight_through import StraightThrough, random_walk_step, soft_temperature

FORWARD_ONLY = {"vanilla": pge.Vanilla, "residual": pge.Residual, "maskpro": pge.MaskPro, "running": pge.Running}
GRADIENTS = {"straight_through": StraightThrough, "momentum": Momentum, "sign": Sign}
Step = Callable[[Tensor, int, int], object]  # minibatch [sequences, tokens], the step's number, steps in all


class Point(NamedTuple):
    """A run after so many forward passes and seconds of learning: the held-out loss of its most probable mask."""
    passes: float
    seconds: float
    loss: float


class Problem:
    """The small model, its text and its initial mask of N:M; m0 is Wanda's. windows: how many of 128 bytes are held
    out, the first ones but `skip`."""

    def __init__(self, model: str, pattern: tuple[int, int], windows: int, device: str, skip: int = 0):
        self.model, self.tokenizer = load_small(model, "auto", device)
        self.pattern = pattern
        self.fixed = data.minibatches(self.tokenizer, TEXT, 512, 32, 128)
        self.heldout = data.perplexity_windows(self.tokenizer, HELDOUT, 128, skip + windows)[skip:]
        samples = data.calibration_samples(self.tokenizer, TEXT, 128, 128, 0)
        self.masks = common.wanda_masks(self.model, samples, *pattern)
        self.norms = wanda_norms(self.model, list(self.masks), self.fixed)
        self.fingerprint = model_fingerprint(self.model)
        m0 = self.fresh_model()
        apply_masks(find_layers(m0), self.masks)
        self.dense_loss, self.m0_loss = batch_loss(self.model, self.heldout), batch_loss(m0, self.heldout)
        self.baselines = [batch_loss(m0, batch) for batch in self.fixed]

    def fresh_model(self) -> nn.Module:
        """The dense model, one of its own for each run."""
        return copy.deepcopy(self.model)

    def batches(self, setting: dict, passes: int, seed: int) -> Tensor:
        """The minibatches that a run goes through, int64 `[minibatches, sequences, tokens]`: the fixed ones from
        another start, or sequences that no run repeats."""
        size = setting.get("batchsize", 32)
        if setting.get("fresh"):
            return data.token_sequences(self.tokenizer, TEXT, passes * 32 * 128, size, 128, seed)
        return self.fixed.flatten(0, 1).view(-1, size, 128).roll(-5 * seed, 0)

    def baselines_of(self, seed: int) -> list[float]:
        """m0's losses on the fixed minibatches, in this seed's order."""
        start = 5 * seed % len(self.baselines)
        return self.baselines[start:] + self.baselines[:start]


def make_step(setting: dict, masked: MaskedModel, baselines: list[float]) -> tuple[Step, int]:
    """A function that takes one step, and what it costs in forward passes."""
    kind, distill = setting["learner"], setting.get("distill", 0.0)
    schedule = setting.get("schedule", "linear" if kind in GRADIENTS else "constant")

    def rate(t: int, steps: int) -> float:
        return setting["lr"] * lr_multiplier(schedule, t / steps)
    if kind in GRADIENTS:
        progress, ramp = [0.0], setting.get("ramp")
        learner = GRADIENTS[kind](
            masked, sample=setting.get("sample", False), distill=distill,
            normalize=setting.get("normalize_gradient", "layer"),
            curvature=Curvature(masked, lambda: progress[0], ramp=ramp) if ramp else None,
            temperature=lambda: soft_temperature(progress[0]) if setting.get("soft") else 0.0)

        def by_gradients(batch: Tensor, t: int, steps: int) -> None:
            progress[0] = t / steps
            learner.learn(batch, random_walk_step(rate(t, steps), steps))
        measuring = 3 * min(1, SEQUENCES / setting["batchsize"]) * (1 - ramp[0]) / EVERY if ramp else 0.0
        return by_gradients, (4 if distill else 3) + measuring
    if kind == "control_variate":
        learner = ControlVariate(masked)
        return lambda batch, t, steps: learner.learn(batch, rate(t, steps), baselines[t % 16]), 3
    if kind == "leave_one_out":
        learner = LeaveOneOut(masked, setting["samples"], pge.Normalized(pge.Vanilla()))
        return lambda batch, t, steps: learner.learn(batch, rate(t, steps)), setting["samples"]
    estimator = pge.MaskPro(debias=True) if setting.get("debias") else FORWARD_ONLY[kind]()
    if setting.get("normalize"):
        estimator = pge.Normalized(estimator)

    def forward_only(batch: Tensor, t: int, steps: int) -> None:
        advantage = estimator.advantage(batch_loss(masked.model, batch), baselines[t % 16], t % 16)
        masked.update(rate(t, steps) * advantage)
    return forward_only, 1


def learn(problem: Problem, setting: dict, passes: int, seed: int, num_evals: int) -> list[Point]:
    """One run of about so many forward passes, from m0 on. Seconds are the processor's, without the evaluations."""
    masked = MaskedModel(problem.fresh_model(), problem.masks, LinearSpace(*problem.pattern), setting["logits"],
                         seed=seed, mode="eager")
    if setting.get("scores"):
        init_from_scores(masked, problem.norms, setting["logits"])
    take_step, cost = make_step(setting, masked, problem.baselines_of(seed))
    batches = problem.batches(setting, passes, seed)
    cost *= batches.shape[1] / 32
    samples = batches.flatten(0, 1)[:TOKENS // 128] if setting.get("swaps") else []
    spent = min(len(samples) / 32, passes - 1)  # swaps cost a pass of their text
    steps, seconds, points = round((passes - spent) / cost), 0.0, []
    growth = setting.get("sharpen", 1.0) ** (1 / steps)
    num_evals = max(num_evals, passes // 250)
    due = {round(steps * (i + 1) / num_evals) for i in range(num_evals)}

    def evaluate(t: int) -> None:
        with masked.use_masks(masked.mode_bits()):
            points.append(Point(spent + t * cost, seconds, batch_loss(masked.model, problem.heldout)))
    if len(samples):
        start = time.process_time()
        init_from_swaps(masked, samples, setting["logits"])
        seconds = time.process_time() - start
    evaluate(0)
    for t in progress_bar(range(steps), desc=f"seed {seed}", unit="step"):
        start = time.process_time()
        take_step(batches[t % len(batches)], t, steps)
        if growth != 1:
            sharpen(masked, growth)
        seconds += time.process_time() - start
        if t + 1 in due:
            evaluate(t + 1)
            if points[-1].loss > problem.m0_loss + setting.get("stop", math.inf):
                break  # it has run away
    return points


class RunsFile:
    """Runs kept in a file, a JSON line each as it ends, by everything that they depend on; without a path, no file."""

    def __init__(self, path: str | None):
        self.path = path
        self.known: dict[str, list[Point]] = {}
        if path and Path(path).exists():
            for line in Path(path).read_text().splitlines():
                record = json.loads(line)
                self.known[json.dumps(record["run"], sort_keys=True)] = [Point(*point) for point in record["points"]]

    def get(self, problem: Problem, name: str, setting: dict, passes: int, seed: int, num_evals: int,
            learn: Callable[..., list[Point]] = learn) -> list[Point]:
        """The points of this run, from the file or learned now."""
        depends_on = {"model": problem.fingerprint, "m0": round(problem.m0_loss, 4), "pattern": problem.pattern,
                      "dtype": str(problem.model.dtype), "windows": len(problem.heldout), "num_evals": num_evals,
                      "setting": setting, "passes": passes, "seed": seed}
        key = json.dumps(depends_on, sort_keys=True)
        if key not in self.known:
            self.known[key] = learn(problem, setting, passes, seed, num_evals)
            if self.path:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"row": name, "run": depends_on, "points": self.known[key]}) + "\n")
        points = self.known[key]
        print(f"{name}, seed {seed}: {points[0].loss:.4f} -> {points[-1].loss:.4f}, "
              f"lowest {min(point.loss for point in points):.4f}; {passes} passes, {points[-1].seconds:.0f} s",
              flush=True)
        return points
