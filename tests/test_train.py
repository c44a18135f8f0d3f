"""train.py's flags, run on the tiny Llama: what they do, held against formulas and the HF model."""

import copy
import math
import shutil

import data
import pge
import train
from files import mask_files
from masking import masked_model
from masking.layers import apply_mask, apply_masks
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace, PatternSpace, logits_from_scores
from models.layers import find_layers
from models.loading import DTYPE
from models.loss import batch_loss
from pruning.swaps import confidence, refine_by_swaps
from training.initialize import from_swaps
from training.plan import SWEEPS
from training.report import command, licence_of, model_card
from utils import UserError

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from masked import all_logits, drawn_masks, inputs_of, make, same
from runs import column, is_strict, loss_under
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def m0(text_and_masks):
    return mask_files.load(text_and_masks / "2_4.safetensors").masks


@pytest.fixture
def sequences(text_and_masks, models):
    """Those that a run learns from."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["llama"])
    return data.minibatches(tokenizer, f"{text_and_masks}/text.jsonl", 8, 4, 32).flatten(0, 1)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_delivered_as_they_were_stored(learn, load, models, tmp_path, stored):
    """Whatever dtype the run computes in: checkpoint/ is what apply_mask makes of the base model,
    to the bit."""
    base = shutil.copytree(models["llama"], tmp_path / "base")
    load(dtype=stored).save_pretrained(base)
    computed = "bfloat16" if stored == torch.float32 else "float32"
    run = learn(f"--model {base} --dtype {computed} --logits 0.1")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **{DTYPE: "auto"})
    expected = apply_mask(model, run.folder / "mask.safetensors").state_dict()
    for name, weight in load_file(run.folder / "checkpoint/model.safetensors").items():
        assert weight.dtype == expected[name].dtype == stored
        assert torch.equal(weight.view(torch.uint8), expected[name].view(torch.uint8))


def test_a_card_names_a_base_that_others_have():
    """Whatever characters the name of a folder has, the card's head is YAML."""
    arguments = {
        "estimator": "maskpro",
        "sparsity_type": (2, 4),
        "model": "no/such",
        "lr": 5.0,
        "mask": "private/mask.safetensors",
        "save": False,
        "resume": None,
    }
    cards = [
        ModelCard(model_card(base, arguments, 14, "2:4", "torch.float16", None))
        for base in ("some/llama", "#y: z")
    ]
    assert [card.data.base_model for card in cards] == ["some/llama", None]
    command = "python train.py --sparsity_type 2:4 --estimator maskpro --lr 5.0\n"
    assert command in cards[0].text and "private" not in cards[0].text


def test_a_cards_command_has_every_flag_but_files():
    said = command(
        {
            "sparsity_type": (2, 4),
            "model": "private",
            "out": "private",
            "permute": True,
            "distill": 0.0,
            "targets": ["q_proj", r"layers\.[01]\."],
        }
    )
    assert said == (
        "python sparsify.py --sparsity_type 2:4 --permute --distill 0.0 --targets q_proj "
        r"'layers\.[01]\.'"
    )


@pytest.mark.parametrize("card", ["---\nlicense: mit\n---\n", "no head", "---\n: [\n---\n", None])
def test_a_card_has_the_licence_of_the_base_if_it_names_one(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == ("mit" if card and "mit" in card else None)


# ---------------------------------------------------------------------------------- where it starts


@pytest.mark.parametrize("space", [LinearSpace(1, 4), PatternSpace(2, 4)])
def test_random_logits_start_with_their_own_most_probable_mask(learn, models, sequences, space):
    """C times normal numbers of --seed; m0 is their mode, evaluated first, and what its losses are
    the baselines of."""
    name = "linear" if isinstance(space, LinearSpace) else "pattern"
    runs = [
        learn(
            f"--init random --space {name} --sparsity_type {space.n}:4 --logits 3 --lr 0 --seed "
            f"{seed}"
        )
        for seed in (0, 0, 1)
    ]
    logits = torch.cat(list(runs[0].logits.values()))
    assert abs(float(logits.mean())) < 0.02 and float(logits.std()) == pytest.approx(3, rel=0.02)
    modes = {
        layer: space.mode(found).reshape(runs[0].masks[layer].shape)
        for layer, found in runs[0].logits.items()
    }
    assert (
        same(modes, runs[0].masks) and same(modes, runs[1].masks) and not same(modes, runs[2].masks)
    )
    first = runs[0].metrics[0]
    assert (
        first["loss"]
        == first["baseline"]
        == pytest.approx(loss_under(models["llama"], modes, sequences[:4]), abs=1e-5)
    )
    assert runs[0].metrics[1]["loss"] != runs[0].metrics[1]["baseline"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--mask m0.safetensors --baseline online", "leave out --mask"),
        ("--baseline cached", "add --baseline online"),
        ("--baseline losses.npz", "add --baseline online"),
    ],
)
def test_a_random_start_takes_no_files_of_another_m0(models, flags, said):
    with pytest.raises(UserError, match=said):
        train.main(f"--model {models['llama']} --dataset {__file__} --init random {flags}".split())


