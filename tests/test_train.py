"""train.py's flags beyond the paper, run on the tiny Llama: what they do, held against formulas and the HF model."""
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

from utils import UserError

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from masked import forward, logits_of, magnitude_masks, make, same
from safetensors.torch import load_file
from tiny import write_corpus

import data
import pge
import train
from files import mask_files
from masking.block_bits import mask_to_bits
from masking.block_stats import block_stats
from masking.distributed import ProcessGroup
from masking.layers import apply_masks, find_layers
from masking.loading import batch_loss, model_fingerprint
from masking.masked_model import MaskedModel
from masking.spaces import logits_from_scores
from pruning.swaps import confidence, refine_by_swaps
from training import args as train_args
from training import baselines, validation
from training.progress import lr_multiplier
from training.run_folder import RunFolder
from training.straight_through import StraightThrough, random_walk_step

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ("--model {llama} --dtype float32 --device cpu --dataset {w}/text.jsonl --batchsize 4 --sqlen 32 "
           "--step eager --skip_checkpoint --save --mask {w}/2_4.safetensors")
GRADIENTS = "--estimator straight_through --logits 1 --lr 0.3 --tokens 768 --epoch 1"  # six minibatches


@pytest.fixture(scope="module")
def w(tmp_path_factory, models):
    """A text, and the Llama's magnitude masks of several N:M."""
    w = tmp_path_factory.mktemp("train")
    write_corpus(w / "text.jsonl", 12)
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    for n, m in ((1, 4), (2, 4), (4, 8), (8, 16)):
        masks = magnitude_masks(find_layers(model), n, m)
        mask_files.save(w / f"{n}_{m}.safetensors", masks, n, m, "llama", model_fingerprint(model))
    return w


@pytest.fixture
def learn(w, models, tmp_path):
    """Flags -> a run: its metrics, layers.jsonl, run.json, masks and logits."""
    runs = []

    def run(flags):
        out = tmp_path / f"run{len(runs)}"
        runs.append(out)
        train.main((COMMAND.format(w=w, llama=models["llama"]) + f" --out {out} {flags}").split())
        return SimpleNamespace(
            folder=out, metrics=[strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
            layers=[strict(line) for line in (out / "layers.jsonl").read_text().splitlines()],
            record=strict((out / "run.json").read_text()), masks=mask_files.load(out / "mask.safetensors").masks,
            logits={name: planes.T for name, planes in load_file(out / "logits.safetensors").items()})
    return run


def parse(flags):
    return train_args.parse(train.__doc__, flags.split())


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""
    def refuse(constant):
        raise ValueError(f"{constant} in {text[:200]}")
    return json.loads(text, parse_constant=refuse)


def column(run, key):
    return [line[key] for line in run.metrics]


def sequences_of(w, models, tokens, seed=0):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["llama"])
    return data.token_sequences(tokenizer, str(w / "text.jsonl"), tokens, 4, 32, seed)


def loss_under(models, masks, sequences):
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    apply_masks(find_layers(model), masks)
    return batch_loss(model, sequences)


def sizes(monkeypatch, clock=None):
    """A list that gets the size of each gradient step; with a clock, each step takes 12 seconds of it."""
    seen, learn_from = [], StraightThrough.learn

    def record(self, batch, size):
        seen.append(size)
        if clock:
            clock.now += 12
        return learn_from(self, batch, size)
    monkeypatch.setattr(StraightThrough, "learn", record)
    return seen


# ---------------------------------------------------------------------------------------------------------- the preset


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (4, 8), (8, 16)])
def test_the_preset_learns_any_pattern(learn, w, models, n, m):
    """Every layer's most probable mask moves; the delivered one is strictly N:M and no worse than m0 on what was held
    out. (The text means nothing to a random model: that the learned mask is better is not to be expected of it.)"""
    run = learn(f"--preset fast --tokens 2560 --val_fraction 0.2 --num_evals 2 --targets k_proj v_proj "
                f"--sparsity_type {n}:{m} --mask {w}/{n}_{m}.safetensors")
    arguments = run.record["arguments"]
    assert (arguments["estimator"], arguments["init"], arguments["distill"]) == ("straight_through", "swaps", 1.0)
    assert (arguments["tokens"], arguments["lr"], arguments["schedule"]) == (2560, 0.8, "linear")  # a flag goes first
    m0 = mask_files.load(w / f"{n}_{m}.safetensors").masks
    assert len(run.metrics) == 16 and run.masks.keys() == m0.keys()
    assert all((mask.view(-1, m).sum(1) == n).all() for mask in run.masks.values())
    assert run.logits.keys() == {name for name in m0 if "k_proj" in name or "v_proj" in name}
    assert not any(torch.equal(pge.mode(logits, n), m0[name].view(-1, m)) for name, logits in run.logits.items())
    heldout = sequences_of(w, models, 2560)[16:].flatten(0, 1)
    assert loss_under(models, run.masks, heldout) <= loss_under(models, m0, heldout)
    assert all(0 <= share <= 1 for line in run.layers for share in line["changed"].values())


