"""What the scripts share: errors for people, arguments, loading a model, its loss, fingerprints, the environment."""
import argparse
import ctypes
import hashlib
import math
import os
import platform
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import offload

LLAMA2 = "meta-llama/Llama-2-7b-hf"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, no traceback."""


def run(main) -> None:
    """Call a script's `main`; a mistake or a full GPU becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({str(error).splitlines()[0][:120]}); lower --microbatch or use 16-bit dtypes",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def printable(error: Exception) -> str:
    """Its message in one line; what a file put into it can move no cursor and is cut where it is endless."""
    line = " ".join(str(error).split())
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line)
    return line if len(line) <= 2000 else line[:2000] + " ..."


# ---------------------------------------------------------------------------------------------------------------------
# arguments

def script_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring, its manual, and every flag's default."""
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            if action.default is None or action.default is False or "default:" in action.help:
                return action.help
            if isinstance(action.default, tuple):
                return f"{action.help} (default: {':'.join(map(str, action.default))})"
            return super()._get_help_string(action)
    return argparse.ArgumentParser(description=docstring, formatter_class=Formatter)


def sparsity_type(text: str) -> tuple[int, int]:
    """'N:M' -> (N, M) with 1 <= N < M <= 16; for argparse, so a bad one is a usage error."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) < int(match[2]) <= 16:
        raise argparse.ArgumentTypeError(f"'{text}' is not N:M with 1 <= N < M <= 16, such as 2:4")
    return int(match[1]), int(match[2])


def finite(lowest: float):
    """A float type for argparse: finite and at least `lowest`."""
    def number(text: str) -> float:
        value = float(text)
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a finite number of at least {lowest:g}")
        return value
    return number


def positive_float(text: str) -> float:
    value = finite(0)(text)
    if not value:
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number of more than 0")
    return value


def seed_number(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to 2^63 - 1")
    return int(text)


def positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser, model_default: str = LLAMA2) -> None:
    parser.add_argument("--model", default=model_default, help="Hugging Face causal LM: hub id or folder")
    parser.add_argument("--dtype", default="float16", choices=["auto", "checkpoint", *DTYPES],
                        help="of the weights; auto: what this processor is fast at; checkpoint: as they are stored")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--device_map", default=None,
                        help="spread the layers over several GPUs and the host's memory: auto, balanced ...")
    parser.add_argument("--seed", type=seed_number, default=0, help="of every random choice")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the model")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The fixed list of minibatches that inference_loss.py and train.py must agree on."""
    parser.add_argument("--dataset", default="allenai/c4",
                        help="training text: hub id, .json.gz, .jsonl, .parquet, .txt or a folder")
    parser.add_argument("--dataset_size", type=positive_int, default=512, help="training documents (rows)")
    parser.add_argument("--batchsize", type=positive_int, default=32, help="rows in a minibatch")
    parser.add_argument("--sqlen", type=positive_int, default=128, help="tokens in a row")
    parser.add_argument("--microbatch", type=positive_int, default=32, help="rows in one forward pass, at most")


def default_device() -> str:
    """A GPU if there is one; of several processes each takes its own."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 on a CPU with AMX or AVX512-BF16, float32 on any other CPU, float16 on a GPU as the paper has it."""
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


def set_seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def be_deterministic() -> None:
    """Only algorithms that give the same bits every time, from here on; call it before a GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


# ---------------------------------------------------------------------------------------------------------------------
# model

def load_model(args, on_host: bool = False):
    """The frozen causal LM that the arguments name, in eval mode, and its tokenizer; UserError if it cannot be had.
    `on_host`: left in the host's memory, though of the dtype for --device."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import model_folder  # it imports utils
    if any(args.model.startswith(mark) for mark in (".", "/", "~")) and not Path(args.model).expanduser().is_dir():
        raise UserError(f"--model {args.model}: there is no such folder")
    device = args.device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); try --device cpu")
    dtype = {"auto": fast_dtype(device), "checkpoint": "auto", **DTYPES}[args.dtype]
    keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    placement = {"device_map": args.device_map} if args.device_map else {}
    source = args.model
    if Path(args.model).expanduser().is_dir():
        source = Path(args.model).expanduser()
        model_folder.check(source, args.trust_remote_code)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if os.environ.get("RANK", "0") == "0":
        print(f"loading {args.model} ({str(dtype).removeprefix('torch.')}, {args.device_map or device})",
              file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        tokenizer("Does it take a text?")  # a damaged one fails here rather than far from its name
        model, found = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=args.trust_remote_code, low_cpu_mem_usage=True, output_loading_info=True,
            **{keyword: dtype}, **placement)
    except Exception as error:  # tokenizers and safetensors raise classes of their own for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {args.model} cannot be loaded: {reason[:300]} (a folder or hub id of a causal LM is "
                        "wanted; a gated one needs `huggingface-cli login`)")
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    missing = sorted({*found["missing_keys"], *([] if args.device_map else empty)})
    if missing:  # transformers would go on with random numbers, or with none
        raise UserError(f"--model {args.model} has no weights for {', '.join(missing[:3])} (missing: {len(missing)}); "
                        "restore it, or give the folder of a whole causal LM")
    if any(offload.is_on_disk(module) for module in model.modules() if isinstance(module, nn.Linear)):
        raise UserError(f"{args.model} does not fit the devices of --device_map {args.device_map} and the host's "
                        "memory, and weights on the disk cannot be masked; use more or larger GPUs, or a larger host")
    if not args.device_map and not on_host:
        model.to(device)
    if device.startswith("cpu"):
        reuse_freed_memory()
    model.requires_grad_(False)
    return model.eval(), tokenizer


