"""Learning curves on the small model over seeds: does the fused step learn as the exact one, do the settings learn?

    python bench/small_model.py                          # first: the model, four minutes
    python bench/learning.py [--quick] [--json FILE] [--steps 640] [--rows fused,exact]

Every row is one setting, run over --seeds seeds on 512 x 128 bytes from the same Wanda mask: mean and deviation of the
loss of the sampled masks over the last epoch, and of the final mask (the mode) on the training minibatches and on
held-out text. `m0` is where all of them start.
"""
import argparse
import copy
import statistics

import common
from utils import progress_bar, run_script

import torch
from small_model import HELDOUT, TEXT, load_small
from torch import Tensor, nn

import data
import pge
from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loss import batch_loss

ROWS = {  # what is varied: eta, C, the tracker, the step
    "authors' defaults: eta 50, C 10": dict(lr=50, logits=10),
    "eta 30, C 5, delta as the authors have it": dict(lr=30, logits=5),
    "fused: eta 30, C 5, debiased": dict(lr=30, logits=5, debias=True),
    "fused, float16 logits": dict(lr=30, logits=5, debias=True, logits_dtype=torch.float16),
    "exact: eta 30, C 5, debiased": dict(lr=30, logits=5, debias=True, mode="exact"),
}
COLUMNS = ("sampled masks, last epoch", "final mask, minibatches", "held out")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/small", help="folder that bench/small_model.py wrote")
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only the rows whose names contain one of these, by commas")
    return parser.parse_args(argv)


def losses(model: nn.Module, batches: Tensor, heldout: Tensor) -> tuple[float, float]:
    """The mean loss over the minibatches `[minibatches, sequences, tokens]`, and that held out `[windows, tokens]`."""
    return statistics.mean(batch_loss(model, batch) for batch in batches), batch_loss(model, heldout, 64)


def learn(model: nn.Module, masks: dict[str, Tensor], batches: Tensor, baselines: list[float], heldout: Tensor,
          steps: int, seed: int, lr: float, logits: float, debias: bool = False,
          logits_dtype: torch.dtype = torch.float32, mode: str = "eager") -> tuple[float, float, float]:
    """One run of a dense model, which is masked for good: the mean loss of the sampled masks in the last epoch, then
    those of the final mask as `losses` has them. baselines: m0's loss on each minibatch."""
    masked = MaskedModel(model, masks, LinearSpace(2, 4), logits, logits_dtype=logits_dtype, seed=seed, mode=mode)
    estimator = pge.MaskPro(debias=debias)
    sampled = []
    for t in progress_bar(range(steps), desc=f"seed {seed}", unit="step"):
        loss = batch_loss(model, batches[t % len(batches)])
        masked.update(lr * estimator.advantage(loss, baselines[t % len(batches)]))
        sampled.append(loss)
    masked.finish()
    return statistics.mean(sampled[-len(batches):]), *losses(model, batches, heldout)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    steps, seeds = (32, 1) if args.quick else (args.steps, args.seeds)
    names = common.chosen(ROWS, args.rows)
    dense, tokenizer = load_small(args.model, "float32", args.device)
    batches = data.minibatches(tokenizer, TEXT, 512, 32, 128)
    heldout = data.perplexity_windows(tokenizer, HELDOUT, 128, 512)
    masks = common.wanda_masks(dense, data.calibration_samples(tokenizer, TEXT, 128, 128, 0))
    m0 = copy.deepcopy(dense)
    apply_masks(find_layers(m0), masks)
    baselines = [batch_loss(m0, batch) for batch in batches]
    rows = [{"setting": name, **dict(zip(COLUMNS[1:], losses(model, batches, heldout)))}
            for name, model in (("dense", dense), ("m0 (Wanda)", m0))]
    for name in names:
        runs = [learn(copy.deepcopy(dense), masks, batches, baselines, heldout, steps, seed, **ROWS[name])
                for seed in range(args.seed, args.seed + seeds)]
        rows.append({"setting": name, "steps": steps, "seeds": seeds, **{
            column: f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if seeds > 1 else 0:.4f}"
            for column, values in zip(COLUMNS, zip(*runs))}})
    common.report(rows, args)


if __name__ == "__main__":
    run_script(main)
