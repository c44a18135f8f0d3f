"""Compares ways to learn an N:M mask on reproduce/small_model: this project's, other methods, and
the paper's.

    python bench/rivals.py [--quick] [--json FILE] [--budgets 160,640,2500] [--seeds 3]
    python bench/rivals.py --rows "MaskLLM,ours"
    # tune a learning rate
    python bench/rivals.py --rows MaskLLM --rates 0.001,0.002 --seeds 1

Is a mask from this project as good as one from a rival, for the same work? All methods start from
the same Wanda mask, or have it as their prior, and learn from the same text, which `make demo
DEMO_FLAGS=--quick` leaves in demo/. A budget is a number of forward passes of 32 x 128 tokens. A
backward pass counts as two, the teacher's forward pass of distillation (KD) as one, and swaps as
one pass over their text.

The table shows, for each method and budget, the held-out loss of the mask on the frozen weights,
mean ± standard deviation over seeds, and the median processor time. State: what learning keeps in
addition to the model. --rates makes a row for each method and rate, on held-out windows that the
table does not use. The rivals are in rival_methods.py; this project's and the paper's methods are
in learning.py.

--json FILE keeps each run as it ends. A run whose row, budget and seed are in FILE is not repeated,
so a bench that was stopped resumes; give another FILE after a change of settings or of the model.
"""

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path

import common
import pge
from files.records import write_json
from masking.kernels import Kernels
from masking.spaces import LinearSpace
from models.loss import batch_loss
from training.faster_model import speed_up
from training.initialize import TOKENS, from_swaps
from training.plan import SWEEPS
from utils import UserError, progress_bar, run_script

import torch
from learning import DEFAULTS, OURS, ForwardOnly, Problem, passes_a_step
from rival_methods import RIVALS, Rival
from small_model import MODEL

WINDOWS = 256  # windows of 128 tokens: the first 256 for the table, the next 256 for --rates

