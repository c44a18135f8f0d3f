"""Learn an N:M mask of a frozen model by policy gradient, from forward passes only (MaskPro, arXiv 2506.12876).

    python train.py --dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625
    python train.py --model MODEL --dataset text.jsonl --dtype auto --lr 1 --logits 5 --debias_tracker  # if it is small
    python train.py --model MODEL --dataset text.jsonl --baseline online      # without inference_loss.py
    python train.py --model MODEL --dataset text.jsonl --preset fast          # beyond the paper: by gradients
    python train.py --resume results/RUN                                      # goes on with a run that was stopped

Needs the initial mask m0 (get_mask.py) and, with --baseline cached, its losses (inference_loss.py). Writes a new folder
results/<run>/: mask.safetensors, checkpoint/ (a plain Hugging Face folder with zeros), metrics.jsonl (one line a step),
layers.jsonl, curve.png, run.json.

The first mask is m0 itself, or with --init swaps what swaps make of it (pruning/swaps.py); with --samples the first
are drawn. The final one keeps the N largest logits of each block, or with --val_fraction does best on held-out text.

--estimator straight_through takes gradients from backward passes (training/straight_through.py). --preset fast is that
with settings that fit any model; flags that are given besides go before the preset's.

torchrun --nproc_per_node R train.py ... learns with R processes (models/processes.py): each scores another minibatch
with the same mask, or with --samples K its share of K masks a step on the same minibatch. --shard shares each layer's
rows out to them, for a model that none could hold (models/sharding.py).

A run can be stopped at any time, by Ctrl-C, a signal or a power failure: --resume makes the mask that it would have
made (on a GPU with --deterministic). --repeat RUN does a run again, from its run.json.
"""
from argparse import Namespace
from statistics import fmean as mean

from utils import arguments_of, run_script, set_seed

from torch import Tensor

import pge
from masking.block_stats import block_stats
from masking.masked_model import MaskedModel
from models.loss import batch_loss
from models.processes import ProcessGroup
from training import args as arguments
from training import results, setup, tracking
from training.baselines import Baseline
from training.curvature import Curvature
from training.multi_sample import MultiSample
from training.progress import Run, StepResult, StopSignals, lr_multiplier
from training.run_folder import RunFolder, is_finished
from training.straight_through import StraightThrough, soft_temperature
from training.validation import Validation


class PolicyGradient:
    """MaskPro (section 4 of the paper): the loss residual against m0, less its moving average, moves the logits.

        A  = f(m_t * w, batch) - f(m0 * w, batch) - delta         the tracker delta: `pge.MaskPro`
        pi <- pi - lr * A * grad log p(m_t | pi)                  the score: `pge.score`
        m_{t+1} ~ p(pi)                                           N draws without replacement: `pge.sample`
    """

    def __init__(self, masked: MaskedModel, batches: Tensor, baseline: Baseline, estimator: pge.Estimator,
                 group: ProcessGroup, microbatch: int = 32):
        self.masked, self.batches = masked, batches
        self.baseline, self.estimator = baseline, estimator
        self.group, self.microbatch = group, microbatch

    def step(self, batch_indices: list[int], lr: float) -> StepResult:
        """One step of each process on its own of these minibatches, all with the same mask; lr: eta."""
        index = batch_indices[self.group.rank]
        loss = batch_loss(self.masked.model, self.batches[index], self.microbatch)      # f_t = f(m_t * w, batch)
        reference = self.baseline(index, self.batches[index])                           # f(m0 * w, batch), or None
        losses, references = zip(*self.group.all_gather([loss, reference]))
        result = StepResult(losses, references)
        if not result.is_finite:
            self.masked.count_step(redraw=True)                                         # another mask may do better
            return result
        advantages = self.estimator.advantages(losses, references, batch_indices)       # A = f_t - f(m0) - delta
        result.advantage, result.delta = mean(advantages), self.estimator.delta
        self.masked.update(lr * result.advantage)       # pi -= lr A score(m_t); m_{t+1} ~ p(pi): in the next forward
        return result

    def state(self) -> tuple[dict, dict]:
        """What a checkpoint keeps of it: the tracker."""
        return self.estimator.state()

    def restore(self, scalars: dict, read: object = None) -> None:
        """From `state`."""
        self.estimator.restore(scalars)


