"""Estimators compared on the small model: the same forward passes, the same time, several seeds.

    python bench/small_model.py --steps 1200             # first: the model, two minutes
    python bench/estimators.py [--quick] [--json FILE] [--passes 960] [--seeds 3] [--rows paper,preset] [--figure PNG]

All rows start from the same Wanda mask and are judged by their most probable mask on held-out text. A forward pass is
one of 32 x 128 bytes; a backward counts as two. Printed are the losses after all passes, after a tenth of them, and
after the time that the fastest row took; --figure draws the curves over passes and over seconds.

`paper` rows are the authors' estimator, with their settings or others; the rest are this project's additions, from the
plain straight-through estimator to the preset, one change a row.
"""
import statistics
import time

import common
import torch
from learning import wanda_masks
from tqdm import tqdm

import data
import layers
import pge
from settings import PRESETS
from straight_through import StraightThrough
from train import logit_step, rate_at, wanda_scores
from utils import UserError, batch_loss, run

FITTED = dict(lr=10, logits=5)  # what fits this model, in the paper's terms
FAST = dict(PRESETS["fast"], scores=True, distill=0.0)
ROWS = {
    "paper: vanilla": dict(estimator=pge.Vanilla, lr=0.03, logits=5),
    "paper: residual": dict(estimator=pge.Residual, **FITTED),
    "paper: maskpro, authors' settings (eta 50, C 10)": dict(estimator=pge.MaskPro, lr=50, logits=10),
    "paper: maskpro (eta 10, C 5)": dict(estimator=pge.MaskPro, **FITTED),
    "maskpro, debiased tracker": dict(estimator=lambda: pge.MaskPro(debias=True), **FITTED),
    "running baseline": dict(estimator=pge.Running, **FITTED),
    "running baseline, normalized": dict(estimator=lambda: pge.Normalized(pge.Running()), lr=0.1, logits=5),
    "straight-through, sampled": dict(lr=3.0, logits=5, sample=True),
    "+ logits from scores": dict(FAST, sample=True),
    "+ at the most probable mask": FAST,
    "+ distillation": dict(FAST, distill=1.0),
    "+ fresh rows: the preset": dict(FAST, distill=1.0, fresh=True),
}


def learn(setting: dict, model, masks, scores, fixed, fresh, baselines, heldout, passes: int, seed: int,
          looks: int = 20):
    """One run: points (passes, seconds of learning, held-out loss of the most probable mask), from m0 on."""
    masked = layers.MaskedModel(model, masks, pge.LinearSpace(2, 4), setting["logits"],
                                "scores" if setting.get("scores") else "mask", seed=seed, mode="eager", scores=scores)
    estimator = setting["estimator"]() if callable(setting.get("estimator")) else None
    distill = setting.get("distill", 0.0)
    learner = None if estimator else StraightThrough(masked, "eager", sample="sample" in setting, distill=distill)
    batches, cost = (fresh if "fresh" in setting else fixed), 1 if estimator else 4 if distill else 3
    steps, seconds, points = passes // cost, 0.0, []

    def look(t):
        with masked.showing(masked.mode_bits()):
            points.append((t * cost, seconds, batch_loss(model, heldout, 64)))
    look(0)
    due = {round(steps * (i + 1) / looks) for i in range(looks)}
    for t in tqdm(range(steps), desc=f"seed {seed}", unit="step", disable=None, leave=False):
        start, batch = time.perf_counter(), batches[(t + seed * steps) % len(batches)]
        if learner:
            learner.step(batch, logit_step(setting["lr"] * rate_at("linear", t / steps), steps))
        else:
            number = (t + seed * steps) % len(batches)
            masked.update(setting["lr"] * estimator.advantage(batch_loss(model, batch), baselines[number], number))
        seconds += time.perf_counter() - start
        if t + 1 in due:
            look(t + 1)
    return points


def at(points, position: int, limit: float) -> float:
    """The held-out loss at the last point within a limit of passes (position 0) or seconds (position 1)."""
    return [point for point in points if point[position] <= limit][-1][2]


def draw(curves: dict, path: str) -> None:
    """Mean held-out loss of each row over passes and over seconds, a deviation's band, to a .png or .svg."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    styles = [(line, marker) for marker in "os^D" for line in ("-", "--", ":")]
    for (name, runs), (line, marker) in zip(curves.items(), styles):
        losses = torch.tensor([[point[2] for point in points] for points in runs])
        mean, spread = losses.mean(0), losses.std(0) if len(runs) > 1 else losses.std(0, correction=0)
        for axis, position in zip(axes, (0, 1)):
            x = torch.tensor([[point[position] for point in points] for points in runs], dtype=torch.float64).mean(0)
            drawn, = axis.plot(x, mean, line, marker=marker, markevery=4, markersize=4, label=name)
            axis.fill_between(x, mean - spread, mean + spread, color=drawn.get_color(), alpha=0.2)
    axes[0].set(xlabel="forward passes of 32 x 128 bytes (a backward counts as two)",
                ylabel="held-out loss of the most probable mask (nats)")
    axes[1].set(xlabel="seconds")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/small", help="folder that bench/small_model.py wrote")
    parser.add_argument("--passes", type=int, default=960, help="forward passes of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only the rows whose names contain one of these, by commas")
    parser.add_argument("--figure", default=None, help="draw the curves to this .png or .svg")
    args = parser.parse_args()
    passes, seeds = (30, 1) if args.quick else (args.passes, args.seeds)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except OSError:
        raise UserError(f"{args.model} is missing; run bench/small_model.py first")

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model).to(args.device).requires_grad_(False).eval()
    fixed = data.minibatches(tokenizer, "demo/train.jsonl", 512, 32, 128)
    fresh = [data.token_rows(tokenizer, "demo/train.jsonl", passes * 32 * 128, 32, 128, seed) for seed in range(seeds)]
    heldout = data.perplexity_windows(tokenizer, "demo/heldout.txt", 128, 512)
    model = load()
    masks = wanda_masks(model, data.calibration_samples(tokenizer, "demo/train.jsonl", 128, 128, 0))
    scores = wanda_scores(model, list(masks), fixed)
    dense = batch_loss(model, heldout, 64)
    layers.apply_masks(layers.find_layers(model), masks)
    start, baselines = batch_loss(model, heldout, 64), [batch_loss(model, batch) for batch in fixed]

    wanted = [part for part in args.rows.split(",") if part]
    curves = {name: [learn(setting, load(), masks, scores, fixed, fresh[seed], baselines, heldout, passes, seed)
                     for seed in range(seeds)]
              for name, setting in ROWS.items() if not wanted or any(part in name for part in wanted)}
    limit_s = min(points[-1][1] for runs in curves.values() for points in runs)

    def cell(runs, position, limit):
        losses = [at(points, position, limit) for points in runs]
        return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) if seeds > 1 else 0:.4f}"
    rows = [{"estimator": name, "all passes": f"{loss:.4f}"} for name, loss in (("dense", dense), ("m0", start))]
    rows += [{"estimator": name, "passes": passes, "seeds": seeds, "a tenth of the passes": cell(runs, 0, passes / 10),
              "all passes": cell(runs, 0, passes), f"after {limit_s:.0f} s": cell(runs, 1, limit_s),
              "seconds": statistics.median(points[-1][1] for points in runs)} for name, runs in curves.items()]
    common.report(rows, args, "held-out loss of the most probable mask, nats a byte, mean ± deviation over seeds")
    if args.figure:
        draw(curves, args.figure)


if __name__ == "__main__":
    run(main)
