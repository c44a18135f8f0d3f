"""Compares ways to learn an N:M mask on reproduce/small_model: this project's, other methods, and
the paper's.

    python bench/rivals.py [--quick] [--json FILE] [--budgets 160,640,2500] [--seeds 3]
    python bench/rivals.py --rows MaskLLM,sparsify.py
    # tune a learning rate
    python bench/rivals.py --rows MaskLLM --rates 0.001,0.002 --seeds 1

Is a mask from this project as good as one from a rival, for the same work? All methods start from
the same Wanda mask, or have it as their prior, and learn from the same text, which `make demo
DEMO_FLAGS=--quick` leaves in demo/. A budget is a number of forward passes of 32 x 128 tokens. A
backward pass counts as two, the teacher's forward pass of distillation (KD) as one, and swaps as
one pass over their text.

The table shows, for each method and budget: the held-out loss of the mask on the frozen weights,
mean ± standard deviation over seeds; the share of the gap from m0 to dense that it closes; and the
median processor time in seconds. Bytes a weight: the state that learning keeps in addition to the
model. --rates makes a row for each method and rate, on held-out windows that the table does not
use. The rivals are in rival_methods.py; this project's and the paper's methods are in learning.py.
"""

import argparse
import statistics
import time

import common
import pge
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

# Settings. learner: a key of OURS or RIVALS; lr: its learning rate; distill: the share of KD in the
# loss, the rest is the text's; batchsize: sequences of fresh text; tuned: the settings that differ
# from a budget on. docs/lab_notebook.md lists the rates that were tried; others are first guesses.
TEXT = dict(batchsize=8, fresh=True)
TUNED = {
    160: dict(lr=1.2),
    640: dict(lr=1.8),
    2500: dict(lr=1.8, batchsize=16),
    10000: dict(lr=2.5, batchsize=32),
}
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
ROI = {160: dict(lr=0.001), 2500: dict(lr=0.001, batchsize=32)}
ROWS = {
    "sparsify.py": DEFAULTS,
    "sparsify.py with its rate tuned": dict(DEFAULTS, tuned=TUNED),
    "STE on scores + Adam + KD": STE,
    "STE on scores + Adam": dict(STE, distill=0.0),
    "MaskLLM": dict(
        MASKLLM,
        distill=0.0,
        tuned={**MASKLLM["tuned"], 640: dict(lr=6e-4), 10000: dict(lr=0.001, batchsize=32)},
    ),
    "MaskLLM + KD": MASKLLM,
    "RoI": dict(MASKLLM, learner="roi", distill=0.0, tuned=ROI),
    "RoI + KD": dict(MASKLLM, learner="roi", tuned=ROI),
    "ProxSparse": dict(
        learner="proxsparse", **TEXT, tuned={160: dict(lr=3e-4), 2500: dict(lr=3e-4, batchsize=32)}
    ),
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


def make_method(problem: Problem, setting: dict, seed: int, steps: int) -> Rival | ForwardOnly:
    """Return the method of a setting, on a copy of the model."""
    if setting["learner"] in OURS:
        return OURS[setting["learner"]](problem, setting, seed)
    further = {"distill": setting["distill"]} if "distill" in setting else {}
    if setting["learner"] == "proxsparse":
        further["steps"] = steps
    model = problem.fresh_model()
    speed_up(model, Kernels(LinearSpace(2, 4), "eager"), 128)  # as for this project's methods
    return RIVALS[setting["learner"]](
        model, problem.masks, problem.norms, 2, 4, lr=setting["lr"], seed=seed, **further
    )


def learn(problem: Problem, setting: dict, passes: int, seed: int) -> tuple[float, float]:
    """Run a method for about `passes` forward passes; return the held-out loss of its mask, and the
    processor time in seconds."""
    batches = problem.batches(setting, passes, seed)
    samples = batches.flatten(0, 1)[: TOKENS // 128] if setting.get("swaps") else []
    spent = min(len(samples) / 32, passes - 1)
    steps = max(1, round((passes - spent) / passes_a_step(setting)))
    method = make_method(problem, setting, seed, steps)
    start = time.process_time()
    if len(samples):
        from_swaps(method.masked, setting["logits"], samples, SWEEPS)
    for t in progress_bar(range(steps), desc=f"seed {seed}", unit="step"):
        method.learn(batches[t % len(batches)], t, steps)
    seconds = time.process_time() - start
    return batch_loss(problem.masked_model(method.masks()), problem.heldout), seconds


def state_bytes(problem: Problem, setting: dict) -> float:
    """Return the bytes per weight that a method keeps in addition to the model, after one step."""
    method = make_method(problem, setting, 0, 1)
    method.learn(problem.fixed[0, :1], 0, 1)
    return method.state_bytes()


def table_row(problem: Problem, name: str, row: dict, budgets: list[int], seeds: range) -> dict:
    """Return the table's row of a method; each run is printed as it ends."""
    cells = {"method": name, "bytes a weight": f"{state_bytes(problem, setting_of(row, 0)):g}"}
    for passes in budgets:
        losses = []
        seconds = []
        for seed in seeds:
            loss, took_s = learn(problem, setting_of(row, passes), passes, seed)
            print(f"{name}, {passes} passes, seed {seed}: {loss:.4f}, {took_s:.0f} s", flush=True)
            losses.append(loss)
            seconds.append(took_s)
        mean = statistics.mean(losses)
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0
        share = (problem.m0_loss - mean) / (problem.m0_loss - problem.dense_loss)
        cells |= {
            f"{passes} passes": f"{mean:.4f} ± {deviation:.4f}",
            f"of the gap, {passes}": f"{share:.1%}",
            f"seconds, {passes}": round(statistics.median(seconds)),
        }
    return {**cells, "seeds": len(seeds)}


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
    first = f"{args.budgets[0]} passes"
    table = [
        {"method": name, "bytes a weight": "", first: f"{loss:.4f}"}
        for name, loss in (("dense", problem.dense_loss), ("m0", problem.m0_loss))
    ]
    table += [
        table_row(problem, name, row, args.budgets, range(args.seed, args.seed + args.seeds))
        for name, row in rows.items()
    ]
    common.report(
        table,
        args,
        "held-out loss of the mask on the frozen weights, nats a token, mean ± deviation over "
        "seeds",
    )


if __name__ == "__main__":
    # MaskLLM's soft masks become denormal numbers, which are slow on a CPU
    torch.set_flush_denormal(True)
    run_script(main)
