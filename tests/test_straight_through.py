"""training/straight_through.py: its gradient against autograd and enumeration, its update by an
independent formula, and what it learns."""

import math
from itertools import combinations

from masking import fused_kernels
from masking.fused_kernels import BLOCK_DECAY, MOST
from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers, is_transposed, weight_matrix
from models.loss import batch_loss
from training import normalization
from training.normalization import DECAY, FLOOR
from training.straight_through import SOFT, StraightThrough, soft_temperature, step_size
from utils import UserError

import pytest
import torch
import transformers
from exact import by_orderings, exact_vjp, inclusion_by_drawings
from masked import (
    TOKENS,
    Stack,
    all_logits,
    drawn_masks,
    forward,
    learner_of,
    logits_of,
    magnitude_masks,
    same,
    seeded,
    used_weights,
    watch,
)
from runs import is_strict
from sharded_script import MixtureModel
from torch import nn

KINDS = ["llama", "gpt2", "opt"]


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 6)])
def test_it_is_the_true_gradient_where_the_loss_is_linear_in_the_mask(n, m, monkeypatch):
    """f = <V, x (m * W)^T + b>: d E f / d pi = sum over all masks of p(S) f(S) score(S), enumerated
    in decimals."""
    monkeypatch.setattr(normalization, "FLOOR", 1e3)  # above all blocks: all move by one factor
    monkeypatch.setattr(fused_kernels, "MOST", 1e9)
    generator = seeded(0)
    model = Stack(nn.Linear(12, 3)).requires_grad_(False)
    model[0].weight.copy_(torch.randn(3, 12, generator=generator))
    x, v = torch.randn(5, 12, generator=generator), torch.randn(5, 3, generator=generator)
    learner, masked, dense = learner_of(model, n, m, init="random")
    layer = masked.layers["0"]
    # what each weight adds to f if it is kept
    worth = (dense["0"] * (v.T @ x)).double().view(-1, m)
    truth = torch.zeros_like(worth)
    for block, logits in enumerate(logits_of(layer).tolist()):
        for kept in combinations(range(m), n):
            p, score = by_orderings(logits, kept, digits=40)
            truth[block] += (
                float(p) * worth[block, list(kept)].sum() * torch.tensor([float(g) for g in score])
            )
    before, learner.keys = logits_of(layer), masked.keys()
    for size in (0.0, 1e3):  # the first only measures
        y = model(x)
        learner.normalization.begin_pass(size)
        y.backward(v)
        learner.normalization.end_pass()
    move = (before - logits_of(layer)).double()
    assert torch.allclose(move, truth / truth.square().mean().sqrt(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", [[], [1.0, 1.0], [0.0, 0.75]])
def test_weight_gradients_are_those_of_an_ordinary_model(kind, load, shares):
    """Of pruned weights too; with Conv1D's [in, out] weights, biases and shared buffers; of
    sequences that distill to different shares."""
    learner = learner_of(load(kind))[0]
    seen = watch(learner)
    result = learner.step(TOKENS, 0.0, distill=shares)
    distill = torch.tensor(shares or [0.0, 0.0])[:, None, None]
    plain = load(kind)
    layers = find_layers(plain)
    apply_masks(layers, magnitude_masks(layers))
    parameters = [module.weight.requires_grad_() for module in layers.values()]
    log_probs = plain(input_ids=TOKENS).logits[:, :-1].log_softmax(-1)
    text = -log_probs.gather(2, TOKENS[:, 1:, None])
    teacher = forward(load(kind))[:, :-1].softmax(-1)
    objective = ((1 - distill) * text).sum() - (distill * teacher * log_probs).sum()
    expected = dict(zip(layers, torch.autograd.grad(objective, parameters)))
    assert (
        result.loss == pytest.approx(float(text.detach().mean()), rel=1e-5)
        and result.not_finite == 0
    )
    assert sorted(layer.name for layer, *_ in seen) == sorted(layers)
    for layer, gradient, _ in seen:
        wanted = (
            expected[layer.name].T if is_transposed(layers[layer.name]) else expected[layer.name]
        )
        assert torch.allclose(gradient, wanted, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8)])