def input_device(model: nn.Module) -> torch.device:
    return offload.device_of(model.get_input_embeddings())


@torch.no_grad()
def batch_loss(model: nn.Module, batch: Tensor, microbatch: int = 32) -> float:
    """f(w, batch): mean next-token cross entropy in nats, float32, over int64 `[rows, tokens]`.

    `microbatch` rows go through one whole-model forward; the head's logits are taken to float32 a few rows at a time,
    so that no [rows, tokens, vocabulary] float32 copy is made.
    """
    check_tokens(model, batch)
    total, count = 0.0, batch.shape[0] * (batch.shape[1] - 1)
    for rows in batch.to(input_device(model)).split(microbatch):
        logits = model(input_ids=rows, use_cache=False).logits
        targets = rows.to(logits.device)
        for row_logits, row in zip(logits.split(4), targets.split(4)):
            total += nn.functional.cross_entropy(row_logits[:, :-1].flatten(0, 1).float(), row[:, 1:].flatten(),
                                                 reduction="sum")
    return float(total) / count


def perplexity(losses: list[float]) -> float:
    """exp of the mean loss over equal windows; inf where that overflows."""
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf


def apply_mask(model: nn.Module, file: str | Path) -> nn.Module:
    """The model itself, its pruned weights zeroed in place (+0.0) by a mask file of any format.

    UserError for a file that is damaged or of another model (shapes, fingerprint).
    """
    from layers import apply_masks, find_layers, read_masks  # layers imports utils
    apply_masks(find_layers(model, targets=[""]), read_masks(str(file), model).masks)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# fingerprints

def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits that name the model whatever its dtype and sparsity: parameter shapes, and the signs of the input
    embedding, which pruning leaves alone."""
    digest = hashlib.sha256(str(tuple(model.get_input_embeddings().weight.shape)).encode())
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2 and not name.startswith("lm_head"):
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
    signs = torch.signbit(offload.weight_of(model.get_input_embeddings()).flatten()[:2**22])
    digest.update(signs.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def mask_fingerprint(masks: dict[str, Tensor]) -> str:
    """16 hex digits of the bool masks by layer name."""
    import numpy as np
    digest = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        digest.update(f"{name} {tuple(mask.shape)}".encode())
        digest.update(np.packbits(mask.cpu().numpy().reshape(-1)).tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# checks, and what is here

def check_length(model: nn.Module, tokens: int, flag: str) -> None:
    """UserError where rows of so many tokens would run past the model's positions."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and tokens > longest:
        raise UserError(f"{flag} {tokens} is more than the {longest} positions of the model; lower {flag}")


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """UserError where the model has no embedding for a token."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens.max() >= rows:
        raise UserError(f"the tokenizer makes token {int(tokens.max())} and the model has {rows} embeddings; give a "
                        "--model whose tokenizer is its own")


def environment() -> dict:
    """Versions, commit and hardware, for run records and benches."""
    import transformers
    commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()
    return {"commit": commit or "unknown", "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "hardware": hardware()}


def hardware() -> str:
    """One line: the card, or the processor and the threads used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        info = Path("/proc/cpuinfo").read_text()
        name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), name)
        name += "".join(f" {label}" for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"))
                        if f" {flag}" in info)
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory_bytes() -> int:
    """The most memory this process has used: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
