"""masking/layers.py: which layers are found, and masking them for good."""

from contextlib import nullcontext

from eval import apply_and_verify
from files.mask_files import MaskFile
from masking.layers import apply_masks, check_sparsity, learned_layers, match_masks, note_sparse
from models.layers import (
    DENSE,
    check_divisible,
    find_layers,
    is_transposed,
    layers_to_mask,
    weight_matrix,
)
from models.loading import model_fingerprint
from utils import UserError

import pytest
import tiny
import torch
import transformers
from masked import assert_masked, magnitude_masks

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
NAMES = {
    kind: [f"{stem}.{i}.{name}" for i in range(2) for name in names]
    for kind, stem, names in (
        (
            "llama",
            "model.layers",
            [*ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
        ),
        ("gpt2", "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("opt", "model.decoder.layers", [*ATTENTION, "self_attn.out_proj", "fc1", "fc2"]),
    )
}


@pytest.fixture(params=list(NAMES))
def kind(request):
    return request.param


# ----------------------------------------------------------------------------------- finding layers


def test_every_projection_is_found_and_no_head(kind, load):
    """GPT-2 and OPT tie their head to the embedding; Llama's head is its own. What it is called
    names no model."""
    model = load(kind)
    layers = find_layers(model)
    assert sorted(layers) == sorted(NAMES[kind])
    assert all(is_transposed(module) == (kind == "gpt2") for module in layers.values())
    fingerprint = model_fingerprint(model)
    model.head, model.get_output_embeddings = model._modules.pop("lm_head"), lambda: model.head
    assert model_fingerprint(model) == fingerprint


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["self_attn"], [name for name in NAMES["llama"] if "self_attn" in name]),
        (
            ["layers.1.mlp", "layers.0.self_attn.q_proj"],
            ["model.layers.0.self_attn.q_proj"]
            + [name for name in NAMES["llama"] if "layers.1.mlp" in name],
        ),
        (
            [r"(gate|up)_proj$"],
            [name for name in NAMES["llama"] if name.endswith(("gate_proj", "up_proj"))],
        ),
        (
            [r"layers\.1\..*[qk]_proj", "down"],
            [
                f"model.layers.{name}_proj"
                for name in ("0.mlp.down", "1.self_attn.q", "1.self_attn.k", "1.mlp.down")
            ],
        ),
    ],
)
def test_targets_select_exactly_what_they_name_in_the_order_of_the_model(load, targets, expected):
    assert list(find_layers(load(), targets)) == expected


def test_a_name_wins_over_a_regular_expression():
    """'.0.' is a part of names, so layer 10, which the regular expression would match, is not
    meant."""
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=11,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert {name.split(".")[2] for name in find_layers(model, [".0."])} == {"0"}
    assert {name.split(".")[2] for name in find_layers(model, [".10."])} == {"10"}
    assert {name.split(".")[2] for name in find_layers(model, [r"layers\..?0\."])} == {"0", "10"}


@pytest.mark.parametrize("target", ["no_such_layer", "lm_head", "embed", "[", "*"])
def test_targets_that_match_nothing_are_refused(load, target):
    with pytest.raises(
        UserError, match=r"matches no layer; names look like model.layers.0.self_attn.q_proj"
    ) as error:
        find_layers(load(), ["mlp", target])
    assert f"--targets {target} " in str(error.value)


def test_fused_experts_are_refused_clearly_and_the_rest_can_be_named(tmp_path):
    assert all(
        map(
            DENSE.search,
            ["mlp.gate", "mlp.shared_expert_gate", "moe.router.layer", "mixer.dt_proj"],
        )
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.make_moe(tmp_path))
    # before transformers 5 they are not fused, and all but the router is found
    with (
        nullcontext()
        if int(transformers.__version__.split(".")[0]) < 5
        else pytest.raises(UserError, match=r"fused experts.*--targets self_attn")
    ):
        assert len(layers_to_mask(model, None, 4)) == 2 * (4 + 4 * 3)
    assert len(layers_to_mask(model, ["self_attn"], 4)) == 8
    # sparse elsewhere is not sparse
    with pytest.raises(UserError, match=r"fused experts|q_proj .* among them"):
        apply_and_verify(model, None, (2, 4), None)


