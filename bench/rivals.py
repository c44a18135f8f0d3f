"""Rivals on the small model: other methods that learn masks by backward passes, and this project's preset.

    python bench/small_model.py --steps 1200             # first: the model
    python bench/rivals.py [--quick] [--json FILE] [--budgets 160,640,2500] [--seeds 3] [--rows MaskLLM,preset]
    python bench/rivals.py --sweep --budgets 160         # the rates that were tried, on other windows
    python bench/rivals.py --study                       # the preset with one change a row

All start from the same Wanda mask, or are told it as their prior, and learn from the same text. A forward pass is one
of 32 x 128 bytes; a backward counts as two, the teacher's forward of distillation (KD) as one, and the preset's swaps
as a pass of their text. Printed are the held-out loss of the mask on the frozen weights, mean ± deviation over seeds,
the share of the gap from m0 to dense that it closes, what a method keeps in bytes a weight, and the processor's seconds
of the longest budget. --runs FILE keeps each run as it ends, and takes the runs from there that it has.

The methods are in rival_methods.py; the rows and their rates are in rival_rows.py, which says how these were chosen.
--sweep tries rates, one seed, on windows of text that are not those of the table.
"""
import argparse
import statistics
import time

import common
from utils import UserError, progress_bar, run_script

import torch
from estimator_runs import GRADIENTS, Point, Problem, RunsFile, learn
from estimators import mean_and_deviation
from rival_methods import RIVALS, Rival
from rival_rows import BUDGETS, RATES, ROWS, STUDY, setting_of

from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loss import batch_loss

WINDOWS = 256  # of 128 bytes: the first are reported, the next are what rates are chosen on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cpu")  # seconds are the processor's
    parser.add_argument("--model", default="demo/small", help="folder that bench/small_model.py wrote")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="forward passes of a run, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only the rows of these names or parts of names, by commas")
    parser.add_argument("--study", action="store_true", help="the rows of the long run's study instead")
    parser.add_argument("--sweep", action="store_true", help="all rates of each row, one seed, on the other windows")
    parser.add_argument("--rates", default="", help="with --sweep, in place of the rows' own rates, by commas")
    parser.add_argument("--runs", default=None, help="file that keeps the runs done, .jsonl")
    args = parser.parse_args(argv)
    try:
        args.budgets = [int(passes) for passes in args.budgets.split(",")]
        args.rates = [float(rate) for rate in args.rates.split(",") if rate]
    except ValueError:
        raise UserError("--budgets and --rates take numbers, separated by commas")
    args.windows = WINDOWS
    if args.quick:
        args.budgets, args.seeds, args.windows = [12], 1, 32
    return args


def make_rival(problem: Problem, setting: dict, seed: int, steps: int) -> Rival:
    """The method of a setting, on a model of its own."""
    kind = RIVALS[setting["learner"]]
    if "changed" in setting:  # of the method itself
        kind = type(kind.__name__, (kind,), setting["changed"])
    further = {name: setting[name] for name in ("distill", "strength") if name in setting}
    if "strength" in further:
        further["steps"] = steps
    return kind(problem.fresh_model(), problem.masks, problem.norms, *problem.pattern, lr=setting["lr"], seed=seed,
                **further)


def learn_rival(problem: Problem, setting: dict, passes: int, seed: int, num_evals: int) -> list[Point]:
    """As `estimator_runs.learn`, of the methods in rival_methods.py."""
    batches = problem.batches(setting, passes, seed)
    cost = (4 if setting.get("distill") else 3) * batches.shape[1] / 32
    steps, seconds, points = max(1, round(passes / cost)), 0.0, []
    rival = make_rival(problem, setting, seed, steps)
    due = {round(steps * (i + 1) / num_evals) for i in range(num_evals)}

    def evaluate(t: int) -> None:
        model = problem.fresh_model()
        apply_masks(find_layers(model), {name: rival.mask(name) for name in rival.layers})
        points.append(Point(t * cost, seconds, batch_loss(model, problem.heldout)))
    evaluate(0)
    for t in progress_bar(range(steps), desc=f"seed {seed}", unit="step"):
        start = time.process_time()
        rival.learn(batches[t % len(batches)], t, steps)
        seconds += time.process_time() - start
        if t + 1 in due:
            evaluate(t + 1)
    return points


