"""A sharded model's folder read and written, a tensor at a time: no process ever has the whole model.

Each process reads its own rows from the .safetensors files; what is written is gathered by the main one.
"""
import json
from contextlib import suppress
from pathlib import Path

from models import processes
from models.loading import DTYPE, Tokenizer, explained, local_folder, read_config, read_tokenizer
from models.sharding import Rows, check_version, own_weight, shard
from utils import DTYPES, UserError, checked_device, fast_dtype

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

MOST_BYTES = 4 * 2**30  # of a file that is written, but for a tensor that is larger


class StoredTensors:
    """The tensors of a model's .safetensors files, a folder's or the Hub's: names, and slices of them."""

    def __init__(self, source: str | Path):
        if whole := cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False):
            paths = [whole]
        elif index := cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False):
            paths = get_checkpoint_shard_files(source, index)[0]
        else:
            raise UserError(f"--shard reads .safetensors files, and {source} has none: load the model and save it with "
                            "save_pretrained, or leave --shard out")
        files = [safe_open(path, framework="pt") for path in paths]
        self.files = {name: file for file in files for name in list(file.keys())}

    def slice(self, name: str) -> object:
        """What gives the parts of a tensor that it is indexed with."""
        return self.files[name].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """A whole one."""
        return self.files[name].get_tensor(name)

    def find(self, name: str, prefix: str) -> str | None:
        """A parameter's name in the files, which may have it without the prefix of the base model, or with it."""
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in self.files:
                return candidate
        return None


def load_sharded(model: str, dtype: str, device: str, trust_remote_code: bool = False) -> tuple[nn.Module, Tokenizer]:
    """The frozen causal LM of this folder or hub id, in eval mode, its projections shared out to all processes, and its
    tokenizer. UserError if it cannot be had so."""
    check_version()
    source = local_folder(model)
    processes.log(f"loading {model}, its layers shared out to {processes.size()} processes")
    with processes.main_before_others(), explained(model):  # the main one may have to fetch it
        tokenizer = read_tokenizer(source, trust_remote_code)
        config = read_config(source, trust_remote_code)
        stored = StoredTensors(source)
    torch_dtype = {"auto": fast_dtype(checked_device(device)), **DTYPES}.get(dtype)
    with explained(model):
        torch_dtype = torch_dtype or stored_dtype(stored)
        with init_empty_weights(include_buffers=False):  # rotary frequencies are computed, and no file has them
            found = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **{DTYPE: torch_dtype})
        found.tie_weights()
        shard(found, torch.device(device), processes.size())
        read_rows(found, stored, model)
        with suppress(OSError):  # it may have none
            found.generation_config = transformers.GenerationConfig.from_pretrained(source)
    return found.eval(), tokenizer


def stored_dtype(stored: StoredTensors) -> torch.dtype:
    """Of the first matrix in the files."""
    return next(rows.dtype for rows in (stored.slice(name)[:1] for name in stored.files
                                      if len(stored.slice(name).get_shape()) == 2))


@torch.no_grad()
def read_rows(model: nn.Module, stored: StoredTensors, name_of_model: str) -> None:
    """Fill a model's tensors, of sharded ones this process's rows. UserError where the files have not what it needs."""
    modules, missing = dict(model.named_modules()), []
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, tensor in tensors.items():
        key = stored.find(name, model.base_model_prefix)
        if key is None and isinstance(tensor, nn.Parameter):
            missing.append(name)
        if key is None:
            continue
        module, found = modules[name.rpartition(".")[0]], stored.slice(key)
        if found.get_shape() != list(tensor.shape):
            raise UserError(f"--model {name_of_model}: {key} is {found.get_shape()} in its files, and the model's is "
                            f"{list(tensor.shape)}; restore it")
        if isinstance(tensor, DTensor):
            rows, own = Rows.of(module), own_weight(module)
            if len(own):
                own.copy_(found[rows.begin:rows.end])
        else:
            tensor.copy_(stored.tensor(key))
    if missing:
        raise UserError(f"--model {name_of_model}: its files have nothing named {', '.join(missing[:3])} (missing: "
                        f"{len(missing)}); restore it, or leave --shard out")


@torch.no_grad()
def save_sharded(model: nn.Module, folder: Path, is_main: bool) -> None:
    """Write a model's folder: its configuration, and .safetensors files of whole tensors. All processes have to ask at
    once; the main one gathers and writes, a file at a time."""
    modules, names = dict(model.named_modules()), {}  # names: of the storage of copies, some of which are tied
    tensors = {name: tensor for name, tensor in model.state_dict().items()
               if isinstance(tensor, DTensor) or names.setdefault(tensor.data_ptr(), name) == name}
    plan = split_torch_state_dict_into_shards({name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                                               for name, tensor in tensors.items()}, max_shard_size=MOST_BYTES)
    if is_main:
        folder.mkdir()
    for file, part in plan.filename_to_tensors.items():
        found = {name: _whole(modules[name.rpartition(".")[0]], tensors[name], is_main) for name in part}
        if is_main:
            save_file(found, folder / file, {"format": "pt"})
    if not is_main:
        return
    if plan.is_sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps({
            "metadata": plan.metadata, "weight_map": plan.tensor_to_filename}))
    setattr(model.config, DTYPE, model.dtype)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _whole(module: nn.Module, tensor: Tensor, is_main: bool) -> Tensor | None:
    """A tensor of a module as files have it, on the CPU; None but in the main process."""
    if isinstance(tensor, DTensor):
        tensor = Rows.of(module).whole(own_weight(module).reshape(-1), tensor.shape[1]).view(tensor.shape)
    return tensor.cpu().contiguous() if is_main else None
