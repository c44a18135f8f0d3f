"""masking/masked_model.py: what a model under learned masks computes, layer by layer, bit for
bit."""

import pge
from masking import masked_layer
from masking.block_bits import mask_to_bits
from masking.layers import apply_masks, check_sparsity
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers, weight_matrix
from models.loss import batch_loss

import pytest
import torch
from masked import (
    TOKENS,
    all_logits,
    assert_masked,
    drawn_masks,
    forward,
    logits_of,
    magnitude_masks,
    make,
    same,
    seeded,
    used_weights,
)


@pytest.fixture(params=["llama", "gpt2", "opt"])
def kind(request):
    return request.param


def under(model, masks):
    apply_masks(find_layers(model), masks)
    return model


# ------------------------------------------------------------------------------- the masked forward


def test_masked_layers_are_seen_in_the_model_until_they_are_finished(kind, load):
    """In every place of a module, in that of GPT-2's Conv1D too; the model's own modules come
    back."""
    model = load(kind)
    own, kinds = dict(model.named_modules()), str(model)
    masked, masks, _ = make(model)
    for name in masks:
        rows, columns = weight_matrix(own[name]).shape
        assert str(model.get_submodule(name)) == f"MaskedLinear({columns}, {rows}, 2:4)"
    # equal decoder layers are printed once
    assert 2 * str(model).count("MaskedLinear(") == len(masks)
    assert model.state_dict().keys() == load(kind).state_dict().keys()
    with pytest.raises(RuntimeError, match="call `finish` first"):
        make(model)
    masked.finish()
    assert (
        all(module is own[name] for name, module in model.named_modules()) and str(model) == kinds
    )


@pytest.mark.parametrize(
    "n, m, space",
    [(2, 4, "linear"), (1, 4, "linear"), (2, 8, "linear"), (4, 16, "linear"), (2, 4, "pattern")],
)
def test_every_forward_multiplies_with_dense_weights_under_an_n_m_mask(kind, load, n, m, space):
    """The first mask is m0 itself; each update moves the logits by the score of the mask, and draws
    another."""
    masked, masks, dense = make(load(kind), n, m, space, magnitude=1.0)
    seen = [masks]
    assert same(
        all_logits(masked),
        {name: masked.space.init(masks[name].view(-1, m), 1.0) for name in masks},
    )
    for t in range(3):
        used, drawn, before = used_weights(masked.model), drawn_masks(masked), all_logits(masked)
        assert same(drawn, seen[0]) == (t == 0)
        for name, weight in used.items():
            assert (drawn[name].reshape(-1, m).sum(1) == n).all()
            assert_masked(weight, dense[name], drawn[name])
        seen.insert(0, drawn)
        masked.update(0.3)
        masked.flush()
        for name, layer in list(masked.layers.items())[:3]:
            score = masked.space.score(before[name], drawn[name].view(-1, m))
            assert torch.allclose(logits_of(layer), before[name] - 0.3 * score, atol=2e-6)
    before = all_logits(masked)
    masked.update(0.0)
    forward(masked.model)
    assert same(all_logits(masked), before) and not same(drawn_masks(masked), seen[0])
    masked.finish()
    assert check_sparsity(find_layers(masked.model), (n, m)) == n / m


def test_a_forward_carries_out_the_update_as_flush_does(kind, load):
    """Whether forward passes come after each update or not at all: the same logits, masks and
    outputs."""
    lazy, eager = (make(load(kind), magnitude=1.0, logits_dtype=torch.float16)[0] for _ in range(2))
    for t in range(3):
        for masked in (lazy, eager):
            masked.update(0.2 * (-1) ** t)
        forward(lazy.model)
        eager.flush()
    assert same(all_logits(lazy), all_logits(eager)) and same(lazy.bits(), eager.bits())
    assert all(x.dtype == torch.float16 and x.isfinite().all() for x in all_logits(lazy).values())
    assert torch.equal(forward(lazy.model), forward(eager.model))


# -------------------------------------------------------------------------- which mask a model uses


def test_a_model_uses_others_masks_or_none_and_comes_back(kind, load):
    masked, m0, _ = make(load(kind), magnitude=1.0)
    start, first = masked.bits(), forward(masked.model)
    assert masked.loss(TOKENS) == batch_loss(under(load(kind), m0), TOKENS)
    masked.update(0.5)
    with masked.use_masks(start):  # the update is carried out first, and not lost
        assert torch.equal(forward(masked.model), first)
    learned = forward(masked.model)
    assert not same(drawn_masks(masked), m0)
    with masked.use_dense():
        assert torch.equal(forward(masked.model), forward(load(kind)))
    flipped = {name: mask_to_bits(~mask.view(-1, 4)) for name, mask in m0.items()}
    with pytest.raises(KeyboardInterrupt), masked.use_masks(flipped):
        masked_by_them = forward(masked.model)
        raise KeyboardInterrupt
    assert torch.equal(
        masked_by_them, forward(under(load(kind), {name: ~mask for name, mask in m0.items()}))
    )
    assert torch.equal(forward(masked.model), learned)


