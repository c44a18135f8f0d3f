"""train.py's flags beyond the paper, run on the tiny Llama: what they do, held against formulas and the HF model."""


import pytest
import torch
import transformers
from runs import GRADIENTS, column, loss_under, sequences_of

import pge
from files import mask_files
from masking.layers import apply_masks
from masking.spaces import logits_from_scores
from models.layers import find_layers
from pruning.swaps import confidence, refine_by_swaps

# ----------------------------------------------------------------------------------------------------------- the preset


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (4, 8), (8, 16)])
def test_the_preset_learns_any_pattern(learn, text_and_masks, models, n, m):
    """Every layer's most probable mask moves; the delivered one is strictly N:M and no worse than m0 on what was held
    out. (The text means nothing to a random model: that the learned mask is better is not to be expected of it.)"""
    run = learn(f"--preset fast --tokens 2560 --val_fraction 0.2 --num_evals 2 --targets k_proj v_proj "
                f"--sparsity_type {n}:{m} --mask {text_and_masks}/{n}_{m}.safetensors")
    arguments = run.record["arguments"]
    assert (arguments["estimator"], arguments["init"], arguments["distill"]) == ("straight_through", "swaps", 1.0)
    assert (arguments["tokens"], arguments["lr"], arguments["schedule"]) == (2560, 0.8, "linear")  # a flag goes first
    m0 = mask_files.load(text_and_masks / f"{n}_{m}.safetensors").masks
    assert len(run.metrics) == 16 and run.masks.keys() == m0.keys()
    assert all((mask.view(-1, m).sum(1) == n).all() for mask in run.masks.values())
    assert run.logits.keys() == {name for name in m0 if "k_proj" in name or "v_proj" in name}
    assert not any(torch.equal(pge.mode(logits, n), m0[name].view(-1, m)) for name, logits in run.logits.items())
    heldout = sequences_of(text_and_masks, models, 2560)[16:].flatten(0, 1)
    assert loss_under(models, run.masks, heldout) <= loss_under(models, m0, heldout)
    assert all(0 <= share <= 1 for line in run.layers for share in line["changed"].values())


# ---------------------------------------------------------------------------------------------- its parts, flag by flag


def test_scores_start_the_logits(learn, text_and_masks, models):
    """C log(|w| ||x|| / the weakest kept), the norms taken on the dense model; --lr 0 leaves them as they were."""
    run = learn(f"{GRADIENTS} --init scores --logits 4 --lr 0 --targets layers.1.mlp.down_proj")
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    name, inputs = "model.layers.1.mlp.down_proj", []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=sequences_of(text_and_masks, models, 768).flatten(0, 1))
    score = model.get_submodule(name).weight.abs().double() * inputs[0].flatten(0, 1).double().norm(dim=0)
    m0 = mask_files.load(text_and_masks / "2_4.safetensors").masks[name].view(-1, 4)
    score = score.detach().view(-1, 4)
    gap = 4 * (score / score.masked_fill(~m0, torch.inf).amin(1, keepdim=True)).log()
    expected = torch.where(m0, gap.clamp(0, 12) + 1, gap.clamp(-12, 0))
    assert torch.allclose(run.logits[name].double(), expected, atol=1e-3)
    assert torch.equal(run.masks[name].view(-1, 4), m0)


@pytest.mark.parametrize("targets", ["layers.1.mlp.down_proj", "layers.1.mlp.down_proj layers.0.mlp.down_proj"])
def test_swaps_start_the_mask_and_the_logits(learn, text_and_masks, models, targets):
    """Of the last layer: its inputs are those of a model whose earlier layers are masked by m0, or as swaps made it."""
    run = learn(f"{GRADIENTS} --init swaps --logits 4 --lr 0 --targets {targets}")
    m0 = mask_files.load(text_and_masks / "2_4.safetensors").masks
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    name, inputs = "model.layers.1.mlp.down_proj", []
    weight = model.get_submodule(name).weight.detach().clone()
    apply_masks(find_layers(model), {**m0, "model.layers.0.mlp.down_proj": run.masks["model.layers.0.mlp.down_proj"]})
    model.get_submodule(name).register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=sequences_of(text_and_masks, models, 768).flatten(0, 1))
    hessian = inputs[0].T @ inputs[0]
    mask = refine_by_swaps(weight, m0[name], hessian, 4)
    assert torch.equal(run.masks[name], mask) and not torch.equal(mask, m0[name])
    score = confidence(weight, mask, hessian, 4)
    assert torch.allclose(run.logits[name], logits_from_scores(mask.view(-1, 4), 4, score.view(-1, 4)), atol=1e-3)
    assert len(run.logits) == len(targets.split())
    assert all(torch.equal(run.masks[other], m0[other]) for other in m0 if other not in run.logits)


