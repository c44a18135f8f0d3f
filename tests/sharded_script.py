"""What tests/test_sharding.py starts in several processes: sharded models held against whole ones, which each process
has beside them.

    torchrun --nproc_per_node 3 tests/sharded_script.py FOLDER

FOLDER has the tiny models. Writes FOLDER/state3.safetensors, a state of all processes, and FOLDER/saved3, the model.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import utils  # noqa: F401 (before torch)

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from masking.block_bits import mask_to_bits
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models import sharded_files
from models.layers import find_layers, weight_matrix
from models.loading import load_model, model_fingerprint
from models.loss import batch_loss
from models.processes import ProcessGroup
from models.sharded_files import load_sharded, save_sharded
from models.sharding import Rows, own_weight, shard
from training import checkpoint
from training.curvature import Curvature
from training.initialize import init_from_swaps
from training.straight_through import StraightThrough

TOKENS = torch.randint(3, 300, (8, 12), generator=torch.Generator().manual_seed(0))


def masks_of(model: nn.Module, n: int, m: int) -> dict:
    """Of a whole model: keep the N largest of M."""
    found = {}
    for name, module in find_layers(model).items():
        blocks = weight_matrix(module).abs().float().reshape(-1, m)
        found[name] = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, blocks.topk(n, 1).indices, True).view(
            weight_matrix(module).shape)
    return found


def assert_same(masked: MaskedModel, whole: MaskedModel, apart: float = 0.0) -> None:
    """The logits and masks of this process's rows are those of the whole model."""
    for name, layer in masked.layers.items():
        blocks = slice(layer.start, layer.start + len(layer.bits))
        for plane, expected in zip(layer.logits, whole.layers[name].logits):
            assert len(plane) == 0 or float((plane.float() - expected[blocks].float()).abs().max()) <= apart, name
        if apart < 1e-3:
            assert torch.equal(layer.bits, whole.layers[name].bits[blocks]), name