def test_the_preset_is_its_flags():
    spelled = " ".join(f"--{key}" if value is True else f"--{key} {value}"
                       for key, value in train_args.PRESETS["fast"].items())
    plain, preset = parse(spelled), parse("--preset fast")
    assert vars(preset) == {**vars(plain), "preset": "fast", "out": preset.out}
    assert parse("--lr 3 --preset fast --batchsize 5").lr == 3
    assert parse("--lr 3 --preset fast --batchsize 5").batchsize == 5
    documents = parse("--preset fast --dataset_size 64")
    assert documents.tokens is None and documents.dataset_size == 64  # a flag of the user's is not passed over
    assert parse("--preset fast").curvature and not parse("--preset fast --no-curvature").curvature
    both = parse("--preset fast --dataset_size 64 --tokens 900")
    assert both.tokens == 900


# --------------------------------------------------------------------------------------------- its parts, flag by flag


def test_scores_start_the_logits(learn, w, models):
    """C log(|w| ||x|| / the weakest kept), the norms taken on the dense model; --lr 0 leaves them as they were."""
    run = learn(f"{GRADIENTS} --init scores --logits 4 --lr 0 --targets layers.1.mlp.down_proj")
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    name, inputs = "model.layers.1.mlp.down_proj", []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=sequences_of(w, models, 768).flatten(0, 1))
    score = model.get_submodule(name).weight.abs().double() * inputs[0].flatten(0, 1).double().norm(dim=0)
    m0 = mask_files.load(w / "2_4.safetensors").masks[name].view(-1, 4)
    score = score.detach().view(-1, 4)
    gap = 4 * (score / score.masked_fill(~m0, torch.inf).amin(1, keepdim=True)).log()
    expected = torch.where(m0, gap.clamp(0, 12) + 1, gap.clamp(-12, 0))
    assert torch.allclose(run.logits[name].double(), expected, atol=1e-3)
    assert torch.equal(run.masks[name].view(-1, 4), m0)


@pytest.mark.parametrize("targets", ["layers.1.mlp.down_proj", "layers.1.mlp.down_proj layers.0.mlp.down_proj"])
def test_swaps_start_the_mask_and_the_logits(learn, w, models, targets):
    """Of the last layer: its inputs are those of a model whose earlier layers are masked by m0, or as swaps made it."""
    run = learn(f"{GRADIENTS} --init swaps --logits 4 --lr 0 --targets {targets}")
    m0 = mask_files.load(w / "2_4.safetensors").masks
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    name, inputs = "model.layers.1.mlp.down_proj", []
    weight = model.get_submodule(name).weight.detach().clone()
    apply_masks(find_layers(model), {**m0, "model.layers.0.mlp.down_proj": run.masks["model.layers.0.mlp.down_proj"]})
    model.get_submodule(name).register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=sequences_of(w, models, 768).flatten(0, 1))
    hessian = inputs[0].T @ inputs[0]
    mask = refine_by_swaps(weight, m0[name], hessian, 4)
    assert torch.equal(run.masks[name], mask) and not torch.equal(mask, m0[name])
    score = confidence(weight, mask, hessian, 4)
    assert torch.allclose(run.logits[name], logits_from_scores(mask.view(-1, 4), 4, score.view(-1, 4)), atol=1e-3)
    assert len(run.logits) == len(targets.split())
    assert all(torch.equal(run.masks[other], m0[other]) for other in m0 if other not in run.logits)


