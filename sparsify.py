"""From a dense model to an N:M-sparse one, in one command.

    python sparsify.py --model MODEL                                          # 300 steps; needs nothing else
    python sparsify.py --model MODEL --minutes 30 --after PASSAGES.jsonl      # the text that it writes continues these
    python sparsify.py --model MODEL --dataset text.jsonl questions.jsonl --sparsity_type 4:8
    python sparsify.py --resume results/RUN                                   # goes on with a run that was stopped

    text      --dataset, of which questions make a quarter at most; the model generates what is missing
              (models/generation.py), every document after one of the passages of --after
    m0        --mask, or Wanda's mask on the same text; with --permute, channels are reordered before
    swaps     weights of a block change places while a layer's output comes closer to the dense one (pruning/swaps.py)
    learning  gradients of backward passes move the logits; the weights stay frozen (training/straight_through.py)
    table     held-out perplexity of the dense model, m0 and the learned mask, on sequences that taught and selected
              nothing, of given and generated text as they were learned from (questions that are few may be in both)

The budget is a number of steps; --minutes measures this machine once and becomes steps (training/plan.py). So the same
flags, or a run that is resumed, give the same mask, whatever else the machine does.
Writes a new folder results/<run>/: mask.safetensors, checkpoint/ (a plain Hugging Face folder with zeros), report.json,
curve.png, metrics.jsonl (one line per step), run.json. Finished stages are skipped on --resume.
"""
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from files.records import GENERATED
from training.arguments import add_mask_arguments, add_run_arguments, parse
from utils import (
    UserError,
    add_model_arguments,
    begin_script,
    number,
    positive_int,
    progress_bar,
    run_script,
    script_parser,
    sequence_length,
)

EVALUATIONS = 10  # of the held-out loss, in a run
STEPS, STEP, LOGITS = 300, 0.8, 4.0  # --steps, --lr and --logits
GIVEN_SHARE, GENERATED_SHARE = 0.5, 1.0  # of --distill, of given text and of generated
PROMPT, SAMPLE = 16, 30  # tokens of held-out text, and of what the models make of them, in the report
WINDOW, WINDOWS = 512, 64  # tokens in one, at most, and how many, of --ppl


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser, model=None, dtype="auto")
    parser.add_argument("--dataset", nargs="+", default=None,
                        help="text to learn from: hub ids, .json.gz, .jsonl, .parquet, .txt, folders; also questions, "
                             "as eval.py's --task_file; if it is too short, the model generates the rest")
    parser.add_argument("--after", metavar="PASSAGES", default=None,
                        help="text of the kind that the model will meet: what it generates continues these")
    parser.add_argument("--seqlen", type=sequence_length, default=128, help="tokens in a sequence")
    parser.add_argument("--batchsize", type=positive_int, default=8, help="sequences in a step of each process")
    parser.add_argument("--microbatch", type=positive_int, default=32, help="sequences in one forward pass, at most")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=positive_int, default=None, help=f"of learning (default: {STEPS})")
    budget.add_argument("--minutes", type=number(float, 0.01), default=None,
                        help="for everything: an estimate, which becomes a number of steps at the start")
    add_mask_arguments(parser, mask_default=None)
    parser.add_argument("--permute", action="store_true", help="first reorder channels, so that masks keep more")
    parser.add_argument("--lr", type=number(float, 0), default=STEP,
                        help="size of the steps: how far, in logits, all of them would move a logit by pure noise")
    parser.add_argument("--logits", type=number(float, 0), default=LOGITS, help="C: scale of the first logits")
    parser.add_argument("--distill", type=number(float, 0, 1), default=None,
                        help="share of the loss that compares with the dense model's predictions, not with the text "
                             "(default: 1 on text that it generates, 0.5 on --dataset)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time a step")
    parser.add_argument("--ppl", nargs="+", default=[], metavar="TEXT",
                        help=f"further texts for the table, the first {WINDOWS} windows of {WINDOW} tokens: wikitext2, "
                             "c4 or files")
    add_run_arguments(parser)
    args = parse(parser, argv)
    if args.shard and not args.resume and not (args.dataset and args.mask and args.steps):
        parser.error("--shard needs --dataset, --mask and --steps: text and m0 are made, and speed is measured, in one "
                     "process that has the whole model")
    if len({Path(text).name for text in args.ppl}) < len(args.ppl):
        parser.error("--ppl: two texts have one name, which the table would show twice: rename one")
    if args.permute and args.mask:
        parser.error("--permute makes a mask of its own, for the order of channels that it finds: leave out --mask")
    if args.minutes is None and args.steps is None:
        args.steps = STEPS
    return args


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

import data
from evaluation.perplexity import evaluate_windows
from files.documents import check_paths
from files.mask_files import MaskFile, fingerprint
from masking.layers import learned_layers, note_sparse, read_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models import generation, processes
from models.layers import find_layers, layers_to_mask
from models.loading import Tokenizer, check_length, load_model, model_fingerprint, positions
from models.loss import check_tokens
from models.machine import DTYPES, set_seed
from models.sharded_files import load_sharded
from pruning.channel_order import check_reorderable
from pruning.channels import apply_permutation
from pruning.one_shot import OneShot, one_shot_masks
from training import initialize, preparation, report, results
from training import plan as plans
from training.launch import launch
from training.loop import Run
from training.run_folder import ORDER, RunFolder
from training.signals import StopSignals
from training.stages import Stages
from training.straight_through import StraightThrough, step_size
from training.validation import Validation

