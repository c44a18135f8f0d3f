"""masking/masked_model.py: what a model under learned masks computes, layer by layer, bit for bit."""
from utils import UserError

import pytest
import torch
import transformers
from masked import assert_masked, drawn_masks, forward, logits_of, magnitude_masks, make, same, used_weights
from torch import nn

import pge
from masking.block_bits import mask_to_bits, write_masked
from masking.layers import apply_masks, check_sparsity
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers, weight_matrix


@pytest.fixture(params=["llama", "gpt2", "opt"])
def kind(request):
    return request.param


# -------------------------------------------------------------------------------------------------- the masked forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_forward_is_that_of_the_model_under_m0(kind, load, dtype):
    plain = load(kind, dtype)
    masked, masks, _ = make(load(kind, dtype))
    apply_masks(find_layers(plain), masks)
    assert torch.equal(forward(masked.model), forward(plain))
    assert torch.equal(forward(masked.model), forward(plain))  # and the second, without an update between


@pytest.mark.parametrize("n, m, space", [(2, 4, "linear"), (1, 4, "linear"), (2, 8, "linear"), (2, 4, "pattern")])
def test_every_forward_multiplies_with_dense_weights_under_an_n_m_mask(kind, load, n, m, space):
    masked, masks, dense = make(load(kind), n, m, space, magnitude=1.0)
    seen = []
    for t in range(4):
        used = used_weights(masked.model)
        drawn = drawn_masks(masked)
        assert t > 0 or same(drawn, masks)  # the first mask is m0 itself
        for name, weight in used.items():
            assert (drawn[name].reshape(-1, m).sum(1) == n).all()
            assert_masked(weight, dense[name], drawn[name])
        seen.append(drawn)
        masked.update(0.3)
    assert not any(same(seen[t], seen[t + 1]) for t in range(3))