def test_tokens_are_the_minibatches(learn, w, models):
    run = learn(f"{GRADIENTS} --epoch 2 --lr 0 --targets k_proj")
    masks = mask_files.load(w / "2_4.safetensors").masks
    expected = [loss_under(models, masks, batch) for batch in sequences_of(w, models, 768)]
    assert column(run, "loss") == pytest.approx(2 * expected, rel=1e-5)
    assert {key for line in run.metrics for key in ("baseline", "advantage", "delta") if line[key] is not None} == set()


def test_targets_are_learned_and_nothing_else(learn, w):
    run = learn(f"{GRADIENTS} --targets q_proj layers.0.mlp.up")
    named = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    m0 = mask_files.load(w / "2_4.safetensors").masks
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


# ------------------------------------------------------------------------------------------- names of old, and of runs


def test_the_old_names_of_flags(tmp_path, capsys):
    """--looks and --init exchange, as they were called, mean the same, are not in the manual and may be in a record."""
    new = parse("--num_evals 7 --init swaps")
    assert vars(parse("--looks 7 --init exchange")) == vars(new) and (new.num_evals, new.init) == (7, "swaps")
    assert parse("--preset fast").init == "swaps" and parse("").num_evals == 20
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    assert "--num_evals" in said and "swaps" in said and "looks" not in said and "exchange" not in said
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"looks": 7, "init": "exchange", "lr": 3.0}}))
    again = parse(f"--repeat {tmp_path}")
    assert (again.num_evals, again.init, again.lr) == (7, "swaps", 3)


@pytest.mark.parametrize("flags, curvature", [("", True), ("--no-curvature", False)])
def test_a_record_names_what_the_preset_does_not_decide(tmp_path, flags, curvature):
    recorded = vars(parse(f"--preset fast {flags}"))
    older = {name: value for name, value in recorded.items() if name != "curvature"}
    for arguments, expected in ((recorded, curvature), (older, False)):
        (tmp_path / "run.json").write_text(json.dumps({"arguments": arguments}))
        again = parse(f"--repeat {tmp_path}")
        assert again.curvature is expected and again.preset == "fast"  # a run of before there was the flag has none


@pytest.mark.parametrize("flags, name", [
    ("--dataset_size 512 --batchsize 32 --lr 50 --logits 10 --epoch 625", "lr50_epoch625_logits10_size512"),
    ("--estimator maskpro", "lr50_epoch10000_logits10_size512"),
    ("--estimator residual --lr 0.5 --dataset_size 64", "residual_lr0.5_epoch10000_logits10_size64"),
    ("--estimator running --tokens 4096", "running_lr50_epoch10000_logits10_tokens4096"),
    ("--estimator straight_through --epoch 2", "straight_through_lr50_epoch2_logits10_size512"),
    ("--preset fast", "fast_lr0.8_epoch1_logits4_tokens400000"),
    ("--preset fast --dataset_size 64 --lr 2", "fast_lr2_epoch1_logits4_size64")])
def test_the_default_folder_says_what_a_run_is(flags, name):
    args = parse(flags)
    assert args.out == train_args.default_folder(args) == f"results/{name}"
    assert parse(f"{flags} --out elsewhere").out == "elsewhere"


@pytest.mark.parametrize("name", ["inference_loss_512_bs32_sql128.npz", "inference_loss_8_bs4_sql32.npz"])
def test_git_ignores_the_baselines_of_the_default_names(name):
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if not shutil.which("git") or git("rev-parse", "--show-toplevel").stdout.strip() != str(ROOT):
        pytest.skip("not a git checkout")
    size, batchsize, sqlen = map(int, re.findall(r"\d+", name))
    assert baselines.default_path(size, batchsize, sqlen) == name
    assert git("check-ignore", name).stdout.strip() == name



# ------------------------------------------------------------------------------------------------ schedules and clocks


@given(st.floats(0, 1))
def test_lr_multiplier(progress):
    warm = min(1, (progress + 0.001) / 0.02)
    assert lr_multiplier("constant", progress) == 1
    assert lr_multiplier("linear", progress) == pytest.approx((1 - progress) * warm)
    assert lr_multiplier("cosine", progress) == pytest.approx(math.cos(math.pi * progress / 2) ** 2 * warm, abs=1e-12)