def test_scores_start_the_logits(learn, models, sequences, m0):
    """C log(|w| ||x|| / the weakest kept), the norms taken on the dense model; --lr 0 leaves them
    as they were."""
    name = "model.layers.1.mlp.down_proj"
    run = learn(f"--init scores --logits 4 --lr 0 --targets {name}")
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    norms = inputs_of(model, name, sequences).double().norm(dim=0)
    score = (model.get_submodule(name).weight.abs().double() * norms).detach().view(-1, 4)
    kept = m0[name].view(-1, 4)
    gap = 4 * (score / score.masked_fill(~kept, torch.inf).amin(1, keepdim=True)).log()
    expected = torch.where(kept, gap.clamp(0, 12) + 1, gap.clamp(-12, 0))
    assert torch.allclose(run.logits[name].double(), expected, atol=1e-3)
    assert torch.equal(run.masks[name].view(-1, 4), kept)


def test_swaps_start_the_mask_and_the_logits(models, sequences, m0):
    """Of the last layer: its inputs are those of a model whose earlier layers are masked by m0, one
    by what swaps made of it."""
    earlier, name = learned = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    masked = MaskedModel(
        copy.deepcopy(model), m0, LinearSpace(2, 4), learned=learned, backend="eager"
    )
    from_swaps(masked, 4.0, sequences, SWEEPS)
    masks, logits = masked.masks_of(masked.bits()), all_logits(masked)
    weight = model.get_submodule(name).weight.detach().clone()
    apply_masks(find_layers(model), {**m0, earlier: masks[earlier]})
    inputs = inputs_of(model, name, sequences)
    hessian = inputs.T @ inputs
    mask = refine_by_swaps(weight, m0[name], hessian, 4, SWEEPS)
    assert torch.equal(masks[name], mask) and not torch.equal(mask, m0[name])
    score = confidence(weight, mask, hessian, 4)
    assert torch.allclose(
        logits[name], logits_from_scores(mask.view(-1, 4), 4, score.view(-1, 4)), atol=1e-3
    )
    others = {other: kept for other, kept in m0.items() if other not in learned}
    assert all(
        torch.equal(masked.model.get_submodule(other).weight != 0, kept)
        for other, kept in others.items()
    )


def test_without_sweeps_the_mask_is_kept_and_the_logits_follow_wandas_scores(models, sequences, m0):
    name, model = (
        "model.layers.1.mlp.down_proj",
        transformers.AutoModelForCausalLM.from_pretrained(models["llama"]),
    )
    masked = MaskedModel(
        copy.deepcopy(model.eval()), m0, LinearSpace(2, 4), learned=[name], backend="eager"
    )
    from_swaps(masked, 4.0, sequences, 0)
    apply_masks(find_layers(model), {other: mask for other, mask in m0.items() if other != name})
    score = model.get_submodule(name).weight.detach().abs() * inputs_of(
        model, name, sequences
    ).norm(dim=0)
    assert torch.equal(masked.masks_of(masked.bits())[name], m0[name])
    expected = logits_from_scores(m0[name].view(-1, 4), 4, score.view(-1, 4))
    assert torch.allclose(all_logits(masked)[name], expected, atol=1e-3)