def test_blocks_of_a_conv1d_run_along_its_inputs(load):
    masked, _, _ = make(load("gpt2"), magnitude=0.5)
    masked.update(0.1)
    forward(masked.model)
    for name, module in find_layers(masked.model).items():
        # The scratch buffer holds one layer at a time: write this one again.
        layer = masked.layers[name]
        write_masked(layer.weight.view(-1), layer.bits, layer.scratch, 4)
        inputs, outputs = module.weight.shape  # Conv1D: [in, out]
        assert (inputs, outputs) == tuple(layer.weight.shape)[::-1]
        assert ((module.weight.view(inputs // 4, 4, outputs) != 0).sum(1) == 2).all()


def test_8_16_works(load):
    model = load()
    layers = find_layers(model, ["k_proj", "v_proj"])
    masks = magnitude_masks(layers, 8, 16)
    dense = {name: weight_matrix(layer).clone() for name, layer in layers.items()}
    masked = MaskedModel(model, masks, LinearSpace(8, 16), magnitude=1.0, mode="eager")
    masked.update(0.5)
    used = used_weights(model)
    for name, drawn in drawn_masks(masked).items():
        assert (drawn.reshape(-1, 16).sum(1) == 8).all() and not torch.equal(drawn, masks[name])
        assert_masked(used[name], dense[name], drawn)
    assert masked.layers["model.layers.0.self_attn.k_proj"].bits.dtype == torch.int32
    masked.finish()
    assert check_sparsity(layers, (8, 16)) == 0.5


def test_an_update_moves_the_logits_by_the_score(load):
    masked, masks, _ = make(load(), magnitude=2.0)
    before = {name: logits_of(layer) for name, layer in masked.layers.items()}
    masked.update(0.7)
    forward(masked.model)
    for name, layer in masked.layers.items():
        score = pge.score(before[name], masks[name].view(-1, 4))
        assert torch.allclose(logits_of(layer), before[name] - 0.7 * score, atol=2e-6)


def test_a_forward_carries_out_the_update_as_flush_does(kind, load):
    """Whether forward passes come after each update or not at all: the same logits, masks and outputs."""
    lazy, eager = make(load(kind), magnitude=1.0)[0], make(load(kind), magnitude=1.0)[0]
    for t in range(3):
        for masked in (lazy, eager):
            masked.update(0.2 * (-1) ** t)
        forward(lazy.model)
        eager.flush()
        eager.flush()  # nothing is due any more
    for name in lazy.layers:
        assert torch.equal(logits_of(lazy.layers[name]), logits_of(eager.layers[name]))
    assert same(drawn_masks(lazy), drawn_masks(eager))
    assert torch.equal(forward(lazy.model), forward(eager.model))


def test_masks_repeat_with_the_seed_and_differ_without(load):
    runs = []
    for seed in (0, 0, 1):
        masked = make(load(), magnitude=1.0, seed=seed)[0]
        masked.update(0.2)
        masked.flush()
        runs.append(drawn_masks(masked))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_every_step_and_layer_draws_afresh(load):
    """At equal logits two draws of a 2:4 block agree once in 6."""
    masked = make(load(), magnitude=0.0)[0]
    seen = []
    for _ in range(2):
        masked.update(0.0)
        masked.flush()
        seen.append(drawn_masks(masked))
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    for a, b in ((seen[0][first], seen[1][first]), (seen[0][first], seen[0][second])):
        assert float((a == b).view(-1, 4).all(1).float().mean()) == pytest.approx(1 / 6, abs=0.05)


def test_eager_and_exact_steps_move_the_logits_alike(load):
    logits = []
    for mode in ("eager", "exact"):
        masked = make(load(), magnitude=2.0, mode=mode)[0]
        masked.update(0.7)
        masked.flush()
        logits.append([logits_of(layer) for layer in masked.layers.values()])
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(*logits))


# -------------------------------------------------------------------------------------------------------- masked by m0


def test_use_initial_is_masked_by_m0_and_restores_the_masks_drawn(kind, load):
    masked, masks, dense = make(load(kind), magnitude=1.0)
    masked.keep_initial(masks)
    before = forward(masked.model)
    masked.update(0.5)
    with masked.use_initial():  # the update is carried out first, and not lost
        inside, used = forward(masked.model), used_weights(masked.model)
    drawn = drawn_masks(masked)
    assert torch.equal(inside, before)
    for name, weight in used.items():
        assert_masked(weight, dense[name], masks[name])
    assert not same(drawn, masks)
    assert all(torch.equal(weight != 0, drawn[name]) for name, weight in used_weights(masked.model).items())
    logits = logits_of(masked.layers[next(iter(masks))])
    assert set(logits.flatten().tolist()) != {0.0, 1.0}


def test_use_initial_is_masked_by_m0_where_learning_started_elsewhere(load):
    masked, masks, dense = make(load(), init="random")
    masked.keep_initial(masks)
    with masked.use_initial():
        used = used_weights(masked.model)
    for name, weight in used.items():
        assert_masked(weight, dense[name], masks[name])


def test_the_masks_drawn_are_back_after_an_error_inside_use_initial(load):
    masked, masks, _ = make(load(), magnitude=1.0)
    masked.keep_initial(masks)
    masked.update(0.5)
    with pytest.raises(KeyboardInterrupt), masked.use_initial():
        raise KeyboardInterrupt
    used, drawn = used_weights(masked.model), drawn_masks(masked)
    assert not same(drawn, masks) and all(torch.equal(used[name] != 0, drawn[name]) for name in drawn)


# ------------------------------------------------------------------------------------------------------------ settings


def test_learning_some_layers_keeps_the_others_at_m0(load):
    model = load()
    names = list(find_layers(model))
    learned = [name for name in names if "self_attn" in name]
    masked, masks, dense = make(model, magnitude=0.5, learned=learned)
    assert list(masked.layers) == learned
    masked.update(0.5)
    used = used_weights(model)
    for name in names:
        mask = masked.layers[name].mask_of(masked.layers[name].bits) if name in learned else masks[name]
        assert torch.equal(mask, masks[name]) == (name not in learned)
        assert_masked(used[name], dense[name], mask)
    assert list(masked.finish()) == learned
    assert check_sparsity(find_layers(model), (2, 4)) == 0.5


def test_layers_without_a_mask_stay_dense(load):
    model = load()
    masks = magnitude_masks(find_layers(model, ["mlp"]))
    dense = model.model.layers[0].self_attn.q_proj.weight.clone()
    masked = MaskedModel(model, masks, LinearSpace(2, 4), mode="eager")
    forward(model)
    assert list(masked.layers) == list(masks)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, dense)


def test_a_mask_of_another_model_is_refused_before_anything_changes(load):
    model, other = load(), load("opt")
    with pytest.raises(UserError, match="another model"):
        MaskedModel(model, magnitude_masks(find_layers(other)), LinearSpace(2, 4))
    assert check_sparsity(find_layers(model), None) == 1.0


@pytest.mark.parametrize("space", ["linear", "pattern"])
def test_initial_logits_prefer_m0(load, space):
    masked, masks, _ = make(load(), space=space, magnitude=7.0)
    layer = masked.layers["model.layers.0.mlp.up_proj"]
    assert logits_of(layer).shape == (128 * 64 // 4, masked.space.width)
    assert torch.equal(logits_of(layer), masked.space.init(masks["model.layers.0.mlp.up_proj"].view(-1, 4), 7.0))
    assert same(masked.mode_masks(), masks)


def test_random_logits_start_at_their_own_mode(load):
    runs = [make(load(), init="random", magnitude=3.0, seed=seed) for seed in (0, 0, 1)]
    masked, masks, dense = runs[0]
    logits = torch.cat([logits_of(layer).flatten() for layer in masked.layers.values()])
    assert abs(float(logits.mean())) < 0.1 and float(logits.std()) == pytest.approx(3.0, rel=0.02)
    drawn = drawn_masks(masked)
    assert same(drawn, masked.mode_masks()) and not same(drawn, masks)
    for name, weight in used_weights(masked.model).items():
        assert_masked(weight, dense[name], drawn[name])
    assert same(drawn, drawn_masks(runs[1][0])) and not same(drawn, drawn_masks(runs[2][0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("init", ["mask", "random"])
def test_logits_of_16_bits(load, dtype, init):
    masked = make(load(), logits_dtype=dtype, init=init, magnitude=2.0)[0]
    assert all(logits_of(layer).dtype == dtype for layer in masked.layers.values())
    for _ in range(3):
        masked.update(0.5)
        forward(masked.model)
    logits = [logits_of(layer) for layer in masked.layers.values()]
    assert all(x.dtype == dtype and x.isfinite().all() for x in logits)
    masked.finish()
    assert check_sparsity(find_layers(masked.model), (2, 4)) == 0.5


def test_all_layers_share_one_buffer_the_size_of_the_largest(kind, load):
    masked = make(load(kind))[0]
    layers = find_layers(masked.model)
    storages = {layer.weight.untyped_storage().data_ptr(): layer.weight.untyped_storage() for layer in layers.values()}
    assert len(storages) == 1
    largest = max(layer.weight.numel() for layer in layers.values())
    assert next(iter(storages.values())).nbytes() == 4 * largest


def test_a_linear_keeps_its_dense_weight_without_a_copy(load):
    model = load()
    before = {name: layer.weight.data_ptr() for name, layer in find_layers(model).items()}
    masked = make(model)[0]
    assert {name: layer.weight.data_ptr() for name, layer in masked.layers.items()} == before


# -------------------------------------------------------------------------------------------------------------- finish


def test_finish_leaves_an_ordinary_model_under_the_mode(kind, load):
    model = load(kind)
    masked, masks, dense = make(model, magnitude=0.5)
    shapes = {name: layer.weight.shape for name, layer in find_layers(load(kind)).items()}
    for _ in range(3):
        masked.update(0.5)
        forward(model)
    masked.update(0.5)  # not carried out yet: finish does
    mode = masked.mode_masks()
    final = masked.finish()
    assert same(final, mode) and not same(final, masks)
    layers = find_layers(model)
    for name, layer in layers.items():
        assert torch.equal(final[name].view(-1, 4), pge.mode(logits_of(masked.layers[name]), 2))
        assert layer.weight.shape == shapes[name] and layer.weight.is_contiguous()
        assert_masked(weight_matrix(layer), dense[name], final[name])
        assert layer.weight.untyped_storage().nbytes() == 4 * layer.weight.numel()
    assert len({layer.weight.data_ptr() for layer in layers.values()}) == len(layers)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    assert check_sparsity(layers, (2, 4)) == 0.5
    plain = load(kind)
    apply_masks(find_layers(plain), final)
    assert torch.equal(forward(model), forward(plain))


def test_a_finished_model_saves_and_loads(load, tmp_path):
    model = load("gpt2")
    masked = make(model)[0]
    masked.finish()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(forward(again), forward(model))


def test_a_plain_stack_of_linears_is_a_model_too():
    """Only forward passes of modules are used, and embeddings may be missing."""
    class Stack(nn.Sequential):
        def get_input_embeddings(self):
            return nn.Embedding(2, 2)

        def get_output_embeddings(self):
            return None

    model = Stack(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    masked, masks, dense = make(model)
    x = torch.randn(3, 16)
    expected = nn.functional.linear(x, dense["0"] * masks["0"]).relu()
    expected = nn.functional.linear(expected, dense["2"] * masks["2"], model[2].bias)
    assert torch.allclose(model(x), expected, atol=1e-6) and list(masked.layers) == ["0", "2"]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_masks_of_a_step_are_drawn_in_any_order(load, order):
    """What is drawn, used and learned does not depend on which of a step's masks a process scores, and when."""
    one, other = (make(load("llama"), magnitude=1.0)[0] for _ in range(2))
    for coefficients in ([0.5, -0.2, 0.1], [0.3, 0.3, -0.6]):
        used = {}
        for sample in order:
            one.draw(sample)
            forward(one.model)
            used[sample] = drawn_masks(one)
        other.draw(1)
        forward(other.model)
        assert same(drawn_masks(other), used[1]) and not same(used[0], used[1]) and not same(used[1], used[2])
        one.update_many(coefficients)
        other.update_many(coefficients)
        assert one.checksum() == other.checksum()
    assert one.checksum() != make(load("llama"), magnitude=1.0)[0].checksum()


# ---------------------------------------------------------------------------------------------- which mask a model uses


def test_a_model_uses_others_masks_or_none_and_comes_back(load):
    masked, m0, _ = make(load(), magnitude=1.0)
    first = forward(masked.model)
    plain = forward(load())
    masked.update(0.5)
    masked.flush()
    learned = forward(masked.model)
    assert not torch.equal(learned, first)
    with masked.use_dense():
        assert torch.equal(forward(masked.model), plain)
    assert torch.equal(forward(masked.model), learned)
    flipped = {name: mask_to_bits(~mask.view(-1, 4)) for name, mask in m0.items()}
    with pytest.raises(KeyboardInterrupt), masked.use_masks(flipped):
        masked_by_them = forward(masked.model)
        raise KeyboardInterrupt
    other = load()
    apply_masks(find_layers(other), {name: ~mask for name, mask in m0.items()})
    assert torch.equal(masked_by_them, forward(other)) and torch.equal(forward(masked.model), learned)


def test_the_dense_model_is_dense_in_layers_that_are_not_learned_too(load):
    masked, _, _ = make(load(), learned=["model.layers.0.self_attn.k_proj"], keep_dense=True)
    plain, first = forward(load()), forward(masked.model)
    assert not torch.equal(first, plain)
    with masked.use_dense():
        assert torch.equal(forward(masked.model), plain)
    assert torch.equal(forward(masked.model), first)
