"""The machine that a script runs on: its devices, what dtype they are fast at, memory, seeds, and
what records say."""

import ctypes
import os
import platform
import random
import re
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from utils import VERSION, UserError

import torch

STATUS = Path("/proc/self/status")  # Linux
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def default_device() -> str:
    """A GPU if there is one; of several processes each takes its own."""
    if not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    # each may see its own GPU alone
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def checked_device(device: str | None = None) -> str:
    """The device itself, or the default one; UserError where it cannot be used."""
    device = default_device() if device in (None, "auto") else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        hint = "is cuda meant?" if "gpu" in device else "try --device cpu"
        raise UserError(
            f"--device {device} cannot be used here ({str(error).splitlines()[0][:80]}); {hint}"
        )
    return device


def dtype_name(dtype: str | None, device: str) -> str:
    """What a --dtype stands for on a device: a name of DTYPES, or checkpoint. None: auto on a CPU,
    float16 on a GPU."""
    if dtype is None and not device.startswith("cpu"):
        return "float16"
    return str(fast_dtype(device)).removeprefix("torch.") if dtype in (None, "auto") else dtype


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware is fast at it; elsewhere float32 on a CPU, float16 on a GPU."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return (
                torch.bfloat16
                if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16
            )
    if not device.startswith("cpu"):
        return torch.float16
    has_bf16 = any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return torch.bfloat16 if has_bf16 else torch.float32


def reuse_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors: to give it back after each large one costs a CPU
    run two fifths of its time, in page faults. Takes some more memory; does nothing where there is
    no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # M_MMAP_MAX, M_TRIM_THRESHOLD off, M_TOP_PAD
    for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):
        mallopt(option, value)


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Of Python's and torch's generators. deterministic: have a GPU use algorithms that give the
    same bits every time, where it has them, from here on; to be called before it is used."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # which costs time and changes no result
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def commit() -> str:
    """Of this code as it is now, or unknown."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:  # there is no git
        found = ""
    return found or "unknown"


def environment(device: str | torch.device | None = None) -> dict:
    """Versions, commit and the hardware of a device, for run records and benches."""
    return {
        "version": VERSION,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "hardware": hardware(device),
    }


def hardware(device: str | torch.device | None = None) -> str:
    """One line: the card, or the processor and the threads used."""
    device = torch.device(checked_device(device))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        info = Path("/proc/cpuinfo").read_text()
        name = next(
            (
                line.split(":")[1].strip()
                for line in info.splitlines()
                if line.startswith("model name")
            ),
            name,
        )
        name += "".join(
            f" {label}"
            for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"))
            if f" {flag}" in info
        )
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory_bytes() -> int:
    """The most memory this process has used since its start or `reset_peak_memory`: allocated on
    its GPUs or, where it uses none, resident (0: not known)."""
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