def test_updates_follow_the_formula(load, n, m):
    """pi <- pi - clip(size * J^T G / max(block's rms, FLOOR layer's rms), +-MOST): running means,
    of the block up to this step, of the layer up to the one before. J is at logits / temperature,
    and at the logits if masks are hard."""
    learner, masked, dense = learner_of(load(), n, m)
    seen, sizes = watch(learner), [0.4, 0.3, 0.1]
    temperatures = [2.0, 0.7, 0.0]
    for size, temperature in zip(sizes, temperatures):
        learner.step(TOKENS, size, temperature=temperature)
    for name, layer in masked.layers.items():
        mine = [(gradient, logits) for of, gradient, logits in seen if of.name == name]
        after = [*[logits for _, logits in mine[1:]], logits_of(layer).double()]
        mean = None
        for index, ((gradient, logits), moved) in enumerate(zip(mine, after)):
            saliency = (dense[name] * gradient).double().view(-1, m)
            vjp = exact_vjp(logits / (temperatures[index] or 1.0), n, saliency)
            squares = vjp.square().mean(1, keepdim=True)
            if mean is None:  # the first only measures
                of_blocks = squares.bfloat16().double()  # as it is stored
                move = 0 * vjp
                mean = squares.mean()
            else:
                of_blocks = BLOCK_DECAY * of_blocks + (1 - BLOCK_DECAY) * squares
                move = vjp / torch.maximum(of_blocks.sqrt(), FLOOR * mean.sqrt())
                move = (move * sizes[index]).clamp(-MOST, MOST)
                of_blocks = of_blocks.bfloat16().double()
                mean = DECAY * mean + (1 - DECAY) * squares.mean()
            # squares that round otherwise to bfloat16 are up to 1/128 apart
            assert torch.allclose(logits - moved, move, atol=2e-5, rtol=4e-3)
        assert len(mine) == 3


def test_soft_masks_weigh_by_inclusion_probabilities(load):
    """The loss is that of weights times their inclusion probabilities. After the step the mask is
    hard."""
    learner, masked, dense = learner_of(load())
    for temperature in (2.0, 0.5, 0.0):
        plain = load()
        for name, module in find_layers(plain).items():
            logits = logits_of(masked.layers[name]).double()
            mask = masked.space.mode(logits.float()).double()
            if temperature:
                mask = torch.stack([inclusion_by_drawings(x / temperature, 2) for x in logits])
            module.weight.mul_(mask.view(module.weight.shape).float())
        loss = learner.step(TOKENS, 0.2, temperature=temperature).loss
        assert loss == pytest.approx(batch_loss(plain, TOKENS), rel=1e-5)
        hard = {name: dense[name] * mask for name, mask in drawn_masks(masked).items()}
        assert same(used_weights(masked.model), hard)


def test_temperatures_fall_by_equal_factors():
    first, later, latest = [soft_temperature(SOFT * share) for share in (0, 0.5, 0.999)]
    assert first == 2.0 and later == pytest.approx(math.sqrt(2.0 * 0.4))
    assert latest == pytest.approx(0.4, rel=2e-3) and soft_temperature(SOFT) == 0.0


def keep_means_in_float32(learner):
    """So that squares which differ by rounding do not round otherwise to bfloat16."""
    means = learner.normalization.of_blocks
    learner.normalization.of_blocks = {name: mean.float() for name, mean in means.items()}


def test_a_step_in_microbatches_is_that_of_the_whole(load):
    """Equal to rounding, with a last microbatch that is smaller; nothing moves where one of them is
    not finite."""
    tokens, distill, found = (
        torch.randint(32, (5, 20), generator=seeded(0)),
        [0.0, 1.0, 0.5, 0.0, 0.25],
        [],
    )
    for microbatch in (5, 2, 1):
        learner, masked, _ = learner_of(load(), microbatch=microbatch)
        keep_means_in_float32(learner)
        for _ in range(3):
            learner.step(tokens, 0.1, distill)
        found.append(all_logits(masked))
    for name, whole in found[0].items():
        for parts in found[1:]:
            assert torch.allclose(parts[name], whole, atol=1e-4) and not torch.equal(
                whole, whole.round()
            )
    final = masked.model.get_output_embeddings()
    final.register_forward_hook(
        lambda _module, inputs, output: output / (tokens[3, 0] != learner.first)
    )
    learner.first, backward = None, learner._backward
    learner._backward = lambda part, shares: (
        setattr(learner, "first", part[0, 0]),
        backward(part, shares),
    )[1]
    assert not learner.step(tokens, 0.1).is_finite and same(all_logits(masked), found[-1])


