"""train.py's arguments: what they are, presets of them, what they may not be together, and those a recorded run had."""
import argparse
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from utils import (
    DTYPES,
    UserError,
    add_data_arguments,
    add_model_arguments,
    add_old_name,
    finite,
    positive_float,
    positive_int,
    script_parser,
    sparsity_type,
)

from files.records import read_record
from masking.kernels import MODES
from masking.spaces import SPACES
from training.normalization import NORMALIZATIONS

PRESETS = {"fast": dict(estimator="straight_through", init="swaps", logits=4.0, distill=1.0, curvature=True, lr=0.8,
                        schedule="linear", tokens=400_000, batchsize=8, epoch=1, val_fraction=0.02, num_evals=10)}
INITS = ("mask", "scores", "swaps", "random")
ESTIMATORS = ("vanilla", "residual", "maskpro", "running", "straight_through")


def interval(text: str) -> str:
    """'500', steps, or '10m', minutes: as it is, for argparse."""
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*|(?=.*[1-9])[0-9]+(\.[0-9]+)?m", text):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of steps, such as 500, nor of minutes, such as "
                                         "10m")
    return text


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """All flags; the docstring is the script's manual."""
    parser = script_parser(docstring)
    add_model_arguments(parser)
    add_data_arguments(parser)
    _add_paper_arguments(parser.add_argument_group("the paper"))
    _add_further_arguments(parser.add_argument_group("beyond the paper"))
    _add_gradient_arguments(parser.add_argument_group("learning from gradients (--estimator straight_through)"))
    _add_machine_arguments(parser.add_argument_group("the machine"))
    _add_folder_arguments(parser.add_argument_group("the run's folder"))
    add_old_name(parser, "looks", "num_evals")
    return parser


def _add_paper_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lr", type=finite(0), default=50.0,
                       help="eta, in logits per nat of advantage; straight_through: the standard deviation, in logits, "
                            "of the random walk that gradients of mere noise would make over the run")
    group.add_argument("--logits", type=finite(0), default=10.0, help="C: initial logit of a kept weight (pruned: 0)")
    group.add_argument("--epoch", type=positive_int, default=10000, help="passes through the minibatches, at most")
    group.add_argument("--max_step", type=positive_int, default=10000, help="steps in all, at most")
    group.add_argument("--targets", nargs="+", default=None,
                       help="learn the layers whose names contain one of these; the others keep m0")
    group.add_argument("--sparsity_type", type=sparsity_type, default=(2, 4), help="N:M of the mask")
    group.add_argument("--mask", default="initial_mask.safetensors", help="m0: mask file or folder of .pt masks")
    group.add_argument("--estimator", choices=ESTIMATORS, default="maskpro",
                       help="the advantage: loss; loss - baseline; loss - baseline - delta; loss - the minibatch's own "
                            "running mean; or gradients instead")
    group.add_argument("--baseline", choices=["cached", "online"], default="cached",
                       help="f(m0): from inference_loss.py, or by a second forward each step")
    group.add_argument("--baseline_file", default=None, help="from inference_loss.py (default: named by the data)")
    group.add_argument("--alpha", type=float, default=0.99, help="decay of delta a step")


def _add_further_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--preset", choices=list(PRESETS), default=None, help="settings as one: " + "; ".join(
        name + " is " + " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in preset.items())
        for name, preset in PRESETS.items()))
    group.add_argument("--init", type=lambda text: "swaps" if text == "exchange" else text, choices=INITS,
                       default="mask", help="logits start at C * m0; at C * log of the weights' |w| ||x||, which makes "
                       "close calls the least certain; of m0 improved by swaps, as confident as the next swap is "
                       "costly (pruning/swaps.py); or at C * normal random numbers")
    group.add_argument("--space", choices=list(SPACES), default="linear",
                       help="linear: M logits a block (MaskPro); pattern: C(M,N) of them (MaskLLM)")
    group.add_argument("--debias_tracker", action="store_true", help="divide delta by 1 - alpha^t")
    group.add_argument("--normalize_advantage", action="store_true",
                       help="divide the advantage by its running root mean square; --lr is then in logits")
    group.add_argument("--schedule", choices=["constant", "linear", "cosine"], default="constant",
                       help="of --lr over the run; the decaying ones warm up for its first fiftieth")
    group.add_argument("--tokens", type=positive_int, default=None,
                       help="learn from so many tokens of running text, shuffled, instead of --dataset_size documents; "
                            "each sequence begins with the token that the tokenizer begins a text with, if any")
    group.add_argument("--val_fraction", type=float, default=0.0,
                       help="of the minibatches, held out to choose the best mask by (default: 0, the last mask)")
    group.add_argument("--num_evals", type=positive_int, default=20,
                       help="evaluations in a run, of its layers and of the held-out loss")
    group.add_argument("--samples", type=positive_int, default=1,
                       help="masks a step, all scored on its minibatch and shared out to the processes; with one mask "
                            "each process takes a minibatch of its own")
    group.add_argument("--max_minutes", type=positive_float, default=None,
                       help="end the loop and its schedule after so long; the mask then depends on the machine")


