"""Make a dense model N:M sparse in one command.

    # 300 steps; needs only the model
    python sparsify.py --model MODEL
    # about 30 minutes in all; the model generates text that continues these passages
    python sparsify.py --model MODEL --minutes 30 --after PASSAGES.jsonl
    python sparsify.py --model MODEL --dataset text.jsonl questions.jsonl --sparsity_type 4:8
    # resume a stopped run
    python sparsify.py --resume results/RUN

    text      --dataset, of which questions make at most a quarter; the model generates what is
              missing (models/generation.py), continuing the passages of --after, if given
    m0        --mask, or Wanda's mask on the same text; with --permute, channels are reordered
              first
    swaps     weights of a block swap places if that brings a layer's output closer to the dense one
              (pruning/swaps.py)
    learning  backward passes give gradients that move the logits; the weights stay frozen
              (training/straight_through.py)
    table     perplexity of the dense model, m0 and the learned mask on held-out sequences, which
              neither taught nor selected a mask; they mix given and generated text as the others
              do (if there are few questions, one may be in both)

The budget is a number of steps; --minutes measures this machine once and becomes steps
(training/plan.py). So the same flags give the same mask, also if a run is resumed, whatever else
the machine does. Writes a new folder results/<run>/: mask.safetensors, checkpoint/ (a plain Hugging
Face folder with zeros), report.json, curve.png, metrics.jsonl (one line per step), run.json.
Finished stages are skipped on --resume.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from files.records import GENERATED
from training import defaults
from training.arguments import add_mask_arguments, add_run_arguments, parse
from utils import (
    UserError,
    add_model_arguments,
    begin_script,
    number,
    positive_int,
    run_script,
    script_parser,
    sequence_length,
)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser, model=None, dtype="auto")
    budget = parser.add_mutually_exclusive_group()
    # fmt: off
    budget.add_argument("--steps", type=positive_int, default=None,
                        help=f"learning steps (default: {defaults.STEPS})")
    budget.add_argument("--minutes", type=number(float, 0.01), default=None,
                        help="estimated minutes of the whole run; turned into a number of steps "
                             "at the start")
    parser.add_argument("--dataset", nargs="+", default=None,
                        help="text to learn from: hub ids, .json.gz, .jsonl, .parquet or .txt "
                             "files, folders; also questions, as in eval.py's --task_file; the "
                             "model generates what is missing, or all if this is left out")
    parser.add_argument("--after", metavar="PASSAGES", default=None,
                        help="text like that on which the model will be used: what it generates "
                             "continues passages of this text")
    parser.add_argument("--seqlen", type=sequence_length, default=128, help="tokens per sequence")
    parser.add_argument("--batchsize", type=positive_int, default=8,
                        help="sequences per step and process")
    parser.add_argument("--microbatch", type=positive_int, default=32,
                        help="sequences per forward pass, at most")
    add_mask_arguments(parser, mask_default=None)
    parser.add_argument("--permute", action="store_true",
                        help="reorder channels first, so that masks can keep more of the "
                             "important weights")
    parser.add_argument("--step_size", "--lr", type=number(float, 0), default=defaults.STEP_SIZE,
                        help="total movement of a logit under pure-noise gradients (standard "
                             "deviation, in logits)")
    parser.add_argument("--logits", type=number(float, 0), default=defaults.LOGITS,
                        help="C: scale of the initial logits")
    parser.add_argument("--distill", type=number(float, 0, 1), default=None,
                        help="share of the loss that compares with the dense model's predictions "
                             "instead of the text (default: 1 on generated text, 0.5 on "
                             "--dataset)")
    parser.add_argument("--gradient_checkpointing", action="store_true",
                        help="use less memory, at a third more time per step")
    parser.add_argument("--ppl", nargs="+", default=[], metavar="TEXT",
                        help=f"more texts for the table: wikitext2, c4 or files; the first "
                             f"{defaults.WINDOWS} windows of {defaults.WINDOW} tokens are used")
    # fmt: on
    add_run_arguments(parser)
    args = parse(parser, argv)
    if args.shard and not args.resume and not (args.dataset and args.mask and args.steps):
        parser.error(
            "--shard needs --dataset, --mask and --steps: only a process with the whole model can "
            "generate text, make m0 and measure its speed"
        )
    if len({Path(text).name for text in args.ppl}) < len(args.ppl):
        parser.error("--ppl: two texts have the same name in the table: rename one")
    if args.permute and args.mask:
        parser.error(
            "--permute makes its own m0, for the channel order that it finds: leave out --mask"
        )
    if args.minutes is None and args.steps is None:
        args.steps = defaults.STEPS
    return args


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

import data
from files.documents import check_paths
from files.mask_files import MaskFile, fingerprint
from masking.layers import learned_layers, note_sparse, read_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models import processes
from models.layers import find_layers, layers_to_mask
from models.loading import Tokenizer, check_length, load_model, model_fingerprint
from models.loss import check_tokens
from models.machine import DTYPES, set_seed
from models.sharded_files import load_sharded
from pruning.channel_order import check_reorderable
from pruning.channels import apply_permutation
from training import initialize, preparation, report, results
from training import plan as plans
from training.launch import launch
from training.loop import Run
from training.notebook import sparsify  # noqa: F401, for `from sparsify import sparsify`
from training.run_folder import ORDER, RunFolder
from training.signals import StopSignals
from training.stages import Stages
from training.straight_through import StraightThrough, soft_temperature, step_size
from training.table import Table, read_windows
from training.validation import Validation

import torch
from torch import Tensor, nn


def load(args: Namespace, device: str | None) -> tuple[nn.Module, Tokenizer, MaskFile | None]:
    """Load the model, its tokenizer and the mask of --mask (None if not given). Raises UserError if
    the flags ask for a mask that cannot be learned on this model."""
    read = load_sharded if args.shard and processes.world_size() > 1 else load_model
    model, tokenizer = read(args.model, args.dtype, device, args.trust_remote_code)
    if args.shard and model.dtype == torch.float16:
        raise UserError(
            "--shard sums gradients over tokens, which overflows in float16: use --dtype bfloat16"
        )
    check_length(model, args.seqlen)
    mask = read_masks(args.mask, model, args.sparsity_type) if args.mask else None
    if mask:
        learned_layers(model, mask, args.targets)
    else:
        layers_to_mask(model, args.targets, args.sparsity_type[1])
        if args.permute:
            check_reorderable(model)
    note_sparse(find_layers(model, args.targets))
    return model, tokenizer, mask


def given_texts(
    args: Namespace, tokenizer: Tokenizer, tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Read up to `tokens` tokens of --dataset. Returns the minibatches of its questions and those
    of its other text, as lists of none or one."""

    def read(datasets: list[str], tokens: int) -> Tensor:
        return data.token_sequences(
            tokenizer, datasets, tokens, args.batchsize, args.seqlen, args.seed
        )

    return preparation.given_texts(read, args.dataset or [], tokens, args.shard)