def make_learner(args: Namespace, masked: MaskedModel, batches: Tensor, baseline: Baseline, group: ProcessGroup,
                 run: Run) -> PolicyGradient | MultiSample | StraightThrough:
    """Three learners, one `step(batch_indices, lr)`: from gradients, from several masks a step, or the paper's."""
    if args.estimator == "straight_through":
        curvature = Curvature(masked, lambda: run.progress, group) if args.curvature else None
        return StraightThrough(masked, batches, args.gradient_checkpointing, args.forward == "sample", args.distill,
                               group, args.microbatch, run.expected_steps, curvature, args.normalize_gradient,
                               lambda: soft_temperature(run.progress) if args.forward == "soft" else 0.0)
    estimator = pge.make_estimator(args.estimator, args.alpha, args.debias_tracker, args.normalize_advantage)
    if args.samples > 1:
        return MultiSample(masked, batches, baseline, estimator, group, args.samples, args.microbatch)
    return PolicyGradient(masked, batches, baseline, estimator, group, args.microbatch)


def learn(args: Namespace, folder: RunFolder, group: ProcessGroup, signals: StopSignals, trackers: list[type]) -> None:
    """The run from its start, or from where it was stopped, to its results."""
    set_seed(args.seed, args.deterministic)
    saved = folder.newest_state()

    # text -> minibatches; m0 -> the masked model and the baseline
    inputs = setup.read_inputs(folder, group, **arguments_of(setup.read_inputs, args))
    folder.check_processes()
    batches, heldout = inputs.split(args.val_fraction)
    masked = setup.mask_model(inputs, batches, group, is_restored=bool(saved), **arguments_of(setup.mask_model, args))
    baseline = setup.make_baseline(inputs, masked, args.microbatch)
    validation = Validation(masked, heldout, group, args.microbatch)
    run = Run(folder, group, signals, validation, len(batches), width=1 if args.samples > 1 else group.size,
              **arguments_of(Run, args))
    learner = make_learner(args, masked, batches, baseline, group, run)
    if not run.restore(saved, masked=masked, learner=learner, validation=validation):
        setup.start(run, masked, validation, batches, group, args.init, args.logits)
    folder.check_disk(run.state_bytes() + results.most_bytes(masked, run.total_steps,
                                                             **arguments_of(results.most_bytes, args)))
    folder.start_trackers(trackers, run.step)
    if args.step == "compiled":
        group.log("the first steps compile the mask step for each shape of layer: half a minute or more, once")

    # the loop
    for _ in run.steps():
        result = learner.step(run.next_batches(), args.lr * lr_multiplier(args.schedule, run.progress))
        if not run.advance(result):  # clock, signals; a loss that is not finite is skipped
            continue
        if run.evaluation_due():
            run.log_evaluation(block_stats(masked), validation.evaluate(run.step))
        run.log(result)

    results.deliver(inputs, masked, validation, run, folder, group, **arguments_of(results.deliver, args))


def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(__doc__, argv)
    if args.resume and is_finished(args.resume):
        print(f"{args.resume} is finished: its mask is in {args.resume}/mask.safetensors")
        return
    trackers = tracking.chosen(args.tensorboard, args.wandb)
    group = ProcessGroup(args.device, args.timeout_s)
    arguments.check_processes(args, group.size)
    with (group, RunFolder(args.out, vars(args), group, bool(args.resume), args.repeat) as folder,
          StopSignals() as signals, group.reported()):
        learn(args, folder, group, signals, trackers)


if __name__ == "__main__":
    run_script(main)
