"""pruning/channels.py and pruning/channel_order.py: the function stays, and the search keeps
more."""

import itertools

from models.layers import find_layers
from pruning import channel_order
from pruning.calibration import input_norms
from pruning.channel_order import (
    assignment,
    best_order,
    find_orders,
    kept,
    readers,
    scores,
    search_and_reorder,
)
from pruning.channels import channel_sets, reorder
from utils import UserError

import pytest
import tiny
import torch
import transformers

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SPREAD = dict(initializer_range=tiny.SPREAD)
MLP = dict(intermediate_size=48) | SPREAD
GROUPED = dict(num_key_value_heads=2) | MLP
OPT = dict(ffn_dim=48, word_embed_proj_dim=32, init_std=tiny.SPREAD)
NEW = int(transformers.__version__.split(".")[0]) >= 5
CONFIGS = {  # name -> (kind, what is its own)
    "llama": ("Llama", GROUPED | dict(attention_bias=True, mlp_bias=True)),
    "llama, tied": ("Llama", GROUPED | dict(tie_word_embeddings=True)),
    **{
        name: (name, GROUPED)
        for name in ("Mistral", "Qwen2", "Olmo2", "SmolLM3", "Granite", "Phi3")
    },
    **{
        name: (name, GROUPED | dict(head_dim=16))
        for name in ("Qwen3", "Gemma", "Gemma2", "Gemma3Text")
    },
    "phi": ("Phi", GROUPED | dict(qk_layernorm=NEW)),  # older versions normalise the wrong shape
    "opt": ("OPT", OPT),
    "opt, norms behind": ("OPT", OPT | dict(do_layer_norm_before=False)),
    "gpt_neox": ("GPTNeoX", MLP),
    "gpt_neox, in turn": ("GPTNeoX", MLP | dict(use_parallel_residual=False)),
    "gpt2": ("GPT2", dict(n_inner=48) | SPREAD),
}
# in which the attention masks of older versions overflow
EXACT = torch.float64 if NEW else torch.float32


def make(name, dtype=EXACT):
    """A model of random weights, biases and norms, so that whatever is left in its place shows."""
    kind, own = CONFIGS[name]
    model = tiny.random_model(kind, **SIZES | own)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


# ------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("name", CONFIGS)
def test_random_orders_leave_the_function_and_move_the_weights(name):
    """Every kind of set by itself; RMSNorm computes in float32 even in a float64 model, so that
    rounding is of that."""
    tokens = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    model = make(name)
    logits, sets, layers = model(input_ids=tokens).logits, channel_sets(model), find_layers(model)
    assert sorted(
        reader for channels in sets.values() for reader in readers(channels, layers)
    ) == sorted(layers)
    assert (
        sorted(key.rpartition(".")[2] for key in sets)
        == ["hidden"] * 2 + ["residual"] + ["value"] * 2
    )
    assert sets["residual"].size == 32 and all(
        sets[key].groups == model.config.to_dict().get("num_key_value_heads", 4)
        for key in sets
        if key.endswith("value")
    )
    for kind in ("value", "hidden", "residual"):
        before = {key: parameter.clone() for key, parameter in model.named_parameters()}
        chosen = {key: channels for key, channels in sets.items() if key.endswith(kind)}
        reorder(
            model,
            {
                key: torch.rand(channels.groups, channels.size).argsort(1)
                for key, channels in chosen.items()
            },
        )
        moved = {
            key
            for key, parameter in model.named_parameters()
            if not torch.equal(parameter, before[key])
        }
        assert moved == {key for channels in chosen.values() for key in channels.places}
        after = model(input_ids=tokens).logits
        assert float((after - logits).abs().max()) < 2e-5 * float(logits.abs().max())


def test_scores_are_shares_of_a_layers_output():
    model = make("llama")
    name, channels = "model.layers.0.mlp.down_proj", channel_sets(model)["model.layers.0.hidden"]
    norm = torch.rand(48, generator=torch.Generator().manual_seed(0))
    added = (model.get_submodule(name).weight * norm).square()
    found = scores(
        {name: model.get_submodule(name)},
        {name: norm},
        readers(channels, find_layers(model)),
        10**6,
        None,
    )
    assert torch.allclose(found, (added / added.mean())[None].float())


