"""train.py's arguments: what they are, presets of them, and the ones a recorded run had."""
import argparse
import json
import re
from pathlib import Path

import pge
import step
from utils import (
    DTYPES,
    UserError,
    add_data_arguments,
    add_model_arguments,
    finite,
    positive_float,
    positive_int,
    script_parser,
    sparsity_type,
)

PRESETS = {"fast": dict(estimator="straight_through", init="exchange", logits=4.0, distill=1.0, lr=0.8,
                        schedule="linear", tokens=400_000, batchsize=8, epoch=1, val_fraction=0.02, looks=10)}


def interval(text: str) -> str:
    """'500', steps, or '10m', minutes: as it is, for argparse."""
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*|(?=.*[1-9])[0-9]+(\.[0-9]+)?m", text):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of steps, such as 500, nor of minutes, such as "
                                         "10m")
    return text


def make_parser(docstring: str) -> argparse.ArgumentParser:
    parser = script_parser(docstring)
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--lr", type=finite(0), default=50.0,
                        help="eta, in logits per nat of advantage; straight_through: how far, in logits, a run of "
                             "gradients that are mere noise moves one")
    parser.add_argument("--logits", type=finite(0), default=10.0, help="C: initial logit of a kept weight (pruned: 0)")
    parser.add_argument("--epoch", type=positive_int, default=10000, help="passes through the minibatches, at most")
    parser.add_argument("--max_step", type=positive_int, default=10000, help="steps in all, at most")
    parser.add_argument("--max_minutes", type=positive_float, default=None,
                        help="end the loop and its schedule after so long; the mask then depends on the machine")
    parser.add_argument("--targets", nargs="+", default=None,
                        help="learn the layers whose names contain one of these; the others keep m0")
    parser.add_argument("--sparsity_type", type=sparsity_type, default=(2, 4), help="N:M of the mask")
    parser.add_argument("--mask", default="initial_mask.safetensors", help="m0: mask file or folder of .pt masks")
    parser.add_argument("--init", choices=["mask", "scores", "exchange", "random"], default="mask",
                        help="logits start at C * m0; at C * log of the weights' |w| ||x||, which makes close calls "
                             "the least sure; as sure as exchanges are dear, of m0 bettered by them (exchange.py); or "
                             "at C * normal random numbers")
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
    parser.add_argument("--samples", type=positive_int, default=1,
                        help="masks a step, all scored on its minibatch and shared out to the processes; with one mask "
                             "each process takes a minibatch of its own")
    parser.add_argument("--shard", action="store_true",
                        help="share each learned layer's rows out to the processes, for a model that one device cannot "
                             "hold: a layer is whole only while it computes")
    parser.add_argument("--logits_dtype", choices=list(DTYPES), default="float32",
                        help="of the logits; 16 bits are rounded stochastically")
    parser.add_argument("--step", choices=step.MODES, default="compiled",
                        help="the mask step: fused by torch.compile; fused, eager; exact: float64, slow")
    parser.add_argument("--deterministic", action="store_true",
                        help="let a GPU use only algorithms that give the same bits every time, some of them slower")
    parser.add_argument("--checkpoint_every", type=interval, default="10m",
                        help="steps, as 500, or minutes, as 10m, between two states saved for --resume; minutes are "
                             "stretched where saving would take more than 2%% of the run")
    parser.add_argument("--keep_checkpoints", type=positive_int, default=2, help="states kept, the newest ones")
    parser.add_argument("--timeout_s", type=positive_float, default=600.0,
                        help="how long a process that does not answer is waited for, in seconds")
    parser.add_argument("--tensorboard", action="store_true", help="log to tensorboard in the run folder too")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    parser.add_argument("--save", action="store_true", help="save the logits too")
    parser.add_argument("--skip_checkpoint", action="store_true", help="write the mask but no sparse checkpoint")
    parser.add_argument("--out", default=None, help="run folder, must be new (default: results/<settings>)")
    parser.add_argument("--resume", metavar="RUN", default=None, help="go on with a run that was stopped")
    parser.add_argument("--repeat", metavar="RUN", default=None,
                        help="do a run again with its own settings, in the folder --out (default: RUN_repeat)")
    return parser


