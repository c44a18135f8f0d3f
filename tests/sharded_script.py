"""What test_distributed.py starts in several processes: sharded models held against whole ones,
which each process has beside them.

    torchrun --nproc_per_node 3 tests/sharded_script.py FOLDER

FOLDER has the tiny models. Writes of each, such as llama, FOLDER/state_llama.pt, a state of all
processes, and FOLDER/saved_llama, the model.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models import processes
from models.layers import find_layers
from models.loading import load_model, model_fingerprint
from models.sharded_files import load_sharded
from models.sharding import Rows, own_weight, shard
from training import checkpoint
from training.initialize import from_swaps
from training.straight_through import StraightThrough
from utils import UserError

import pytest
import torch
from masked import magnitude_masks
from torch import nn
from torch.distributed.tensor import DTensor

TOKENS = torch.randint(3, 300, (8, 12), generator=torch.Generator().manual_seed(0))


@contextmanager
def alone():
    """Inside, this process is the only one."""
    size, rank = processes.world_size, processes.rank
    processes.world_size, processes.rank = (lambda: 1), (lambda: 0)
    yield
    processes.world_size, processes.rank = size, rank


def pair(
    folder: Path, dtype: str, n: int = 2, m: int = 4, **settings
) -> tuple[MaskedModel, MaskedModel]:
    """A model of this folder shared out to the processes, and whole, under its magnitude masks."""
    whole = load_model(str(folder), dtype, "cpu")[0]
    sharded = load_sharded(str(folder), dtype, "cpu")[0]
    assert model_fingerprint(sharded) == model_fingerprint(whole)
    masks = magnitude_masks(find_layers(whole), n, m)
    return tuple(
        MaskedModel(model, masks, LinearSpace(n, m), 1.0, backend="eager", **settings)
        for model in (sharded, whole)
    )


def assert_same(masked: MaskedModel, whole: MaskedModel, apart: float = 0.0) -> None:
    """The logits and masks of this process's rows are those of the whole model."""
    for name, layer in masked.layers.items():
        blocks = slice(layer.start, layer.start + len(layer.bits))
        for plane, expected in zip(layer.logits, whole.layers[name].logits):
            assert (
                len(plane) == 0
                or float((plane.float() - expected[blocks].float()).abs().max()) <= apart
            ), name
        if apart < 1e-3:
            assert torch.equal(layer.bits, whole.layers[name].bits[blocks]), name


def forward_only(folder: Path, dtype: str, n: int, m: int) -> MaskedModel:
    """Losses, masks and logits have the bits of a whole model's; nothing whole is held."""
    masked, expected = pair(folder, dtype, n, m, logits_dtype=torch.float16)
    model, size, itemsize = masked.model, processes.world_size(), expected.model.dtype.itemsize
    copies = sum(
        parameter.nbytes for parameter in model.parameters() if not isinstance(parameter, DTensor)
    )
    weights = sum(layer.shape.numel() for layer in masked.layers.values())
    held = copies + sum(
        tensor.untyped_storage().nbytes()
        for layer in masked.layers.values()
        for tensor in (layer.weight, *layer.logits, layer.bits)
    )
    planned = copies + weights / size * (itemsize + 2 + 1 / m)
    assert 0.99 < held / planned < (1.1 if size == 3 else 1.05), held / planned  # 3: uneven
    m0 = masked.bits(), expected.bits()
    for _ in range(3):
        loss = masked.loss(TOKENS)
        assert loss == expected.loss(TOKENS)
        for each in (masked, expected):
            each.update(5 * loss)
    with masked.use_masks(m0[0]), expected.use_masks(m0[1]):
        assert masked.loss(TOKENS) == expected.loss(TOKENS)
    assert_same(masked, expected)
    assert any(
        (plane != plane.round()).any() for layer in masked.layers.values() for plane in layer.logits
    )
    return masked


