"""What every script shares: errors for people, flags, a progress bar, and how a script begins and
ends.

Nothing here imports torch, which takes seconds: a wrong flag is refused before.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

VERSION = "0.9.0"  # as in CITATION.cff
LINE_S = 30  # between two bars in a log
LLAMA2 = "meta-llama/Llama-2-7b-hf"  # the authors' defaults
C4 = "allenai/c4"
DTYPES = ("float16", "bfloat16", "float32")


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, no traceback."""


@contextmanager
def as_user_error(what: str | Path, advice: str, doubt: str = "") -> Iterator[None]:
    """Turn whatever reading raises into a UserError that begins with `what`: parsers share no class
    of error. doubt: goes on from `what` in errors that are none of ours."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):  # `run_script` has better advice
            raise
        reason = (
            getattr(error, "strerror", None)
            or f"{type(error).__name__}: {error.__cause__ or error}"
        )
        raise UserError(
            f"{what}{doubt} cannot be read ({' '.join(reason.split())[:300]}); {advice}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory is full or a CPU's. PyTorch has no class of error for the latter, nor
    for what Triton and cuBLAS need on a GPU."""
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(part in str(error) for part in said)
    )


def use_short_spins() -> None:
    """Have OpenMP's threads spin only briefly while they wait, on cores that another process may
    want. It costs nothing alone. Call it before torch is imported, which is when OpenMP reads
    these."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ.update(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")


def note(message: str) -> None:
    """Say something to stderr, once however many processes the launcher has started."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def begin_script(parse_args: Callable[[], argparse.Namespace]) -> None:
    """What a script does before it imports torch and transformers: it refuses a wrong command, and
    says that it has begun. From here on Ctrl-C is a line, not a traceback."""
    sys.excepthook = lambda kind, *rest: (
        print("interrupted", file=sys.stderr)
        if kind is KeyboardInterrupt
        else sys.__excepthook__(kind, *rest)
    )
    use_short_spins()
    run_script(parse_args)
    note("importing torch and transformers")


def run_script(main: Callable[[], object]) -> None:
    """Call a script's `main`; a mistake or full memory becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({' '.join(str(error).split())[:120]}); use a 16-bit --dtype "
            "or --logits_dtype, or --gradient_checkpointing, or lower --microbatch (which costs "
            "memory in sparsify.py), --batchsize, --tasks_batchsize, --nsamples or --seqlen, "
            "where the script has it",
            file=sys.stderr,
        )
        sys.exit(2)


def progress_bar(iterable: Iterable | None = None, **names) -> tqdm:
    """tqdm's bar; where it is no terminal that reads it, one every LINE_S, so that logs stay
    short."""
    if not sys.stderr.isatty():
        names |= {
            "mininterval": LINE_S,
            "maxinterval": LINE_S,
            "miniters": 1,
            "delay": LINE_S,
            "ncols": 100,
            "ascii": True,
        }
    return tqdm(iterable, **names)


# --------------------------------------------------------------------------------------------------
# flags


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command, and which flag may be meant by one that does
    not exist."""

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        near = (
            difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        )
        self.exit(
            2,
            f"error: {message}; "
            f"{f'is {near[0]} meant?' if near else '--help explains the flags'}\n",
        )


def script_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring, its manual, and every flag's default."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            if action.default is None or action.default is False or "default:" in action.help:
                return action.help
            return super()._get_help_string(action)

    parser = Parser(description=docstring, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"MaskPro {VERSION}")
    return parser


def sparsity_type(text: str) -> tuple[int, int]:
    """'N:M' -> (N, M) with 1 <= N < M <= 16; for argparse, so a bad one is a usage error."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) < int(match[2]) <= 16:
        raise argparse.ArgumentTypeError(f"'{text}' is not N:M with 1 <= N < M <= 16, such as 2:4")
    return int(match[1]), int(match[2])


def number(kind: type, lowest: float, highest: float = 2**63 - 1) -> Callable[[str], float]:
    """A type for argparse: int or float, of at least `lowest` and at most `highest`."""

    def parsed(text: str) -> float:
        with suppress(ValueError):
            if lowest <= (value := kind(text)) <= highest and (kind is float or text.isdigit()):
                return value
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a {whole}number of at least {lowest:g}, at most {highest:g}"
        )

    return parsed


# a token, and one to predict from it, at least
positive_int = number(int, 1)
sequence_length = number(int, 2)


def add_model_arguments(
    parser: argparse.ArgumentParser,
    model: str = LLAMA2,
    dtype: str | None = None,
    device: str | None = None,
    is_random: bool = True,
) -> None:
    """Which model, where, of what dtype: the parameters of `models.loading.load_model`, by default
    these; and the seed of a script that draws."""
    parser.add_argument("--model", default=model, help="Hugging Face causal LM: hub id or folder")
    parser.add_argument(
        "--dtype",
        default=dtype,
        choices=["auto", "checkpoint", *DTYPES],
        help="of the weights; auto: what the hardware is fast at; checkpoint: as they are stored"
        + ("" if dtype else " (default: auto on a CPU, float16 on a GPU)"),
    )
    parser.add_argument(
        "--device",
        default=device,
        help="cpu, cuda, cuda:1 ...; auto: spread layers over all GPUs"
        + ("" if device else " (default: cuda if there is one)"),
    )
    if is_random:
        parser.add_argument("--seed", type=number(int, 0), default=0, help="of every random choice")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the model brings or names"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The fixed list of minibatches that inference_loss.py and train.py must agree on, and how many
    sequences go through the model at once."""
    parser.add_argument(
        "--dataset",
        default=C4,
        help="training text: hub id, .json.gz, .jsonl, .parquet, .txt or a folder",
    )
    parser.add_argument(
        "--dataset_size", type=positive_int, default=512, help="training documents, a sequence each"
    )
    parser.add_argument(
        "--batchsize", type=positive_int, default=32, help="sequences in a minibatch"
    )
    parser.add_argument(
        "--seqlen", "--sqlen", type=sequence_length, default=128, help="tokens in a sequence"
    )
    parser.add_argument(
        "--microbatch", type=positive_int, default=32, help="sequences in one forward pass, at most"
    )
