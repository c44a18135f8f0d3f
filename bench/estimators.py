"""Estimators compared on the small model: the same forward passes, the same time, several seeds.

    python bench/small_model.py --steps 1200             # first: the model, two minutes
    python bench/estimators.py [--quick] [--json FILE] [--passes 480] [--seeds 3] [--rows paper,preset] [--figure PNG]
    python bench/estimators.py --long 10000 --rows long  # passes until the preset is as good as the paper's long run
    python bench/estimators.py --patterns                # the preset at 1:4, 2:4, 4:8 and 8:16

All rows start from the same Wanda mask and are judged by their most probable mask on held-out text. A forward pass is
one of 32 x 128 bytes; a backward counts as two, and exchanges as a pass of their text. Printed are the losses after all
passes, after a tenth of them, after the time that the fastest row took, and the lowest on the way. Seconds are the
processor's, so that a busy machine does not matter. --figure draws the curves over passes and over seconds. --runs FILE
keeps each run as it ends, and takes the runs from there that it has: what was cut off goes on.

`paper` rows are the authors' estimator, with their settings or others; the rest are this project's additions: forward
only, then with gradients, from the plain straight-through estimator to the preset, one change a row, and at last what
train.py does not have (variants.py).
"""
import json
import statistics
import time
from pathlib import Path

import common
import torch
from learning import wanda_masks
from tqdm import tqdm
from variants import ControlVariate, LeaveOneOut, Momentum, Sign, sharpen

import data
import exchange
import layers
import masked_model
import pge
from settings import PRESETS
from straight_through import StraightThrough
from train import logit_step, rate_at, wanda_scores
from utils import UserError, batch_loss, model_fingerprint, reuse_freed_memory, run

FITTED = dict(lr=10, logits=5)  # what fits this model, in the paper's terms
UNIT = dict(lr=0.1, logits=5, normalize=True)  # lr in logits
FAST = dict(learner="straight_through", lr=PRESETS["fast"]["lr"], logits=PRESETS["fast"]["logits"], scores=True)
FRESH = dict(FAST, distill=PRESETS["fast"]["distill"], batchsize=PRESETS["fast"]["batchsize"], fresh=True)
PRESET = {name: value for name, value in FRESH.items() if name != "scores"} | {"exchange": True}
ROWS = {
    "paper: vanilla (eta 0.03, C 5)": dict(learner="vanilla", lr=0.03, logits=5),
    "paper: residual (eta 10, C 5)": dict(learner="residual", **FITTED),
    "paper: maskpro, authors' settings (eta 50, C 10)": dict(learner="maskpro", lr=50, logits=10),
    "paper: maskpro (eta 10, C 5)": dict(learner="maskpro", **FITTED),
    "maskpro, debiased tracker": dict(learner="maskpro", debias=True, **FITTED),
    "running baseline": dict(learner="running", **FITTED),
    "running baseline, normalized": dict(learner="running", **UNIT),
    "leave-one-out, 2 masks a step, normalized": dict(learner="leave_one_out", samples=2, **UNIT),
    "leave-one-out, 4 masks a step, normalized": dict(learner="leave_one_out", samples=4, **UNIT),
    "control variate (eta 10)": dict(learner="control_variate", **FITTED),
    "straight-through, sampled": dict(learner="straight_through", sample=True, lr=FAST["lr"], logits=5),
    "+ logits from scores": dict(FAST, sample=True),
    "+ at the most probable mask": FAST,
    "+ distillation": dict(FAST, distill=1.0),
    "+ fresh rows, 8 a minibatch": FRESH,
    "+ exchanges instead of scores: the preset": PRESET,
    "the preset, momentum 0.9": dict(PRESET, learner="momentum"),
    "the preset, sign": dict(PRESET, learner="sign"),
    "the preset, C from 2 to 8": dict(PRESET, logits=2.0, sharpen=4.0),
}
LONG = {  # with --long: (row, its share of the passes)
    "long: paper, maskpro (eta 10, C 5)": (dict(ROWS["paper: maskpro (eta 10, C 5)"], stop=0.5), 1),
    "long: paper, maskpro but with a debiased tracker": (dict(ROWS["maskpro, debiased tracker"], stop=0.5), 1),
    "long: running baseline, normalized": (ROWS["running baseline, normalized"], 1 / 5),
    "long: the same from exchanges": (dict(ROWS["running baseline, normalized"], exchange=True), 1 / 5),
    "long: the preset": (PRESET, 1 / 50),
}
PATTERNS = ((1, 4), (2, 4), (4, 8), (8, 16))
FORWARD_ONLY = {"vanilla": pge.Vanilla, "residual": pge.Residual, "maskpro": pge.MaskPro, "running": pge.Running}
GRADIENTS = {"straight_through": StraightThrough, "momentum": Momentum, "sign": Sign}


