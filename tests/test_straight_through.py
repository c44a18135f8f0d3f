"""training/straight_through.py: its gradient against autograd and enumeration, its update by an independent formula,
and what it learns."""
from itertools import combinations

import pytest
import torch
import transformers
from exact import by_orderings, exact_vjp
from masked import (
    TOKENS,
    all_logits,
    drawn_masks,
    learner_of,
    logits_of,
    magnitude_masks,
    same,
    seeded,
    used_weights,
    watch,
)
from torch import nn

from masking.layers import apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import SPACES
from models.layers import find_layers, is_transposed, weight_matrix
from models.loss import batch_loss
from training import normalization
from training.normalization import CLIP
from training.straight_through import StraightThrough, soft_temperature

KINDS = ["llama", "gpt2", "opt"]


# ------------------------------------------------------------------------------ the gradient, where it is exactly right


class Stack(nn.Sequential):
    """Linears as a model of their own."""

    def get_input_embeddings(self):
        return nn.Embedding(2, 2)

    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize("n, m, sample", [(1, 4, False), (2, 4, False), (2, 4, True), (3, 6, True)])
def test_it_is_the_true_gradient_where_the_loss_is_linear_in_the_mask(n, m, sample, monkeypatch):
    """f = <V, x (m * W)^T + b>: d E f / d pi = sum over all masks of p(S) f(S) score(S), enumerated in decimals."""
    monkeypatch.setattr(normalization, "CLIP", 1e3)  # so far out that nothing is clipped
    generator = seeded(0)
    model = Stack(nn.Linear(12, 3)).requires_grad_(False)
    model[0].weight.copy_(torch.randn(3, 12, generator=generator))
    x, v = torch.randn(5, 12, generator=generator), torch.randn(5, 3, generator=generator)
    learner, masked, dense = learner_of(model, n, m, sample=sample, init="random")
    layer = masked.layers["0"]
    worth = (dense["0"] * (v.T @ x)).double().view(-1, m)  # what each weight adds to f if it is kept
    truth = torch.zeros_like(worth)
    for block, logits in enumerate(logits_of(layer).tolist()):
        for kept in combinations(range(m), n):
            p, score = by_orderings(logits, kept, digits=40)
            truth[block] += float(p) * worth[block, list(kept)].sum() * torch.tensor([float(g) for g in score])
    before = logits_of(layer)
    for size in (0.0, 1e3):  # the first only measures
        learner.keys = masked.keys()
        y = model(x)
        learner.normalization.begin_pass(size, 0.0)
        y.backward(v)
        learner.normalization.end_pass()
        masked.count_step(redraw=sample)
        assert torch.allclose(y, nn.functional.linear(x, layer.scratch.view(3, 12), model[0].bias))
    move = (before - logits_of(layer)).double()
    assert torch.allclose(move, truth / truth.square().mean().sqrt(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_weight_gradients_are_those_of_an_ordinary_model(kind, load, distill):
    """Of pruned weights too; with Conv1D's [in, out] weights, biases and shared buffers."""
    learner = learner_of(load(kind), distill=distill)[0]
    seen = watch(learner)
    loss = learner.learn(TOKENS, 0.0)
    plain, dense = load(kind), load(kind)
    layers = find_layers(plain)
    apply_masks(layers, magnitude_masks(layers))
    parameters = [module.weight.requires_grad_() for module in layers.values()]
    log_probs = plain(input_ids=TOKENS).logits[:, :-1].log_softmax(-1)
    text = -log_probs.gather(2, TOKENS[:, 1:, None])
    nats = float(text.detach().mean())
    with torch.no_grad():
        teacher = dense(input_ids=TOKENS).logits[:, :-1].softmax(-1)
    objective = (1 - distill) * text.sum() - distill * (teacher * log_probs).sum()
    expected = dict(zip(layers, torch.autograd.grad(objective, parameters)))
    assert loss == pytest.approx(nats, rel=1e-5)
    assert sorted(layer.name for layer, *_ in seen) == sorted(layers)
    for layer, gradient, _ in seen:
        module = layers[layer.name]
        wanted = expected[layer.name].T if is_transposed(module) else expected[layer.name]
        assert torch.allclose(gradient, wanted, atol=2e-4 * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------------ the bookkeeping


@pytest.mark.parametrize("n, m, space, microbatch", [(2, 4, "linear", 32), (2, 4, "linear", 1), (4, 8, "linear", 32),
                                                     (2, 4, "pattern", 32)])
def test_updates_follow_the_formula(load, n, m, space, microbatch):
    """pi <- pi - rate / parts * clip(J^T G / (CLIP rms)), rms^2 a running mean of the earlier parts' mean squares."""
    learner, masked, dense = learner_of(load(), n, m, space, microbatch=microbatch)
    seen, rates = watch(learner), [0.5, 0.3, 0.1]
    for rate in rates:
        learner.learn(TOKENS, rate)
    parts = -(-len(TOKENS) // microbatch)
    assert len(seen) == 3 * parts * len(masked.layers)
    for name, layer in masked.layers.items():
        mine = [(gradient, logits) for of, gradient, logits in seen if of.name == name]
        after = [logits for _, logits in mine[1:]] + [logits_of(layer).double()]
        mean_square = None
        for index, (gradient, logits) in enumerate(mine):
            vjp = exact_vjp(masked.space, logits, (dense[name] * gradient).double().view(-1, m))
            now = float(vjp.square().sum()) / gradient.numel()
            if mean_square is None:
                assert torch.equal(after[0], logits)  # the first only measures
                mean_square = now
                continue
            move = (vjp / (CLIP * mean_square**0.5)).clamp(-1, 1) * rates[index // parts] / parts
            assert torch.allclose(after[index], logits - move, atol=2e-5)
            mean_square = 0.9 * mean_square + 0.1 * now
        known = learner.normalization
        assert float(known.mean_squares[known.place[name]]) == pytest.approx(mean_square, rel=1e-3)
    furthest = sum(rates[1:]) if parts == 1 else sum(rates) - rates[0] / parts
    started = masked.space.init(magnitude_masks(find_layers(load()), n, m)[name].view(-1, m), 1.0)
    assert 0 < (logits_of(layer) - started).abs().max() <= furthest + 1e-5


def test_the_scale_of_the_loss_and_the_depth_of_the_text_do_not_matter(load):
    """Only the direction does: a hundred times the gradient gives the same logits."""
    runs = []
    for factor in (1.0, 100.0):
        learner, masked, _ = learner_of(load())
        consume = learner.consume
        learner.consume = lambda layer, gradient, f=factor, consume=consume: consume(layer, gradient * f)
        for _ in range(3):
            learner.learn(TOKENS, 0.1)
        runs.append(torch.cat([logits.flatten() for logits in all_logits(masked).values()]))
    assert torch.allclose(*runs, atol=1e-3) and (runs[0] - runs[0].round()).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("space", ["linear", "pattern"])
def test_the_mask_used_is_the_mode_of_the_stored_logits(load, space, dtype):
    learner, masked, dense = learner_of(load(), space=space, logits_dtype=dtype)
    m0 = drawn_masks(masked)
    for _ in range(4):
        learner.learn(TOKENS, 0.6)
    used = drawn_masks(masked)
    assert not same(used, m0)
    for name, weight in used_weights(masked.model).items():
        logits = logits_of(masked.layers[name])
        assert logits.dtype == dtype and logits.isfinite().all()
        assert torch.equal(used[name].view(-1, 4), masked.space.mode(logits.float()))
        assert torch.equal(weight, dense[name] * used[name])
    assert same(masked.mode_masks(), used)


def test_sampling_draws_afresh_each_step_and_repeats_with_the_seed(load):
    runs = []
    for seed in (0, 0, 1):
        learner, masked, dense = learner_of(load(), sample=True, seed=seed)
        run = [drawn_masks(masked)]
        for _ in range(3):
            learner.learn(TOKENS, 0.01)
            used = used_weights(masked.model)  # the draw is due in this forward
            run.append(drawn_masks(masked))
            assert all(torch.equal(used[name], dense[name] * run[-1][name]) for name in used)
        assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in run[-1].values())
        assert not same(run[-1], masked.mode_masks())
        runs.append(run)
    assert all(same(a, b) for a, b in zip(runs[0], runs[1])) and not same(runs[0][1], runs[2][1])
    assert not any(same(runs[0][t], runs[0][t + 1]) for t in range(3))


# ---------------------------------------------------------------------------------------------------------- odd numbers


@pytest.mark.parametrize("sample", [False, True])
def test_a_loss_that_is_not_finite_moves_nothing(load, sample):
    learner, masked, _ = learner_of(load(), sample=sample)
    learner.learn(TOKENS, 0.3)
    before, squares = all_logits(masked), learner.normalization.mean_squares.clone()
    norm = masked.model.model.norm.weight.data
    kept = norm.clone()
    norm.fill_(torch.nan)
    assert not torch.isfinite(torch.tensor(learner.learn(TOKENS, 0.3)))
    norm.copy_(kept)
    assert all(torch.equal(logits, before[name]) for name, logits in all_logits(masked).items())
    assert torch.equal(learner.normalization.mean_squares, squares)
    assert torch.isfinite(torch.tensor(learner.learn(TOKENS, 0.3)))
    assert not all(torch.equal(logits, before[name]) for name, logits in all_logits(masked).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_16_bits(kind, load, dtype):
    """The logits go where those of the float32 model go, mostly: the signs of large moves agree."""
    moves = []
    for of in (torch.float32, dtype):
        learner, masked, _ = learner_of(load(kind, of))
        before = all_logits(masked)
        for _ in range(2):
            learner.learn(TOKENS, 0.1)
        assert next(iter(masked.layers.values())).scratch.dtype == of
        moves.append(torch.cat([(logits - before[name]).flatten() for name, logits in all_logits(masked).items()]))
        assert moves[-1].isfinite().all() and moves[-1].dtype == torch.float32
    large = moves[0].abs() > 0.05
    assert large.sum() > 1000 and (moves[0].sign() == moves[1].sign())[large].float().mean() > 0.95


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def generated_text(models):
    """Sequences that the dense Llama generated, drawn from its own predictions: 640 to learn from, 32 held out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        begun, length = torch.full((672, 1), 1), {"min_new_tokens": 23, "max_new_tokens": 23}
        sequences = model.generate(begun, attention_mask=torch.ones_like(begun), do_sample=True, top_k=0, **length)
    return sequences[:640].split(16), sequences[640:]


@pytest.mark.parametrize("space, of_masked, of_learner", [
    ("linear", {}, {}), ("linear", {}, {"distill": 1.0}), ("linear", {}, {"sample": True}), ("pattern", {}, {}),
    ("linear", {"logits_dtype": torch.float16}, {"checkpointing": True}), ("linear", {}, {"normalize": "block"})],
    ids=["mode", "distill", "sample", "pattern", "float16", "soft, by block"])
def test_it_learns(load, generated_text, space, of_masked, of_learner):
    """From a mask that keeps the smaller half of each block to one better than magnitude's, on text it did not see."""
    batches, heldout = generated_text
    model, larger = load(), load()
    layers = find_layers(model)
    kept = magnitude_masks(layers)
    apply_masks(find_layers(larger), kept)
    masked = MaskedModel(model, {name: ~mask for name, mask in kept.items()}, SPACES[space](2, 4), magnitude=1.0,
                         mode="eager", **of_masked)
    start, target = batch_loss(model, heldout), batch_loss(larger, heldout)
    is_soft, t = "normalize" in of_learner, 0
    learner = StraightThrough(masked, **of_learner,
                              temperature=lambda: soft_temperature(t / len(batches)) if is_soft else 0.0)
    for t, batch in enumerate(batches):
        learner.learn(batch, 0.2 * (1 - t / len(batches)))
    masks = masked.finish()
    end = batch_loss(model, heldout)
    assert end < target < start - 0.5, (end, target, start)
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())
    assert all((weight_matrix(layer) != 0).equal(masks[name]) for name, layer in layers.items())