@pytest.mark.parametrize("steps", [100, 1000])
def test_random_walk_step_lets_noise_come_as_far_in_any_run(steps):
    """Random walks of linearly decaying steps, 20,000 of them: their standard deviation is what was asked for."""
    size = random_walk_step(0.4, steps) * (1 - torch.arange(steps) / steps)
    signs = torch.randint(2, (20_000, steps), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float((signs * size).sum(1).std()) == pytest.approx(0.4, rel=0.03)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_is_in_force(learn, monkeypatch, schedule):
    seen = sizes(monkeypatch)
    learn(f"{GRADIENTS} --schedule {schedule} --epoch 2 --max_step 10 --targets k_proj")
    assert seen == pytest.approx([0.3 * (3 / 10) ** 0.5 * lr_multiplier(schedule, t / 10) for t in range(10)])


def test_the_schedule_is_in_force_for_advantages(learn, monkeypatch):
    seen, update = [], MaskedModel.update

    def record(self, coefficient):
        seen.append(coefficient)
        update(self, coefficient)
    monkeypatch.setattr(MaskedModel, "update", record)
    run = learn("--estimator vanilla --logits 1 --lr 0.5 --tokens 768 --max_step 8 --schedule linear --targets k_proj")
    expected = [0.5 * lr_multiplier("linear", t / 8) * line["loss"] for t, line in enumerate(run.metrics)]
    assert seen == pytest.approx(expected)


def test_minutes_end_a_run_and_its_schedule(learn, monkeypatch):
    """Steps of 12 seconds by a clock of our own: of one minute, five, the rate falling with the clock."""
    clock = SimpleNamespace(now=1e9)
    for name in ("time", "monotonic"):  # whichever the run goes by
        monkeypatch.setattr(time, name, lambda: clock.now)
    seen = sizes(monkeypatch, clock)
    run = learn(f"{GRADIENTS} --schedule linear --epoch 100 --max_minutes 1 --targets k_proj --val_fraction 0.2 "
                "--num_evals 5")
    assert len(run.metrics) == 5 and column(run, "seconds") == [12, 24, 36, 48, 60]
    assert [line["step"] for line in run.layers] == [1, 2, 3, 4, 5]
    expected = [0.3 * lr_multiplier("linear", t / 5) * (3 / 5) ** 0.5 for t in range(1, 5)]
    assert seen[1:] == pytest.approx(expected)
    assert run.record["arguments"]["max_minutes"] == 1


# ------------------------------------------------------------------------------------------------------- the best mask


def test_validation_keeps_the_mask_with_the_lowest_loss(load, monkeypatch):
    """Planted divergence: the losses of five evaluations; nan and inf are never best; the mask of the lowest is
    delivered."""
    masked = make(load(), magnitude=1.0)[0]
    losses = iter([3.0, math.inf, 2.5, math.nan, 2.7])
    evaluated = []

    def planted(model, batch, microbatch):
        evaluated.append(forward(model))
        return next(losses)
    monkeypatch.setattr(validation, "batch_loss", planted)
    best = validation.Validation(masked, torch.zeros(1, 2, 20, dtype=torch.int64), ProcessGroup())
    masks, found = [], []
    for t in range(5):
        masks.append(masked.mode_masks())
        found.append(best.evaluate(t))
        for layer in masked.layers.values():
            layer.logits[t % 4].add_(3.0)
    assert found == [3.0, None, 2.5, None, 2.7] and (best.loss, best.step, best.m0_loss) == (2.5, 2, 3.0)
    assert not any(same(masks[2], masks[t]) for t in (0, 1, 3, 4))
    assert same(masked.finish(best.bits), masks[2])
    assert torch.equal(forward(masked.model), evaluated[2]) and not torch.equal(evaluated[2], evaluated[3])


def test_the_best_of_held_out_minibatches_is_delivered(learn, w, models, monkeypatch):
    """Planted divergence: the second half of the steps climbs. Losses on the last minibatches, which are not learned
    from, by the HF model."""
    learn_from, planted = StraightThrough.learn, iter([0.4] * 4 + [-0.8] * 4)
    monkeypatch.setattr(StraightThrough, "learn", lambda self, batch, _: learn_from(self, batch, next(planted)))
    run = learn(f"{GRADIENTS} --epoch 2 --val_fraction 0.3 --num_evals 4")
    batches = sequences_of(w, models, 768)
    assert len(run.metrics) == 8  # four of six minibatches, twice
    evaluations = [line["heldout"] for line in run.metrics if "heldout" in line]
    m0 = mask_files.load(w / "2_4.safetensors").masks
    started = loss_under(models, m0, batches[4:].flatten(0, 1))
    delivered = loss_under(models, run.masks, batches[4:].flatten(0, 1))
    assert len(evaluations) == 4 and delivered == pytest.approx(min(started, *evaluations), rel=1e-5)
    assert evaluations[-1] > delivered + 0.05
    assert run.metrics[0]["loss"] == pytest.approx(loss_under(models, m0, batches[0]), rel=1e-5)


def test_without_held_out_minibatches_the_last_mask_is_delivered(learn):
    run = learn(f"{GRADIENTS} --targets k_proj")
    assert not any("heldout" in line for line in run.metrics)
    for name, logits in run.logits.items():
        assert torch.equal(run.masks[name].view(-1, 4), pge.mode(logits, 2))


# -------------------------------------------------------------------------------------------------------- what is told


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for both libraries, which note what they are told."""
    told = SimpleNamespace(scalars=[], text=[], logs=[], init=None, closed=[])

    class SummaryWriter:
        def __init__(self, folder, **settings):
            told.folder = folder

        def add_text(self, tag, text):
            told.text.append((tag, text))

        def add_scalar(self, name, value, step):
            told.scalars.append((step, name, value))

        def close(self):
            told.closed.append("tensorboard")

    def init(**kwargs):
        told.init = kwargs
        return SimpleNamespace(log=lambda values, step: told.logs.append((step, values)),
                               finish=lambda: told.closed.append("wandb"))
    for name, content in (("tensorboard", {}), ("torch.utils.tensorboard", {"SummaryWriter": SummaryWriter}),
                          ("wandb", {"init": init})):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_only_the_main_process_has_trackers():
    folder = SimpleNamespace(group=SimpleNamespace(is_main=False), trackers=[])
    RunFolder.start_trackers(folder, [pytest.fail], 0)
    assert folder.trackers == []


def test_both_trackers_are_told_every_step(learn, trackers):
    run = learn(f"{GRADIENTS} --targets k_proj --val_fraction 0.2 --num_evals 2 --tensorboard --wandb")
    assert trackers.folder == str(run.folder / "tensorboard") and trackers.closed == ["tensorboard", "wandb"]
    assert trackers.init["project"] == "maskpro" and trackers.init["config"]["lr"] == 0.3
    assert "lr: 0.3" in trackers.text[0][1]
    assert [number for number, _ in trackers.logs] == column(run, "step") == [1, 2, 3, 4]
    for line, (number, values) in zip(run.metrics, trackers.logs):
        expected = {key: line[key] for key in ("loss", "seconds", "heldout", "blocks_not_finite") if key in line}
        for layers in (layers for layers in run.layers if layers["step"] == number):
            expected |= {key: pytest.approx(sum(layers[key].values()) / 2) for key in ("changed", "entropy")}
        assert values == expected
    assert trackers.scalars == [(number, *item) for number, values in trackers.logs for item in values.items()]
    assert sum("heldout" in values for _, values in trackers.logs) == 2


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_runs(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)  # import fails
    with pytest.raises(UserError, match=f"{library} is missing; install it with: pip install {library}"):
        train.main(f"--model nowhere --{library} --out never".split())


# --------------------------------------------------------------------------------------------- which mask a model uses


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


@pytest.mark.parametrize("n, m, space", [(2, 4, "linear"), (2, 4, "pattern"), (8, 16, "linear")])
def test_block_stats(load, n, m, space):
    """Shares and entropies by the definition, on a layer small enough to be looked at whole."""
    masked, m0, _ = make(load(), n, m, space, magnitude=1.0, learned=["model.layers.0.self_attn.k_proj"])
    layer, = masked.layers.values()
    for plane in layer.logits[::3]:
        plane.add_(torch.randn(len(plane), generator=torch.Generator().manual_seed(1)))
    found = block_stats(masked)
    logits, name = logits_of(layer), "model.layers.0.self_attn.k_proj"
    changed = (masked.space.mode(logits) != m0[name].view(-1, m)).any(1).float().mean()
    assert found["changed"][name] == pytest.approx(float(changed)) and 0 < changed < 1
    if m == 4:
        probs = masked.space.pattern_probs(logits.double())
        assert found["entropy"][name] == pytest.approx(float(-(probs * probs.log()).sum(1).mean()), rel=1e-4)
    assert 0 < found["entropy"][name] < math.log(math.comb(m, n)) and found["blocks"][name] == 32 * 64 // m