class Bench:
    """The model, its text and its initial mask of N:M; m0 is Wanda's."""

    def __init__(self, args, pattern):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        except OSError:
            raise UserError(f"{args.model} is missing; run bench/small_model.py first")
        self.dtype = common.fast_dtype(args.device)
        self.load = lambda: AutoModelForCausalLM.from_pretrained(
            args.model, dtype=self.dtype).to(args.device).requires_grad_(False)
        self.pattern, self.looks = pattern, args.looks
        self.fixed = data.minibatches(self.tokenizer, "demo/train.jsonl", 512, 32, 128)
        self.heldout = data.perplexity_windows(self.tokenizer, "demo/heldout.txt", 128, args.windows)
        model = self.load()
        samples = data.calibration_samples(self.tokenizer, "demo/train.jsonl", 128, 128, 0)
        self.masks = wanda_masks(model, samples, *pattern)
        self.scores = wanda_scores(model, list(self.masks), self.fixed)
        self.dense, self.fingerprint = batch_loss(model, self.heldout), model_fingerprint(model)
        layers.apply_masks(layers.find_layers(model), self.masks)
        self.start, self.baselines = batch_loss(model, self.heldout), [batch_loss(model, rows) for rows in self.fixed]

    def batches(self, setting: dict, passes: int, seed: int) -> torch.Tensor:
        """The minibatches that a run goes through: the fixed ones from another start, or rows no run repeats."""
        size = setting.get("batchsize", 32)
        if setting.get("fresh"):
            return data.token_rows(self.tokenizer, "demo/train.jsonl", passes * 32 * 128, size, 128, seed)
        return self.fixed.flatten(0, 1).view(-1, size, 128).roll(-5 * seed, 0)

    def learn(self, setting: dict, passes: int, seed: int) -> list[tuple[float, float, float]]:
        """One run: points (passes, seconds of learning, held-out loss of the most probable mask), from m0 on."""
        masked = masked_model.MaskedModel(self.load(), self.masks, pge.LinearSpace(*self.pattern), setting["logits"],
                                          "scores" if setting.get("scores") else "mask", seed=seed, mode="eager",
                                          scores=self.scores)
        take, cost = stepper(setting, masked, self.baselines[5 * seed % 16:] + self.baselines[:5 * seed % 16])
        batches = self.batches(setting, passes, seed)
        cost *= batches.shape[1] / 32
        samples = batches.flatten(0, 1)[:exchange.TOKENS // 128] if setting.get("exchange") else []
        spent = min(len(samples) / 32, passes - 1)
        steps, seconds, points = round((passes - spent) / cost), 0.0, []
        growth = setting.get("sharpen", 1.0) ** (1 / steps)
        looks = max(self.looks, passes // 250)
        due = {round(steps * (i + 1) / looks) for i in range(looks)}

        def look(t):
            with masked.showing(masked.mode_bits()):
                points.append((spent + t * cost, seconds, batch_loss(masked.model, self.heldout)))
        if len(samples):
            start = time.process_time()
            exchange.settle(masked, samples, setting["logits"])
            seconds = time.process_time() - start
        look(0)
        for t in tqdm(range(steps), desc=f"seed {seed}", unit="step", disable=None, leave=False):
            start = time.process_time()
            take(batches[t % len(batches)], t, steps)
            if growth != 1:
                sharpen(masked, growth)
            seconds += time.process_time() - start
            if t + 1 in due:
                look(t + 1)
                if points[-1][2] > self.start + setting.get("stop", float("inf")):
                    break  # it has run away
        return points


def stepper(setting: dict, masked, baselines: list[float]):
    """A function (minibatch, its step, steps in all) that takes one step, and what it costs in forward passes."""
    kind, lr, distill = setting["learner"], setting["lr"], setting.get("distill", 0.0)
    schedule = setting.get("schedule", "linear" if kind in GRADIENTS else "constant")
    if kind in GRADIENTS:
        learner = GRADIENTS[kind](masked, "eager", sample=setting.get("sample", False), distill=distill)
        return (lambda batch, t, steps: learner.step(batch, logit_step(lr * rate_at(schedule, t / steps), steps)),
                4 if distill else 3)
    if kind == "control_variate":
        learner = ControlVariate(masked)
        return lambda batch, t, steps: learner.step(batch, lr * rate_at(schedule, t / steps), baselines[t % 16]), 3
    if kind == "leave_one_out":
        learner = LeaveOneOut(masked, setting["samples"], pge.Normalized(pge.Vanilla()))
        return lambda batch, t, steps: learner.step(batch, lr * rate_at(schedule, t / steps)), setting["samples"]
    estimator = pge.MaskPro(debias=True) if setting.get("debias") else FORWARD_ONLY[kind]()
    if setting.get("normalize"):
        estimator = pge.Normalized(estimator)

    def forward_only(batch, t, steps):
        advantage = estimator.advantage(batch_loss(masked.model, batch), baselines[t % 16], t % 16)
        masked.update(lr * rate_at(schedule, t / steps) * advantage)
    return forward_only, 1


class Runs:
    """Runs kept in a file, a JSON line each as it ends, by everything that they depend on; without a path, no file."""

    def __init__(self, path: str | None):
        self.path, self.known = path, {}
        if path and Path(path).exists():
            for line in open(path):
                record = json.loads(line)
                self.known[json.dumps(record["run"], sort_keys=True)] = record["points"]

    def get(self, bench: Bench, name: str, setting: dict, passes: int, seed: int):
        """The points of this run, from the file or learned now."""
        depends_on = {"model": bench.fingerprint, "m0": round(bench.start, 4), "pattern": bench.pattern,
                      "dtype": str(bench.dtype), "windows": len(bench.heldout), "looks": bench.looks,
                      "setting": setting, "passes": passes, "seed": seed}
        key = json.dumps(depends_on, sort_keys=True)
        if key not in self.known:
            self.known[key] = bench.learn(setting, passes, seed)
            if self.path:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"row": name, "run": depends_on, "points": self.known[key]}) + "\n")
        points = self.known[key]
        print(f"{name}, seed {seed}: {points[0][2]:.4f} -> {points[-1][2]:.4f}, lowest {lowest(points):.4f}; "
              f"{passes} passes, {points[-1][1]:.0f} s", flush=True)
        return points