def planned(
    args: Namespace, model: nn.Module, tokenizer: Tokenizer, read_given: Callable
) -> plans.Plan:
    """Return the plan for the budget. With --minutes, time for generating text is set aside if
    --dataset does not suffice. read_given: reads `given_texts` for a number of tokens."""
    minibatch = args.batchsize * args.seqlen
    if args.steps:
        return plans.of_steps(args.steps, minibatch)
    processes.log("measuring this machine")
    sizes = args.sparsity_type, args.batchsize, args.seqlen, args.microbatch
    seconds = plans.measured(model, *sizes, args.gradient_checkpointing)
    plan = plans.of_minutes(args.minutes, seconds, minibatch)
    questions, others = read_given(plan.tokens)
    available = sum(text.numel() for text in questions + others)
    if available < plan.tokens and not args.shard:
        seconds["token"] = plans.token_s(model, tokenizer)
        plan = plans.of_minutes(args.minutes, seconds, minibatch)
    processes.log(plans.in_words(plan, seconds))
    return plan


def read_text(
    args: Namespace, model: nn.Module, tokenizer: Tokenizer, read_given: Callable, stages: Stages
) -> tuple[Tensor, Tensor]:
    """Return the text to learn from: minibatches, int64 `[minibatches, sequences, tokens]`, and
    each sequence's share of distillation, `[minibatches, sequences]`. The model generates what is
    missing. read_given: reads `given_texts` for a number of tokens."""
    folder = stages.folder
    plan = folder.record["plan"]
    given_share = defaults.GIVEN_SHARE if args.distill is None else args.distill
    generated_share = defaults.GENERATED_SHARE if args.distill is None else args.distill
    questions, others = read_given(plan["tokens"])
    texts = [(text, given_share) for text in others]
    missing = plan["tokens"] - sum(text.numel() for text in questions + others)
    if missing and not args.shard:
        file = folder.path / GENERATED
        minibatch = args.batchsize * args.seqlen
        wanted = min(missing, plan["generated"]) // minibatch * minibatch
        if "text" not in stages.done:
            with stages.stage("text", f"generating up to {wanted:,} tokens"):
                preparation.generate_text(
                    file, model, tokenizer, wanted, args.seqlen, args.after, args.seed
                )
        text = data.token_sequences(
            tokenizer, [str(file)], wanted, args.batchsize, args.seqlen, args.seed
        )
        texts.append((text, generated_share))
    elif args.after:
        processes.log("note: no text is generated, so --after is not used")
    other_tokens = sum(text.numel() for text, _ in texts)
    questions = [preparation.at_most_a_quarter(text, other_tokens) for text in questions]
    texts = [(text, given_share) for text in questions] + texts
    minibatches, distill = preparation.mixed(texts, args.seed)
    check_tokens(model, minibatches)
    return minibatches, distill


