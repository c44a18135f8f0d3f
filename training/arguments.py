"""Flags that train.py and sparsify.py share, and the arguments of a resumed run. Nothing here
imports torch."""

import argparse
import re
import shlex
from argparse import Namespace
from pathlib import Path

from files.records import read_record, short_hash
from utils import DTYPES, UserError, sparsity_type

# flags that may change when a run is resumed
CHANGEABLE = ("device", "microbatch", "gradient_checkpointing", "checkpoint_every")


def interval(text: str) -> str:
    """Check '500' (steps) or '10m' (minutes) for argparse, and return it unchanged."""
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*|(?=.*[1-9])[0-9]+(\.[0-9]+)?m", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a number of steps, such as 500, nor a number of minutes, such "
            "as 10m"
        )
    return text


def add_mask_arguments(parser: argparse.ArgumentParser, mask_default: str | None) -> None:
    """Add the flags that say which mask is learned and how its logits are stored."""
    parser.add_argument(
        "--sparsity_type",
        type=sparsity_type,
        default="2:4",
        help="N:M: the mask keeps N of every M consecutive weights",
    )
    parser.add_argument(
        "--mask",
        default=mask_default,
        help="m0, the initial mask: a mask file or a folder of .pt masks"
        + ("" if mask_default else " (default: Wanda's mask)"),
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=None,
        help="layers to learn, as parts of their names or regular expressions; the others keep "
        "m0, or stay dense if m0 does not have them (default: all)",
    )
    parser.add_argument(
        "--logits_dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the logits; 16 bits halve their memory and are rounded stochastically",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="shard each layer's rows over the processes that torchrun started",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the run folder and for what is saved in it."""
    parser.add_argument(
        "--out",
        default=None,
        help="run folder; must not exist yet (default: a new one in results/)",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        default=None,
        help="resume a stopped run, from its folder",
    )
    parser.add_argument(
        "--checkpoint_every",
        type=interval,
        default="10m",
        help="interval between the states saved for --resume, in steps (500) or minutes (10m); "
        "minutes are stretched if saving would take more than 2%% of the run's time; the last "
        "state is always saved",
    )
    parser.add_argument(
        "--skip_checkpoint", action="store_true", help="write the mask but no sparse model"
    )


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> Namespace:
    """Parse the arguments of a run; with --resume, start from those recorded in RUN.

    Without --out, the folder is named after the model, the pattern, the method and a hash of all
    arguments. Raises UserError if a flag given with --resume differs from the recorded one and is
    not in CHANGEABLE.
    """
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
    # flags that are not given keep their recorded values, except --trust_remote_code
    args = parser.parse_args(argv, Namespace(**{**recorded, "trust_remote_code": False}))
    if args.dtype == "auto":  # the record has the dtype that it stood for
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
            f"{run} is resumed with its own settings, and these differ: {'; '.join(changed)}; "
            "leave them out, or start a new run"
        )
    args.out = args.resume = run
    return args


def of_another_script(run: str | Path, record: dict, this_script: str) -> UserError:
    """Return the UserError for resuming a run that another script, or another version of
    `this_script`, started."""
    script = record.get("script")
    path = shlex.quote(str(run))
    if script == this_script:
        return UserError(
            f"{run} is a run of another version of {script}: resume it there, or start a new run"
        )
    advice = f"resume it with `python {script} --resume {path}`" if script else "resume it there"
    return UserError(
        f"{run} is a run of {script or 'another version or script'}: {advice}, or start a new run"
    )
