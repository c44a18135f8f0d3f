"""Learning curves on the small model over seeds: does the fused step learn as the exact one, do the settings learn?

    python bench/small_model.py                          # first: the model, four minutes
    python bench/learning.py [--quick] [--json FILE] [--steps 640] [--rows fused,exact]

Every row is one setting, run over --seeds seeds on 512 x 128 bytes from the same Wanda mask: mean and deviation of the
loss of the sampled masks over the last epoch, and of the final mask (the mode) on the training minibatches and on
held-out text. `m0` is where all of them start.
"""
import statistics

import common
import torch
from tqdm import tqdm

import data
import importance
import layers
import masked_model
import pge
from utils import UserError, batch_loss, run

ROWS = {  # what is varied: eta, C, the tracker, the step
    "authors' defaults: eta 50, C 10": dict(lr=50, logits=10),
    "eta 30, C 5, delta as the authors have it": dict(lr=30, logits=5),
    "fused: eta 30, C 5, debiased": dict(lr=30, logits=5, debias=True),
    "fused, float16 logits": dict(lr=30, logits=5, debias=True, logits_dtype=torch.float16),
    "exact: eta 30, C 5, debiased": dict(lr=30, logits=5, debias=True, mode="exact"),
}


def wanda_masks(model, samples, n=2, m=4):
    """The initial mask, computed as prune.py does."""
    import prune
    found = layers.find_layers(model)
    norms = importance.input_norms(model, found, samples)
    return {name: prune.best_mask(importance.wanda(layers.weight_matrix(module).float(), norms[name]), n, m)
            for name, module in found.items()}


def learn(load, masks, batches, baselines, heldout, steps, seed, lr, logits, debias=False,
          logits_dtype=torch.float32, mode="eager"):
    """One run; (mean loss of the sampled masks in the last epoch, final mask on the minibatches, and held out)."""
    model = load()
    masked = masked_model.MaskedModel(model, masks, pge.LinearSpace(2, 4), logits, logits_dtype=logits_dtype, seed=seed,
                                      mode=mode)
    estimator = pge.MaskPro(debias=debias)
    losses = []
    for t in tqdm(range(steps), desc=f"seed {seed}", unit="step", disable=None, leave=False):
        loss = batch_loss(model, batches[t % len(batches)])
        masked.update(lr * estimator.advantage(loss, baselines[t % len(batches)]))
        losses.append(loss)
    masked.finish()
    final = statistics.mean(batch_loss(model, batch) for batch in batches)
    return statistics.mean(losses[-len(batches):]), final, batch_loss(model, heldout, 64)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="demo/small", help="folder that bench/small_model.py wrote")
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only the rows whose names contain one of these, by commas")
    args = parser.parse_args()
    steps, seeds = (32, 1) if args.quick else (args.steps, args.seeds)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except OSError:
        raise UserError(f"{args.model} is missing; run bench/small_model.py first")

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model).to(args.device).requires_grad_(False).eval()
    batches = data.minibatches(tokenizer, "demo/train.jsonl", 512, 32, 128)
    heldout = data.perplexity_windows(tokenizer, "demo/heldout.txt", 128, 512)
    masks = wanda_masks(load(), data.calibration_samples(tokenizer, "demo/train.jsonl", 128, 128, 0))
    model = load()
    dense = statistics.mean(batch_loss(model, batch) for batch in batches), batch_loss(model, heldout, 64)
    layers.apply_masks(layers.find_layers(model), masks)
    baselines = [batch_loss(model, batch) for batch in batches]
    start = statistics.mean(baselines), batch_loss(model, heldout, 64)
    rows = [{"setting": name, "final mask, minibatches": pair[0], "held out": pair[1]}
            for name, pair in (("dense", dense), ("m0 (Wanda)", start))]
    wanted = [part for part in args.rows.split(",") if part]
    for name, setting in ROWS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        runs = [learn(load, masks, batches, baselines, heldout, steps, seed, **setting) for seed in range(seeds)]
        columns = ["sampled masks, last epoch", "final mask, minibatches", "held out"]
        rows.append({"setting": name, "steps": steps, "seeds": seeds, **{
            column: f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if seeds > 1 else 0:.4f}"
            for column, values in zip(columns, zip(*runs))}})
    common.report(rows, args)


if __name__ == "__main__":
    run(main)
