"""Learn an N:M mask of a frozen model by policy gradient, from forward passes only (MaskPro, arXiv 2506.12876).

    python train.py --dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625
    python train.py --model MODEL --dataset text.jsonl --dtype auto --lr 10 --logits 5 --debias_tracker --max_step 1000
    python train.py --model MODEL --dataset text.jsonl --baseline online      # without inference_loss.py
    python train.py --model MODEL --dataset text.jsonl --preset fast          # beyond the paper: by gradients

Needs the initial mask m0 (get_mask.py) and, with --baseline cached, its losses (inference_loss.py). Writes a new folder
results/<run>/: mask.safetensors, checkpoint/ (a plain Hugging Face folder with zeros), metrics.jsonl (one line a step),
layers.jsonl, curve.png, run.json.

A step:  f_t = f(m_t * w, minibatch);  A = f_t - f(m0 * w, minibatch) - delta;
pi <- pi - lr * A * grad log p(m_t | pi);  m_{t+1} ~ p(pi).
The first mask is m0 itself, the final one keeps the N largest logits of each block.

--estimator straight_through takes gradients from backward passes instead (straight_through.py). --preset fast is that
with settings that fit any model; flags that are given besides go before the preset's. With --val_fraction the best mask
on held-out minibatches is delivered.
"""
import json
import math
import statistics
import sys
import time

import torch
from tqdm import tqdm

import baseline
import data
import figures
import importance
import mask_files
import pge
import step
import tracking
from layers import MaskedModel, check_divisible, find_layers, read_masks
from straight_through import StraightThrough
from utils import (
    DTYPES,
    UserError,
    add_data_arguments,
    add_model_arguments,
    batch_loss,
    check_length,
    environment,
    finite,
    load_model,
    model_fingerprint,
    peak_memory_bytes,
    positive_int,
    refuse_existing,
    run,
    script_parser,
    set_seed,
    sparsity_type,
    write_json,
)

ROWS = 64  # of text that --init scores measures the layers' inputs on
PRESETS = {"fast": dict(estimator="straight_through", init="scores", logits=4.0, distill=1.0, lr=0.4, schedule="linear",
                        tokens=400_000, batchsize=8, epoch=1, val_fraction=0.02, looks=10)}


