"""The machine that a script runs on: devices, their fast dtypes, memory, seeds, and the environment
that run records store."""

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
    """Return a GPU if there is one, otherwise "cpu". Each of several processes gets its own GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    # a process may see only its own GPU
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def checked_device(device: str | None = None) -> str:
    """Return the device, or the default one for None and "auto". Raises UserError if it cannot be
    used."""
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
    """Return the dtype that a --dtype means on a device: a name of DTYPES, or "checkpoint". None
    means auto on a CPU, float16 on a GPU."""
    if dtype is None and not device.startswith("cpu"):
        return "float16"
    return str(fast_dtype(device)).removeprefix("torch.") if dtype in (None, "auto") else dtype


def fast_dtype(device: str) -> torch.dtype:
    """Return bfloat16 if the hardware is fast at it, otherwise float32 on a CPU and float16 on a
    GPU."""
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
    """Have glibc keep the memory of freed tensors instead of returning it to the system.

    Returning it after each large tensor costs a CPU run two fifths of its time, in page faults.
    Keeping it takes some more memory. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # M_MMAP_MAX, M_TRIM_THRESHOLD off, M_TOP_PAD
    for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):
        mallopt(option, value)


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python's and torch's random generators.

    deterministic: from here on, have a GPU use algorithms that give the same bits every time, if it
    has them. Call this before the GPU is used.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # filling costs time and changes no result
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def commit() -> str:
    """Return the commit of this code, with "-dirty" if it was changed since, or "unknown"."""
    try:
        description = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:  # git is not installed
        description = ""
    return description or "unknown"


def environment(device: str | torch.device | None = None) -> dict:
    """Return versions, commit and a device's hardware, for run records and benches."""
    return {
        "version": VERSION,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "hardware": hardware(device),
    }


def hardware(device: str | torch.device | None = None) -> str:
    """Return the name of the GPU, or of the processor with the number of threads, in one line."""
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
    """Return the peak memory of this process, in bytes, since its start or `reset_peak_memory`.

    It is the memory allocated on all its GPUs or, if it uses none, its resident memory; 0 if
    unknown.
    """
    if allocated := sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))):
        return allocated
    match = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text() if STATUS.exists() else "")
    return 1024 * int(match[1]) if match else 0


def reset_peak_memory() -> None:
    """Restart the measurement of peak memory, if the system supports it."""
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(gpu)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