def test_experts_that_the_last_microbatch_does_not_reach_learn_too():
    """A sequence of odd tokens, which one expert of each layer takes, and one of even tokens."""
    tokens, found = torch.stack([2 * TOKENS[0] + 1, 2 * TOKENS[0]]), []
    for microbatch in (2, 1):
        torch.manual_seed(0)
        learner, masked, _ = learner_of(MixtureModel().requires_grad_(False), microbatch=microbatch)
        keep_means_in_float32(learner)
        for _ in range(3):
            learner.step(tokens, 0.1)
        found.append(all_logits(masked))
    for name, whole in found[0].items():
        assert torch.allclose(found[1][name], whole, atol=1e-4) and not torch.equal(
            whole, whole.round()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_mask_used_is_the_mode_of_the_stored_logits(load, dtype):
    learner, masked, dense = learner_of(load(), logits_dtype=dtype)
    m0 = drawn_masks(masked)
    for _ in range(4):
        learner.step(TOKENS, 0.6)
    used = drawn_masks(masked)
    assert not same(used, m0) and masked.steps == 4
    for name, weight in used_weights(masked.model).items():
        logits = logits_of(masked.layers[name])
        assert logits.dtype == dtype and logits.isfinite().all()
        assert torch.equal(used[name].view(-1, 4), masked.space.mode(logits.float()))
        assert torch.equal(weight, dense[name] * used[name])


def test_a_model_may_change_a_layers_output_in_place(load):
    model = load("opt")
    model.model.decoder.layers[1].self_attn.q_proj.register_forward_hook(
        lambda *args: args[2].add_(1.0)
    )
    assert learner_of(model)[0].step(TOKENS, 0.3).is_finite


def test_a_layer_that_is_used_twice_is_refused():
    layer = nn.Linear(8, 8)
    learner, masked, _ = learner_of(Stack(layer, layer).requires_grad_(False))
    learner.keys = masked.keys()
    learner.normalization.begin_pass(0.1)
    with pytest.raises(UserError, match="the model uses 0 twice in a pass"):
        masked.model(torch.ones(2, 8)).sum().backward()


def test_a_loss_that_is_not_finite_moves_nothing(load):
    learner, masked, _ = learner_of(load())
    learner.step(TOKENS, 0.3)
    before, squares = all_logits(masked), learner.normalization.mean_squares.clone()
    masked.model.model.norm.weight.fill_(torch.nan)
    assert not learner.step(TOKENS, 0.3).is_finite
    learner.normalization.begin_pass(0.3)
    learner.normalization.end_pass()  # nor does a pass that reaches no layer
    assert same(all_logits(masked), before) and torch.equal(
        learner.normalization.mean_squares, squares
    )


@pytest.mark.parametrize("steps", [100, 1000])
def test_step_sizes_let_noise_come_as_far_in_any_run(steps):
    """Random walks of such steps, 20,000 of them: their standard deviation is what was asked for,
    less the warm-up."""
    size = torch.tensor([step_size(0.4, t / steps, steps) for t in range(steps)])
    signs = torch.randint(2, (20_000, steps), generator=seeded(0)) * 2 - 1
    assert float((signs * size).sum(1).std()) == pytest.approx(0.4, rel=0.05)
    assert (
        size[0] == pytest.approx(0.05 * 0.4 * math.sqrt(3 / steps))
        and step_size(0.4, 1.0, steps) == 0
    )


# ----------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def generated_text(models):
    """Sequences that the dense Llama generated, drawn from its own predictions: 320 to learn from,
    32 held out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        begun, length = torch.full((352, 1), 1), {"min_new_tokens": 23, "max_new_tokens": 23}
        sequences = model.generate(
            begun, attention_mask=torch.ones_like(begun), do_sample=True, top_k=0, **length
        )
    return sequences[:320].split(8), sequences[320:]


@pytest.mark.parametrize(
    "dtype, of_learner",
    [(torch.float16, {"checkpointing": True}), (torch.bfloat16, {}), (torch.float32, {})],
)
def test_it_learns(load, generated_text, dtype, of_learner):
    """From a mask that keeps the smaller half of each block to one better than magnitude's, on text
    it did not see; float16 logits."""
    batches, heldout = generated_text
    model, larger = load(dtype=dtype), load(dtype=dtype)
    layers = find_layers(model)
    kept = magnitude_masks(layers)
    apply_masks(find_layers(larger), kept)
    masked = MaskedModel(
        model,
        {name: ~mask for name, mask in kept.items()},
        LinearSpace(2, 4),
        magnitude=1.0,
        logits_dtype=torch.float16,
        backend="eager",
    )
    start, target = masked.loss(heldout), batch_loss(larger, heldout)
    learner, distill = (
        StraightThrough(masked, **of_learner),
        [1.0] * 8 if dtype == torch.bfloat16 else [],
    )
    for t, batch in enumerate(batches):
        learner.step(batch, 0.2 * (1 - t / len(batches)), distill)
    masks = masked.finish()
    end = batch_loss(model, heldout)
    assert end < target < start - 0.5, (end, target, start)
    assert is_strict(masks)
    assert all((weight_matrix(layer) != 0).equal(masks[name]) for name, layer in layers.items())