def _add_gradient_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--forward", choices=["mode", "sample", "soft"], default="mode",
                       help="take gradients at the most probable mask; at one drawn; or, in the first half of the run, "
                            "where weights count by their probabilities of being kept "
                            "(training/straight_through.py)")
    group.add_argument("--normalize_gradient", choices=list(NORMALIZATIONS), default="layer",
                       help="divide a step by the layer's root mean square, and clip it; or by each block's own, a "
                            "number a block more to keep (training/normalization.py)")
    group.add_argument("--distill", type=float, default=0.0,
                       help="the share, 0 to 1, of the loss that compares with the dense model's predictions instead "
                            "of the text; a fifth more time")
    group.add_argument("--curvature", action=argparse.BooleanOptionalAction, default=False,
                       help="in the second half of the run, add the loss's second order in each weight "
                            "(training/curvature.py); 2 to 4%% more time")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")


def _add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--shard", action="store_true",
                       help="share each layer's rows out to the processes, for a model that one device cannot hold: a "
                            "decoder layer is whole only while it computes")
    group.add_argument("--logits_dtype", choices=list(DTYPES), default="float32",
                       help="of the logits; 16 bits are rounded stochastically")
    group.add_argument("--step", choices=MODES, default="compiled",
                       help="the mask step: fused by torch.compile; fused, eager; exact: float64, slow")
    group.add_argument("--deterministic", action="store_true",
                       help="let a GPU use only algorithms that give the same bits every time, some of them slower")
    group.add_argument("--timeout_s", type=positive_float, default=600.0,
                       help="how long a process that does not answer is waited for, in seconds")


def _add_folder_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", default=None, help="run folder, must be new (default: results/<settings>)")
    group.add_argument("--resume", metavar="RUN", default=None, help="go on with a run that was stopped")
    group.add_argument("--repeat", metavar="RUN", default=None,
                       help="do a run again with its own settings, in the folder --out (default: RUN_repeat)")
    group.add_argument("--checkpoint_every", type=interval, default="10m",
                       help="steps, as 500, or minutes, as 10m, between two states saved for --resume; minutes are "
                            "stretched where saving would take more than 2%% of the run")
    group.add_argument("--keep_checkpoints", type=positive_int, default=2, help="states kept, the newest ones")
    group.add_argument("--save", action="store_true", help="save the logits too")
    group.add_argument("--skip_checkpoint", action="store_true", help="write the mask but no sparse model")
    group.add_argument("--tensorboard", action="store_true", help="log to tensorboard in the run folder too")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")


# ---------------------------------------------------------------------------------------------------------------------
# from a command line, or from a run's record

def parse(docstring: str, argv: list[str] | None = None, error: Callable[[str], NoReturn] | None = None) -> Namespace:
    """The arguments of a run; with --resume or --repeat those that RUN has recorded. `error(message)` is called in the
    parser's place where they are wrong."""
    parser = make_parser(docstring)
    parser.error = error or parser.error
    known = parser.parse_known_args(argv)[0]
    if known.resume and known.repeat:
        parser.error("--resume goes on with a run and --repeat does it again: give one of them")
    if known.resume or known.repeat:
        return _parse_again(docstring, argv, Path(known.resume or known.repeat), bool(known.resume))
    preset, given = PRESETS.get(known.preset, {}), _given_flags(docstring, argv)
    if "dataset_size" in given:  # documents instead of the preset's running text
        preset = {name: value for name, value in preset.items() if name != "tokens"}
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    _check(args, parser.error)
    args.out = args.out or default_folder(args)
    return args