def learn_any(problem: Problem, setting: dict, *rest) -> list[Point]:
    """One run, of a rival or of an estimator of this project."""
    return (learn_rival if setting["learner"] in RIVALS else learn)(problem, setting, *rest)


def state_bytes(problem: Problem, setting: dict) -> float:
    """Bytes a weight that learning keeps beside the model and its masked weights, measured after one step."""
    batch = problem.fixed[0, :1]
    if setting["learner"] in RIVALS:
        rival = make_rival(problem, setting, 0, 1)
        rival.learn(batch, 0, 1)
        return rival.state_bytes()
    masked = MaskedModel(problem.fresh_model(), problem.masks, LinearSpace(*problem.pattern), setting["logits"],
                         mode="eager")
    held = [tensor for layer in masked.layers.values() for tensor in (*layer.logits, layer.bits)]
    learner = GRADIENTS[setting["learner"]](masked, normalize=setting.get("normalize_gradient", "layer"))
    learner.learn(batch, 0.0)
    held += [*learner.normalization.state().values(), *getattr(learner, "means", {}).values()]
    return sum(tensor.nbytes for tensor in held) / sum(mask.numel() for mask in problem.masks.values())


def sweep(args: argparse.Namespace, kept: RunsFile, planned: dict[str, dict]) -> list[dict]:
    """The table's rows: for each row and budget, what each rate ends at on the windows that rates are chosen on."""
    problem, rows = Problem(args.model, (2, 4), args.windows, args.device, skip=args.windows), []
    for name in planned:
        for passes in args.budgets:
            setting = setting_of(planned, name, passes)
            losses = {rate: kept.get(problem, name, {**setting, "lr": rate}, passes, args.seed, 1, learn_any)[-1].loss
                      for rate in args.rates or RATES[setting["learner"]]}
            best = min(losses, key=losses.get)
            rows.append({"method": name, "passes": passes, "best rate": f"{best:g}",
                         "rates and losses": "; ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())})
    return rows


def compare(args: argparse.Namespace, kept: RunsFile, planned: dict[str, dict]) -> list[dict]:
    """The table's rows: each method at each budget."""
    problem = Problem(args.model, (2, 4), args.windows, args.device)
    gap = problem.m0_loss - problem.dense_loss
    first = f"{args.budgets[0]} passes"
    rows = [{"method": name, "bytes a weight": "", first: f"{loss:.4f}"} for name, loss in
            (("dense", problem.dense_loss), ("m0", problem.m0_loss))]
    for name in planned:
        row = {"method": name, "bytes a weight": f"{state_bytes(problem, setting_of(planned, name, 0)):g}"}
        for passes in args.budgets:
            setting = setting_of(planned, name, passes)
            runs = [kept.get(problem, name, setting, passes, args.seed + seed, 1, learn_any)
                    for seed in range(args.seeds)]
            losses = [points[-1].loss for points in runs]
            row |= {f"{passes} passes": mean_and_deviation(losses),
                    f"of the gap, {passes}": f"{(problem.m0_loss - statistics.mean(losses)) / gap:.1%}",
                    "seconds": round(statistics.median(points[-1].seconds for points in runs))}
        rows.append({**row, "seeds": args.seeds})
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = STUDY if args.study else ROWS
    planned = {name: rows[name] for name in common.chosen(rows, args.rows)}
    table = (sweep if args.sweep else compare)(args, RunsFile(args.runs), planned)
    common.report(table, args, "held-out loss of the mask on the frozen weights, nats a byte" + (
        "; windows that rates are chosen on" if args.sweep else ", mean ± deviation over seeds"))


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # MaskLLM's soft masks end in denormal numbers, which are slow on a CPU
    run_script(main)