def parse_args(argv=None):
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--lr", type=finite(0), default=50.0,
                        help="eta, in logits per nat of advantage; straight_through: how far, in logits, a run of "
                             "gradients that are mere noise moves one")
    parser.add_argument("--logits", type=finite(0), default=10.0, help="C: initial logit of a kept weight (pruned: 0)")
    parser.add_argument("--epoch", type=positive_int, default=10000, help="passes through the minibatches, at most")
    parser.add_argument("--max_step", type=positive_int, default=10000, help="steps in all, at most")
    parser.add_argument("--max_minutes", type=finite(0), default=math.inf,
                        help="end the loop and its schedule after so long; the mask then depends on the machine")
    parser.add_argument("--targets", nargs="+", default=None,
                        help="learn the layers whose names contain one of these; the others keep m0")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=(2, 4), help="N:M of the mask")
    parser.add_argument("--mask", default="initial_mask.safetensors", help="m0: mask file or folder of .pt masks")
    parser.add_argument("--init", choices=["mask", "scores", "random"], default="mask",
                        help="logits start at C * m0; at C * log of the weights' |w| ||x||, which makes close calls "
                             "the least sure; or at C * normal random numbers")
    parser.add_argument("--space", choices=list(pge.SPACES), default="linear",
                        help="linear: M logits a block (MaskPro); pattern: C(M,N) of them (MaskLLM)")
    parser.add_argument("--estimator", choices=["vanilla", "residual", "maskpro", "running", "straight_through"],
                        default="maskpro", help="the advantage: loss; loss - baseline; loss - baseline - delta; loss - "
                                                "the minibatch's own running mean; or gradients instead")
    parser.add_argument("--baseline", choices=["cached", "online"], default="cached",
                        help="f(m0): from inference_loss.py, or by a second forward each step")
    parser.add_argument("--baseline_file", default=None, help="from inference_loss.py (default: named by the data)")
    parser.add_argument("--alpha", type=float, default=0.99, help="decay of delta a step")
    parser.add_argument("--debias_tracker", action="store_true", help="divide delta by 1 - alpha^t")
    parser.add_argument("--normalize_advantage", action="store_true",
                        help="divide the advantage by its running root mean square; --lr is then in logits")
    parser.add_argument("--schedule", choices=["constant", "linear", "cosine"], default="constant",
                        help="of --lr over the run; the decaying ones warm up for its first fiftieth")
    parser.add_argument("--tokens", type=positive_int, default=None,
                        help="learn from so many tokens of running text, shuffled, instead of --dataset_size documents")
    parser.add_argument("--val_fraction", type=float, default=0.0,
                        help="of the minibatches, held out to choose the best mask by (default: 0, the last mask)")
    parser.add_argument("--looks", type=positive_int, default=20,
                        help="times a run's layers, and the held-out minibatches, are looked at")
    parser.add_argument("--forward", choices=["mode", "sample"], default="mode",
                        help="straight_through: take gradients at the most probable mask, or at one drawn")
    parser.add_argument("--distill", type=float, default=0.0,
                        help="straight_through: the share, 0 to 1, of the loss that compares with the dense model's "
                             "predictions instead of the text; a third more time")
    parser.add_argument("--gradient_checkpointing", action="store_true",
                        help="straight_through: less memory, a third more time")
    parser.add_argument("--preset", choices=list(PRESETS), default=None, help="settings as one: " + "; ".join(
        name + " is " + " ".join(f"--{key} {value}" for key, value in preset.items())
        for name, preset in PRESETS.items()))
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float32",
                        help="of the logits; 16 bits are rounded stochastically")
    parser.add_argument("--step", choices=step.MODES, default="compiled",
                        help="the mask step: fused by torch.compile; fused, eager; exact: float64, slow")
    parser.add_argument("--tensorboard", action="store_true", help="log to tensorboard in the run folder too")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    parser.add_argument("--save", action="store_true", help="save the logits too")
    parser.add_argument("--skip_checkpoint", action="store_true", help="write the mask but no sparse checkpoint")
    parser.add_argument("--out", default=None, help="run folder, must be new (default: results/<settings>)")
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    if not 0 <= args.alpha < 1:
        parser.error(f"--alpha {args.alpha} is not in [0, 1)")
    if not 0 <= args.distill <= 1:
        parser.error(f"--distill {args.distill} is not in [0, 1]")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction} is not in [0, 1)")
    if args.tokens and args.baseline == "cached" and args.estimator in ("residual", "maskpro"):
        parser.error("--tokens makes minibatches that no cached baseline knows: add --baseline online, or choose "
                     "--estimator running or straight_through")
    return args


def make_estimator(args):
    """What turns a loss into an advantage; None for straight_through, which needs none."""
    if args.estimator == "straight_through":
        return None
    estimator = {"vanilla": pge.Vanilla, "residual": pge.Residual, "running": pge.Running,
                 "maskpro": lambda: pge.MaskPro(args.alpha, args.debias_tracker)}[args.estimator]()
    return pge.Normalized(estimator) if args.normalize_advantage else estimator


def wanda_scores(model, learned: list[str], batches):
    """name, weight -> |w| ||x||, x the layer's inputs in the dense model on the first ROWS rows of the minibatches."""
    layers = find_layers(model, [""])
    norms = importance.input_norms(model, {name: layers[name] for name in learned}, batches.flatten(0, 1)[:ROWS])
    return lambda name, weight: importance.wanda(weight, norms[name])


def logit_step(wander: float, steps: float) -> float:
    """The step by which a random walk of so many, decaying linearly, gets as far as `wander`: sum of (1 - t/T)^2 = T/3.

    A logit whose gradient is all noise then comes as far in a long run as in a short one, and one whose gradient is
    true comes further."""
    return wander * math.sqrt(3 / steps)


