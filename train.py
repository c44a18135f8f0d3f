"""Learn an N:M mask of a frozen model by policy gradient, from forward passes only (MaskPro, arXiv 2506.12876).

    python train.py --dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625
    python train.py --model MODEL --dataset text.jsonl --dtype auto --lr 10 --logits 5 --debias_tracker --max_step 1000
    python train.py --model MODEL --dataset text.jsonl --baseline online      # without inference_loss.py
    python train.py --model MODEL --dataset text.jsonl --preset fast          # beyond the paper: by gradients
    python train.py --resume results/RUN                                      # goes on with a run that was stopped

Needs the initial mask m0 (get_mask.py) and, with --baseline cached, its losses (inference_loss.py). Writes a new folder
results/<run>/: mask.safetensors, checkpoint/ (a plain Hugging Face folder with zeros), metrics.jsonl (one line a step),
layers.jsonl, curve.png, run.json.

A step:  f_t = f(m_t * w, minibatch);  A = f_t - f(m0 * w, minibatch) - delta;
pi <- pi - lr * A * grad log p(m_t | pi);  m_{t+1} ~ p(pi).
The first mask is m0 itself, or with --init exchange what exchanges make of it (exchange.py); the final one keeps the N
largest logits of each block.

--estimator straight_through takes gradients from backward passes instead (straight_through.py). --preset fast is that
with settings that fit any model; flags that are given besides go before the preset's. With --val_fraction the best mask
on held-out minibatches is delivered.

torchrun --nproc_per_node R train.py ... learns with R processes (parallel.py): each scores another minibatch with the
same mask, or with --samples K its share of K masks a step on the same minibatch. --shard shares each layer's rows out
to them, for a model that none could hold.

A run can be stopped at any time, by Ctrl-C, a signal or the power's failure: --resume makes the same mask as if it had
not been. --repeat RUN does a run again, from its run.json.
"""
import math
import time
from statistics import fmean as mean

from safetensors.torch import save_file

import baseline
import data
import exchange
import figures
import importance
import mask_files
import pge
import runs
import settings
import tracking
from best import Best, diverging
from files import written_beside
from layers import check_divisible, find_layers, read_masks
from masked_model import MaskedModel
from parallel import Ranks
from straight_through import StraightThrough
from utils import (
    DTYPES,
    UserError,
    batch_loss,
    be_deterministic,
    check_length,
    load_model,
    mask_fingerprint,
    model_fingerprint,
    peak_memory_bytes,
    run,
    set_seed,
)

ROWS = 64  # of text that --init scores measures the layers' inputs on


def parse_args(argv=None):
    return settings.parse(__doc__, argv)


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
    """The share of --lr in force after this share of the steps; a decaying schedule warms up in its first fiftieth."""
    if schedule == "constant":
        return 1.0
    decay = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return decay * min(1.0, (progress + 1e-3) / 0.02)


def main(argv=None):
    args = parse_args(argv)
    if args.resume and runs.is_finished(args.resume):
        print(f"{args.resume} is finished: its mask is in {args.resume}/mask.safetensors")
        return
    tracker_classes = tracking.chosen(args.tensorboard, args.wandb)
    args.out = args.out or (f"results/lr{args.lr:g}_epoch{args.epoch}_logits{args.logits:g}_size{args.dataset_size}")
    ranks = Ranks(args.device, args.timeout_s)
    if args.samples % ranks.count and args.samples > 1:
        raise UserError(f"--samples {args.samples} cannot be shared by {ranks.count} processes: choose a multiple")
    if args.shard and (args.samples > 1 or args.init == "scores"):
        raise UserError("with --shard all processes wear one mask, and none has the dense model whole: leave out "
                        "--samples, and --init scores")
    if args.device_map and ranks.count > 1:
        raise UserError("--device_map gives all GPUs to one process: leave it out, or start one process")
    with ranks, runs.RunFolder(args, ranks) as folder:
        learn(args, folder, ranks, tracker_classes)