# ----------------------------------------------------------------------------------------- settings


def test_learning_some_layers_keeps_the_others_at_m0_or_dense(load):
    """The dense model is dense in those at m0 too, where that is asked for."""
    model = load()
    layers = find_layers(model)
    dense = {name: weight_matrix(layer).clone() for name, layer in layers.items()}
    learned = [name for name in layers if "self_attn" in name]
    masks = magnitude_masks(
        {name: layer for name, layer in layers.items() if "up_proj" not in name}
    )
    masked = MaskedModel(
        model, masks, LinearSpace(2, 4), 0.5, learned=learned, backend="eager", keep_dense=True
    )
    first = forward(model)
    with masked.use_dense():
        assert torch.equal(forward(model), forward(load()))
    assert torch.equal(forward(model), first) and list(masked.layers) == learned
    masked.update(0.5)
    used, drawn = used_weights(model), drawn_masks(masked)
    assert not any(torch.equal(drawn[name], masks[name]) for name in learned)
    for name in layers:
        assert_masked(used[name], dense[name], (masks | drawn).get(name, dense[name] != 0))
    assert list(masked.finish()) == learned


def test_all_layers_share_one_buffer_and_keep_their_dense_weight_without_a_copy(kind, load):
    model = load(kind)
    before = {name: layer.weight.data_ptr() for name, layer in find_layers(model).items()}
    masked = make(model)[0]
    layers = find_layers(model)
    storages = {
        layer.weight.untyped_storage().data_ptr(): layer.weight.untyped_storage()
        for layer in layers.values()
    }
    assert [storage.nbytes() for storage in storages.values()] == [
        4 * max(layer.weight.numel() for layer in layers.values())
    ]
    if kind != "gpt2":  # whose weights are transposed once
        assert {name: layer.weight.data_ptr() for name, layer in masked.layers.items()} == before


# ------------------------------------------------------------------------------------------- finish


def test_finish_leaves_an_ordinary_model_under_the_mode(kind, load):
    model = load(kind)
    shapes = {name: layer.weight.shape for name, layer in find_layers(model).items()}
    masked, masks, dense = make(model, magnitude=0.5)
    for _ in range(3):
        forward(model)
        masked.update(0.5)  # the last is not carried out yet: finish does
    final = masked.finish()
    layers = find_layers(model)
    assert not same(final, masks)
    for name, layer in layers.items():
        assert torch.equal(final[name].view(-1, 4), pge.mode(logits_of(masked.layers[name]), 2))
        assert layer.weight.shape == shapes[name] and layer.weight.is_contiguous()
        assert_masked(weight_matrix(layer), dense[name], final[name])
        assert layer.weight.untyped_storage().nbytes() == 4 * layer.weight.numel()
    assert len({layer.weight.data_ptr() for layer in layers.values()}) == len(layers)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    assert torch.equal(forward(model), forward(under(load(kind), final)))


# small enough to be looked at whole
NAMES = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]


def test_changes_are_counted_in_a_sample_of_the_blocks(load, monkeypatch):
    monkeypatch.setattr(masked_layer, "SAMPLE", 8)
    masked = make(load(), magnitude=1.0)[0]
    assert all(layer.stride > 1 for layer in masked.layers.values()) and masked.changed() == 0
    for layer in masked.layers.values():
        for plane in layer.logits:
            plane.neg_()
    assert masked.changed() == 1


@pytest.mark.parametrize("n, m, space", [(2, 4, "linear"), (2, 4, "pattern"), (8, 16, "linear")])
def test_the_share_of_blocks_that_changed(load, n, m, space):
    masked, m0, _ = make(load(), n, m, space, magnitude=1.0, learned=NAMES)
    for layer in masked.layers.values():
        for plane in layer.logits[::3]:
            plane.add_(torch.randn(len(plane), generator=seeded(1)))
    found = masked.changed()
    logits = torch.cat([logits_of(layer) for layer in masked.layers.values()])
    changed = masked.space.mode(logits) != torch.cat([m0[name].view(-1, m) for name in NAMES])
    assert found == pytest.approx(float(changed.any(1).float().mean())) and 0 < found < 1