# ------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize(
    "flags, estimator",
    [
        ("--estimator vanilla --baseline there_is_none", pge.Estimator("vanilla")),
        ("--estimator residual", pge.Estimator("residual")),
        ("", pge.Estimator()),
        ("--alpha 0.6 --debias_tracker", pge.Estimator("maskpro", 0.6, debias=True)),
    ],
)
def test_advantages(learn, flags, estimator):
    """Of the losses that are logged, as the estimators make them (test_estimators.py)."""
    run = learn(f"{flags} --lr 0.3 --max_step 6")
    for line in run.metrics:
        assert (line["baseline"] is None) == (not estimator.needs_baseline)
        assert line["advantage"] == pytest.approx(
            estimator.advantage(line["loss"], line["baseline"])
        )
        assert line["delta"] == (
            None if estimator.delta is None else pytest.approx(estimator.delta)
        )


def test_pattern_space(learn, m0):
    run = learn("--space pattern --logits 1")
    assert run.metrics[0]["loss"] == pytest.approx(
        run.metrics[0]["baseline"], abs=1e-6
    ) and is_strict(run.masks)
    for name, mask in run.masks.items():
        assert not torch.equal(run.logits[name], PatternSpace(2, 4).init(m0[name].view(-1, 4), 1.0))
        assert torch.equal(pge.patterns(2, 4)[run.logits[name].argmax(1)], mask.view(-1, 4))


def test_float16_logits_and_bfloat16_weights(learn):
    run = learn("--logits_dtype float16 --dtype bfloat16")
    assert {planes.dtype for planes in run.logits.values()} == {torch.float16} and is_strict(
        run.masks
    )


@pytest.mark.parametrize("n, m", [(4, 8), (1, 4), (8, 16)])
def test_other_sparsity_types(learn, text_and_masks, n, m):
    mask = text_and_masks / f"{n}_{m}.safetensors"
    run = learn(
        f"--sparsity_type {n}:{m} --mask {mask} --lr 200 --targets layers.1.self_attn.q_proj"
    )
    m0, named = mask_files.load(mask, (n, m)).masks, ["model.layers.1.self_attn.q_proj"]
    assert run.metrics[0]["loss"] == run.metrics[0]["baseline"] and is_strict(run.masks, n, m)
    assert not any("heldout" in line for line in run.metrics)
    assert torch.equal(run.masks[named[0]].view(-1, m), pge.mode(run.logits[named[0]], n))
    assert (
        list(run.logits)
        == named
        == [name for name in m0 if not torch.equal(m0[name], run.masks[name])]
    )


def test_a_loss_that_is_not_finite_draws_another_mask_and_moves_no_logit(load, losses):
    masked, m0, _ = make(load(), magnitude=1.0)
    learner = train.PolicyGradient(
        masked, torch.zeros(1, 2, 8, dtype=torch.int64), None, pge.Estimator("vanilla")
    )
    losses[1] = lambda: math.nan
    assert not learner.step(0, 1.0).is_finite and masked.steps == 1
    masked.flush()
    assert all(
        set(planes.unique().tolist()) == {0.0, 1.0} for planes in all_logits(masked).values()
    )
    assert not any(torch.equal(mask, m0[name]) for name, mask in drawn_masks(masked).items())


def test_microbatches_of_a_run(learn, monkeypatch):
    seen = []
    monkeypatch.setattr(
        masked_model, "batch_loss", lambda *given: seen.append(given[2]) or batch_loss(*given)
    )
    learn("--microbatch 3 --max_step 2 --skip_checkpoint")
    assert set(seen) == {3}


def test_a_seed_is_a_run(learn):
    first, again, other = (learn(f"--seed {seed}") for seed in (3, 3, 4))
    assert column(first, "loss") == column(again, "loss")
    assert all(torch.equal(first.masks[name], mask) for name, mask in again.masks.items())
    assert first.metrics[0]["loss"] == other.metrics[0]["loss"]  # m0
    assert all(a != b for a, b in zip(column(first, "loss")[1:], column(other, "loss")[1:]))