def _check(args: Namespace, error: Callable[[str], NoReturn]) -> None:
    if not 0 <= args.alpha < 1:
        error(f"--alpha {args.alpha} is not in [0, 1)")
    if not 0 <= args.distill <= 1:
        error(f"--distill {args.distill} is not in [0, 1]")
    if not 0 <= args.val_fraction < 1:
        error(f"--val_fraction {args.val_fraction} is not in [0, 1)")
    if args.samples > 1 and args.estimator == "straight_through":
        error("--samples is for the forward-only estimators: straight_through takes one mask a step")
    if args.estimator != "straight_through":
        idle = [f"--{name}" for name in ("distill", "curvature", "gradient_checkpointing") if getattr(args, name)]
        idle += [f"--{name} {value}" for name, value, default in (
            ("forward", args.forward, "mode"), ("normalize_gradient", args.normalize_gradient, "layer"))
            if value != default]
        if idle:
            error(f"{', '.join(idle)}: only --estimator straight_through learns from gradients, {args.estimator} does "
                  "not; leave that out")
    if args.tokens and args.baseline == "cached" and args.estimator in ("residual", "maskpro"):
        error("--tokens makes minibatches that no cached baseline knows: add --baseline online, or choose "
              "--estimator running or straight_through")


def check_processes(args: Namespace, processes: int) -> None:
    """UserError for what may not be together in so many processes."""
    if args.samples > 1 and args.samples % processes:
        raise UserError(f"--samples {args.samples} cannot be split over {processes} processes: choose a multiple")
    if args.shard and (args.samples > 1 or args.init == "scores"):
        raise UserError("with --shard all processes have one mask at a time, and the dense model makes no pass before "
                        "it is masked: leave out --samples, and --init scores")
    if args.device_map and processes > 1:
        raise UserError("--device_map gives all GPUs to one process: leave it out, or start one process")


def default_folder(args: Namespace) -> str:
    """results/<settings>, as the authors name a run, after the preset or the estimator where it is not theirs."""
    kind = args.preset or (args.estimator if args.estimator != "maskpro" else "")
    text = f"tokens{args.tokens}" if args.tokens else f"size{args.dataset_size}"
    return f"results/{kind}{'_' if kind else ''}lr{args.lr:g}_epoch{args.epoch}_logits{args.logits:g}_{text}"


def _given_flags(docstring: str, argv: list[str] | None) -> dict:
    """The arguments that the command line itself gives."""
    parser = make_parser(docstring)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _parse_again(docstring: str, argv: list[str] | None, run: Path, resume: bool) -> Namespace:
    """The arguments that a run has recorded. UserError for a flag given besides that says otherwise."""
    given = _given_flags(docstring, argv)
    given.update({name: str(Path(given[name])) for name in ("out", "resume", "repeat") if name in given})
    record = read_record(run)

    def refuse(reason: str):
        raise UserError(f"{run / 'run.json'} is damaged or of another version ({reason}); start a new run")
    args = parse(docstring, _as_flags(make_parser(docstring), record["arguments"], refuse), refuse)
    args.out = str(run) if resume else given.get("out") or f"{run}_repeat"
    args.timeout_s = given.get("timeout_s", args.timeout_s)
    args.resume, args.repeat = (str(run), None) if resume else (None, str(run))
    if args.trust_remote_code and not given.get("trust_remote_code"):
        raise UserError(f"{run} was started with --trust_remote_code, which a file cannot give: add the flag if you "
                        "still trust the code that comes with the model")
    changed = [f"--{name} {_shown(getattr(args, name))} there, {_shown(value)} here" for name, value in given.items()
               if getattr(args, name) != value]
    if changed:
        verb = "goes on" if resume else "is repeated"
        raise UserError(f"{run} {verb} with its own settings, and these differ: {'; '.join(changed)}; leave them out, "
                        "or start a new run")
    return args


def _shown(value: object) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _as_flags(parser: argparse.ArgumentParser, arguments: dict, refuse: Callable[[str], NoReturn]) -> list[str]:
    """The command line that gives these arguments, as run.json holds them: what a file says is parsed and checked as
    what a user says. `refuse(reason)` where there is none."""
    flags = []
    known = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    for name, value in arguments.items():
        if name in ("out", "resume", "repeat") or value is None or value is False:
            continue
        if name not in known or name in ("help", "h", "-h"):
            refuse(f"there is no --{name[:40]}")
        if value is True:
            flags.append(f"--{name}")
        elif known[name].nargs == "+":
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, list):
            flags.append(f"--{name}={':'.join(map(str, value))}")
        else:
            flags.append(f"--{name}={value}")
    return flags + [f"--no-{name}" for name in known if f"no-{name}" in known and not arguments.get(name)]