def rate_at(schedule: str, progress: float) -> float:
    """The share of --lr in force after this share of the steps; a tenth of a decaying schedule warms up."""
    if schedule == "constant":
        return 1.0
    decay = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return decay * min(1.0, (progress + 1e-3) / 0.02)


class Best:
    """The most probable mask with the lowest loss on held-out minibatches; m0, looked at first, is one of them."""

    def __init__(self, masked: MaskedModel, judge):
        self.masked, self.judge = masked, judge
        self.bits, self.loss = None, math.inf

    def look(self) -> float:
        """The held-out loss of the present mask."""
        bits = self.masked.mode_bits()
        with self.masked.showing(bits):
            loss = self.judge()
        if loss < self.loss:
            self.bits, self.loss = bits, loss
        return loss


def main(argv=None):
    args = parse_args(argv)
    n, m = args.sparsity_type
    out = refuse_existing(args.out or f"results/lr{args.lr:g}_epoch{args.epoch}_logits{args.logits:g}_"
                                      f"size{args.dataset_size}", "choose another --out or remove it")
    tracker_classes = tracking.chosen(args.tensorboard, args.wandb)
    set_seed(args.seed)

    # text -> minibatches, model and m0
    model, tokenizer = load_model(args)
    check_length(model, args.sqlen, "--sqlen")
    mask_file = read_masks(args.mask, model, n, m)
    learned = find_layers(model, args.targets or [""])
    check_divisible(learned, m)
    fingerprint = model_fingerprint(model)
    learned = [name for name in mask_file.masks if name in learned]
    if not learned:
        raise UserError(f"{args.mask} has no mask for the layers that --targets name")
    if args.tokens:
        batches = data.token_rows(tokenizer, args.dataset, args.tokens, args.batchsize, args.sqlen, args.seed)
    else:
        batches = data.minibatches(tokenizer, args.dataset, args.dataset_size, args.batchsize, args.sqlen)

    # m0 -> baseline losses
    estimator = make_estimator(args)
    baselines = None
    online = estimator and estimator.needs_baseline and args.baseline == "online"
    if estimator and estimator.needs_baseline and args.baseline == "cached":
        depends_on = baseline.conditions(args, model, mask_file.masks, batches)
        baselines = baseline.load(args.baseline_file or baseline.default_path(args), depends_on)
    heldout_size = math.ceil(args.val_fraction * len(batches))
    if heldout_size == len(batches):
        raise UserError(f"--val_fraction {args.val_fraction} of {len(batches)} minibatches leaves none to learn from")
    batches, heldout = batches[:len(batches) - heldout_size], batches[len(batches) - heldout_size:]
    scores = wanda_scores(model, learned, batches) if args.init == "scores" else None
    masked = MaskedModel(model, mask_file.masks, pge.SPACES[args.space](n, m), args.logits, args.init,
                         DTYPES[args.logits_dtype], learned, args.seed, args.step, scores)
    if online:
        masked.keep_initial(mask_file.masks)
    learner = None if estimator else StraightThrough(masked, args.step, args.gradient_checkpointing,
                                                     args.forward == "sample", args.distill)
    best = Best(masked, lambda: statistics.mean(batch_loss(model, batch, args.microbatch) for batch in heldout))

    if len(heldout):
        heldout_m0 = best.look()

    # the loop
    if args.step == "compiled":
        print("the first steps compile the mask step for each shape of layer: half a minute or more, once",
              file=sys.stderr)
    steps = min(args.max_step, args.epoch * len(batches))
    metrics, started, log, trackers, done, looked = [], time.time(), None, [], 0.0, 0
    progress = tqdm(range(steps), desc="learning", unit="step", disable=None)
    for t in progress:
        batch, rate = batches[t % len(batches)], args.lr * rate_at(args.schedule, done)
        reference = advantage = None
        if learner:
            loss = learner.step(batch, logit_step(rate, round(t / done) if done else steps), args.microbatch)
        else:
            loss = batch_loss(model, batch, args.microbatch)  # f(m_t * w, minibatch)
            reference = baselines[t % len(batches)] if baselines else None
            if online:
                with masked.showing_initial():
                    reference = batch_loss(model, batch, args.microbatch)
        if not math.isfinite(loss + (reference or 0)):
            raise UserError(f"the loss is {loss + (reference or 0)} at step {t + 1}; lower --lr, or use --dtype "
                            f"bfloat16 if the model overflows in {model.dtype}"
                            + (f" (metrics so far: {out}/metrics.jsonl)" if log else ""))
        if estimator:
            advantage = estimator.advantage(loss, reference, t % len(batches))
            masked.update(rate * advantage)

        metrics.append({"step": t + 1, "loss": loss, "baseline": reference, "advantage": advantage,
                        "delta": getattr(estimator, "delta", None), "seconds": round(time.time() - started, 3)})
        if log is None:
            out.mkdir(parents=True)
            record = {"arguments": vars(args), "model_fingerprint": fingerprint, "environment": environment()}
            write_json(out / "run.json", record)
            log = open(out / "metrics.jsonl", "w", buffering=1)
            trackers = [tracker(out, vars(args)) for tracker in tracker_classes]
        done = min(1.0, max((t + 1) / steps, (time.time() - started) / (60 * args.max_minutes)))
        census = None
        if int(done * args.looks) > looked:
            looked = int(done * args.looks)
            census = masked.census()
            with open(out / "layers.jsonl", "a") as file:
                file.write(json.dumps({"step": t + 1, **census}) + "\n")
            if len(heldout):
                metrics[-1]["heldout"] = best.look()
        log.write(json.dumps(metrics[-1]) + "\n")
        for tracker in trackers:
            tracker.log(t + 1, tracking.scalars(metrics[-1], census))
        improvement = "" if reference is None else f" ({reference - loss:+.4f} against m0)"
        progress.set_postfix_str(f"loss {loss:.4f}{improvement}", refresh=False)
        if done == 1.0:
            break
    for opened in (log, *trackers):
        opened.close()

    # results
    masked.flush()
    if args.save:
        from safetensors.torch import save_file
        logits = {name: torch.stack(layer.logits) for name, layer in masked.layers.items()}  # [width, blocks]
        save_file(logits, out / "logits.safetensors")
    initial = {name: mask_file.masks[name] for name in learned}
    if learner:
        learner.detach()
    final = masked.finish(best.bits)
    changed = sum(int((final[name] != initial[name]).reshape(-1, m).any(1).sum()) for name in learned)
    blocks = sum(mask.numel() // m for mask in initial.values())
    mask_files.save(out / "mask.safetensors", {**mask_file.masks, **final}, n, m, args.model, fingerprint)
    if not args.skip_checkpoint:
        model.save_pretrained(out / "checkpoint")
        tokenizer.save_pretrained(out / "checkpoint")
    figures.learning_curve({out.name: metrics}, out / "curve.png")
    tail = [line["loss"] for line in metrics[-len(batches):]]
    seconds = time.time() - started
    if len(heldout):
        print(f"held-out loss of the mask delivered {best.loss:.4f} nats, of m0 {heldout_m0:.4f}")
    summary = {"steps": len(metrics), "seconds": round(seconds, 1), "peak_memory_bytes": peak_memory_bytes(),
               "blocks": blocks, "blocks_changed": changed, "mean_loss_last_epoch": sum(tail) / len(tail)}
    write_json(out / "run.json", {**record, "summary": summary})
    print(f"{len(metrics)} steps in {seconds:.0f} s, last epoch's mean loss {summary['mean_loss_last_epoch']:.4f} "
          f"nats, {changed / blocks:.2%} of {blocks} blocks changed, peak {peak_memory_bytes() / 2**30:.2f} GiB "
          f"-> {out}")


if __name__ == "__main__":
    run(main)
