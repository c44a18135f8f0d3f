"""Learn an N:M mask of a frozen model by policy gradient, from forward passes only (MaskPro, arXiv 2506.12876).

    python train.py --dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625
    python train.py --model MODEL --dataset text.jsonl --dtype auto --lr 10 --logits 5 --debias_tracker --max_step 1000
    python train.py --model MODEL --dataset text.jsonl --baseline online      # without inference_loss.py

Needs the initial mask m0 (get_mask.py) and, with --baseline cached, its losses (inference_loss.py). Writes a new folder
results/<run>/: mask.safetensors, checkpoint/ (a plain Hugging Face folder with zeros), metrics.jsonl (one line a step),
curve.png, run.json.

A step:  f_t = f(m_t * w, minibatch);  A = f_t - f(m0 * w, minibatch) - delta;
pi <- pi - lr * A * grad log p(m_t | pi);  m_{t+1} ~ p(pi).
The first mask is m0 itself, the final one keeps the N largest logits of each block.
"""
import json
import math
import sys
import time

import torch
from tqdm import tqdm

import baseline
import data
import figures
import mask_files
import pge
import step
from layers import MaskedModel, check_divisible, find_layers, read_masks
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


def parse_args(argv=None):
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--lr", type=finite(0), default=50.0, help="eta, in logits per nat of advantage")
    parser.add_argument("--logits", type=finite(0), default=10.0, help="C: initial logit of a kept weight (pruned: 0)")
    parser.add_argument("--epoch", type=positive_int, default=10000, help="passes through the minibatches, at most")
    parser.add_argument("--max_step", type=positive_int, default=10000, help="steps in all, at most")
    parser.add_argument("--targets", nargs="+", default=None,
                        help="learn the layers whose names contain one of these; the others keep m0")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=(2, 4), help="N:M of the mask")
    parser.add_argument("--mask", default="initial_mask.safetensors", help="m0: mask file or folder of .pt masks")
    parser.add_argument("--init", choices=["mask", "random"], default="mask",
                        help="logits start at C * m0, or at C * normal random numbers")
    parser.add_argument("--space", choices=list(pge.SPACES), default="linear",
                        help="linear: M logits a block (MaskPro); pattern: C(M,N) of them (MaskLLM)")
    parser.add_argument("--estimator", choices=["vanilla", "residual", "maskpro"], default="maskpro",
                        help="the advantage: loss; loss - baseline; loss - baseline - delta")
    parser.add_argument("--baseline", choices=["cached", "online"], default="cached",
                        help="f(m0): from inference_loss.py, or by a second forward each step")
    parser.add_argument("--baseline_file", default=None, help="from inference_loss.py (default: named by the data)")
    parser.add_argument("--alpha", type=float, default=0.99, help="decay of delta a step")
    parser.add_argument("--debias_tracker", action="store_true", help="divide delta by 1 - alpha^t")
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float32",
                        help="of the logits; 16 bits are rounded stochastically")
    parser.add_argument("--step", choices=step.MODES, default="compiled",
                        help="the mask step: fused by torch.compile; fused, eager; exact: float64, slow")
    parser.add_argument("--save", action="store_true", help="save the logits too")
    parser.add_argument("--skip_checkpoint", action="store_true", help="write the mask but no sparse checkpoint")
    parser.add_argument("--out", default=None, help="run folder, must be new (default: results/<settings>)")
    args = parser.parse_args(argv)
    if not 0 <= args.alpha < 1:
        parser.error(f"--alpha {args.alpha} is not in [0, 1)")
    return args


def make_estimator(args):
    if args.estimator == "maskpro":
        return pge.MaskPro(args.alpha, args.debias_tracker)
    return {"vanilla": pge.Vanilla, "residual": pge.Residual}[args.estimator]()