def first_mask(args: Namespace, model: nn.Module, stages: Stages, sequences: Tensor) -> MaskFile:
    """Return m0: Wanda's mask, measured on int64 `[sequences, tokens]`. With --permute, channels
    are reordered first."""
    layers = args.model, args.targets, args.sparsity_type
    order_file = stages.folder.path / ORDER
    wanda_file = stages.folder.path / "initial_mask.safetensors"
    if args.permute and "order" in stages.done:  # order_file.exists() may differ by process
        apply_permutation(model, order_file)
    elif args.permute:
        with stages.stage("order", "reordering channels"):
            preparation.reorder_channels(order_file, model, *layers, sequences, args.seed)
    if not ("m0" in stages.done and processes.broadcast_float(float(wanda_file.exists()))):
        with stages.stage("m0", "Wanda's mask"):
            preparation.wanda_mask(wanda_file, model, *layers, sequences)
    return read_masks(wanda_file, model, args.sparsity_type)


def masked_model(args: Namespace, model: nn.Module, m0: MaskFile) -> MaskedModel:
    """Put the model under m0."""
    learned = learned_layers(model, m0, args.targets)
    # fmt: off
    return MaskedModel(model, m0.masks, LinearSpace(m0.n, m0.m), args.logits,
                       DTYPES[args.logits_dtype], learned, args.seed, keep_dense=True,
                       microbatch=args.microbatch)
    # fmt: on


def improve_m0(
    args: Namespace, table: Table, validation: Validation, batches: Tensor, start: Callable
) -> None:
    """Evaluate the dense model and m0; then improve m0 by swaps and set the logits accordingly."""
    masked = validation.masked
    plan = table.folder.record["plan"]
    with masked.use_dense():
        table.add("dense", masked)
        validation.dense_loss = masked.mean_loss(validation.heldout)
    with masked.use_masks(masked.bits()):
        table.add("m0", masked)
    validation.evaluate(0)
    sequences = preparation.read_by_swaps(batches.flatten(0, 1), plan["tokens"])
    start(masked, args.logits, sequences, plan["sweeps"])


def learn(
    args: Namespace,
    device: str | None,
    folder: RunFolder,
    signals: StopSignals,
    learner_of: Callable = StraightThrough,
    start: Callable | None = None,
) -> None:
    """Do the run, from its start or from where it was stopped, up to its results. learner_of makes
    the learner and start sets the first logits; other methods pass their own."""
    set_seed(args.seed)
    check_paths([args.mask], [args.after, *(args.dataset or []), *args.ppl])
    stages = Stages(folder)

    # read the text and m0
    model, tokenizer, mask = load(args, device)
    windows = read_windows(model, tokenizer, args.ppl)
    # cached, as `planned` may read the same text
    read_given = lru_cache(1)(partial(given_texts, args, tokenizer))
    if "steps" not in folder.record.get("plan", {}):  # none yet, or one of an earlier version
        folder.note(plan=vars(planned(args, model, tokenizer, read_given)))
    minibatches, distill = read_text(args, model, tokenizer, read_given, stages)
    batches, selecting, unseen = plans.split(minibatches)
    m0 = mask or first_mask(args, model, stages, batches.flatten(0, 1))
    text = data.fingerprint(minibatches)
    folder.check_inputs(model=model_fingerprint(model), mask=fingerprint(m0.masks), text=text)
    folder.note(plan={**folder.record["plan"], "learned_tokens": minibatches.numel()})
    table = Table(folder, tokenizer, unseen, windows)
    if not args.shard:
        table.write("dense", model)
    masked = masked_model(args, model, m0)
    learner = learner_of(masked, args.seqlen, args.gradient_checkpointing)
    validation = Validation(learner, selecting)
    steps = folder.record["plan"]["steps"]
    run = Run(folder, signals, validation, len(batches), steps, evaluations=defaults.EVALUATIONS)
    if not run.restore(masked=masked, learner=learner, validation=validation):
        with stages.stage("swaps", "evaluating the dense model and m0, then improving m0 by swaps"):
            improve_m0(args, table, validation, batches, start or initialize.from_swaps)
            run.save()

    # the loop
    with stages.stage("learning", f"from {len(batches)} minibatches", run.progress.seconds):
        for index in run.steps():
            size = step_size(args.step_size, run.share_done, run.total_steps)
            temperature = soft_temperature(run.share_done)
            run.advance(learner.step(batches[index], size, distill[index].tolist(), temperature))

    with stages.stage("table", "evaluating and writing the learned mask"):
        with masked.use_masks(validation.bits):
            table.add("learned", masked)
        summary = results.deliver(run, m0, tokenizer, False, args.skip_checkpoint)
    if processes.is_main():  # the others have no summary
        if not args.shard:
            table.write("sparse", model)
        print(report.write(folder.path, folder.record, summary))
    folder.finish(summary)


def main(argv: list[str] | None = None) -> None:
    launch("sparsify.py", parse_args(argv), learn)


if __name__ == "__main__":
    run_script(main)