def learn(masked: MaskedModel, expected: MaskedModel, tokens: torch.Tensor, **settings) -> tuple:
    """After each of three steps (learner from a sequence a process, learner from all of them in
    one). Masks are soft in the first two."""
    ours = StraightThrough(masked, **settings)
    with alone():
        one = StraightThrough(expected, **settings)
    for temperature in (2.0, 0.5, 0.0):
        ours.step(tokens[processes.rank()][None], 0.1, temperature=temperature)
        with alone():
            one.step(tokens, 0.1, temperature=temperature)
        yield ours, one
    assert_same(masked, expected, apart=2e-3)


def by_gradients(folder: Path) -> None:
    """What processes learn from a sequence each is what one learns from all of them."""
    masked, expected = pair(folder, "float32")
    for each in (masked, expected):
        from_swaps(each, 1.0, TOKENS, 3)
    assert_same(masked, expected, apart=1e-4)  # products of fewer rows may round otherwise
    for ours, one in learn(masked, expected, TOKENS[: processes.world_size()], checkpointing=True):
        found, expected_squares = (each.normalization.mean_squares for each in (ours, one))
        assert torch.allclose(found * processes.world_size() ** 2, expected_squares, rtol=1e-3)
    assert (
        max(
            float((plane - plane.round()).abs().max())
            for layer in masked.layers.values()
            if len(layer.bits)
            for plane in layer.logits
        )
        > 0.05
    )


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


def experts() -> None:
    """Experts that the text of one process does not reach get no other's gradient."""
    torch.manual_seed(0)
    whole, size = MixtureModel().requires_grad_(False), processes.world_size()
    with torch.device("meta"):
        model = MixtureModel()
    shard(model, torch.device("cpu"), size)
    for (name, module), (_, full) in zip(model.named_modules(), whole.named_modules()):
        if "experts." in name:
            own_weight(module).copy_(Rows.of(module).own(full.weight.data))
            module.bias.data.copy_(full.bias.data)
    (
        model.embedding.load_state_dict(whole.embedding.state_dict()),
        model.head.load_state_dict(whole.head.state_dict()),
    )
    # even: the first expert
    masks, tokens = magnitude_masks(find_layers(whole)), torch.arange(24).view(1, 24) * 2
    tokens = torch.cat([tokens, *[tokens + 1] * (size - 1)]) % 64
    masked, expected = (
        MaskedModel(each, masks, LinearSpace(2, 4), 1.0, backend="eager") for each in (model, whole)
    )
    assert masked.loss(tokens) == expected.loss(tokens)
    for _ in learn(masked, expected, tokens):
        pass


def failures_of_fsdp_are_noticed(folder: Path) -> None:
    """A model that keeps what it has gathered computes with old masks, and one without hooks learns
    nothing: errors, not silence."""
    masked = pair(folder, "float32")[0]
    learner = StraightThrough(masked)
    masked.undo[-2]()
    with pytest.raises(RuntimeError, match=r"no gradient for model\.layers\.1\.mlp\.down_proj"):
        learner.step(TOKENS[:1], 0.1)
    masked.model.set_reshard_after_forward(False)
    masked.model.reset_iter_state = lambda: None  # which would drop them
    masked.loss(TOKENS)
    masked.update(1.0)
    with pytest.raises(RuntimeError, match="computed with an old mask"):
        masked.loss(TOKENS)


def main(folder: Path) -> None:
    with processes.joined("cpu"):
        for name, dtype, n, m in (
            ("llama", "float32", 2, 4),
            ("opt", "float16", 4, 8),
            ("neox", "float32", 2, 4),
        ):
            masked = forward_only(folder / name, dtype, n, m)
            state = masked.state()[1]
            if processes.is_main():
                checkpoint.save(folder / f"state_{name}.pt", {}, state)
            else:
                checkpoint.give_shards(state)
        by_gradients(folder / "opt")
        with pytest.raises(UserError, match="has Conv1D"):
            load_sharded(str(folder / "gpt2"), "float32", "cpu")
        experts()
        failures_of_fsdp_are_noticed(folder / "llama")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
