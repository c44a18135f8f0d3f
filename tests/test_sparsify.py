"""sparsify.py: what minutes become; its table, recomputed; runs killed in each of its stages."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import data
import sparsify
from files import mask_files
from files.documents import documents
from files.records import read_record
from models import generation
from models.layers import decoder_layers, find_layers
from models.loading import load_model
from pruning.one_shot import OneShot, one_shot_masks
from training import initialize, plan, preparation, results, straight_through
from training.loop import StepResult
from training.report import note_unchanged, perplexity_table, shortage, verdict
from training.straight_through import StraightThrough
from utils import UserError

import pytest
import tiny
import torch
from faults import kill
from huggingface_hub import ModelCard
from masked import same
from runs import column, is_strict, loss_under, raises, read_run
from safetensors.torch import load_file
from transformers import AutoTokenizer

SMALL = "--dtype float32 --device cpu --seqlen 24 --batchsize 2"
# stage -> what is called in it, and which call is the last of a run that is killed there
MOMENTS = {
    "text": (generation, "write_text", 1),
    "order": (preparation, "search_and_reorder", 1),
    "m0": (preparation, "one_shot_masks", 1),
    "swaps": (initialize, "from_swaps", 1),
    "learning": (StraightThrough, "step", 3),
    "table": (results, "deliver", 1),
}


@pytest.fixture
def learned(workshop, tmp_path):
    """Flags -> a run's folder, read."""

    def run(flags, name="run"):
        sparsify.main(f"--model {workshop}/dense {SMALL} --out {tmp_path}/{name} {flags}".split())
        return read_run(tmp_path / name)

    return run


def heldout(workshop, run, files) -> torch.Tensor:
    """The minibatches that nothing was selected by, of these texts."""
    tokenizer, arguments = (
        AutoTokenizer.from_pretrained(workshop / "dense"),
        run.record["arguments"],
    )
    minibatches = data.token_sequences(
        tokenizer,
        list(map(str, files)),
        run.record["plan"]["tokens"],
        arguments["batchsize"],
        arguments["seqlen"],
        arguments["seed"],
    )
    assert run.record["fingerprints"]["text"] == data.fingerprint(minibatches)
    return minibatches[-math.ceil(0.02 * len(minibatches)) :].flatten(0, 1)


# --------------------------------------------------------------------------------- what it delivers


