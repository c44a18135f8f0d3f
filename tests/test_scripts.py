"""The scripts as a user runs them, tiny: what they write against brute force, hand computation and
the HF model itself.

Each script runs on three models, one command after the other with their default file names; the
variations of a script run on the Llama.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import data
import get_mask
import prune
import train
from files import mask_files
from files.documents import documents
from masking.layers import apply_masks
from models.layers import find_layers

import numpy as np
import pytest
import torch
import transformers
from masked import inputs_of, same
from mistakes import edited
from quizzes import hf_model
from runs import SCRIPTS, column, is_strict, read_run
from safetensors.torch import load_file
from tiny import write_corpus

MODELS = {  # name -> maskable layers, a late one whose inputs have been through most of the model
    "llama": (14, "model.layers.1.mlp.down_proj"),
    "gpt2": (8, "transformer.h.1.mlp.c_proj"),
    "opt": (12, "model.decoder.layers.1.fc2"),
}
SIZE, BATCH, SQLEN, STEPS = 8, 4, 32, 5
NSAMPLES, CALIBRATION_LENGTH, WINDOW = 6, 48, 64
PLACE = "--dtype float32 --device cpu"
DATA = f"--dataset ../text.jsonl --dataset_size {SIZE} --batchsize {BATCH} --sqlen {SQLEN}"
COMMANDS = [
    (
        f"prune.py --model dense {PLACE} --dataset ../text.jsonl --nsamples {NSAMPLES} --seqlen "
        f"{CALIBRATION_LENGTH}"
    ),
    "get_mask.py",
    f"inference_loss.py --model dense {PLACE} {DATA}",
    f"train.py --model dense {PLACE} {DATA} --logits 2 --lr 20 --max_step {STEPS} --save --out run",
    (
        f"eval.py --model run/checkpoint {PLACE} --sparsity_type 2:4 --ppl ../held_out.txt "
        f"--seqlen {WINDOW} --save evaluation.json"
    ),
]


def in_process(command: str, folder: Path) -> None:
    """Run a script in `folder`, in this process, which saves the seconds that another takes to
    import torch."""
    script, *arguments = command.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        SCRIPTS[script.removesuffix(".py")].main(arguments)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory, models):
    """Model name -> folder in which all five commands have run."""
    root = tmp_path_factory.mktemp("pipelines")
    write_corpus(root / "text.jsonl", 16)
    (root / "held_out.txt").write_text(
        "\n\n".join(documents(write_corpus(root / "other.jsonl", 2, seed=7)))
    )
    for name in MODELS:
        shutil.copytree(models[name], root / name / "dense")
        for command in COMMANDS:
            in_process(command, root / name)
    return {
        name: SimpleNamespace(name=name, folder=root / name, layers=layers, watched=watched)
        for name, (layers, watched) in MODELS.items()
    }


@pytest.fixture(params=list(MODELS))
def made(request, pipelines):
    return pipelines[request.param]


@pytest.fixture
def llama(pipelines, monkeypatch):
    """The Llama's folder, and the working directory there."""
    monkeypatch.chdir(pipelines["llama"].folder)
    return pipelines["llama"].folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def as_matrix(made, weight: torch.Tensor) -> torch.Tensor:
    """[out, in]: GPT-2 keeps its weights as [in, out]."""
    return weight.T.contiguous() if made.name == "gpt2" else weight


def first_sequences(tokenizer, corpus: Path) -> torch.Tensor:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    sequences = [
        ids[:SQLEN] for ids in (tokenizer(text).input_ids for text in texts) if len(ids) > SQLEN
    ]
    return torch.tensor(sequences[:SIZE]).view(-1, BATCH, SQLEN)


# ------------------------------------------------------------------------------- prune and get_mask


def brute_force(metric: torch.Tensor, n: int, m: int) -> torch.Tensor:
    kept = torch.zeros(metric.shape, dtype=torch.bool)
    for i, row in enumerate(metric.tolist()):
        for start in range(0, len(row), m):
            best = sorted(range(start, start + m), key=lambda j: -row[j])[:n]
            kept[i, best] = True
    return kept


def calibration_norms(made) -> torch.Tensor:
    """Norm of each input feature of the watched layer, in float64."""
    model, tokenizer = hf_model(made.folder / "dense")
    samples = data.calibration_samples(
        tokenizer, str(made.folder.parent / "text.jsonl"), NSAMPLES, CALIBRATION_LENGTH, seed=0
    )
    return inputs_of(model, made.watched, samples).double().norm(dim=0)


