"""Loads a causal LM, frozen, and its tokenizer; computes a model's fingerprint."""

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from files import hub
from files.records import of_run
from models import processes
from models.machine import DTYPES, checked_device, dtype_name, reuse_freed_memory
from utils import UserError, as_user_error

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import nn

NOT_CAUSAL = re.compile(
    r"(MaskedLM|PreTraining|Classification|QuestionAnswering|[Bb]erta?(?!\w*LMHead)\w*Model)$"
)
Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"
# the keyword's name in this version of transformers
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
# settings of generation that only sampling reads
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


def load_model(
    model: str, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, Tokenizer]:
    """Load a causal LM, frozen and in eval mode, and its tokenizer from a folder or hub id.

    dtype: a name of DTYPES, "auto" or "checkpoint"; None means auto on a CPU, float16 on a GPU.
    device: a torch device, or "auto" to have accelerate spread the layers over all GPUs; None means
    a GPU if there is one. Raises UserError if the model cannot be loaded.
    """
    if processes.started() > processes.world_size():
        raise UserError(
            f"{processes.started()} processes were started (WORLD_SIZE), and each would do all of "
            "the work: start this script as a single process, with python"
        )
    is_spread = device == "auto"
    device = checked_device(device)
    loaded, tokenizer = read_model(model, dtype, device, trust_remote_code, is_spread)
    if not is_spread:
        loaded.to(device)
    if device.startswith("cpu"):
        reuse_freed_memory()
    processes.wait_for_all()  # one of them may have downloaded it
    return loaded, tokenizer


def read_model(
    model: str, dtype: str | None, device: str, trust_remote_code: bool, is_spread: bool = False
) -> tuple[nn.Module, Tokenizer]:
    """Load as `load_model` does, but leave the model on the CPU unless is_spread, which spreads it
    over all GPUs. device: where the model will run, which decides the default dtype."""
    source = local_folder(model)
    dtype = dtype_name(dtype, device)
    torch_dtype = {"checkpoint": "auto", **DTYPES}[dtype]
    processes.log(f"loading {model} ({dtype}, {device})")
    if torch_dtype == torch.float16 and device.startswith("cpu"):
        processes.log(
            "note: a CPU is several times slower in float16 than in the dtype of --dtype auto"
        )
    with as_model_error(model):
        tokenizer = read_tokenizer(source, trust_remote_code)
        read_config(source, trust_remote_code)
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=trust_remote_code,
            low_cpu_mem_usage=True,
            output_loading_info=True,
            **{DTYPE: torch_dtype},
            **({"device_map": "auto"} if is_spread else {}),
        )
    empty = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    missing = sorted({*report["missing_keys"], *([] if is_spread else empty)})
    if missing:  # transformers would continue with random numbers, or with none
        raise UserError(
            f"--model {model} has no weights for {', '.join(missing[:3])} (missing: "
            f"{len(missing)}); restore it, or give the folder of a complete causal LM"
        )
    if empty:
        raise UserError(
            f"{model} does not fit on the GPUs of --device auto; use more or larger ones, or "
            "several processes with --shard"
        )
    # with it, older Llamas use weights without calling their modules
    if getattr(loaded.config, "pretraining_tp", 1) > 1:
        loaded.config.pretraining_tp = 1
    settings = getattr(loaded, "generation_config", None)
    # without sampling these have no effect, and older transformers refuse to save them
    if settings and not settings.do_sample:
        for name in SAMPLING & settings.to_diff_dict().keys():
            setattr(settings, name, getattr(transformers.GenerationConfig(), name))
    return loaded.requires_grad_(False).eval(), tokenizer


def local_folder(model: str) -> str | Path:
    """Return a model's folder, or the checkpoint in a run's folder, or a hub id unchanged. Raises
    UserError if `model` names a run without a checkpoint, a file or a missing folder."""
    if ((folder := of_run(model, "checkpoint")) / "run.json").is_file():
        raise UserError(
            f"{model} has no sparse model: the run is not finished, or had --skip_checkpoint; give "
            f"its base model, with --mask {model} if there is a mask"
        )
    if folder.is_dir():
        return folder
    if folder.is_file():
        gguf = ", which `from_pretrained(..., gguf_file=...)` and `save_pretrained` make of a .gguf"
        raise UserError(
            f"--model {model} is a file: give the folder of a causal "
            f"LM{gguf if '.gguf' in model else ''}"
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"--model {model}: there is no such folder")
    return model