def test_a_model_is_all_it_needs_and_minutes_become_steps(workshop, tmp_path, monkeypatch, capsys):
    """Half an hour on a machine of these speeds; the plan is recorded, and holds on --resume."""
    seconds = {"step": 60.0, "sweep": 100.0, "token": 0.01}
    monkeypatch.setattr(plan, "measured", lambda *given: {**seconds, "token": 1e-9})
    monkeypatch.setattr(plan, "token_s", lambda *given: seconds["token"])
    monkeypatch.setattr(preparation, "one_shot_masks", raises(KeyboardInterrupt()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sparsify.main(
            ["--model", str(workshop / "dense"), *SMALL.split(), "--minutes", "30", "--out", "run"]
        )
    said = capsys.readouterr().err
    assert "about 29.0 minutes: 0.2 for text, 3.3 for swaps, 25.0 for 25 steps" in said
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "measured", raises(AssertionError("measured again")))
    sparsify.main(["--resume", "run"])
    run = read_run(Path("run"))
    assert run.record["plan"] | {"learned_tokens": 0} == {
        "steps": 25,
        "tokens": 27 * 48,
        "generated": 47_100,
        "sweeps": 2,
        "learned_tokens": 0,
    }
    assert is_strict(run.masks) and len(run.metrics) == 25
    assert {path.name for path in run.folder.iterdir()} == {
        "checkpoint",
        "curve.png",
        "generated.jsonl",
        "initial_mask.safetensors",
        "mask.safetensors",
        "metrics.jsonl",
        "report.json",
        "run.json",
    }


@pytest.mark.parametrize(
    "minutes, seconds, steps, sweeps, generated",
    [
        # text takes its share and no more
        (30, {"step": 10, "sweep": 10, "token": 0.01}, 121, 3, 52_200),
        (1, {"step": 100, "sweep": 100, "token": 1}, 1, 0, 8192),
        (0.01, {"step": 1, "sweep": 1, "token": 1}, 1, 0, 8192),
        (30, {"step": 1, "sweep": 1, "token": 1e-9}, 1766, 3, 400_000),
    ],
)
def test_what_minutes_buy(minutes, seconds, steps, sweeps, generated):
    found = plan.of_minutes(minutes, seconds, 1024)
    assert (found.steps, found.sweeps) == (steps, sweeps) and found.generated == pytest.approx(
        generated, abs=1
    )
    learned, selecting, unseen = plan.split(torch.zeros(found.tokens // 1024, 1))
    assert len(learned) >= steps and len(selecting) == len(unseen) == plan.heldout_of(len(learned))


def test_a_machine_is_measured(workshop):
    model, tokenizer = load_model(f"{workshop}/dense", "float32", "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = plan.measured(model, (2, 4), 2, 24, 32, False)
    assert all(0 < seconds < 60 for seconds in found.values()) and found.keys() == {
        "step",
        "sweep",
        "token",
    }
    assert found["token"] < plan.token_s(model, tokenizer) < 60
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_machine_is_measured_by_microbatches(workshop, monkeypatch):
    """The measurement needs no more memory than a step does; it leaves the model as it was."""
    model, _ = load_model(f"{workshop}/dense", "float32", "cpu")
    sizes = []
    monkeypatch.setattr(plan, "timed", lambda call: (call(), 1.0)[1])
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        found = plan.measured(model, (2, 4), 8, 24, 2, False)
        kept = sum(saved)
        saved.clear()
        plan.measured(model, (2, 4), 8, 24, 2, True)
    assert sizes == [2, 2] * 2  # forward and backward, then the loss, of each measurement
    assert found["step"] == (1 + plan.STEP_FORWARDS) * 8 / 2
    assert sum(saved) < kept / 2
    assert "forward" not in vars(decoder_layers(model)[0])


@pytest.mark.parametrize("documents, generates", [(2, True), (400, False)])
def test_minutes_measure_generation_only_if_given_text_does_not_suffice(
    workshop, tmp_path, monkeypatch, documents, generates
):
    """It takes a share of the minutes, and a tokenizer whose texts have a beginning."""
    seconds = {"step": 1.0, "sweep": 1e-3, "token": 1e-9}
    monkeypatch.setattr(plan, "measured", lambda *_: dict(seconds))
    monkeypatch.setattr(plan, "token_s", lambda *_: 1e-2)
    tiny.write_corpus(tmp_path / "text.jsonl", documents)
    model, tokenizer = load_model(f"{workshop}/dense", "float32", "cpu")
    args = sparsify.parse_args(
        f"--model {workshop}/dense --dataset {tmp_path}/text.jsonl --minutes 2 --batchsize 2 "
        "--seqlen 24".split()
    )
    given = partial(sparsify.given_texts, args, tokenizer)
    planned = sparsify.planned(args, model, tokenizer, given)
    assert (planned.steps < 85) == generates


def test_its_table_recomputed(workshop, learned, capsys):
    run = learned(f"--steps 6 --ppl {workshop}/text.jsonl")
    report, said = json.loads((run.folder / "report.json").read_text()), capsys.readouterr().out
    m0 = mask_files.load(run.folder / "initial_mask.safetensors").masks
    model, tokenizer = load_model(str(workshop / "dense"), "float32", "cpu")
    text = data.token_sequences(tokenizer, [str(run.folder / "generated.jsonl")], 8 * 48, 2, 24, 0)
    assert same(
        m0,
        dict(
            one_shot_masks(
                model, find_layers(model), text[:6].flatten(0, 1), OneShot("wanda", (2, 4))
            )
        ),
    )
    of_m0 = loss_under(workshop / "dense", m0, text[6])  # the mask is selected on the last but one
    assert report["summary"]["heldout_loss_of_m0"] == pytest.approx(of_m0, abs=1e-4)
    # its positions
    windows, _ = data.perplexity_windows(tokenizer, f"{workshop}/text.jsonl", 256, 64)
    assert windows[:, 0].eq(tokenizer.bos_token_id).tolist() == [
        True,
        *[False] * (len(windows) - 1),
    ]
    unseen = heldout(workshop, run, [run.folder / "generated.jsonl"])
    for row, masks in (("dense", {}), ("m0", m0), ("learned", run.masks)):
        first, others = (
            loss_under(workshop / "dense", masks, *read)
            for read in ((windows[:1],), (windows[1:], tokenizer.bos_token_id))
        )
        assert report["nats"][row] == pytest.approx(
            {
                "held-out text": loss_under(workshop / "dense", masks, unseen),
                "text.jsonl after BOS": (first + (len(windows) - 1) * others) / len(windows),
            },
            abs=1e-4,
        )
        assert all(f"{math.exp(value):.3f}" in said for value in report["nats"][row].values())
    card = (run.folder / "checkpoint/README.md").read_text()
    sample = report["sample"]
    with torch.no_grad():
        for mask, model_under in (
            ("dense", workshop / "dense"),
            ("sparse", run.folder / "checkpoint"),
        ):
            model, ids = load_model(str(model_under), "float32", "cpu")[0], unseen[0, :16].tolist()
            while len(ids) < 16 + 30 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert (
                sample[mask]
                == " ".join(tokenizer.decode(ids[16:], skip_special_tokens=True).split())
                in said
            )
    step, changed = report["summary"]["mask_of_step"], report["summary"]["blocks_changed"]
    assert (
        f"The mask of step {step} of 6 is delivered: {changed:,} of " in said
        and verdict(report["nats"]) in said
    )
    metadata = ModelCard(card).data  # a local folder is no base that others have
    assert "2:4" in metadata.tags and metadata.base_model is None and str(workshop) not in card
    assert f"{len(m0)} of its layers keep 2:4 weights" in card
    results = {result.dataset_name: result.metric_value for result in metadata.eval_results}
    assert results == {
        text: round(math.exp(nats), 3) for text, nats in report["nats"]["learned"].items()
    }
    assert perplexity_table(report["nats"]) in card and perplexity_table(report["nats"]) in said
    few, some = (
        {**report["summary"], "blocks": 10**6, "blocks_changed": changed} for changed in (99, 100)
    )
    assert "larger steps (--lr, --step_size)" in note_unchanged(few) and note_unchanged(some) == ""
    assert list(report["stages"]) == ["text", "m0", "swaps", "learning", "table"]
    assert (
        report["summary"]["blocks_changed"]
        == sum(int((mask != m0[name]).view(-1, 4).any(1).sum()) for name, mask in run.masks.items())
        > 0
    )
    dense, sparse = (
        load_file(path / "model.safetensors")
        for path in (workshop / "dense", run.folder / "checkpoint")
    )
    for name, mask in run.masks.items():
        dense[f"{name}.weight"][~mask] = 0.0
    assert is_strict(run.masks) and all(
        torch.equal(dense[name], tensor) for name, tensor in sparse.items()
    )


def test_in_a_notebook_the_mask_is_the_commands(workshop, learned):
    run = learned(f"--steps 6 --dataset {workshop}/text.jsonl")
    model, tokenizer = load_model(f"{workshop}/dense", "float32", "cpu")
    masks = sparsify.sparsify(
        model, tokenizer, f"{workshop}/text.jsonl", steps=6, batchsize=2, seqlen=24
    )
    assert same(masks, dict(run.masks)) and run.record["summary"]["blocks_changed"] > 0
    sparse = load_file(run.folder / "checkpoint/model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in sparse.items())


def test_in_a_notebook_losses_that_stay_nan_end_the_run(workshop, monkeypatch):
    monkeypatch.setattr(StraightThrough, "step", lambda *_: StepResult(math.nan))
    model, tokenizer = load_model(f"{workshop}/dense", "float32", "cpu")
    with pytest.raises(UserError, match="3 losses in a row are nan"):
        sparsify.sparsify(
            model, tokenizer, f"{workshop}/text.jsonl", steps=6, batchsize=2, seqlen=24
        )


def test_a_lost_m0_is_made_again(learned, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(initialize, "from_swaps", raises(KeyboardInterrupt()))
        learned("--steps 6")
    run = learned("--steps 6", "whole")
    (run.folder.parent / "run/initial_mask.safetensors").unlink()
    sparsify.main(["--resume", str(run.folder.parent / "run")])
    assert same(dict(read_run(run.folder.parent / "run").masks), dict(run.masks))


def test_given_texts_and_given_masks(workshop, learned, text_and_masks):
    """Several files are one text; layers that are not named keep the mask given."""
    files = [workshop / "one.jsonl", workshop / "two.jsonl"]
    for file, text in zip(files, documents(str(workshop / "text.jsonl"))):
        file.write_text(json.dumps({"text": text[:800]}))
    mask = text_and_masks / "4_8.safetensors"
    run = learned(
        f"--steps 9 --dataset {files[0]} {files[1]} --mask {mask} --sparsity_type 4:8 --targets "
        "q_proj layers.0.mlp.up --distill 0 --lr 2 --seed 3"
    )
    dense = loss_under(workshop / "dense", {}, heldout(workshop, run, files))
    assert run.record["nats"]["dense"]["held-out text"] == pytest.approx(dense, abs=1e-4)
    m0 = mask_files.load(mask).masks
    assert is_strict(run.masks, 4, 8) and {
        name for name in m0 if not torch.equal(m0[name], run.masks[name])
    } == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }


def test_a_text_of_less_than_a_minibatch_is_generated(workshop, learned, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A small cat watches the doctor.")
    run = learned(f"--steps 6 --dataset {tmp_path}/short.txt")
    assert (
        "short.txt has only" in (said := capsys.readouterr().err)
        and "the model generates text instead" in said
    )
    assert (
        (run.folder / "generated.jsonl").exists() and len(run.metrics) == 6 and is_strict(run.masks)
    )


def test_questions_and_text_share_the_budget(tmp_path):
    quiz, text, asked = str(tmp_path / "quiz.jsonl"), str(tmp_path / "text.jsonl"), []
    Path(quiz).write_text('{"context": "a", "choices": [" b", " c"], "gold": 0}\n')
    Path(text).write_text('{"text": "a"}\n')

    def read(datasets, tokens):
        asked.append((datasets, tokens))
        return torch.zeros(tokens // 8, 2, 4)

    (questions,), (others,) = preparation.given_texts(read, [text, quiz], 160)
    assert asked == [([quiz], 160), ([text], 120)] and (questions.numel(), others.numel()) == (
        40,
        120,
    )
    fewer = [
        preparation.at_most_a_quarter(questions, rest).numel() for rest in (120, 119, 48, 3, 0)
    ]
    # at least a minibatch of 8; all where there is nothing else
    assert fewer == [40, 32, 16, 8, 40]
    assert [plan.of_steps(1, minibatch).generated for minibatch in (2**10, 2**17)] == [
        400_000,
        2**20,
    ]


@pytest.mark.parametrize("questions", [8, 80])
def test_a_quarter_of_questions_and_the_rest_after_passages(
    workshop, learned, monkeypatch, questions
):
    """Few questions are read twice; the rest is generated; each sequence keeps its text's share of
    distillation."""
    file, texts, seen, mixed, step = (
        workshop / "questions.jsonl",
        [],
        [],
        preparation.mixed,
        StraightThrough.step,
    )
    written, generate = [], generation.generate  # written: the passages of each call
    monkeypatch.setattr(
        generation, "generate", lambda *given: written.append(given[4]) or generate(*given)
    )
    item = {
        "context": next(documents(str(workshop / "text.jsonl")))[:30],
        "choices": ["!", "?"],
        "gold": 1,
    }
    file.write_text(f"{json.dumps(item)}\n" * questions)
    monkeypatch.setattr(
        preparation, "mixed", lambda *given: (texts.extend(given[0]), mixed(*given))[1]
    )
    monkeypatch.setattr(
        StraightThrough,
        "step",
        lambda *given: (seen.extend(zip(given[1].tolist(), given[3], strict=True)), step(*given))[
            1
        ],
    )
    run = learned(f"--steps 38 --dataset {file} --after {workshop}/text.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(workshop / "dense")
    asked = min(10, 2 * len(data.token_sequences(tokenizer, [str(file)], 40 * 48, 2, 24, 0)))
    assert run.record["plan"]["tokens"] == 40 * 48 and (asked < 10) == (questions == 8)
    assert [(len(text), share) for text, share in texts] == [(asked, 0.5), (40 - asked, 1.0)]
    assert written[0] and all(passages == written[0] for passages in written)
    assert all(
        map(
            str.startswith,
            documents(str(workshop / "text.jsonl")),
            map(tokenizer.decode, written[0]),
        )
    )
    of_share = {share: text.flatten(0, 1).tolist() for text, share in texts}
    assert len(seen) == 76 and all(sequence in of_share[share] for sequence, share in seen)


def test_ways_to_take_the_gradient(workshop, learned, monkeypatch):
    """Each flag changes the run, but for checkpointing and microbatches, which do not: how it is
    computed they do."""
    parts, backward, checkpointed, enable = (
        [],
        StraightThrough._backward,
        [],
        straight_through.enable_checkpointing,
    )
    monkeypatch.setattr(
        StraightThrough,
        "_backward",
        lambda learner, part, distill: parts.append(len(part)) or backward(learner, part, distill),
    )
    monkeypatch.setattr(
        straight_through,
        "enable_checkpointing",
        lambda model: checkpointed.append(1) or enable(model),
    )
    text = (
        f"--steps 12 --dataset {workshop}/text.jsonl --mask {workshop}/mask.safetensors "
        "--skip_checkpoint"
    )
    runs = {
        flags: learned(f"{text} {flags}", f"run{number}")
        for number, flags in enumerate(
            (
                "",
                "--gradient_checkpointing",
                "--microbatch 1",
                "--distill 1",
                "--logits_dtype bfloat16",
                "--lr 2",
                "--seed 3",
                "--logits 1",
            )
        )
    }
    for flags, run in runs.items():
        same = flags in ("", "--gradient_checkpointing", "--microbatch 1")
        expected = pytest.approx(column(runs[""], "loss"), rel=1e-5)
        assert is_strict(run.masks) and (column(run, "loss") == expected) == same, flags
    assert parts == 24 * [2] + 24 * [1] + 60 * [2] and len(checkpointed) == 1


# ------------------------------------------------------------------------------------------ stopped


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """A run of all stages that nothing stops: its flags, and what it made."""
    flags = (
        f"--model {workshop}/dense {SMALL} --steps 4 --permute --after {workshop}/text.jsonl "
        "--checkpoint_every 1 --skip_checkpoint"
    ).split()
    sparsify.main([*flags, "--out", str(tmp_path_factory.mktemp("whole") / "run")])
    return flags, read_run(tmp_path_factory.getbasetemp() / "whole0/run")


def counting(owner, name, monkeypatch, number=math.inf):
    """The list that this function's calls are counted in; the call of this number kills the
    process."""
    calls, true = [], getattr(owner, name)

    def counted(*given, **names):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*given, **names)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("stage", MOMENTS)
def test_killed_in_a_stage_it_goes_on_there(whole, tmp_path, monkeypatch, stage):
    """What is done is not done again, and the result is the uninterrupted run's."""
    flags, expected = whole
    child = os.fork()
    if child == 0:
        try:
            counting(*MOMENTS[stage][:2], monkeypatch, MOMENTS[stage][2])
            sparsify.main([*flags, "--out", str(tmp_path / "run")])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    # measured once
    assert read_record(tmp_path / "run")["plan"]["tokens"] == expected.record["plan"]["tokens"]
    calls = {name: counting(*moment[:2], monkeypatch) for name, moment in MOMENTS.items()}
    sparsify.main(["--resume", str(tmp_path / "run")])
    once = {"learning": 4} | dict.fromkeys(("text", "order", "m0", "swaps", "table"), 1)
    done = {name: once[name] for name in list(MOMENTS)[: list(MOMENTS).index(stage)]} | {
        stage: MOMENTS[stage][2] - 1
    }
    assert {name: len(found) for name, found in calls.items()} == {
        name: count - done.get(name, 0) for name, count in once.items()
    }
    assert kill.contents(tmp_path / "run") == kill.contents(expected.folder)
    record = read_run(tmp_path / "run").record
    assert record["nats"] == expected.record["nats"]
    # of all processes
    assert record["stages"]["learning"]["seconds"] >= record["summary"]["seconds"] - 0.1


def test_text_that_was_generated_before_a_run_failed_is_kept(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "sync", raises(MemoryError()))
    with pytest.raises(MemoryError):
        sparsify.main([*whole[0], "--out", str(tmp_path / "run")])
    assert (
        len({(run / "generated.jsonl").read_bytes() for run in (tmp_path / "run", whole[1].folder)})
        == 1
    )


def test_reordered_channels_and_passages(workshop, whole):
    """The order changes no loss of the dense model."""
    run = whole[1]
    dense = loss_under(
        workshop / "dense", {}, heldout(workshop, run, [run.folder / "generated.jsonl"])
    )
    assert run.record["nats"]["dense"]["held-out text"] == pytest.approx(dense, abs=1e-4)
    assert list(documents(str(run.folder / "generated.jsonl"))) and is_strict(run.masks)


@pytest.mark.parametrize(
    "dense, m0, learned, words",
    [
        (2.0, 4.0, 1.9, "0.90 times the dense perplexity: no worse than the dense model"),
        (2.0, 4.0, 1.9, "More than 100 %"),
        (2.0, 4.0, 2.1, "1.11 times the dense perplexity: close to the dense model"),
        (2.0, 4.0, 2.5, "1.65 times the dense perplexity: usable with care"),
        (
            2.0,
            4.0,
            3.3,
            (
                "3.67 times the dense perplexity: not usable yet; take more steps, or give more "
                "real text"
            ),
        ),
        (2.0, 2.0, 2.1, "A gap is blank if m0 is no worse"),
        (2.0, 4.0, 1000.0, "inf times the dense perplexity"),
    ],
)
def test_whether_a_model_is_good(dense, m0, learned, words):
    nats = {"dense": {"text": dense}, "m0": {"text": m0}, "learned": {"text": learned}}
    assert words in verdict(nats) and ("inf" in perplexity_table(nats)) == (learned == 1000)
    assert ("gap" in verdict(nats)) == (learned < dense or m0 <= dense)


@pytest.mark.parametrize(
    "steps, tokens, words",
    [
        (9, 900, "9 steps are very few"),
        (10, 900, ""),
        (10, 199, "only 199 tokens to learn from, and one pass"),
    ],
)
def test_a_run_without_steps_or_text_says_so_at_its_end(steps, tokens, words):
    found = shortage({"steps": steps, "tokens": 1000, "learned_tokens": tokens})
    assert words in found and bool(found) == bool(words)


def test_the_gap_is_one_of_losses():
    assert perplexity_table(
        {"dense": {"text": 1.0}, "m0": {"text": 3.0}, "learned": {"text": 2.5}}
    ).endswith("| learned | 12.182 | 25.0 |")


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--shard --dataset text.jsonl --steps 2", "--shard needs --dataset, --mask and --steps"),
        ("--shard --dataset text.jsonl --mask m0.safetensors", "measure its speed"),
        ("--minutes 0", "at least 0.01"),
        ("--distill 1.5", "at most 1"),
        ("--minutes 5 --steps 5", "not allowed with argument"),
        ("--permute --mask m0.safetensors", "leave out --mask"),
    ],
)
def test_flags_that_do_not_go_together(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        sparsify.main(["--model", "m", *flags.split()])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_float16_is_not_summed_over_shards(workshop, learned):
    with pytest.raises(UserError, match="overflows in float16"):
        learned(
            f"--shard --mask {workshop}/mask.safetensors --dataset {workshop}/text.jsonl --steps "
            "5 --dtype float16"
        )


def test_a_mask_that_does_not_fit_is_refused_before_text_is_generated(
    learned, text_and_masks, monkeypatch
):
    monkeypatch.setattr(preparation, "generate_text", raises(AssertionError()))
    with pytest.raises(UserError, match="4:8, not 2:4"):
        learned(f"--steps 9 --mask {text_and_masks}/4_8.safetensors")


def test_a_text_that_is_too_short(workshop, learned, tmp_path):
    with pytest.raises(UserError, match="the text makes 2 minibatches, but at least 3 are needed"):
        learned(
            f"--shard --mask {workshop}/mask.safetensors --dataset {workshop}/text.jsonl --steps "
            "5 --batchsize 150"
        )
    assert not (tmp_path / "run").exists()