# Settings. learner: a key of OURS or RIVALS; lr: learning rate, or --step_size for ours; logits: C;
# distill: the share of KD in the loss, the rest is the text's; batchsize: sequences of fresh text;
# tuned: the settings that differ from a budget on. docs/lab_notebook.md lists the rates that were
# tried.
TEXT = dict(batchsize=8, fresh=True)
SPARSIFY = dict(
    DEFAULTS,
    tuned={
        160: dict(lr=1.5),
        640: dict(lr=2.4),
        2500: dict(lr=3, batchsize=16),
        10000: dict(lr=2, batchsize=32, logits=0.5),
    },
)
STE = dict(
    learner="scores_ste",
    distill=1.0,
    **TEXT,
    tuned={
        160: dict(lr=0.04),
        640: dict(lr=0.01),
        2500: dict(lr=0.005),
        10000: dict(lr=0.005, batchsize=32),
    },
)
MASKLLM = dict(
    learner="maskllm",
    distill=1.0,
    **TEXT,
    tuned={160: dict(lr=0.001), 2500: dict(lr=0.002, batchsize=32)},
)
ROI = dict(
    MASKLLM,
    learner="roi",
    tuned={160: dict(lr=0.03), 2500: dict(lr=0.03, batchsize=32)},
)
ROWS = {
    "ours + KD": SPARSIFY,
    "STE + Adam + KD": STE,
    "MaskLLM + KD": MASKLLM,
    "RoI + KD": ROI,
    "ours": dict(
        DEFAULTS,
        distill=0.0,
        tuned={
            160: dict(lr=1.65),
            640: dict(lr=2, logits=1),
            2500: dict(lr=2, logits=0.5, batchsize=16),
            10000: dict(lr=2, logits=0.5, batchsize=32),
        },
    ),
    "STE + Adam": dict(
        STE, distill=0.0, tuned={**STE["tuned"], 160: dict(lr=0.02), 640: dict(lr=0.02)}
    ),
    "MaskLLM": dict(
        MASKLLM,
        distill=0.0,
        tuned={**MASKLLM["tuned"], 640: dict(lr=6e-4), 10000: dict(lr=0.001, batchsize=32)},
    ),
    "RoI": dict(ROI, distill=0.0),
    "forward-only: MaskPro": dict(learner="forward_only", estimator=pge.Estimator, lr=10, logits=5),
    "forward-only: MaskPro, debiased tracker": dict(
        learner="forward_only", estimator=lambda: pge.Estimator(debias=True), lr=10, logits=5
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # the table shows processor time
    parser.add_argument("--model", default=MODEL, help="folder that bench/small_model.py wrote")
    parser.add_argument(
        "--budgets", default="160,640,2500", help="forward passes per run, comma-separated"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method and budget")
    parser.add_argument(
        "--rows", default="", help="only rows whose names contain one of these, comma-separated"
    )
    parser.add_argument(
        "--rates", default="", help="learning rates to try in place of the rows', comma-separated"
    )
    args = parser.parse_args(argv)
    try:
        args.budgets = [int(passes) for passes in args.budgets.split(",")]
        args.rates = [float(rate) for rate in args.rates.split(",") if rate]
    except ValueError:
        raise UserError("--budgets and --rates take numbers, separated by commas")
    args.windows = WINDOWS
    if args.quick:
        args.budgets = [12]
        args.seeds = 1
        args.windows = 32
    return args


def setting_of(row: dict, passes: int) -> dict:
    """Return a row's setting for a budget, with the values tuned for the largest budget up to this
    one, or else for the smallest."""
    setting = {key: value for key, value in row.items() if key != "tuned"}
    tuned = row.get("tuned", {})
    budgets = sorted(tuned)
    fitting = [budget for budget in budgets if budget <= passes] or budgets[:1]
    return {**setting, **(tuned[fitting[-1]] if fitting else {})}


def make_method(problem: Problem, setting: dict, seed: int) -> Rival | ForwardOnly:
    """Return the method of a setting, on a copy of the model."""
    if setting["learner"] in OURS:
        return OURS[setting["learner"]](problem, setting, seed)
    model = problem.fresh_model()
    speed_up(model, Kernels(LinearSpace(2, 4), "eager"), 128)  # as for this project's methods
    return RIVALS[setting["learner"]](
        model,
        problem.masks,
        problem.norms,
        2,
        4,
        lr=setting["lr"],
        seed=seed,
        distill=setting["distill"],
    )


def learn(problem: Problem, name: str, row: dict, passes: int, seed: int) -> dict:
    """Run a row's method for about `passes` forward passes; return what a record has of it."""
    setting = setting_of(row, passes)
    batches = problem.batches(setting, passes, seed)
    samples = batches.flatten(0, 1)[: TOKENS // 128] if setting.get("swaps") else []
    spent = min(len(samples) / 32, passes - 1)
    steps = max(1, round((passes - spent) / passes_a_step(setting)))
    method = make_method(problem, setting, seed)
    start = time.process_time()
    if len(samples):
        from_swaps(method.masked, setting["logits"], samples, SWEEPS)
    for t in progress_bar(range(steps), desc=f"seed {seed}", unit="step"):
        method.learn(batches[t % len(batches)], t, steps)
    seconds = time.process_time() - start
    return {
        "method": name,
        "passes": passes,
        "seed": seed,
        "lr": setting["lr"],
        "state": f"{method.state_bytes():.3g}",
        "seconds": round(seconds),
        "loss": batch_loss(problem.masked_model(method.masks()), problem.heldout),
        "dense loss": problem.dense_loss,
        "m0 loss": problem.m0_loss,
    }


def table(runs: list[dict]) -> list[dict]:
    """Return the table's rows, one per method."""
    rows = {}
    for name, passes in dict.fromkeys((run["method"], run["passes"]) for run in runs):
        found = [run for run in runs if (run["method"], run["passes"]) == (name, passes)]
        losses = [run["loss"] for run in found]
        deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        seconds = statistics.median(run["seconds"] for run in found)
        row = rows.setdefault(name, {"method": name, "state (bytes per weight)": found[0]["state"]})
        row[f"{passes:,} passes"] = f"{statistics.mean(losses):.4f}{deviation} ({seconds:.0f} s)"
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = {name: ROWS[name] for name in common.chosen(ROWS, args.rows)}
    if args.rates:
        rows = {
            f"{name}, rate {rate:g}": {
                **row,
                "tuned": {
                    passes: {**setting_of(row, passes), "lr": rate} for passes in args.budgets
                },
            }
            for name, row in rows.items()
            for rate in args.rates
        }
    problem = Problem(args.model, args.windows, args.device, skip=args.windows if args.rates else 0)
    runs = []
    if args.json and Path(args.json).exists():
        runs = json.loads(Path(args.json).read_text())
    known = {(run["method"], run["passes"], run["seed"]) for run in runs}
    seeds = range(args.seed, args.seed + args.seeds)
    for passes, seed, name in product(args.budgets, seeds, rows):
        if (name, passes, seed) in known:
            continue
        run = learn(problem, name, rows[name], passes, seed)
        print(f"{name}, {passes} passes, seed {seed}: {run['loss']:.4f}", flush=True)
        runs.append({**common.conditions_of(args), **run})
        if args.json:
            write_json(args.json, runs)
    common.print_report(
        table(runs),
        args,
        f"held-out loss, nats a token (processor time); dense {problem.dense_loss:.4f}, m0 "
        f"{problem.m0_loss:.4f}",
    )


if __name__ == "__main__":
    # MaskLLM's soft masks become denormal numbers, which are slow on a CPU
    torch.set_flush_denormal(True)
    run_script(main)