def test_tokens_are_the_minibatches(learn, text_and_masks, models):
    run = learn(f"{GRADIENTS} --epoch 2 --lr 0 --targets k_proj")
    masks = mask_files.load(text_and_masks / "2_4.safetensors").masks
    expected = [loss_under(models, masks, batch) for batch in sequences_of(text_and_masks, models, 768)]
    assert column(run, "loss") == pytest.approx(2 * expected, rel=1e-5)
    assert {key for line in run.metrics for key in ("baseline", "advantage", "delta") if line[key] is not None} == set()


def test_targets_are_learned_and_nothing_else(learn, text_and_masks):
    run = learn(f"{GRADIENTS} --targets q_proj layers.0.mlp.up")
    named = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    m0 = mask_files.load(text_and_masks / "2_4.safetensors").masks
    assert run.logits.keys() == named == {name for name in m0 if not torch.equal(m0[name], run.masks[name])}


def test_ways_to_take_the_gradient(learn):
    """Each flag changes the run, but for checkpointing and microbatches of the whole batch, which do not."""
    runs = {flags: learn(f"{GRADIENTS} --targets q_proj up_proj {flags}") for flags in (
        "", "--gradient_checkpointing", "--microbatch 4", "--microbatch 2", "--forward sample", "--distill 1",
        "--distill 0.5", "--space pattern", "--logits_dtype bfloat16", "--dtype bfloat16")}
    plain = runs[""]
    for flags, run in runs.items():
        assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in run.masks.values())
        assert run.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=0.02)  # at m0 all
        if flags in ("", "--gradient_checkpointing", "--microbatch 4"):
            assert column(run, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
        else:
            assert column(run, "loss")[2:] != pytest.approx(column(plain, "loss")[2:], rel=1e-5), flags
    for flags in set(runs) - {"--space pattern"}:
        assert runs[flags].logits.keys() == plain.logits.keys()
        for name, logits in runs[flags].logits.items():
            assert torch.equal(runs[flags].masks[name].view(-1, 4), pge.mode(logits.float(), 2))
    assert next(iter(runs["--space pattern"].logits.values())).shape[1] == 6
    assert next(iter(runs["--logits_dtype bfloat16"].logits.values())).dtype == torch.bfloat16


def test_running_and_normalized_advantages(learn):
    run = learn("--estimator running --normalize_advantage --logits 1 --lr 0.05 --tokens 384 --max_step 9")
    means, square, t = {}, 0.0, 0
    for index, line in enumerate(run.metrics):
        before = means.get(index % 3, line["loss"])
        means[index % 3] = 0.8 * before + 0.2 * line["loss"]
        advantage = line["loss"] - before
        if advantage:
            t += 1
            square = 0.99 * square + 0.01 * advantage**2
            advantage /= (square / (1 - 0.99**t)) ** 0.5
        assert line["advantage"] == pytest.approx(advantage)
    assert t == 6


@pytest.mark.parametrize("estimator, has_delta", [("maskpro", True), ("residual", False)])
def test_normalized_advantages_are_logged_with_their_tracker(learn, estimator, has_delta):
    run = learn(f"--estimator {estimator} --normalize_advantage --baseline online --logits 1 --lr 0.3 --dataset_size 8 "
                "--max_step 5 --targets k_proj")
    delta = 0.0
    for line in run.metrics:
        delta = 0.99 * delta + 0.01 * (line["loss"] - line["baseline"])
        assert line["delta"] == (pytest.approx(delta) if has_delta else None)
    assert len(run.metrics) == 5 and delta != 0
