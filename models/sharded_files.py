"""Loads a sharded model: transformers reads the files in the main process, the only one that holds
the whole model."""

from models import processes
from models.loading import (
    DTYPE,
    Tokenizer,
    as_model_error,
    local_folder,
    read_config,
    read_model,
    read_tokenizer,
)
from models.sharding import check_version, shard

import torch
import transformers
from accelerate import init_empty_weights
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict


def load_sharded(
    model: str, dtype: str | None, device: str, trust_remote_code: bool = False
) -> tuple[nn.Module, Tokenizer]:
    """Load a causal LM, frozen and in eval mode, with its projections sharded over all processes,
    and its tokenizer from a folder or hub id. Raises UserError if it cannot be loaded or sharded.

    The main process holds the whole model in host memory meanwhile, and sends one tensor at a time.
    """
    check_version()
    source = local_folder(model)
    whole_model = None
    with processes.main_process_first():  # which may have to download the model
        if processes.is_main():
            whole_model, _ = read_model(model, dtype, device, trust_remote_code)
        with as_model_error(model):
            tokenizer = read_tokenizer(source, trust_remote_code)
            config = read_config(source, trust_remote_code)
    dtypes = [whole_model and whole_model.dtype]
    distributed.broadcast_object_list(dtypes)
    # buffers get values here: the files do not store rotary frequencies
    with as_model_error(model), init_empty_weights(include_buffers=False):
        sharded = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **{DTYPE: dtypes[0]}
        )
    sharded.tie_weights()
    shard(sharded, torch.device(device), processes.world_size())
    set_model_state_dict(
        sharded,
        whole_model.state_dict() if whole_model else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    return sharded.eval(), tokenizer