import torch
from torch import Tensor, nn


def load(args: Namespace, device: str | None) -> tuple[nn.Module, Tokenizer, MaskFile | None]:
    """The model, its tokenizer and the mask given, if one is; UserError where no mask can be learned of it as the flags
    ask."""
    read = load_sharded if args.shard and processes.size() > 1 else load_model
    model, tokenizer = read(args.model, args.dtype, device, args.trust_remote_code)
    if args.shard and model.dtype == torch.float16:
        raise UserError("--shard sums gradients over tokens, which overflows in float16: use --dtype bfloat16")
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


def planned(args: Namespace, model: nn.Module, tokenizer: Tokenizer) -> plans.Plan:
    """What the budget buys."""
    minibatch = args.batchsize * args.seqlen
    if args.steps:
        return plans.of_steps(args.steps, minibatch)
    processes.log("measuring this machine")
    seconds = plans.measured(model, tokenizer, args.sparsity_type, args.batchsize, args.seqlen, not args.shard)
    return plans.of_minutes(args.minutes, seconds, minibatch)


def prepare(args: Namespace, model: nn.Module, tokenizer: Tokenizer, folder: RunFolder,
            stages: Stages, mask: MaskFile | None) -> tuple[Tensor, Tensor, MaskFile]:
    """What is learned from: minibatches, int64 `[minibatches, sequences, tokens]`, their sequences' shares of
    distillation, `[minibatches, sequences]`, and m0, which is the mask given, if one is."""
    pattern, record = args.sparsity_type, folder.record
    if "steps" not in record.get("plan", {}):  # not there, or of an earlier version
        record["plan"] = vars(planned(args, model, tokenizer))
        folder.write_record()
    plan = record["plan"]

    def read(datasets: list[str], tokens: int) -> Tensor:
        return data.token_sequences(tokenizer, datasets, tokens, args.batchsize, args.seqlen, args.seed)

    given, generated = (GIVEN_SHARE, GENERATED_SHARE) if args.distill is None else (args.distill, args.distill)
    questions, others = preparation.given_texts(read, args.dataset or [], plan["tokens"], args.shard)
    texts, minibatch = [(text, given) for text in others], args.batchsize * args.seqlen
    missing = plan["tokens"] - sum(text.numel() for text in questions + others)
    if missing and not args.shard:
        file = folder.path / GENERATED
        wanted = min(missing, plan["generated"]) // minibatch * minibatch
        if "text" not in stages.done:
            with stages.stage("text", f"the model generates up to {wanted:,} tokens"):
                preparation.generate_text(file, model, tokenizer, wanted, args.seqlen, args.after, args.seed)
        texts.append((read([str(file)], wanted), generated))
    elif args.after:
        processes.log("note: no text is generated, so that none continues --after's passages")
    rest = sum(text.numel() for text, _ in texts)
    texts = [(preparation.at_most_a_quarter(text, rest), given) for text in questions] + texts
    minibatches, distill = preparation.mixed(texts, args.seed)
    check_tokens(model, minibatches)
    sequences = plans.split(minibatches)[0].flatten(0, 1)

    order, wanda = folder.path / ORDER, folder.path / "initial_mask.safetensors"
    if args.permute and "order" in stages.done:  # not: its file is there, which another process may just have written
        apply_permutation(model, order)
    elif args.permute:
        with stages.stage("order", "channels are reordered"):
            preparation.reorder_channels(order, model, args.model, args.targets, pattern, sequences, args.seed)
    if not (mask or ("m0" in stages.done and processes.agreed(float(wanda.exists())))):
        with stages.stage("m0", "Wanda's mask"):
            preparation.wanda_mask(wanda, model, args.model, args.targets, pattern, sequences)
    m0 = mask or read_masks(wanda, model, pattern)
    plan["learned_tokens"] = minibatches.numel()
    folder.check_inputs(model=model_fingerprint(model), mask=fingerprint(m0.masks), text=data.fingerprint(minibatches))
    return minibatches, distill, m0


def losses(masked: MaskedModel, tokenizer: Tokenizer, unseen: Tensor, texts: dict[str, Tensor]) -> dict[str, float]:
    """Text -> loss in nats of the mask in use: of held-out minibatches, and of the windows of further texts."""
    bos = data.added_bos(tokenizer)
    behind = "" if bos is None else " after BOS"
    found = {"held-out text": masked.mean_loss(unseen)}
    for name, windows in texts.items():
        found[f"{name}{behind}"] = evaluate_windows(masked.model, windows, bos)["nats"]
    return found


