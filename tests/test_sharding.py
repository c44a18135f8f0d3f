"""Layers shared out to several processes by FSDP: masks and losses of one process, and no more than rows in memory."""
import inspect
import shutil
from pathlib import Path

from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loading import DTYPE, load_model
from models.sharding import check_version, decoder_layers
from training.checkpoint import StateFile
from utils import UserError

import pytest
import tiny
import torch
import transformers
from launched import ROOT, Launched
from masked import magnitude_masks, same
from safetensors.torch import load_file
from sharded_script import TOKENS
from torch import nn
from torch.distributed import fsdp

pytestmark = pytest.mark.skipif("ignored_params" not in inspect.signature(fsdp.fully_shard).parameters,
                                reason="FSDP takes no ignored_params before torch 2.8")


def test_sharded_models_are_whole_models(models, tmp_path):
    """See tests/sharded_script.py; 3 processes have unequal parts. What they save, one reads."""
    w = Path(shutil.copytree(Path(models["llama"]).parent, tmp_path / "models", ignore=lambda *_: ["opt"]))
    tiny.make_opt(w / "opt", embedding=tiny.HIDDEN // 2)
    tiny.save_model(shutil.copytree(w / "gpt2", w / "neox"), transformers.GPTNeoXConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4))
    launched = Launched(3, [ROOT / "tests/sharded_script.py", w], tmp_path / "said.txt")
    assert launched.wait() == 0, launched.said
    for name, dtype in (("llama", torch.float32), ("opt", torch.float16), ("neox", torch.float32)):
        folders = w / name, w / f"saved_{name}"
        given, saved = (load_file(folder / "model.safetensors") for folder in folders)
        assert same({key: tensor.to(dtype) for key, tensor in given.items()}, saved)
        given, saved = map(transformers.AutoConfig.from_pretrained, folders)
        assert saved.architectures == given.architectures and getattr(saved, DTYPE) == dtype
    one, again = (MaskedModel(model, magnitude_masks(find_layers(model)), LinearSpace(2, 4), 1.0, torch.float16,
                              mode="eager")
                  for model in (load_model(str(w / "llama"), "float32", "cpu")[0] for _ in range(2)))
    for _ in range(3):
        one.update(5 * one.loss(TOKENS))
    expected = one.state()[1]
    again.restore({"steps": 3}, StateFile(w / "state_llama.safetensors").read)
    assert same(expected, again.state()[1])


def test_decoder_layers_are_the_outermost_lists():
    experts = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(5)) for _ in range(3))
    model = nn.ModuleDict({"embedding": nn.Embedding(2, 2), "layers": experts})
    assert decoder_layers(model) == list(experts)


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, mesh: None)
    with pytest.raises(UserError, match=r"--shard needs torch 2.8 or newer, this is"):
        check_version()
