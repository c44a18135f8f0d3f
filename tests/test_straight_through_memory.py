"""What a backward pass of training/straight_through.py holds in memory, and what is as before when it is over."""
import weakref

import pytest
import torch
import transformers
from masked import TOKENS, all_logits, forward, learner_of, used_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.layers import find_layers

KINDS = ["llama", "gpt2", "opt"]


def deep_llama(layers):
    """A Llama of narrow layers, whose weights outweigh the activations of a few tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                                      num_hidden_layers=layers, initializer_range=0.1)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def storages(values):
    """The storages of all tensors in a nest of values."""
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Allocated(TorchDispatchMode):
    """Follows what operators allocate inside: the bytes of the storages that are alive, and the most at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for storage in storages(result):
            if id(storage) not in self.alive and all(storage is not one for one in given):  # no view, not in place
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage))
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peak_bytes(function):
    """The most memory that tensors made inside had taken at once."""
    with Allocated() as allocated:
        function()
    return allocated.peak


def growth(peak_of_depth):
    """Bytes that each further decoder layer adds to the peak."""
    return (peak_of_depth(8) - peak_of_depth(2)) / 6


WEIGHTS = 4 * (4 * 64 * 64 + 3 * 64 * 128)  # bytes of a decoder layer's projections


def peak_of_learning(depth, tokens, **kwargs):
    learner = learner_of(deep_llama(depth), **kwargs)[0]
    learner.step(tokens, 0.1)  # after it, what stays is there already
    return peak_bytes(lambda: learner.step(tokens, 0.1))


def peak_of_autograd(depth, tokens):
    model = deep_llama(depth)
    for module in find_layers(model).values():
        module.weight.requires_grad_()
    def learn():
        model(input_ids=tokens, labels=tokens).loss.backward()
    return peak_bytes(learn)


def test_the_peak_does_not_grow_by_the_weight_gradients():
    """A layer more adds its activations, where ordinary backward adds its weights' gradients to them."""
    tokens = TOKENS[:1, :4]
    assert growth(lambda depth: peak_of_autograd(depth, tokens)) >= WEIGHTS
    assert growth(lambda depth: peak_of_learning(depth, tokens)) < WEIGHTS / 4


def test_checkpointing_keeps_a_layers_input_only():
    tokens = TOKENS.repeat(4, 3)
    plain, saved = (growth(lambda depth, c=c: peak_of_learning(depth, tokens, checkpointing=c)) for c in (False, True))
    assert saved < 2 * 4 * 64 * tokens.numel() < plain / 4


def with_chances(model, chance=0.5):
    """The model with every dropout and layerdrop it has at this chance."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (isinstance(module, nn.Dropout) and name == "p")):
                setattr(module, name, chance)
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = chance
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_number(kind, load):
    """Nor do dropout and layerdrop, which the libraries' checkpointing would switch on."""
    runs = []
    for checkpointing in (False, True):
        learner, masked, _ = learner_of(with_chances(load(kind)), checkpointing=checkpointing)
        losses = [learner.step(TOKENS, 0.3).loss for _ in range(3)]
        runs.append((losses, all_logits(masked), forward(masked.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    assert all(torch.allclose(runs[0][1][name], runs[1][1][name], atol=1e-5) for name in runs[0][1])
    assert torch.allclose(runs[0][2], runs[1][2], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_finish_gives_everything_back(kind, load, checkpointing):
    model = with_chances(load(kind))
    state = [{name: value for name, value in vars(module).items() if isinstance(value, (float, bool))}
             for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    learner, masked, dense = learner_of(model, checkpointing=checkpointing)
    assert kind != "llama" or "forward" in vars(model.model.norm)  # made faster
    learner.step(TOKENS, 0.3)
    used = forward(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    masks = masked.finish()
    assert [{name: vars(module)[name] for name in before} for module, before in zip(model.modules(), state)] == state
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    assert not getattr(model, "is_gradient_checkpointing", False) and not model.training
    assert torch.allclose(forward(model), used, atol=1e-5)
    assert all(torch.equal(weight, dense[name] * masks[name]) for name, weight in used_weights(model).items())
