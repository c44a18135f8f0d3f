"""What every part shares: errors for people, flags, seeds, and the environment that a record names.

Our modules are imported before the libraries (pyproject.toml), and so this one before torch: it sets how long OpenMP's
threads may spin.
"""
import argparse
import ctypes
import difflib
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

# Threads that wait spin, on cores that another process may want; a short spin costs nothing alone. OpenMP reads these
# when torch is loaded.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")

# Ctrl-C is a line, not a traceback, and so it is while libraries are imported.
sys.excepthook = lambda kind, *rest: (print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt
                                      else sys.__excepthook__(kind, *rest))

import torch
from tqdm import tqdm

VERSION = "0.9.0"  # as in CITATION.cff
STATUS = Path("/proc/self/status")  # Linux
LINE_S = 30  # between two bars in a log
LLAMA2 = "meta-llama/Llama-2-7b-hf"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, no traceback."""


@contextmanager
def explained(what: str | Path, advice: str) -> Iterator[None]:
    """Turn whatever reading raises into a UserError that begins with `what`: parsers share no class of error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):  # `run_script` has better advice
            raise
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error.__cause__ or error}"
        raise UserError(f"{what} cannot be read ({' '.join(reason.split())[:300]}); {advice}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory is full or a CPU's. PyTorch has no class of error for the latter, nor for what Triton and
    cuBLAS need on a GPU."""
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in str(error) for part in said)


def run_script(main: Callable[[], None]) -> None:
    """Call a script's `main`; a mistake or full memory becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory ({' '.join(str(error).split())[:120]}); use a 16-bit --dtype or "
              "--logits_dtype, or --gradient_checkpointing, or lower --microbatch (which costs memory in sparsify.py), "
              "--batchsize, --tasks_batchsize, --nsamples or --seqlen, where the script has it", file=sys.stderr)
        sys.exit(2)


def progress_bar(iterable: Iterable | None = None, **names) -> tqdm:
    """tqdm's bar; where it is no terminal that reads it, one every LINE_S, so that logs stay short."""
    if not sys.stderr.isatty():
        names |= {"mininterval": LINE_S, "maxinterval": LINE_S, "miniters": 1, "delay": LINE_S, "ncols": 100,
                  "ascii": True}
    return tqdm(iterable, **names)


# ---------------------------------------------------------------------------------------------------------------------
# flags

class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command, and which flag may be meant by one that does not exist."""

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        self.exit(2, f"error: {message}; {f'is {near[0]} meant?' if near else '--help explains the flags'}\n")


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
        raise argparse.ArgumentTypeError(f"'{text}' is not a {whole}number of at least {lowest:g}, at most {highest:g}")
    return parsed


positive_int, sequence_length = number(int, 1), number(int, 2)  # a token, and one to predict from it, at least


def add_model_arguments(parser: argparse.ArgumentParser, model: str = LLAMA2, dtype: str | None = None,
                        device: str | None = None, is_random: bool = True) -> None:
    """Which model, where, of what dtype: the parameters of `models.loading.load_model`, by default these; and the seed
    of a script that draws."""
    parser.add_argument("--model", default=model, help="Hugging Face causal LM: hub id or folder")
    parser.add_argument("--dtype", default=dtype, choices=["auto", "checkpoint", *DTYPES],
                        help="of the weights; auto: what the hardware is fast at; checkpoint: as they are stored"
                             + ("" if dtype else " (default: auto on a CPU, float16 on a GPU)"))
    parser.add_argument("--device", default=device,
                        help="cpu, cuda, cuda:1 ...; auto: spread layers over all GPUs"
                             + ("" if device else " (default: cuda if there is one)"))
    if is_random:
        parser.add_argument("--seed", type=number(int, 0), default=0, help="of every random choice")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings or names")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The fixed list of minibatches that inference_loss.py and train.py must agree on, and how many sequences go
    through the model at once."""
    parser.add_argument("--dataset", default="allenai/c4",
                        help="training text: hub id, .json.gz, .jsonl, .parquet, .txt or a folder")
    parser.add_argument("--dataset_size", type=positive_int, default=512, help="training documents, a sequence each")
    parser.add_argument("--batchsize", type=positive_int, default=32, help="sequences in a minibatch")
    parser.add_argument("--seqlen", "--sqlen", type=sequence_length, default=128, help="tokens in a sequence")
    parser.add_argument("--microbatch", type=positive_int, default=32, help="sequences in one forward pass, at most")


def default_device() -> str:
    """A GPU if there is one; of several processes each takes its own."""
    if not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"  # each may see its own GPU alone


def checked_device(device: str | None = None) -> str:
    """The device itself, or the default one; UserError where it cannot be used."""
    device = default_device() if device in (None, "auto") else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); try --device cpu")
    return device


def dtype_name(dtype: str | None, device: str) -> str:
    """What a --dtype stands for on a device: a name of DTYPES, or checkpoint. None: auto on a CPU, float16 on a GPU."""
    if dtype is None and not device.startswith("cpu"):
        return "float16"
    return str(fast_dtype(device)).removeprefix("torch.") if dtype in (None, "auto") else dtype


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware is fast at it; elsewhere float32 on a CPU, float16 on a GPU."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if not device.startswith("cpu"):
        return torch.float16
    has_bf16 = any(getattr(torch.cpu, name, lambda: False)()
                   for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return torch.bfloat16 if has_bf16 else torch.float32


def reuse_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors: to give it back after each large one costs a CPU run two fifths of
    its time, in page faults. Takes some more memory; does nothing where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD off, M_TOP_PAD
        mallopt(option, value)


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Of Python's and torch's generators. deterministic: have a GPU use algorithms that give the same bits every time,
    where it has them, from here on; to be called before it is used."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # which costs time and changes no result
        torch.use_deterministic_algorithms(True, warn_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# the environment

def commit() -> str:
    """Of this code as it is now, or unknown."""
    try:
        found = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                               capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        found = ""
    return found or "unknown"


def environment(device: str | torch.device | None = None) -> dict:
    """Versions, commit and the hardware of a device, for run records and benches."""
    return {"version": VERSION, "commit": commit(), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": version("transformers"), "hardware": hardware(device)}


def hardware(device: str | torch.device | None = None) -> str:
    """One line: the card, or the processor and the threads used."""
    device = torch.device(checked_device(device))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        info = Path("/proc/cpuinfo").read_text()
        name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), name)
        name += "".join(f" {label}" for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"))
                        if f" {flag}" in info)
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory_bytes() -> int:
    """The most memory this process has used since its start or `reset_peak_memory`: allocated on its GPUs or, where it
    uses none, resident (0: not known)."""
    if allocated := sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))):
        return allocated
    found = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text() if STATUS.exists() else "")
    return 1024 * int(found[1]) if found else 0


def reset_peak_memory() -> None:
    """Count the peaks from here on, where the system can."""
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(gpu)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