def learn(args, folder: runs.RunFolder, ranks: Ranks, tracker_classes: list[type]) -> None:
    """The run from its start, or from where it was stopped, to its results."""
    n, m = args.sparsity_type
    set_seed(args.seed)
    if args.deterministic:
        be_deterministic()

    # text -> minibatches, model and m0
    sharing = args.shard and ranks.count > 1
    if sharing:
        ranks.await_turn()  # the host holds one whole model at a time
    model, tokenizer = load_model(args, on_host=sharing)
    check_length(model, args.sqlen, "--sqlen")
    mask_file = read_masks(args.mask, model, n, m)
    learned = find_layers(model, args.targets or [""])
    check_divisible(learned, m)
    fingerprint = model_fingerprint(model)
    learned = [name for name in mask_file.masks if name in learned]
    if not learned:
        raise UserError(f"{args.mask} has no mask for the layers that --targets name")
    if ranks.count > 1 and (args.shard or not make_estimator(args)) and any("expert" in name for name in learned):
        raise UserError("experts that one process's text does not reach would keep the other processes waiting: name "
                        "other layers with --targets, or start one process")
    if args.tokens:
        batches = data.token_rows(tokenizer, args.dataset, args.tokens, args.batchsize, args.sqlen, args.seed)
    else:
        batches = data.minibatches(tokenizer, args.dataset, args.dataset_size, args.batchsize, args.sqlen)
    folder.confirm({"model": fingerprint, "mask": mask_fingerprint(mask_file.masks), "text": data.fingerprint(batches)})

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
    init = "mask" if args.init == "exchange" else args.init
    masked = MaskedModel(model, mask_file.masks, pge.SPACES[args.space](n, m), args.logits, init,
                         DTYPES[args.logits_dtype], learned, args.seed, args.step, scores,
                         ranks if sharing else None)
    if online:
        masked.keep_initial(mask_file.masks)
    if sharing:
        model.to(ranks.device)  # what is not shared out
        mask_file = mask_file if ranks.first else None  # a byte a weight
        ranks.pass_turn()
    folder.compare()
    learner = None if estimator else StraightThrough(masked, args.step, args.gradient_checkpointing,
                                                     args.forward == "sample", args.distill, ranks=ranks)
    best = Best(masked, lambda: ranks.mean([batch_loss(model, batch, args.microbatch)
                                            for batch in (heldout if sharing else ranks.share(heldout))]))

    # the start, or where the run was stopped
    restored = folder.restore({"masked": masked, "estimator": estimator, "learner": learner, "best": best})
    if len(heldout) and not restored and best.look(0) is None:
        raise UserError(f"the held-out loss of m0 is not finite; use --dtype bfloat16 if the model overflows in "
                        f"{model.dtype}")
    at = folder.position
    if args.init == "exchange" and not restored:
        began = time.monotonic()
        exchange.settle(masked, batches.flatten(0, 1), args.logits)
        ranks.check_same(masked.checksum(), "the logits at the start")
        at.seconds_exchanging = time.monotonic() - began
    passes, several = args.epoch * len(batches), args.samples > 1
    width = 1 if several else ranks.count  # minibatches a step
    steps = min(args.max_step, at.step + math.ceil((passes - at.minibatches) / width))
    folder.check_disk(results_bytes(args, masked, steps))
    folder.trackers = [tracker(folder.path, vars(args), folder.record["id"], at.step) for tracker in tracker_classes]
    if args.step == "compiled":
        folder.say("the first steps compile the mask step for each shape of layer: half a minute or more, once")

    # the loop
    for progress in folder.steps(steps):
        rate, length = args.lr * rate_at(args.schedule, at.done), round(at.step / at.done) if at.done else steps
        minibatches = [(at.minibatches + i) % len(batches) for i in range(width)]
        own, reference, advantage, census = minibatches[ranks.rank % width], None, None, None
        if learner:
            losses = [learner.step(batches[own], logit_step(rate, length), args.microbatch)]
        else:
            losses = []
            for sample in ranks.share(range(args.samples)) if several else [None]:
                masked.draw(sample)
                losses.append(batch_loss(model, batches[own], args.microbatch))  # f(m_t * w, minibatch)
            reference = baselines[own] if baselines else None
            if online:
                with masked.showing_initial():
                    reference = batch_loss(model, batches[own], args.microbatch)
        losses, references, seconds = folder.agree(losses, reference)
        loss, reference = mean(losses), None if reference is None else mean(references)
        at.step, at.minibatches = at.step + 1, at.minibatches + width
        at.done = min(1.0, max(at.step / args.max_step, at.minibatches / passes,
                               seconds / (60 * (args.max_minutes or math.inf))))
        if not math.isfinite(loss + (reference or 0)):
            if estimator:
                masked.next_step(redraw=True)  # another mask may do better
            folder.skip(loss + (reference or 0), f"lower --lr, or use --dtype bfloat16 if the model overflows in "
                                                 f"{model.dtype}")
            continue
        at.skipped_in_a_row = 0
        if estimator:
            advantages = estimator.advantages(losses, references, minibatches * args.samples)
            advantage = mean(advantages)
            masked.update([rate * each / args.samples for each in advantages] if several else rate * advantage)

        line = {"step": at.step, "loss": loss, "baseline": reference, "advantage": advantage,
                "delta": getattr(estimator, "delta", None), "seconds": round(seconds, 3)}
        if int(at.done * args.looks) > at.looks:
            at.looks, census = int(at.done * args.looks), masked.census()
            if ranks.count > 1:
                ranks.check_same(masked.checksum(), "the logits")
            if len(heldout):
                line["heldout"] = best.look(at.step)
        folder.log(line, census)
        improvement = "" if reference is None else f" ({reference - loss:+.4f} against m0)"
        progress.set_postfix_str(f"loss {loss:.4f}{improvement}", refresh=False)
        if census and at.diverged is None and (reason := diverging(folder.metrics, len(batches), best.first)):
            at.diverged = at.step
            remedy = f"the mask of step {best.step} will be delivered" if len(heldout) else "see --val_fraction"
            folder.say(f"\nat step {at.step} {reason}: the run diverges ({remedy}; a lower --lr may help)")

    # results
    logits = masked.whole_logits() if args.save else None
    if learner:
        learner.detach()
    final = masked.finish(best.bits)
    if not ranks.first:
        return
    if logits:
        with written_beside(folder.path / "logits.safetensors") as beside:
            save_file(logits, beside)
    initial = {name: mask_file.masks[name] for name in learned}
    changed = sum(int((final[name] != initial[name]).reshape(-1, m).any(1).sum()) for name in learned)
    blocks = sum(mask.numel() // m for mask in initial.values())
    masks = {**mask_file.masks, **final}
    mask_files.save(folder.path / "mask.safetensors", masks, n, m, args.model, fingerprint)
    if not args.skip_checkpoint:
        with written_beside(folder.path / "checkpoint") as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    figures.learning_curve({folder.path.name: folder.metrics}, folder.path / "curve.png")
    tail = [line["loss"] for line in folder.metrics[-len(batches):]]
    summary = {"steps": at.step, "seconds": round(folder.seconds() + at.seconds_exchanging, 1),
               "seconds_exchanging": round(at.seconds_exchanging, 1), "seconds_saving": round(at.seconds_saving, 2),
               "peak_memory_bytes": peak_memory_bytes(), "processes": ranks.count, "sent_bytes": ranks.sent_bytes,
               "blocks": blocks, "blocks_changed": changed, "mean_loss_last_epoch": sum(tail) / len(tail),
               "mask_of_step": best.step if best.bits else at.step, "mask_fingerprint": mask_fingerprint(masks),
               "steps_skipped": at.skipped, "diverged_at_step": at.diverged}
    if best.bits:
        summary.update(heldout_loss=best.loss, heldout_loss_of_m0=best.first)
        print(f"held-out loss of the mask delivered, that of step {best.step}, {best.loss:.4f} nats, of m0 "
              f"{best.first:.4f}")
    folder.finish(summary)
    skipped = f", {at.skipped} skipped for a loss that was not finite" if at.skipped else ""
    print(f"{at.step} steps in {summary['seconds']:.0f} s{skipped}, last epoch's mean loss "
          f"{summary['mean_loss_last_epoch']:.4f} nats, {changed / blocks:.2%} of {blocks} blocks changed, peak "
          f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB -> {folder.path}")


def results_bytes(args, masked: MaskedModel, steps: int) -> int:
    """What the run will write beside its states, at most: masks at a bit a weight, logits, the model, a line a step."""
    weights = sum(layer.scratch.numel() for layer in masked.layers.values())
    logits = sum(layer.part(plane).nbytes for layer in masked.layers.values() for plane in layer.logits)
    model = sum(parameter.nbytes for parameter in masked.model.parameters())
    lines = 200 * steps + 150 * args.looks * len(masked.layers)
    return weights // 8 + args.save * logits + (not args.skip_checkpoint) * model + lines


if __name__ == "__main__":
    run(main)