def at(points, position: int, limit: float) -> float:
    """The held-out loss at the last point within a limit of passes (position 0) or seconds (position 1)."""
    return [point for point in points if point[position] <= limit * 1.001][-1][2]


def lowest(points) -> float:
    return min(loss for _, _, loss in points)


def mean_and_deviation(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) if len(losses) > 1 else 0:.4f}"


def passes_to(runs, loss: float) -> str:
    """The passes after which the mean over runs is first at or below a loss."""
    for points in zip(*runs):
        if statistics.mean(point[2] for point in points) <= loss:
            return f"{points[0][0]:.0f}"
    return "not reached"


def draw(curves: dict, path: str) -> None:
    """Mean held-out loss of each row over passes and over seconds, a deviation's band, to a .png or .svg."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    styles = [(line, marker) for marker in "os^Dvx" for line in ("-", "--", ":")]
    for (name, runs), (line, marker) in zip(curves.items(), styles):
        losses = torch.tensor([[point[2] for point in points] for points in runs])
        mean, spread = losses.mean(0), losses.std(0) if len(runs) > 1 else losses.std(0, correction=0)
        for axis, position in zip(axes, (0, 1)):
            x = torch.tensor([[point[position] for point in points] for points in runs], dtype=torch.float64).mean(0)
            drawn, = axis.plot(x, mean, line, marker=marker, markevery=3, markersize=4, linewidth=1.2, label=name)
            axis.fill_between(x, mean - spread, mean + spread, color=drawn.get_color(), alpha=0.2)
    m0 = next(iter(curves.values()))[0][0][2]
    axes[0].set(xlabel="forward passes of 32 x 128 bytes (a backward counts as two)",
                ylabel="held-out loss of the most probable mask (nats a byte)", ylim=(None, m0 + 0.1))
    axes[1].set(xlabel="seconds of one thread")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def compare_patterns(args, runs: Runs, passes: int, seeds: int) -> list[dict]:
    rows = []
    for pattern in PATTERNS:
        bench = Bench(args, pattern)
        losses = [runs.get(bench, f"the preset, {pattern[0]}:{pattern[1]}", PRESET, passes, seed)[-1][2]
                  for seed in range(seeds)]
        rows.append({"N:M": f"{pattern[0]}:{pattern[1]}", "dense": f"{bench.dense:.4f}", "m0": f"{bench.start:.4f}",
                     "the preset": mean_and_deviation(losses), "passes": passes, "seeds": seeds,
                     "of the gap": f"{(bench.start - statistics.mean(losses)) / (bench.start - bench.dense):.0%}"})
    return rows


def compare_estimators(args, runs: Runs, passes: int, seeds: int) -> list[dict]:
    bench, wanted = Bench(args, (2, 4)), [part for part in args.rows.split(",") if part]
    planned = {name: (setting, passes) for name, setting in ROWS.items()}
    if args.long:
        planned.update({name: (setting, round(args.long * share)) for name, (setting, share) in LONG.items()})
    planned = {name: plan for name, plan in planned.items() if not wanted or any(part in name for part in wanted)}
    if not planned:
        raise UserError(f"--rows {args.rows} is in no row's name")
    curves = {name: [runs.get(bench, name, *plan, seed) for seed in range(seeds)] for name, plan in planned.items()}
    short = {name: curves[name] for name, (_, length) in planned.items() if length == passes} or curves
    limit_s = min(points[-1][1] for runs in short.values() for points in runs)
    goals = [statistics.mean(map(lowest, curves[name])) for name in curves if name.startswith("long: paper")]
    rows = [{"estimator": name, "all passes": f"{loss:.4f}"} for name, loss in
            (("dense", bench.dense), ("m0", bench.start))]
    for name, found in curves.items():
        length = planned[name][1]
        row = {"estimator": name, "passes": length, "seeds": seeds,
               "a tenth of the passes": mean_and_deviation([at(points, 0, length / 10) for points in found]),
               "all passes": mean_and_deviation([points[-1][2] for points in found]),
               "lowest": mean_and_deviation([lowest(points) for points in found]),
               f"after {limit_s:.0f} s": mean_and_deviation([at(points, 1, limit_s) for points in found]),
               "seconds": statistics.median(points[-1][1] for points in found)}
        for goal in goals:
            row[f"passes to {goal:.4f}"] = passes_to(found, goal)
        rows.append(row)
    if args.figure:
        draw(short, args.figure)
    return rows


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/small", help="folder that bench/small_model.py wrote")
    parser.add_argument("--passes", type=int, default=480, help="forward passes of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--looks", type=int, default=10, help="at the held-out text, in a run")
    parser.add_argument("--windows", type=int, default=256, help="of 128 bytes, of held-out text")
    parser.add_argument("--rows", default="", help="only the rows whose names contain one of these, by commas")
    parser.add_argument("--long", type=int, default=0, help="add rows: the paper's with so many passes, forward-only "
                                                            "with a fifth of them, the preset with a fiftieth")
    parser.add_argument("--patterns", action="store_true", help="the preset at several N:M instead")
    parser.add_argument("--runs", default=None, help="file that keeps the runs done, .jsonl")
    parser.add_argument("--figure", default=None, help="draw the curves to this .png or .svg")
    args = parser.parse_args()
    passes, seeds = (12, 1) if args.quick else (args.passes, args.seeds)
    if args.quick:
        args.looks, args.windows = 2, 32
    reuse_freed_memory()
    compare = compare_patterns if args.patterns else compare_estimators
    common.report(compare(args, Runs(args.runs), passes, seeds), args,
                  "held-out loss of the most probable mask, nats a byte, mean ± deviation over seeds")


if __name__ == "__main__":
    run(main)
