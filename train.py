"""Learn an N:M mask of a frozen model by policy gradient, from forward passes only (MaskPro, arXiv
2506.12876).

    python train.py --dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625
    # if a start at 10 * m0 learns slowly
    python train.py --model MODEL --dataset text.jsonl --init scores --logits 4 --lr 1
    # without inference_loss.py
    python train.py --model MODEL --dataset text.jsonl --baseline online
    # without any sparse model
    python train.py --model MODEL --dataset text.jsonl --init random --baseline online
    # continue a run that was stopped
    python train.py --resume results/RUN
    # R processes, each with its own minibatch under the same mask
    torchrun --nproc_per_node R train.py ...

A run needs the initial mask m0 (get_mask.py) and, with --baseline cached, its losses
(inference_loss.py). With --init random, m0 is the most probable mask of random logits, and neither
file is needed. A run writes a new folder results/<run>/: mask.safetensors, checkpoint/ (a plain
Hugging Face folder with zeros), metrics.jsonl (one line per step), curve.png, run.json.

The first mask is m0 itself; the final mask keeps the N largest logits of each block. With
--val_fraction, the final mask is the one that does best on held-out text. Masks with less of the
prior C * m0 in the logits are tried there, too. With --resume, a run that was stopped continues to
the same bits.
"""

from argparse import Namespace
from math import comb
from statistics import fmean

from training.arguments import add_mask_arguments, add_run_arguments, parse
from utils import (
    UserError,
    add_data_arguments,
    add_model_arguments,
    begin_script,
    number,
    positive_int,
    run_script,
    script_parser,
)

MOST_KEPT = 8  # largest N: the exact score sums over 2^N subsets of a block
MOST_LOGITS = 128  # per block with --space pattern; 4:8 has 70 patterns


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    add_data_arguments(parser)
    # fmt: off
    parser.add_argument("--lr", type=number(float, 0), default=50.0,
                        help="learning rate eta, in logits per nat of advantage")
    parser.add_argument("--logits", type=number(float, 0), default=10.0,
                        help="C, the initial logit of kept weights; that of pruned ones is 0")
    parser.add_argument("--epoch", type=positive_int, default=10000,
                        help="most passes through the minibatches")
    parser.add_argument("--max_step", type=positive_int, default=10000,
                        help="most steps in all")
    parser.add_argument("--estimator", choices=["vanilla", "residual", "maskpro"],
                        default="maskpro",
                        help="the advantage: loss; loss - baseline; loss - baseline - delta")
    parser.add_argument("--baseline", default="cached", metavar="{cached,online,FILE}",
                        help="f(m0 * w): from inference_loss.py's file of the default name "
                             "(cached), from such a FILE, or by a second forward pass in each step "
                             "of the first epoch (online)")
    parser.add_argument("--alpha", type=number(float, 0, 0.99999), default=0.99,
                        help="decay of delta per step")
    parser.add_argument("--debias_tracker", action="store_true",
                        help="divide delta by 1 - alpha^t")
    parser.add_argument("--init", choices=["mask", "scores", "random"], default="mask",
                        help="mask: logits start at C * m0; scores: they follow Wanda's scores "
                             "|w| ||x||, so that close scores give close logits; random: they are "
                             "C times normal random numbers, and m0 is their most probable mask "
                             "(needs no --mask, but more steps)")
    parser.add_argument("--space", choices=["linear", "pattern"], default="linear",
                        help="linear: M logits per block (MaskPro); pattern: C(M,N) logits per "
                             "block (MaskLLM)")
    parser.add_argument("--val_fraction", type=number(float, 0, 0.99999), default=0.0,
                        help="fraction of the minibatches held out to select the final mask, and "
                             "how much of the prior C * m0 its logits keep (default: 0, which "
                             "takes the last mask)")
    parser.add_argument("--save", action="store_true", help="also save the logits")
    # fmt: on
    add_mask_arguments(parser, "initial_mask.safetensors")
    add_run_arguments(parser)
    return checked(parse(parser, argv), parser.get_default("mask"))


def checked(args: Namespace, default_mask: str) -> Namespace:
    """Return the arguments of a run. Raises UserError if they do not go together."""
    if args.init == "random":
        if args.mask not in (None, default_mask):
            raise UserError("--init random draws its own m0: leave out --mask")
        if args.baseline != "online" and args.estimator != "vanilla":
            raise UserError(
                "--init random draws m0 when the run starts, so no file has its losses: add "
                "--baseline online"
            )
        args.mask = None
    n, m = args.sparsity_type
    if args.space == "linear" and n > MOST_KEPT:
        raise UserError(
            f"the score of {n}:{m} is a sum over 2^{n} subsets of each block: N is at most "
            f"{MOST_KEPT} in train.py; sparsify.py has no such limit"
        )
    if args.space == "pattern" and comb(m, n) > MOST_LOGITS:
        raise UserError(
            f"--space pattern would keep {comb(m, n)} logits per block of {n}:{m}; use --space "
            f"linear, which keeps {m}"
        )
    return args


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