def test_what_is_not_known_is_refused_by_name(tmp_path):
    moe = transformers.AutoModelForCausalLM.from_pretrained(tiny.make_moe(tmp_path))
    with pytest.raises(UserError, match=r"architecture mixtral cannot .* these can: llama"):
        channel_sets(moe)


@pytest.mark.parametrize(
    "name, order",
    [
        ("nothing", torch.arange(32)[None]),
        ("residual", torch.arange(48)[None]),
        ("residual", torch.zeros(1, 32)),
    ],
)
def test_orders_of_other_channels_are_refused_and_nothing_moves(name, order):
    model, untouched = make("llama"), make("llama").state_dict()
    with pytest.raises(UserError, match=f"the order of {name} is not one of this model's channels"):
        reorder(model, {"model.layers.0.hidden": torch.arange(48).roll(1)[None], name: order})
    assert all(torch.equal(weight, untouched[key]) for key, weight in model.state_dict().items())


# --------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_assignment_is_the_best_of_all(n):
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        value = (
            torch.randint(3, (n, n), generator=generator).float()
            if seed % 2
            else torch.randn(n, n, generator=generator)
        )  # with ties, and without
        sums = {
            p: sum(float(value[i, p[i]]) for i in range(n))
            for p in itertools.permutations(range(n))
        }
        assert sums[tuple(assignment(value).tolist())] == pytest.approx(
            max(sums.values()), abs=1e-5
        )


def score_of(rows, size, seed):
    """Heavy tails, and columns of different sizes, as weights times inputs have."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, size, generator=generator).square()
        * torch.rand(size, generator=generator).exp()
    )


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])
def test_more_steps_keep_more(n, m):
    score = score_of(40, 48, 0)
    before = sum(float(block.sort(dim=1).values[:, -n:].sum()) for block in score.split(m, dim=1))
    assert kept(score, n, m) == pytest.approx(before, rel=1e-6)
    path = [before]
    for steps in (1, 5, 30):
        order = best_order(score, n, m, steps, torch.Generator().manual_seed(0))
        assert sorted(order.tolist()) == list(range(48))
        path.append(kept(score[:, order], n, m))
    assert (
        all(b >= a * (1 - 1e-6) for a, b in itertools.pairwise(path)) and path[-1] > 1.01 * before
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "Phi3"])
def test_the_reordered_model_keeps_what_the_search_says(name):
    """Calibrated again, its scores as they lie keep that share; of no kind less than before."""
    model, tokens = (
        make(name, torch.float32),
        torch.randint(3, 50, (4, 24), generator=torch.Generator().manual_seed(1)),
    )
    layers, sets = find_layers(model), channel_sets(model)
    _, shares = search_and_reorder(model, layers, tokens, (2, 4), 10)
    norms, generator = input_norms(model, layers, tokens), torch.Generator()
    for kind, (before, after) in shares.items():
        score = torch.cat(
            [
                scores(layers, norms, readers(channels, layers), 10**6, generator).reshape(
                    -1, channels.size
                )
                for key, channels in sets.items()
                if key.endswith(kind)
            ]
        )
        assert kept(score, 2, 4) / float(score.sum()) == pytest.approx(after, rel=1e-4)
        assert before < after < 1


def test_a_reordered_model_that_computes_something_else_is_told(monkeypatch):
    model = make("llama", torch.float32)
    monkeypatch.setattr(
        channel_order, "reorder", lambda model, orders: model.model.norm.weight.mul_(3)
    )
    with pytest.raises(UserError, match="the loss of a calibration sequence is"):
        search_and_reorder(model, find_layers(model), torch.randint(3, 50, (4, 24)), (2, 4), 1)


def test_layers_may_never_fire_and_sets_that_m_does_not_divide_are_left():
    model = make("llama", torch.float32)
    layers = find_layers(model)
    norms = input_norms(model, layers, torch.randint(3, 50, (4, 24)))
    norms["model.layers.0.mlp.down_proj"].zero_()
    orders, _ = find_orders(model, layers, norms, (8, 16), 2, 64)
    # heads have 8 channels
    assert {key.rpartition(".")[2] for key in orders} == {"residual", "hidden"}
