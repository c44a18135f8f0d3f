"""Flags of train.py and sparsify.py, and the arguments of a run that goes on. Nothing here imports
torch."""

import argparse
import re
import shlex
from argparse import Namespace
from pathlib import Path

from files.records import read_record, short_hash
from utils import DTYPES, UserError, sparsity_type

# of a run that goes on
CHANGEABLE = ("device", "microbatch", "gradient_checkpointing", "checkpoint_every")


def interval(text: str) -> str:
    """'500', steps, or '10m', minutes: as it is, for argparse."""
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*|(?=.*[1-9])[0-9]+(\.[0-9]+)?m", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a number of steps, such as 500, nor of minutes, such as 10m"
        )
    return text


def add_mask_arguments(parser: argparse.ArgumentParser, mask_default: str | None) -> None:
    """Which mask is learned, and how its logits are kept."""
    parser.add_argument(
        "--sparsity_type", type=sparsity_type, default="2:4", help="N:M of the mask"
    )
    parser.add_argument("--mask", default=mask_default, help="m0: mask file or folder of .pt masks")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=None,
        help="learn these layers: parts of their names, or regular expressions; the others keep "
        "m0, or stay dense where it has none",
    )
    parser.add_argument(
        "--logits_dtype",
        choices=DTYPES,
        default="float32",
        help="of the logits; 16 bits halve their memory, and are rounded stochastically",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="share each layer's rows out to the processes that torchrun has started",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """A run's folder, and what is kept in it."""
    parser.add_argument(
        "--out", default=None, help="run folder, must be new (default: results/<settings>)"
    )
    parser.add_argument(
        "--resume", metavar="RUN", default=None, help="go on with a run that was stopped"
    )
    parser.add_argument(
        "--checkpoint_every",
        type=interval,
        default="10m",
        help="steps, as 500, or minutes, as 10m, between two states saved for --resume; minutes "
        "are stretched where saving would take more than 2%% of the run; the last state is always "
        "saved",
    )
    parser.add_argument(
        "--skip_checkpoint", action="store_true", help="write the mask but no sparse model"
    )


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> Namespace:
    """The arguments of a run; with --resume those that RUN has recorded. UserError for a flag
    beside --resume that says otherwise, but for CHANGEABLE ones. Without --out the folder is named
    by the model, the pattern, the method and a hash of all arguments."""
    args = parser.parse_args(argv)
    if not args.resume:
        if not args.model:
            parser.error("give --model, a hub id or a folder, or --resume")
        args.out = args.out or "results/{}_{}of{}_{}_{}".format(
            Path(args.model).name,
            *args.sparsity_type,
            getattr(args, "estimator", "sparsify"),
            short_hash(vars(args)),
        )
        return args
    run = str(Path(args.resume))
    record = read_record(args.resume)
    recorded = record["arguments"]
    if recorded.keys() | {"out", "resume"} != vars(args).keys():
        raise of_another_script(run, record, parser.prog)
    recorded["sparsity_type"] = tuple(recorded["sparsity_type"])
    # argparse leaves what is there where no flag says otherwise; trust is asked for anew
    args = parser.parse_args(argv, Namespace(**{**recorded, "trust_remote_code": False}))
    if args.dtype == "auto":  # the run has recorded what that was
        args.dtype = recorded["dtype"]
    if recorded["trust_remote_code"] and not args.trust_remote_code:
        raise UserError(
            f"{run} was started with --trust_remote_code: add the flag if you still trust its "
            "model's code"
        )
    changed = [
        f"--{name} {value} there, {getattr(args, name)} here"
        for name, value in recorded.items()
        if name not in CHANGEABLE and getattr(args, name) != value
    ]
    if changed:
        raise UserError(
            f"{run} goes on with its own settings, and these differ: {'; '.join(changed)}; leave "
            "them out, or start a new run"
        )
    args.out = args.resume = run
    return args


def of_another_script(run: str | Path, record: dict, here: str) -> UserError:
    """What to do with a run that another script has begun, or another version of this one, which is
    `here`."""
    script = record.get("script")
    place = shlex.quote(str(run))
    if script == here:
        return UserError(
            f"{run} is a run of another version of {script}: go on with it there, or start a new "
            "run"
        )
    then = (
        f"`python {script} --resume {place}` goes on with it" if script else "go on with it there"
    )
    return UserError(
        f"{run} is a run of {script or 'another version or script'}: {then}; or start a new run"
    )
