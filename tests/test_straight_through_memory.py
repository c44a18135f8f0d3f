"""What training/straight_through.py holds in memory, and makes of a model; what is as before when
it is over."""

import weakref

from masking.kernels import Kernels
from masking.spaces import LinearSpace
from models.layers import find_layers
from models.loading import positions
from training.faster_model import SHORT, speed_up

import pytest
import tiny
import torch
from masked import TOKENS, all_logits, forward, learner_of, used_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ["llama", "gpt2", "opt"]
# Qwen3 has norms of heads, too
NORMED = {"Llama": {}, "Gemma": {"head_dim": 16}, "Qwen3": {"head_dim": 16}}


def model_of(kind, layers=2):
    return tiny.random_model(
        kind, **tiny.SIZES | {"num_hidden_layers": layers} | NORMED.get(kind, {"head_dim": 16})
    )


def storages(values):
    """The storages of all tensors in a nest of values."""
    return [
        value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)
    ]


class Allocated(TorchDispatchMode):
    """Follows what operators allocate inside: the bytes of the storages that are alive, and the
    most at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for storage in storages(result):
            # no view, not in place
            if id(storage) not in self.alive and all(storage is not one for one in given):
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage))
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def growth(peak_of_depth):
    """Bytes that each further decoder layer adds to the peak."""
    return (peak_of_depth(4) - peak_of_depth(2)) / 2


WEIGHTS = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # bytes of a decoder layer's projections


def peak_of_learning(depth, tokens, **kwargs):
    learner = learner_of(model_of("Llama", depth), **kwargs)[0]
    learner.step(tokens, 0.1)  # after it, what stays is there already
    with Allocated() as allocated:
        learner.step(tokens, 0.1)
    return allocated.peak


def peak_of_autograd(depth, tokens):
    model = model_of("Llama", depth)
    for module in find_layers(model).values():
        module.weight.requires_grad_()
    with Allocated() as allocated:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return allocated.peak


def test_the_peak_does_not_grow_by_the_weight_gradients():
    """A layer more adds its activations, where ordinary backward adds its weights' gradients to
    them."""
    tokens = TOKENS[:1, :4]
    assert growth(lambda depth: peak_of_autograd(depth, tokens)) >= WEIGHTS
    assert growth(lambda depth: peak_of_learning(depth, tokens)) < WEIGHTS / 4


def test_checkpointing_keeps_a_layers_input_only():
    tokens = TOKENS.repeat(4, 3)
    plain, saved = (
        growth(lambda depth, c=c: peak_of_learning(depth, tokens, checkpointing=c))
        for c in (False, True)
    )
    assert saved < 2 * 4 * 64 * tokens.numel() < plain / 4


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_number_and_finish_gives_everything_back(kind, load):
    def settings_of(model):
        return [
            (
                {
                    name: value
                    for name, value in vars(module).items()
                    if isinstance(value, (float, bool))
                },
                len(module._forward_hooks),
                "forward" in vars(module),
            )
            for module in model.modules()
        ]

    runs = []
    for checkpointing in (False, True):
        model = load(kind)
        before, (learner, masked, dense) = (
            settings_of(model),
            learner_of(model, checkpointing=checkpointing),
        )
        assert kind != "llama" or "forward" in vars(model.model.norm)  # made faster
        losses = torch.tensor([learner.step(TOKENS, 0.3).loss for _ in range(3)])
        runs.append({"losses": losses, "outputs": forward(model), **all_logits(masked)})
        masks = masked.finish()
        after = [
            ({name: now[name] for name in was}, *rest)
            for (now, *rest), (was, *_) in zip(settings_of(model), before)
        ]
        assert after == before and not model.training
        assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        assert torch.allclose(forward(model), runs[-1]["outputs"], atol=1e-5)
        assert all(
            torch.equal(weight, dense[name] * masks[name])
            for name, weight in used_weights(model).items()
        )
    assert all(torch.allclose(value, runs[1][name], atol=1e-5) for name, value in runs[0].items())


def test_checkpointing_where_a_layer_ends_with_a_norm(compiler):
    """What is recomputed ends with an exception inside that norm, which is compiled."""
    losses = []
    for backend, checkpointing in (("eager", False), ("compiled", True)):
        learner, *_ = learner_of(
            model_of("Gemma2", 1), backend=backend, checkpointing=checkpointing
        )
        # the second step moves masks
        temperatures = (2.0, 0.5, 0.0)
        losses.append([learner.step(TOKENS, 0.6, temperature=t).loss for t in temperatures])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# ---------------------------------------------------------------------------------- faster_model.py


def run(model):
    """The logits, and the gradient of their squares in the embedded tokens."""
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("kind", NORMED)
def test_logits_and_gradients_are_the_models_own(kind, compiler):
    model = model_of(kind)
    logits, gradient = run(model)
    attention = model.config._attn_implementation
    restore = speed_up(model, Kernels(LinearSpace(2, 4)), TOKENS.shape[1])
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert len(norms) >= 5 and all("forward" in vars(norm) for norm in norms)
    if hasattr(model, "set_attn_implementation"):
        assert (attention, model.config._attn_implementation) == ("sdpa", "eager")
    faster_logits, faster_gradient = run(model)
    torch.testing.assert_close(faster_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        faster_gradient, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
    )
    restore()
    assert (
        not any("forward" in vars(norm) for norm in norms)
        and model.config._attn_implementation == attention
    )
    assert torch.equal(run(model)[0], logits)


def test_what_is_not_the_models_own_stays():
    """Long sequences keep their fused attention, and a norm that an offloading hook moves keeps
    that hook."""
    model = model_of("Llama")
    moved = model.model.norm
    moved.forward = hooked = moved.forward
    speed_up(model, Kernels(LinearSpace(2, 4), "eager"), SHORT + 1)
    assert model.config._attn_implementation == "sdpa"
    assert vars(moved)["forward"] is hooked and "forward" in vars(
        model.model.layers[0].input_layernorm
    )


def test_parts_that_read_no_text_are_left_as_they_are():
    """Gemma 4's audio has no sdpa, as Gemma 2 has none."""
    text = tiny.SIZES | dict(
        vocab_size=352,
        vocab_size_per_layer_input=352,
        num_hidden_layers=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    model = tiny.random_model(
        "Gemma4",
        text_config=text,
        vision_config=None,
        audio_config=dict(hidden_size=64, num_hidden_layers=1),
    )
    speed_up(model, Kernels(LinearSpace(2, 4), "eager"), 8)()
    assert (model.config._attn_implementation, model.config.audio_config._attn_implementation) == (
        "sdpa",
        "eager",
    )
    assert positions(model) == 64 and not any("audio" in name for name in find_layers(model))