def check_pruned(made, sparse: Path, metric: torch.Tensor, n: int, m: int) -> None:
    """The watched layer is as the metric has it; all others N:M; what is kept and what is no Linear
    are untouched."""
    before, after = weights(made.folder / "dense"), weights(sparse)
    assert before.keys() == after.keys()
    assert torch.equal(
        as_matrix(made, after[f"{made.watched}.weight"]) != 0, brute_force(metric, n, m)
    )
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == made.layers and not any(
        "head" in key or "embed" in key or "wte" in key for key in changed
    )
    for key in changed:
        kept = after[key] != 0
        assert is_strict({key: as_matrix(made, kept)}, n, m)
        assert torch.equal(after[key][kept].view(torch.int32), before[key][kept].view(torch.int32))
        assert not after[key][~kept].view(torch.int32).any()  # +0.0


def test_wanda_is_the_brute_force(made):
    weight = as_matrix(made, weights(made.folder / "dense")[f"{made.watched}.weight"])
    check_pruned(made, made.folder / "out", weight.abs() * calibration_norms(made), 2, 4)


@pytest.mark.parametrize("n, m", [(2, 4), (3, 8)])
def test_magnitude_is_the_brute_force(made, tmp_path, n, m):
    prune.main(
        f"--model {made.folder}/dense {PLACE} --prune_method magnitude --sparsity_type {n}:{m} "
        f"--save_model {tmp_path}/sparse".split()
    )
    weight = as_matrix(made, weights(made.folder / "dense")[f"{made.watched}.weight"])
    check_pruned(made, tmp_path / "sparse", weight.abs(), n, m)
    assert os.listdir(tmp_path) == ["sparse"]


def test_prune_targets_only(llama, tmp_path):
    prune.main(
        f"--model dense {PLACE} --prune_method magnitude --targets v_proj layers.0.mlp.up "
        f"--save_model {tmp_path}/sparse".split()
    )
    before, after = weights(llama / "dense"), weights(tmp_path / "sparse")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    }


def test_the_mask_is_where_weights_are_not_zero(made):
    found = mask_files.load(made.folder / "initial_mask.safetensors", (2, 4))
    sparse = weights(made.folder / "out")
    assert len(found.masks) == made.layers and found.model == "dense"
    for name, mask in found.masks.items():
        assert torch.equal(mask, as_matrix(made, sparse[f"{name}.weight"]) != 0)


def test_blocks_with_fewer_weights_are_filled_up(llama, tmp_path, capsys):
    name = "model.layers.0.mlp.up_proj"
    edited(
        llama / "out",
        tmp_path / "fewer",
        lambda tensors: tensors[f"{name}.weight"].view(-1, 4)[0].zero_(),
    )
    get_mask.main(f"--model {tmp_path}/fewer --save {tmp_path}/m0.safetensors".split())
    assert "1 blocks had fewer than 2 nonzero weights" in capsys.readouterr().out
    found, before = (
        dict(mask_files.load(file).masks)
        for file in (f"{tmp_path}/m0.safetensors", "initial_mask.safetensors")
    )
    before[name].view(-1, 4)[0] = torch.tensor([True, True, False, False])
    assert is_strict(found) and same(found, before)


# ----------------------------------------------------------------------------------- inference_loss


@pytest.mark.parametrize("is_masked", [True, False])
def test_baseline_losses_are_the_models_own(made, tmp_path, is_masked):
    """Also without a mask, and in microbatches."""
    path, mask = made.folder / f"inference_loss_{SIZE}_bs{BATCH}_sql{SQLEN}.npz", {}
    if is_masked:
        mask = mask_files.load(made.folder / "initial_mask.safetensors").masks
    else:
        path, flags = (
            tmp_path / "dense.npz",
            f"--mask none --microbatch 3 --save {tmp_path}/dense.npz",
        )
        in_process(f"inference_loss.py --model dense {PLACE} {DATA} {flags}", made.folder)
    model, tokenizer = hf_model(made.folder / "dense")
    apply_masks({name: module for name, module in find_layers(model).items() if name in mask}, mask)
    with torch.no_grad():
        expected = [
            model(input_ids=sequences, labels=sequences).loss.item()
            for sequences in first_sequences(tokenizer, made.folder.parent / "text.jsonl")
        ]
    losses = np.load(path)["losses"]
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, expected, atol=1e-4)


# -------------------------------------------------------------------------------------------- train