def test_layers_that_share_a_weight_are_refused(load):
    model = load()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        UserError, match=r"layers.0.mlp.up_proj and model.layers.1.mlp.up_proj share a weight"
    ):
        layers_to_mask(model, None, 4)
    assert len(layers_to_mask(model, ["self_attn"], 4)) == 8


def test_check_divisible(load):
    layers = find_layers(load("gpt2"))
    with pytest.raises(
        UserError,
        match=r"M = 5 does not divide the 64 input features of transformer.h.0.attn.c_attn",
    ):
        check_divisible(layers, 5)
    check_divisible({"c_proj": layers["transformer.h.0.mlp.c_proj"]}, 256)  # in: 256, out: 64


def test_layers_without_a_mask_may_have_any_width(load):
    name = "model.layers.0.mlp.down_proj"  # 128 inputs, the others 64
    assert learned_layers(load(), MaskFile({name: None}, 2, 128), None) == [name]


def test_masks_of_another_model_are_refused(load):
    layers = find_layers(load())
    masks = magnitude_masks(layers)
    match_masks(layers, masks)
    with pytest.raises(
        UserError, match=r"another model: model.layers.9.mlp is .* and missing in the model"
    ):
        match_masks(layers, masks | {"model.layers.9.mlp": masks["model.layers.0.mlp.up_proj"]})
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(UserError, match=r"up_proj is \[64, 128\] in .* and \[128, 64\] in"):
        match_masks(layers, masks | {name: masks[name].T})
    layers, name = find_layers(load("gpt2")), "transformer.h.0.mlp.c_fc"
    # a transposed layer: out by in
    match_masks(layers, {name: torch.ones(256, 64, dtype=torch.bool)})
    with pytest.raises(UserError, match="another model"):
        match_masks(layers, {name: torch.ones(64, 256, dtype=torch.bool)})


# ------------------------------------------------------------------ masks for good, and their check


def test_apply_masks_zeroes_in_place(kind, load):
    model = load(kind)
    layers = find_layers(model)
    dense, masks = (
        {name: weight_matrix(layer).clone() for name, layer in layers.items()},
        magnitude_masks(layers),
    )
    storages = [layer.weight.data_ptr() for layer in layers.values()]
    apply_masks(layers, masks)
    assert storages == [layer.weight.data_ptr() for layer in layers.values()]
    for name, layer in layers.items():
        assert_masked(weight_matrix(layer), dense[name], masks[name])


def test_check_sparsity(load):
    layers = find_layers(load())
    with pytest.raises(
        UserError, match=r"14 of 14 layers are not 2:4 sparse, .*q_proj .*blocks.* among them;"
    ):
        check_sparsity(layers, (2, 4))
    apply_masks(layers, magnitude_masks(layers))
    assert check_sparsity(layers, (2, 4)) == check_sparsity(layers, None) == 0.5
    # fewer than N may be kept
    assert check_sparsity(layers, (4, 8)) == check_sparsity(layers, (3, 4)) == 0.5


def test_check_sparsity_looks_along_the_inputs_of_a_transposed_layer(load):
    layers = find_layers(load("gpt2"))
    apply_masks(layers, magnitude_masks(layers))
    assert check_sparsity(layers, (2, 4)) == 0.5
    layers["transformer.h.0.mlp.c_fc"].weight.data[:, ::2] = 0  # 2:4 along the outputs
    layers["transformer.h.0.mlp.c_fc"].weight.data[:, 1::2] = 1
    with pytest.raises(UserError, match="1 of 8 layers"):
        check_sparsity(layers, (2, 4))


def test_a_model_that_is_sparse_already_is_pointed_out(load, capsys):
    layers, _ = find_layers(load()), capsys.readouterr()
    note_sparse(layers)
    assert capsys.readouterr().err == ""
    layers["model.layers.0.mlp.up_proj"].weight.data[::2] = 0
    note_sparse(layers)
    assert (
        "note: 50% of the weights of a layer are zero already: is this the dense model?"
        in capsys.readouterr().err
    )