def learn(args: Namespace, device: str | None, folder: RunFolder, signals: StopSignals,
             learner_of: Callable = StraightThrough, start: Callable | None = None) -> None:
    """The run from its start, or from where it was stopped, to its results. Both functions are for rivals."""
    set_seed(args.seed)
    check_paths([args.mask], [args.after, *(args.dataset or []), *args.ppl])
    stages = Stages(folder)
    model, tokenizer, mask = load(args, device)
    window = min(WINDOW, positions(model))
    texts = {Path(text).name: data.perplexity_windows(tokenizer, text, window, WINDOWS)[0] for text in args.ppl}
    minibatches, distill, m0 = prepare(args, model, tokenizer, folder, stages, mask)
    batches, selecting, unseen = plans.split(minibatches)
    sample, prompt = folder.record.setdefault("sample", {}), unseen[0, 0, :PROMPT]
    if not (sample or args.shard):
        sample["prompt"] = tokenizer.decode(prompt, skip_special_tokens=True)
        sample["dense"] = generation.continuation(model, tokenizer, prompt, SAMPLE)
    masked = MaskedModel(model, m0.masks, LinearSpace(m0.n, m0.m), args.logits, DTYPES[args.logits_dtype],
                         learned_layers(model, m0, args.targets), args.seed, keep_dense=True,
                         microbatch=args.microbatch)
    learner = learner_of(masked, args.seqlen, args.gradient_checkpointing)
    validation = Validation(masked, selecting)
    nats = partial(losses, masked, tokenizer, unseen, texts)
    table, plan = folder.record.setdefault("nats", {}), folder.record["plan"]
    run = Run(folder, signals, validation, len(batches), plan["steps"], evaluations=EVALUATIONS)
    if not run.restore(masked=masked, learner=learner, validation=validation):
        with stages.stage("swaps", "the dense model and m0 are evaluated; then swaps improve m0"):
            with masked.use_dense():
                table["dense"] = nats()
                validation.dense_loss = masked.mean_loss(selecting)
            with masked.use_masks(masked.bits()):
                table["m0"] = nats()
            sequences = preparation.read_by_swaps(batches.flatten(0, 1), plan["tokens"])
            validation.evaluate(0)
            (start or initialize.from_swaps)(masked, args.logits, sequences, plan["sweeps"])
            folder.write_record()
            run.save()

    # the loop
    with stages.stage("learning", f"from {len(batches)} minibatches", run.position.seconds):
        for index in run.steps():
            size = step_size(args.lr, run.progress, run.total_steps)
            run.advance(learner.step(batches[index], size, distill[index].tolist()))

    with stages.stage("table", "the learned mask is evaluated and written"):
        with masked.use_masks(validation.bits):
            table["learned"] = nats()
        summary = results.deliver(run, m0, tokenizer, saves_logits=False, skips_checkpoint=args.skip_checkpoint,
                                  nats=table)
    if processes.is_main():  # the others have no summary
        if sample:
            sample["sparse"] = generation.continuation(model, tokenizer, prompt, SAMPLE)
        print(report.write(folder.path, folder.record, summary))
    folder.finish(summary)


def sparsify(model: nn.Module, tokenizer: Tokenizer, dataset: str, sparsity_type: tuple[int, int] = (2, 4),
             steps: int = STEPS, batchsize: int = 8, seqlen: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """For notebooks: learn a mask of a loaded, frozen causal LM, in the model's own dtype and on its device, with this
    script's defaults. The model is sparse when it returns.

        masks = sparsify(model, tokenizer, "text.jsonl")     # layer name -> bool [out, in], on the CPU
        files.mask_files.save("mask.safetensors", masks, 2, 4)

    dataset: a file, a folder or a hub id of text, of which (steps + 4 %) * batchsize * seqlen tokens are read at most.
    The command also generates text, resumes, uses several processes, measures and writes a checkpoint; this does not.
    """
    plan = plans.of_steps(steps, batchsize * seqlen)
    batches, selecting, _ = plans.split(
        data.token_sequences(tokenizer, [dataset], plan.tokens, batchsize, seqlen, seed))
    check_tokens(model, batches)
    model.requires_grad_(False).eval()
    layers, sequences = layers_to_mask(model, None, sparsity_type[1]), batches.flatten(0, 1)
    m0 = dict(one_shot_masks(model, layers, sequences[:preparation.SEQUENCES], OneShot("wanda", sparsity_type)))
    masked = MaskedModel(model, m0, LinearSpace(*sparsity_type), LOGITS, seed=seed, keep_dense=True)
    learner, validation = StraightThrough(masked, seqlen), Validation(masked, selecting)
    validation.evaluate(0)
    initialize.from_swaps(masked, LOGITS, preparation.read_by_swaps(sequences, plan.tokens), plan.sweeps)
    for step in progress_bar(range(steps), desc="learning", unit="step"):
        size = step_size(STEP, step / steps, steps)
        learner.step(batches[step % len(batches)], size, [GIVEN_SHARE] * batchsize)
        if EVALUATIONS * (step + 1) // steps > EVALUATIONS * step // steps:  # evenly spread over the run
            validation.evaluate(step + 1)
    return masked.finish(validation.bits)


def main(argv: list[str] | None = None) -> None:
    launch("sparsify.py", parse_args(argv), learn)


if __name__ == "__main__":
    run_script(main)