def forward_only(folder: Path, group: ProcessGroup, dtype: str, n: int, m: int) -> tuple:
    """Losses, masks and logits have the bits of a whole model's; nothing whole is held."""
    whole = load_model(str(folder), dtype, "cpu")[0]
    model, _ = load_sharded(str(folder), dtype, group, False)
    assert model_fingerprint(model) == model_fingerprint(whole)
    masks, space = masks_of(whole, n, m), LinearSpace(n, m)
    settings = dict(magnitude=1.0, logits_dtype=torch.float16, mode="eager")
    masked, expected = MaskedModel(model, masks, space, **settings), MaskedModel(whole, masks, space, **settings)
    copies = sum(parameter.nbytes for parameter in model.parameters() if not isinstance(parameter, DTensor))
    planned = copies + sum(mask.numel() for mask in masks.values()) / group.size * (whole.dtype.itemsize + 2 + 1 / m)
    held = copies + sum(tensor.untyped_storage().nbytes() for layer in masked.layers.values()
                        for tensor in (layer.weight, *layer.logits, layer.bits))
    assert 0.99 < held / planned < (1.1 if group.size == 3 else 1.05), held / planned  # 3: uneven
    most = {name: -(-mask.shape[0] // group.size) * mask.shape[1] for name, mask in masks.items()}
    for name, layer in masked.layers.items():
        assert layer.sharded and layer.weight.untyped_storage().nbytes() <= most[name] * layer.weight.itemsize
        assert sum(plane.untyped_storage().nbytes() for plane in layer.logits) <= most[name] * 2
    masked.keep_initial(masks)
    for _ in range(3):
        loss = batch_loss(model, TOKENS)
        assert loss == batch_loss(whole, TOKENS)
        for each in (masked, expected):
            each.update(5 * loss)
    with masked.use_dense(), expected.use_dense():
        assert batch_loss(model, TOKENS) == batch_loss(whole, TOKENS)
    with masked.use_initial(), expected.use_masks({name: mask_to_bits(mask.view(-1, m))
                                                   for name, mask in masks.items()}):
        assert batch_loss(model, TOKENS) == batch_loss(whole, TOKENS)
    masked.flush(), expected.flush()
    assert_same(masked, expected)
    assert any((plane != plane.round()).any() for layer in masked.layers.values() for plane in layer.logits)
    return masked, expected


def gathers_of(masked: MaskedModel) -> list[str]:
    """A list that grows by a layer's name each time that FSDP asks for its rows."""
    asked, fill = [], masked._fill
    for name, layer in masked.layers.items():
        rows = layer.module.weight._local_tensor
        rows.fill = lambda out, name=name, layer=layer: (asked.append(name), fill(layer, out))
    return asked


def by_gradients(folder: Path, group: ProcessGroup) -> None:
    """What processes learn from a sequence each is what one learns from all of them; two gathers a layer and step."""
    whole, tokens = load_model(str(folder), "float32", "cpu")[0], TOKENS[:group.size]
    model, _ = load_sharded(str(folder), "float32", group, False)
    masks, settings = masks_of(whole, 2, 4), dict(magnitude=1.0, mode="eager")
    masked, expected = (MaskedModel(each, masks, LinearSpace(2, 4), **settings) for each in (model, whole))
    batch_loss(model, tokens)
    init_from_swaps(masked, TOKENS, 1.0, sweeps=2), init_from_swaps(expected, TOKENS, 1.0, sweeps=2)
    assert_same(masked, expected, apart=1e-4)  # products of fewer rows may round otherwise
    asked = gathers_of(masked)
    one = ProcessGroup.__new__(ProcessGroup)
    one.size, one.mean = 1, lambda values: values[0]
    ours, alone = (StraightThrough(each, checkpointing=True, distill=0.0, group=group_of,
                                   curvature=Curvature(each, lambda: 1.0, group_of))
                   for each, group_of in ((masked, group), (expected, one)))
    for learner in (ours, alone):
        learner.curvature._drawn = lambda _logits, sequences: sequences  # what is drawn depends on the process
    for step in range(3):
        asked.clear()
        ours.learn(tokens[group.rank][None], 0.1), alone.learn(tokens, 0.1)
        passes = 2 if step else 4  # a measurement
        assert sorted(asked) == sorted([name for name, layer in masked.layers.items() if len(layer.bits)] * passes)
        assert torch.allclose(ours.curvature.mean_squares, alone.curvature.mean_squares, rtol=1e-3)
        found, expected_squares = (each.normalization.mean_squares for each in (ours, alone))
        assert torch.allclose(found * group.size**2, expected_squares, rtol=1e-3)
    assert_same(masked, expected, apart=2e-3)
    moved = [float((plane - plane.round()).abs().max()) for layer in masked.layers.values() if len(layer.bits)
             for plane in layer.logits]
    assert max(moved) > 0.05


class Mixture(nn.Module):
    """Two experts, of which a token takes one by its parity."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for parity, expert in enumerate(self.experts):
            chosen = tokens % 2 == parity
            if chosen.any():
                y[chosen] = expert(x[chosen]).relu()
        return x + y


class MixtureModel(nn.Module):
    """A causal LM of two such layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)
        self.layers = nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return SimpleNamespace(logits=self.head(x))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def tie_weights(self) -> None:
        pass


def experts(group: ProcessGroup) -> None:
    """Experts that the text of one process does not reach get no other's gradient."""
    torch.manual_seed(0)
    whole = MixtureModel().requires_grad_(False)
    with torch.device("meta"):
        model = MixtureModel()
    shard(model, group.device, group.size)
    for (name, module), (_, full) in zip(model.named_modules(), whole.named_modules()):
        if "experts." in name:
            own_weight(module).copy_(Rows.of(module).own(full.weight.data))
            module.bias.data.copy_(full.bias.data)
    model.embedding.load_state_dict(whole.embedding.state_dict()), model.head.load_state_dict(whole.head.state_dict())
    masks, tokens = masks_of(whole, 2, 4), torch.arange(24).view(1, 24) * 2  # even: the first expert
    tokens = torch.cat([tokens, *[tokens + 1] * (group.size - 1)]) % 64
    masked, expected = (MaskedModel(each, masks, LinearSpace(2, 4), 1.0, mode="eager") for each in (model, whole))
    assert batch_loss(model, tokens) == batch_loss(whole, tokens)
    ours = StraightThrough(masked, group=group)
    alone = StraightThrough(expected, group=ProcessGroup.__new__(ProcessGroup))
    alone.group.size, alone.group.mean = 1, lambda values: values[0]
    for _ in range(3):
        ours.learn(tokens[group.rank][None], 0.1), alone.learn(tokens, 0.1)
    assert_same(masked, expected, apart=2e-3)


def old_masks_are_noticed(folder: Path, group: ProcessGroup) -> None:
    """A model that keeps what it has gathered computes with old masks: an error, not silence."""
    model, _ = load_sharded(str(folder), "float32", group, False)
    model.set_reshard_after_forward(False)
    model.reset_iter_state = lambda: None  # which would drop them
    masked = MaskedModel(model, masks_of(load_model(str(folder), "float32", "cpu")[0], 2, 4), LinearSpace(2, 4),
                         mode="eager")
    batch_loss(model, TOKENS)
    masked.update(1.0)
    with pytest.raises(RuntimeError, match="computed with an old mask"):
        batch_loss(model, TOKENS)


def main(folder: Path) -> None:
    group = ProcessGroup("cpu", 60)
    sharded_files.MOST_BYTES = 2**17  # of a file: OPT and GPT-2 are several
    for name, dtype, n, m in (("llama", "float32", 2, 4), ("gpt2", "bfloat16", 4, 8), ("opt", "float16", 2, 4)):
        masked, expected = forward_only(folder / name, group, dtype, n, m)
        tensors = masked.state()[1]
        if name == "llama" and group.size == 3:
            if group.is_main:
                checkpoint.save(folder / "state3.safetensors", {}, tensors)
            else:
                checkpoint.give_shards(tensors)
        save_sharded(masked.model, folder / f"saved_{name}_{group.size}", group.is_main)
        del masked, expected
    by_gradients(folder / "gpt2", group), by_gradients(folder / "llama", group)
    experts(group)
    old_masks_are_noticed(folder / "llama", group)
    group.__exit__(None, None, None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