import data
import pge
from files.documents import check_paths
from files.mask_files import MaskFile
from masking.layers import learned_layers, note_sparse, read_masks
from masking.masked_model import MaskedModel
from masking.spaces import SPACES, Space
from models import processes
from models.layers import find_layers
from models.loading import check_length, load_model, positions
from models.machine import DTYPES, set_seed
from models.sharded_files import load_sharded
from training import baselines, initialize, report, results
from training.launch import launch
from training.learner import Learner
from training.loop import Run, StepResult
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.validation import Validation, hold_out

from torch import Tensor, nn


class PolicyGradient(Learner):
    """MaskPro (section 4 of the paper): the logits move by the loss residual against m0, less its
    moving average.

        A  = f(m_t * w, batch) - f(m0 * w, batch) - delta         the tracker delta: `pge.Estimator`
        pi <- pi - lr * A * grad log p(m_t | pi)                  the score: `pge.score`
        m_{t+1} ~ p(pi)                                           N draws without replacement:
                                                                  `pge.sample`

    These references are the plain mathematics; `fused_update` of masking/fused_kernels.py does the
    same in one pass. batches: int64 `[minibatches, sequences, tokens]`; baseline: minibatch number
    -> f(m0 * w, batch), or None if the estimator needs none.
    """

    def __init__(
        self,
        masked: MaskedModel,
        batches: Tensor,
        baseline: baselines.Baseline,
        estimator: pge.Estimator,
    ):
        super().__init__(masked)
        self.batches = batches
        self.baseline = baseline
        self.estimator = estimator

    def step(self, index: int, lr: float) -> StepResult:
        """Do one step: each process takes its own minibatch, and all use the same mask. lr: eta."""
        losses = [self.masked.loss(self.batches[index])]  # f_t = f(m_t * w, batch)
        if self.baseline:
            losses.append(self.baseline[index])  # f(m0 * w, batch)
        means = [fmean(values) for values in zip(*processes.all_gather(losses))]
        result = StepResult(*means)  # over the processes
        if not result.is_finite:
            self.masked.update(0.0)  # another mask may do better
            return result
        # the advantage A, and then pi -= lr A score(m_t), m_{t+1} ~ p(pi), in the next forward
        result.advantage = self.estimator.advantage(result.loss, result.baseline)
        result.delta = self.estimator.delta
        self.masked.update(lr * result.advantage)
        return result


def first_mask(args: Namespace, model: nn.Module, space: Space) -> MaskFile:
    """Return m0: the mask of --mask, or with --init random the most probable one of random
    logits."""
    if args.init == "random":
        return initialize.random_mask(
            model, args.model, args.targets, space, args.logits, args.seed
        )
    return read_masks(args.mask, model, args.sparsity_type)


def learn(args: Namespace, device: str | None, folder: RunFolder, signals: StopSignals) -> None:
    """Do a run from its start, or from where it was stopped, to its results."""
    set_seed(args.seed, deterministic=True)
    check_paths([args.mask], [args.dataset])
    estimator = pge.Estimator(args.estimator, args.alpha, args.debias_tracker)
    size = args.dataset_size, args.batchsize, args.seqlen
    file = None
    if estimator.needs_baseline and args.baseline != "online":
        file = baselines.find(args.baseline, *size)

    # text -> minibatches; m0 -> the masked model and the baseline
    load = load_sharded if args.shard and processes.world_size() > 1 else load_model
    model, tokenizer = load(args.model, args.dtype, device, args.trust_remote_code)
    check_length(model, args.seqlen)
    note_sparse(find_layers(model, args.targets))
    space = SPACES[args.space](*args.sparsity_type)
    m0 = first_mask(args, model, space)
    learned = learned_layers(model, m0, args.targets)
    minibatches = data.minibatches(tokenizer, args.dataset, *size)
    depends_on = baselines.conditions(model, m0.masks, minibatches)
    folder.check_inputs(
        model=depends_on["model"], mask=depends_on["mask"], text=depends_on["tokens"]
    )
    baseline = baselines.load(file, depends_on) if file else None
    batches, heldout = hold_out(minibatches, args.val_fraction)
    # fmt: off
    masked = MaskedModel(model, m0.masks, space, args.logits, DTYPES[args.logits_dtype],
                         learned, args.seed, keep_dense=args.init == "scores",
                         microbatch=args.microbatch)
    # fmt: on
    if estimator.needs_baseline and baseline is None:
        baseline = baselines.OnlineBaseline(masked, batches)

    learner = PolicyGradient(masked, batches, baseline, estimator)
    validation = Validation(learner, heldout)
    run = Run(folder, signals, validation, len(batches), args.max_step, args.epoch)
    if not run.restore(masked=masked, estimator=estimator, validation=validation):
        if args.init == "scores":
            initialize.from_scores(masked, args.logits, batches.flatten(0, 1))
        if args.init == "random":
            initialize.from_random(masked, args.logits, args.seed)
        validation.evaluate(0)

    # the loop
    for index in run.steps():
        run.advance(learner.step(index, args.lr))
    if args.init != "random":  # random logits hold no prior for m0
        validation.weaken_prior(m0.masks, args.logits, run.step)

    summary = results.deliver(run, m0, tokenizer, args.save, args.skip_checkpoint)
    folder.finish(summary)
    if processes.is_main():  # the others have no summary
        print(report.in_words(summary, folder.path, args.model, args.dataset, positions(model)))


def main(argv: list[str] | None = None) -> None:
    launch("train.py", parse_args(argv), learn)


if __name__ == "__main__":
    run_script(main)