@contextmanager
def as_model_error(model: str) -> Iterator[None]:
    """Turn any error that the libraries raise about a model into a UserError of one line."""
    transformers.utils.logging.set_verbosity_error()
    # hide the progress bar of reading weights, but not those of downloads
    hidden = are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if not hidden:
        enable_progress_bars()
    advice = "give the folder of a causal LM"
    doubt = ""
    if not Path(model).expanduser().exists():
        doubt = ": there is no such folder, and as a hub id it"
        if hub.answers():
            advice += " or a hub id (gated: first `hf auth login`)"
        else:
            advice += ": the Hub does not answer"
    with as_user_error(f"--model {model}", advice, doubt):
        yield


def read_tokenizer(source: str | Path, trusted: bool) -> Tokenizer:
    """Load a model's tokenizer and try it on a text, so that a damaged one fails here, where the
    error names it. Raises UserError if a folder has no tokenizer."""
    if Path(source).is_dir() and not [
        file for kind in ("*token*", "vocab*", "*.model") for file in Path(source).glob(kind)
    ]:
        raise UserError(
            f"there is no tokenizer in {source}: copy the base model's tokenizer files there"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
    tokenizer("Does it take a text?")
    return tokenizer


def attention_of(config: transformers.PretrainedConfig) -> dict[str, str]:
    """Return the attention implementations of a model, under "", and of each of its parts, in the
    form that `set_attn_implementation` takes. Parts are listed one by one because some, such as
    audio encoders, support only one implementation."""
    parts = {name: getattr(config, name) for name in getattr(config, "sub_configs", {})}
    implementations = {
        name: part._attn_implementation for name, part in {"": config, **parts}.items() if part
    }
    return {name: value for name, value in implementations.items() if value}


def read_config(source: str | Path, trusted: bool) -> transformers.PretrainedConfig:
    """Load a model's configuration. Raises UserError if it is not of a causal LM, if its weights
    are quantised, or if its attention is a kernel from the Hub, which is code, and not trusted."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusted)
    classes = config.architectures or []
    if classes and all(map(NOT_CAUSAL.search, classes)):
        raise UserError(
            f"it is {classes[0]}, not a causal language model: give one that predicts the next "
            "token"
        )
    if getattr(config, "quantization_config", None):
        raise UserError("its weights are quantised; give the original model, in 16 or 32 bits")
    kernels = [name for name in attention_of(config).values() if name and "/" in name]
    if kernels and not trusted:
        raise UserError(
            f"its config.json would run code from the Hub, the kernel {kernels[0]}; give "
            "--trust_remote_code if you trust it"
        )
    return config


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the input embedding, where tokens have to be."""
    return model.get_input_embeddings().weight.device


def model_fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits that identify a model regardless of its dtype and sparsity.

    They are a hash of the parameters' shapes, the signs of the input embedding, which pruning does
    not change, and the order of the channels if permute.py chose it.
    """
    embedding = model.get_input_embeddings().weight
    # left out: its name depends on the version of transformers
    head = getattr(model.get_output_embeddings(), "weight", None)
    digest = hashlib.sha256(str(tuple(embedding.shape)).encode())
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2 and (parameter is not head or parameter is embedding):
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
    signs = torch.signbit(embedding.flatten()[: 2**22])
    digest.update(signs.cpu().numpy().tobytes())
    if permutation := getattr(model.config, "channel_permutation", None):
        digest.update(f"channel_permutation {permutation}".encode())
    return digest.hexdigest()[:16]


def positions(model: nn.Module) -> float:
    """Return the maximum number of tokens in a sequence; infinity if the model has no limit."""
    # models that also read images keep it in text_config
    config = getattr(model.config, "text_config", None) or model.config
    return getattr(config, "max_position_embeddings", None) or math.inf


def check_length(model: nn.Module, tokens: int, before: int = 0) -> None:
    """Raise UserError if a sequence of `tokens` tokens after a passage of `before` tokens exceeds
    the model's positions."""
    if before + tokens > (limit := positions(model)):
        after_passage = f", after a passage of {before} tokens," if before else ""
        raise UserError(
            f"--seqlen {tokens}{after_passage} exceeds the model's {limit} positions; lower "
            "--seqlen"
        )