def main(argv=None):
    args = parse_args(argv)
    n, m = args.sparsity_type
    out = refuse_existing(args.out or f"results/lr{args.lr:g}_epoch{args.epoch}_logits{args.logits:g}_"
                                      f"size{args.dataset_size}", "choose another --out or remove it")
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
    batches = data.minibatches(tokenizer, args.dataset, args.dataset_size, args.batchsize, args.sqlen)

    # m0 -> baseline losses
    estimator = make_estimator(args)
    baselines = None
    if estimator.needs_baseline and args.baseline == "cached":
        depends_on = baseline.conditions(args, model, mask_file.masks, batches)
        baselines = baseline.load(args.baseline_file or baseline.default_path(args), depends_on)
    masked = MaskedModel(model, mask_file.masks, pge.SPACES[args.space](n, m), args.logits, args.init,
                         DTYPES[args.logits_dtype], learned, args.seed, args.step)
    online = estimator.needs_baseline and args.baseline == "online"
    if online:
        masked.keep_initial(mask_file.masks)

    # the loop
    if args.step == "compiled":
        print("the second step compiles the mask step for each shape of layer: half a minute or more, once",
              file=sys.stderr)
    steps = min(args.max_step, args.epoch * len(batches))
    metrics, started, log = [], time.time(), None
    progress = tqdm(range(steps), desc="learning", unit="step", disable=None)
    for t in progress:
        batch = batches[t % len(batches)]
        loss = batch_loss(model, batch, args.microbatch)  # f(m_t * w, minibatch)
        reference = baselines[t % len(batches)] if baselines else None
        if online:
            with masked.showing_initial():
                reference = batch_loss(model, batch, args.microbatch)
        if not math.isfinite(loss + (reference or 0)):
            raise UserError(f"the loss is {loss + (reference or 0)} at step {t + 1}; lower --lr, or use --dtype "
                            f"bfloat16 if the model overflows in {model.dtype}"
                            + (f" (metrics so far: {out}/metrics.jsonl)" if log else ""))
        advantage = estimator.advantage(loss, reference)
        masked.update(args.lr * advantage)

        metrics.append({"step": t + 1, "loss": loss, "baseline": reference, "advantage": advantage,
                        "delta": getattr(estimator, "delta", None), "seconds": round(time.time() - started, 3)})
        if log is None:
            out.mkdir(parents=True)
            record = {"arguments": vars(args), "model_fingerprint": fingerprint, "environment": environment()}
            write_json(out / "run.json", record)
            log = open(out / "metrics.jsonl", "w", buffering=1)
        log.write(json.dumps(metrics[-1]) + "\n")
        improvement = "" if reference is None else f" ({reference - loss:+.4f} against m0)"
        progress.set_postfix_str(f"loss {loss:.4f}{improvement}", refresh=False)
    log.close()

    # results
    masked.flush()
    if args.save:
        from safetensors.torch import save_file
        logits = {name: torch.stack(layer.logits) for name, layer in masked.layers.items()}  # [width, blocks]
        save_file(logits, out / "logits.safetensors")
    initial = {name: mask_file.masks[name] for name in learned}
    final = masked.finish()
    changed = sum(int((final[name] != initial[name]).reshape(-1, m).any(1).sum()) for name in learned)
    blocks = sum(mask.numel() // m for mask in initial.values())
    mask_files.save(out / "mask.safetensors", {**mask_file.masks, **final}, n, m, args.model, fingerprint)
    if not args.skip_checkpoint:
        model.save_pretrained(out / "checkpoint")
        tokenizer.save_pretrained(out / "checkpoint")
    figures.learning_curve({out.name: metrics}, out / "curve.png")
    tail = [line["loss"] for line in metrics[-len(batches):]]
    seconds = time.time() - started
    summary = {"steps": steps, "seconds": round(seconds, 1), "peak_memory_bytes": peak_memory_bytes(),
               "blocks": blocks, "blocks_changed": changed, "mean_loss_last_epoch": sum(tail) / len(tail)}
    write_json(out / "run.json", {**record, "summary": summary})
    print(f"{steps} steps in {seconds:.0f} s, last epoch's mean loss {summary['mean_loss_last_epoch']:.4f} nats, "
          f"{changed / blocks:.2%} of {blocks} blocks changed, peak {peak_memory_bytes() / 2**30:.2f} GiB -> {out}")


if __name__ == "__main__":
    run(main)