def test_a_cached_baseline_serves_a_run_that_holds_text_out(llama, tmp_path):
    train.main(
        (
            f"--model dense {PLACE} {DATA} --max_step 1 --val_fraction 0.5 --skip_checkpoint "
            f"--out {tmp_path}/run"
        ).split()
    )
    (first,) = read_run(tmp_path / "run").metrics
    assert first["loss"] == pytest.approx(first["baseline"], abs=1e-5)


def test_a_run_folder_is_complete(made):
    run = made.folder / "run"
    assert sorted(os.listdir(run)) == [
        "checkpoint",
        "curve.png",
        "logits.safetensors",
        "mask.safetensors",
        "metrics.jsonl",
        "run.json",
    ]
    record = json.loads((run / "run.json").read_text())
    assert record["arguments"]["lr"] == 20 and record["summary"]["steps"] == STEPS
    assert record["environment"]["transformers"] == transformers.__version__
    m0, learned = (
        mask_files.load(path).masks
        for path in (made.folder / "initial_mask.safetensors", run / "mask.safetensors")
    )
    different = sum(int((m0[name] != learned[name]).view(-1, 4).any(1).sum()) for name in m0)
    assert record["summary"]["blocks_changed"] == different > 0
    assert record["summary"]["blocks"] == sum(mask.numel() // 4 for mask in m0.values())


def test_metrics_have_a_line_a_step_and_start_at_m0(made):
    run = read_run(made.folder / "run")
    assert column(run, "step") == list(range(1, STEPS + 1))
    losses = np.load(made.folder / f"inference_loss_{SIZE}_bs{BATCH}_sql{SQLEN}.npz")[
        "losses"
    ].tolist()
    assert column(run, "baseline") == [losses[t % len(losses)] for t in range(STEPS)]
    assert (
        run.metrics[0]["loss"] == run.metrics[0]["baseline"]
        and run.metrics[1]["loss"] != run.metrics[1]["baseline"]
    )


def test_the_checkpoint_is_dense_times_mask_which_is_the_mode_of_the_logits(made):
    run = read_run(made.folder / "run")
    dense, sparse = weights(made.folder / "dense"), weights(run.folder / "checkpoint")
    assert (
        dense.keys() == sparse.keys()
        and len(run.masks) == made.layers
        and run.masks.keys() == run.logits.keys()
    )
    for name, mask in run.masks.items():
        key = f"{name}.weight"
        expected = as_matrix(made, dense.pop(key)).masked_fill(~mask, 0.0)
        assert torch.equal(
            as_matrix(made, sparse[key]).view(torch.int32), expected.view(torch.int32)
        )
        assert torch.equal(mask.view(-1, 4), brute_force(run.logits[name], 2, 4))
    assert all(torch.equal(sparse[key], dense[key]) for key in dense)


@pytest.mark.parametrize("init", ["mask", "scores"])
def test_online_baselines_are_the_cached_ones(llama, tmp_path, init):
    runs = {}
    for kind in ("cached", "online"):
        train.main(
            f"--model dense {PLACE} {DATA} --logits 1 --lr 5 --max_step 4 --skip_checkpoint "
            f"--init {init} "
            f"--baseline {kind} --out {tmp_path}/{kind}".split()
        )
        runs[kind] = read_run(tmp_path / kind)
        assert sorted(os.listdir(tmp_path / kind)) == [
            "curve.png",
            "mask.safetensors",
            "metrics.jsonl",
            "run.json",
        ]
    for key in ("loss", "baseline", "advantage", "delta"):
        np.testing.assert_allclose(
            column(runs["online"], key), column(runs["cached"], key), atol=1e-5
        )
    assert all(
        torch.equal(mask, runs["cached"].masks[name]) for name, mask in runs["online"].masks.items()
    )


# ----------------------------------------------------------------------------------------- evaluate


def test_perplexity_is_the_hand_computed_one(made):
    model, tokenizer = hf_model(made.folder / "run" / "checkpoint")
    ids = torch.tensor(tokenizer((made.folder.parent / "held_out.txt").read_text()).input_ids)
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        chances = (
            model(input_ids=windows).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])
        )
    nats = -chances.double().mean().item()
    result = json.loads((made.folder / "evaluation.json").read_text())
    assert (
        result["windows"] == len(windows)
        and result["seqlen"] == WINDOW
        and result["tokens"] == windows.numel()
    )
    assert result["nats"] == pytest.approx(nats, abs=1e-4)
    assert result["ppl"] == pytest.approx(np.exp(nats), rel=1e-4)
    assert result["density"] == 0.5 and result["sparsity_type"] == "2:4"
