"""Shared by all scripts: user errors, flags, a progress bar, and how a script starts and ends.

Nothing here imports torch, which takes seconds, so a wrong flag is refused at once.
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

VERSION = "0.9.0"  # the same as in CITATION.cff
LINE_S = 30  # seconds between two progress lines in a log
LLAMA2 = "meta-llama/Llama-2-7b-hf"  # the authors' defaults
C4 = "allenai/c4"
DTYPES = ("float16", "bfloat16", "float32")


class UserError(Exception):
    """A mistake that the user can correct: printed as one line, with exit code 2 and no
    traceback."""


@contextmanager
def as_user_error(what: str | Path, advice: str, doubt: str = "") -> Iterator[None]:
    """Turn any exception of the block into a UserError that begins with `what`; parsers share no
    class of error. doubt: follows `what` unless the exception is a UserError already."""
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
    """Return whether a GPU's or a CPU's memory is full. PyTorch has no exception class for a full
    CPU memory, nor for failed allocations of Triton and cuBLAS on a GPU."""
    phrases = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(phrase in str(error) for phrase in phrases)
    )


def use_short_spins() -> None:
    """Make OpenMP's threads spin only briefly while they wait, as another process may want the
    cores. This costs nothing if there is none. Call it before torch is imported, when OpenMP reads
    these variables."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ.update(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")


def note(message: str) -> None:
    """Print a message to stderr, once for all processes of a launcher."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def begin_script(
    parse_args: Callable[[], argparse.Namespace], imports: str = "torch and transformers"
) -> None:
    """Check the command line and announce the imports, before they take seconds. From here on
    Ctrl-C prints one line instead of a traceback."""
    sys.excepthook = lambda kind, *rest: (
        print("interrupted", file=sys.stderr)
        if kind is KeyboardInterrupt
        else sys.__excepthook__(kind, *rest)
    )
    use_short_spins()
    run_script(parse_args)
    note(f"importing {imports}")


def run_script(main: Callable[[], object]) -> None:
    """Call a script's `main`; a UserError or full memory becomes one line and exit code 2."""
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
            "or --logits_dtype, or --gradient_checkpointing, or lower --batchsize, --seqlen, "
            "--nsamples, --tasks_batchsize or --microbatch (which costs memory in sparsify.py), "
            "if the script has the flag",
            file=sys.stderr,
        )
        sys.exit(2)


def progress_bar(iterable: Iterable | None = None, **names) -> tqdm:
    """Return tqdm's bar; if stderr is not a terminal, a line at most every LINE_S seconds, so that
    logs stay short."""
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
    """A parser that reports errors in one line, and suggests an existing flag for an unknown
    one."""

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        matches = (
            difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        )
        self.exit(
            2,
            f"error: {message}; "
            f"{f'did you mean {matches[0]}?' if matches else '--help explains the flags'}\n",
        )


def script_parser(docstring: str) -> argparse.ArgumentParser:
    """Return a parser whose --help shows the script's docstring, as its manual, and every flag's
    default."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            if action.default is None or action.default is False or "default:" in action.help:
                return action.help
            return super()._get_help_string(action)

    parser = Parser(description=docstring, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"MaskPro {VERSION}")
    return parser


def sparsity_type(text: str) -> tuple[int, int]:
    """Parse 'N:M' into (N, M) with 1 <= N < M <= 16, for argparse."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) < int(match[2]) <= 16:
        raise argparse.ArgumentTypeError(f"'{text}' is not N:M with 1 <= N < M <= 16, such as 2:4")
    return int(match[1]), int(match[2])


def number(kind: type, lowest: float, highest: float = 2**63 - 1) -> Callable[[str], float]:
    """Return a type for argparse: an int or float from `lowest` to `highest`."""

    def parsed(text: str) -> float:
        with suppress(ValueError):
            if lowest <= (value := kind(text)) <= highest and (kind is float or text.isdigit()):
                return value
        qualifier = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a {qualifier}number of at least {lowest:g}, at most {highest:g}"
        )

    return parsed


positive_int = number(int, 1)
sequence_length = number(int, 2)  # at least one token, and one to predict from it


def add_model_arguments(
    parser: argparse.ArgumentParser,
    model: str = LLAMA2,
    dtype: str | None = None,
    device: str | None = None,
    is_random: bool = True,
) -> None:
    """Add the flags that `models.loading.load_model` takes (model, dtype, device), with these
    defaults, and --seed if the script draws random numbers."""
    parser.add_argument(
        "--model", default=model, help="Hugging Face causal LM: a hub id or a folder"
    )
    parser.add_argument(
        "--dtype",
        default=dtype,
        choices=["auto", "checkpoint", *DTYPES],
        help="dtype of the weights; auto: one that is fast on this hardware; checkpoint: as stored"
        + ("" if dtype else " (default: auto on a CPU, float16 on a GPU)"),
    )
    parser.add_argument(
        "--device",
        default=device,
        help="cpu, cuda, cuda:1 ...; auto: spread layers over all GPUs"
        + ("" if device else " (default: cuda if there is one)"),
    )
    if is_random:
        parser.add_argument(
            "--seed", type=number(int, 0), default=0, help="seed of every random choice"
        )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the model contains or names"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the fixed list of minibatches, on which inference_loss.py and train.py must
    agree, and for the number of sequences per forward pass."""
    parser.add_argument(
        "--dataset",
        default=C4,
        help="training text: a hub id, a .json.gz, .jsonl, .parquet or .txt file, or a folder",
    )
    parser.add_argument(
        "--dataset_size",
        type=positive_int,
        default=512,
        help="training documents, each cut to one sequence",
    )
    parser.add_argument(
        "--batchsize", type=positive_int, default=32, help="sequences per minibatch"
    )
    parser.add_argument(
        "--seqlen", "--sqlen", type=sequence_length, default=128, help="tokens per sequence"
    )
    parser.add_argument(
        "--microbatch", type=positive_int, default=32, help="sequences per forward pass, at most"
    )