def parse(docstring: str, argv=None, error=None) -> argparse.Namespace:
    """The arguments of a run; with --resume or --repeat those that RUN has recorded. `error(message)` is called in the
    parser's place where they are wrong."""
    parser = make_parser(docstring)
    parser.error = error or parser.error
    first = parser.parse_known_args(argv)[0]
    if first.resume and first.repeat:
        parser.error("--resume goes on with a run and --repeat does it again: give one of them")
    if first.resume or first.repeat:
        return parse_again(docstring, argv, Path(first.resume or first.repeat), bool(first.resume))
    preset, given = PRESETS.get(first.preset, {}), given_flags(docstring, argv)
    if "dataset_size" in given:  # documents instead of the preset's running text
        preset = {name: value for name, value in preset.items() if name != "tokens"}
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    if not 0 <= args.alpha < 1:
        parser.error(f"--alpha {args.alpha} is not in [0, 1)")
    if not 0 <= args.distill <= 1:
        parser.error(f"--distill {args.distill} is not in [0, 1]")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction} is not in [0, 1)")
    if args.samples > 1 and args.estimator == "straight_through":
        parser.error("--samples is for the forward-only estimators: straight_through takes one mask a step")
    if args.tokens and args.baseline == "cached" and args.estimator in ("residual", "maskpro"):
        parser.error("--tokens makes minibatches that no cached baseline knows: add --baseline online, or choose "
                     "--estimator running or straight_through")
    return args


def given_flags(docstring: str, argv) -> dict:
    """The arguments that the command line itself gives."""
    parser = make_parser(docstring)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def parse_again(docstring: str, argv, run: Path, resume: bool) -> argparse.Namespace:
    """The arguments that a run has recorded. UserError for a flag given besides that says otherwise."""
    given = given_flags(docstring, argv)
    given.update({name: str(Path(given[name])) for name in ("out", "resume", "repeat") if name in given})
    record = read_record(run)

    def refuse(reason: str):
        raise UserError(f"{run / 'run.json'} is damaged or of another version ({reason}); start a new run")
    args = parse(docstring, as_flags(make_parser(docstring), record["arguments"], refuse), refuse)
    args.out = str(run) if resume else given.get("out") or f"{run}_repeat"
    args.resume, args.repeat = (str(run), None) if resume else (None, str(run))
    if args.trust_remote_code and not given.get("trust_remote_code"):
        raise UserError(f"{run} was started with --trust_remote_code, which a file cannot give: add the flag if you "
                        "still trust the code that comes with the model")
    changed = [f"--{name} {shown(getattr(args, name))} there, {shown(value)} here" for name, value in given.items()
               if getattr(args, name) != value]
    if changed:
        verb = "goes on" if resume else "is repeated"
        raise UserError(f"{run} {verb} with its own settings, and these differ: {'; '.join(changed)}; leave them out, "
                        "or start a new run")
    return args


def shown(value) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_record(run: Path) -> dict:
    """A run's run.json; UserError where there is none or it is damaged."""
    path = run / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
            raise ValueError("no arguments")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"{path} cannot be read ({reason}); give the folder of a run of train.py")
    return record


def as_flags(parser: argparse.ArgumentParser, arguments: dict, refuse) -> list[str]:
    """The command line that gives these arguments, as run.json holds them: what a file says is parsed and checked as
    what a user says. `refuse(reason)` where there is none."""
    flags, known = [], {action.dest: action for action in parser._actions}
    for name, value in arguments.items():
        if name in ("out", "resume", "repeat") or value is None or value is False:
            continue
        if name not in known or name == "help":
            refuse(f"there is no --{name[:40]}")
        if value is True:
            flags.append(f"--{name}")
        elif known[name].nargs == "+":
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, list):
            flags.append(f"--{name}={':'.join(map(str, value))}")
        else:
            flags.append(f"--{name}={value}")
    return flags
