"""training/straight_through.py: its gradient against autograd and enumeration, its update by an independent formula,
its memory as operators allocate it, and what it learns."""
import weakref
from itertools import combinations

import pytest
import torch
import transformers
from exact import by_orderings, exact_vjp, inclusion_by_drawings, jacobian, pattern_inclusion
from masked import (
    TOKENS,
    drawn_masks,
    forward,
    logits_of,
    magnitude_masks,
    make,
    same,
    seeded,
    used_weights,
    watch,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pge
from masking.block_bits import bits_dtype, bits_to_mask
from masking.kernels import Kernels
from masking.layers import apply_masks, find_layers, is_transposed, weight_matrix
from masking.loading import batch_loss
from masking.masked_model import MaskedModel
from masking.random_bits import layer_keys
from masking.spaces import SPACES, LinearSpace
from training import normalization
from training.loss import summed_loss
from training.normalization import CLIP
from training.straight_through import StraightThrough, soft_temperature

KINDS = ["llama", "gpt2", "opt"]


def learner_of(model, n=2, m=4, space="linear", mode="eager", **kwargs):
    """(StraightThrough, its MaskedModel, the dense weights), the logits' magnitude 1."""
    of_learner = {key: kwargs.pop(key) for key in ("checkpointing", "sample", "distill", "microbatch") if key in kwargs}
    masked, _, dense = make(model, n, m, space, mode=mode, **({"magnitude": 1.0} | kwargs))
    return StraightThrough(masked, **of_learner), masked, dense


def all_logits(masked):
    return {name: logits_of(layer) for name, layer in masked.layers.items()}


# ------------------------------------------------------------------------------------------ the step on its own: J^T G


@pytest.mark.parametrize("space, n, m, mode", [
    *[("linear", n, m, mode) for n, m in ((1, 4), (2, 4), (3, 4), (4, 8)) for mode in ("eager", "exact")],
    ("linear", 5, 6, "exact"), ("pattern", 1, 4, "eager"), ("pattern", 2, 4, "eager"), ("pattern", 3, 6, "exact")])
def test_the_step_follows_the_jacobian_of_the_inclusion_probabilities(space, n, m, mode):
    """pi - clip(J^T G * scale, +-1) * rate, the squares of J^T G, and the mode of the result."""
    made = SPACES[space](n, m)
    logits, saliency = torch.randn(5, made.width, generator=seeded(n)), torch.randn(5, m, generator=seeded(m))
    inclusion = (lambda x: pattern_inclusion(x, n, m)) if space == "pattern" else lambda x: inclusion_by_drawings(x, n)
    vjp = torch.stack([jacobian(inclusion, x).T @ g.double() for x, g in zip(logits, saliency)])
    planes = [plane.clone() for plane in logits.unbind(1)]
    bits = torch.zeros(5, dtype=bits_dtype(m))
    squares = Kernels(made, mode).vjp(planes, bits, saliency, torch.ones_like(saliency), None,
                                      torch.tensor([4.0, 0.3, 1.0, 0.0]), layer_keys(0, 0, 1)[0])
    assert ((4 * vjp).abs() > 1).any() and ((4 * vjp).abs() < 1).any()  # some are clipped, some are not
    moved = torch.stack(planes, 1)
    assert torch.allclose(moved.double(), logits - (4 * vjp).clamp(-1, 1) * 0.3, atol=1e-5)
    assert torch.allclose(squares.double(), vjp.square().sum(1), rtol=1e-4)
    assert torch.equal(bits_to_mask(bits, m), made.mode(moved))


def test_the_exact_step_of_8_16_by_finite_differences():
    space = LinearSpace(8, 16)
    logits, saliency = torch.randn(1, 16, generator=seeded(0)), torch.randn(1, 16, generator=seeded(1))
    shift = 1e-5 * torch.eye(16).double()
    ends = pge.inclusion(torch.cat([logits.double() + shift, logits.double() - shift]), 8) @ saliency[0].double()
    planes = [plane.clone() for plane in logits.unbind(1)]
    scale, key = torch.tensor([0.1, 1.0, 1.0, 0.0]), layer_keys(0, 0, 1)[0]
    Kernels(space, "exact").vjp(planes, None, saliency, torch.ones_like(saliency), None, scale, key)
    expected = logits.double() - 0.1 * (ends[:16] - ends[16:]) / 2e-5
    assert torch.allclose(torch.stack(planes, 1).double(), expected, atol=1e-6)


@pytest.mark.parametrize("space", ["linear", "pattern"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_updates_below_a_16_bit_step_count_on_average(space, dtype):
    """Rounded to the nearest, not one logit of 3 would move."""
    made, blocks = SPACES[space](2, 4), 2**16
    planes = [torch.full((blocks,), 3.0, dtype=dtype) for _ in range(made.width)]
    saliency = torch.tensor([1.0, -1.0, 0.5, 0.0]).expand(blocks, 4)
    rate = 1e-4
    scale, key = torch.tensor([1.0, rate, 1.0, 0.0]), layer_keys(0, 0, 1)[0]
    Kernels(made, "eager").vjp(planes, None, saliency.contiguous(), torch.ones(blocks, 4), None, scale, key)
    vjp = exact_vjp(made, torch.full((1, made.width), 3.0), saliency[:1])[0]
    moved = torch.stack(planes, 1).double() - 3
    assert vjp.abs().max() > 0.1 and planes[0].dtype == dtype
    assert ((moved.mean(0) + rate * vjp).abs() < 5 * moved.std(0) / blocks**0.5 + 1e-7).all()


@pytest.mark.parametrize("space, mode", [("linear", "eager"), ("linear", "exact"), ("pattern", "eager")])
def test_a_saliency_that_is_not_finite_moves_nothing_in_its_block(space, mode):
    """float16 gradients overflow where one weight matters enormously."""
    made = SPACES[space](2, 4)
    logits, saliency = torch.randn(3, made.width, generator=seeded(0)), torch.randn(3, 4, generator=seeded(1))
    saliency[1, 2], saliency[2, 0] = torch.inf, torch.nan
    planes = [plane.clone() for plane in logits.unbind(1)]
    squares = Kernels(made, mode).vjp(planes, None, saliency, torch.ones_like(saliency), None,
                                      torch.ones(4), layer_keys(0, 0, 1)[0])
    moved = torch.stack(planes, 1)
    assert torch.equal(moved[1:], logits[1:]) and not torch.equal(moved[0], logits[0])
    assert squares[0] > 0 and squares[1:].isnan().all()  # and is told


# ----------------------------------------------------------------------------- the gradient, where it is exactly right


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


# ----------------------------------------------------------------------------------------------------- the bookkeeping


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


# ---------------------------------------------------------------------------------------------------------- distilling


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summed_loss_and_its_gradient_are_autograds(distill, dtype):
    logits = (torch.randn(3, 7, 11, generator=seeded(0)) * 3).to(dtype)
    teacher = torch.randn(3, 7, 11, generator=seeded(1)) * 3
    sequences = torch.randint(11, (3, 7), generator=seeded(2))
    followed = logits.double().requires_grad_()
    flat = followed[:, :-1].flatten(0, 1)
    text = nn.functional.cross_entropy(flat, sequences[:, 1:].flatten(), reduction="sum")
    copied = nn.functional.cross_entropy(flat, teacher[:, :-1].double().softmax(-1).flatten(0, 1), reduction="sum")
    expected, = torch.autograd.grad((1 - distill) * text + distill * copied, followed)
    loss, gradient = summed_loss(logits, sequences, teacher if distill else None, distill)
    assert loss == pytest.approx(float(text), rel=1e-5) and gradient.dtype == dtype
    assert torch.allclose(gradient.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.01)


def test_a_perfect_pupil_has_nothing_to_learn():
    """Distilled from itself, the gradient is zero though the text surprises it."""
    logits, sequences = torch.randn(2, 5, 9, generator=seeded(0)), torch.zeros(2, 5, dtype=torch.int64)
    loss, gradient = summed_loss(logits, sequences, logits, 1.0)
    assert loss > 1 and gradient.abs().max() < 1e-6


# -------------------------------------------------------------------------------------------------------------- memory


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
    learner.learn(tokens, 0.1)  # after it, what stays is there already
    return peak_bytes(lambda: learner.learn(tokens, 0.1))


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_freed_one_by_one(kind, load, checkpointing):
    """When a layer's gradient comes, those of the layers before are gone; no parameter has a .grad."""
    learner, masked, _ = learner_of(load(kind), checkpointing=checkpointing)
    consume, alive, counts = learner.consume, [], []

    def record(layer, gradient):
        counts.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(gradient))
        consume(layer, gradient)
    learner.consume = record
    learner.learn(TOKENS, 0.1)
    assert counts == [0] * len(masked.layers) and all(reference() is None for reference in alive)
    assert all(parameter.grad is None for parameter in masked.model.parameters())


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
        losses = [learner.learn(TOKENS, 0.3) for _ in range(3)]
        runs.append((losses, all_logits(masked), forward(masked.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    assert all(torch.allclose(runs[0][1][name], runs[1][1][name], atol=1e-5) for name in runs[0][1])
    assert torch.allclose(runs[0][2], runs[1][2], atol=1e-5)


# ----------------------------------------------------------------------------------------------- ends, and odd numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_finish_gives_everything_back(kind, load, checkpointing):
    model = with_chances(load(kind))
    state = [{name: value for name, value in vars(module).items() if isinstance(value, (float, bool))}
             for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    learner, masked, dense = learner_of(model, checkpointing=checkpointing)
    learner.learn(TOKENS, 0.3)
    used = forward(model)
    masks = masked.finish()
    assert [{name: vars(module)[name] for name in before} for module, before in zip(model.modules(), state)] == state
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    assert not getattr(model, "is_gradient_checkpointing", False) and not model.training
    assert torch.allclose(forward(model), used, atol=1e-5)
    assert all(torch.equal(weight, dense[name] * masks[name]) for name, weight in used_weights(model).items())


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


# ------------------------------------------------------------------------------------------------------------ learning


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
