"""eval.py: what is verified and refused, and where the numbers go."""

import json
import os
import shutil
from pathlib import Path

import data
import eval as evaluate
from files import mask_files
from models.layers import find_layers
from models.loading import model_fingerprint
from utils import UserError

import pytest
import torch
from quizzes import hf_model, run
from safetensors.torch import load_file, save_file

KEPT = torch.tensor([True, False, True, False])


def masks_of(model) -> dict[str, torch.Tensor]:
    return {
        name: KEPT.repeat(module.weight.numel() // 4).view_as(module.weight)
        for name, module in find_layers(model).items()
    }


@pytest.fixture
def model_copy(models, tmp_path):
    return shutil.copytree(models["llama"], tmp_path / "model")


def test_tokens_of_the_text_and_of_the_windows(folder, tmp_path, capsys):
    run(
        f"--model {folder}/llama --ppl {folder}/text.txt --seqlen 50 --nwindows 3 --save "
        f"{tmp_path}/a.json"
    )
    record, said = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    ids = hf_model(folder / "llama")[1]((folder / "text.txt").read_text()).input_ids
    assert len(ids) % 50 and (record["text_tokens"], record["tokens"], record["windows"]) == (
        len(ids),
        150,
        3,
    )
    assert record["fingerprint"] == data.fingerprint(torch.tensor(ids[:150]).view(3, 50))
    assert (
        f"(3 windows of 50 tokens from a text of {len(ids):,})" in said
        and f"written to {tmp_path}/a.json" in said
    )


@pytest.mark.parametrize(
    "change, words",
    [
        # a block with fewer weights is no breach of the pattern
        (("layers.0.mlp.up_proj", slice(None), 0.0), None),
        (
            ("layers.1.mlp.down_proj", 3, 1.0),
            r"1 of 14 layers are not 2:4 .*model.layers.1.mlp.down_proj \(1 blocks\)",
        ),
        (("layers.1.mlp.down_proj", slice(None), -0.0), None),
    ],
)  # as weight * mask leaves
def test_density_and_pattern(model_copy, tmp_path, capsys, change, words):
    """One block of a 2:4 model is changed; the density is exact, and nothing is written of a broken
    model."""
    model, _ = hf_model(model_copy)
    weights = sum(mask.numel() for mask in masks_of(model).values())
    tensors = load_file(model_copy / "model.safetensors")
    for name, mask in masks_of(model).items():
        tensors[f"{name}.weight"].masked_fill_(~mask, 0.0)
    name, place, value = change
    tensors[f"model.{name}.weight"].view(-1, 4)[7, place] = value
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    command = f"--model {model_copy} --ppl none --sparsity_type 2:4 --save {tmp_path}/record.json"
    if words:
        with pytest.raises(UserError, match=words):
            run(command)
        assert not list(tmp_path.glob("*.json"))
        run(f"{command} --targets self_attn")
        return
    run(command)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["density"] == (weights // 2 - 2) / weights and record["sparsity_type"] == "2:4"
    assert (
        "density 0.49997" in (said := capsys.readouterr().out)
        and ", 2:4 in every masked layer\n" in said
    )


def test_an_evaluation_is_shown_and_not_repeated(
    model_copy, tmp_path, monkeypatch, capsys, request
):
    """Until something that decides its numbers changes. With --save a file that is there is
    refused."""
    monkeypatch.chdir(tmp_path)
    of_a_root = evaluate.output_file(evaluate.parse_args(["--model", "/model"]))
    assert evaluate.output_file(evaluate.parse_args(["--model", "someone/model"])).name.startswith(
        "someone_model_"
    )
    assert of_a_root.parent == Path("results/evaluations") and of_a_root.name.startswith("model_")
    os.mkdir("run")
    found = []
    for file in ("run.json", "mask.safetensors", "plot.png"):  # a plot of a run changes no number
        Path("run", file).touch()
        found.append(
            evaluate.output_file(evaluate.parse_args(["--model", "model", "--mask", "run"]))
        )
    assert found[0] != found[1] == found[2]
    for flags in (["--ppl", "text"], ["--task_file", "text"]):
        Path("text").touch()
        before = evaluate.output_file(evaluate.parse_args(["--model", "model", *flags]))
        os.utime("text", (1, 1))
        assert evaluate.output_file(evaluate.parse_args(["--model", "model", *flags])) != before
    run("--model model --ppl none")
    (first,) = Path("results/evaluations").iterdir()
    assert first.name.startswith("model_") and f"written to {first}" in capsys.readouterr().out
    run("--model model --ppl none --dtype bfloat16")
    os.utime("model/config.json", (1, 1))
    run("--model model --ppl none")
    assert len(list(Path("results/evaluations").iterdir())) == 3 and sorted(
        os.listdir("model")
    ) == sorted(os.listdir(request.getfixturevalue("models")["llama"]))
    run(f"--model model --ppl none --save {first}x")
    request.getfixturevalue("nothing_loads")
    capsys.readouterr()
    run("--model model --ppl none")
    assert (
        "1.000000 |\nmeasured earlier; remove results/evaluations/model_" in capsys.readouterr().out
    )
    with pytest.raises(
        UserError, match=r"jsonx exists already; remove it, or choose another --save"
    ):
        run(f"--model model --ppl none --save {first}x")
    monkeypatch.setattr("files.atomic.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"not a folder that can be written to; .*--save"):
        run("--model model --ppl none --save new.json")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_mask(model_copy, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    model, _ = hf_model(model_copy)
    masks, mask = (
        masks_of(model),
        tmp_path / {"file": "mask.v1.safetensors", "folder": "mask.v1"}[kind],
    )
    if kind == "file":
        mask_files.save(mask, masks, 2, 4, "model", model_fingerprint(model))
    else:
        mask_files.save(mask, masks, 2, 4)
    run(f"--model {model_copy} --mask {mask} --ppl none")
    (written,) = Path("results/evaluations").glob("*_mask.v1*_*.json")
    record = json.loads(written.read_text())
    assert record["density"] == 0.5 and record["mask_fingerprint"] == mask_files.fingerprint(masks)
