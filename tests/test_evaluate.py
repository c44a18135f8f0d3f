"""evaluate.py: what is verified and refused, and where the numbers go."""

import json
import shutil

from utils import UserError

import pytest
import torch
from quizzes import hf_model, run, table_of
from safetensors.torch import load_file, save_file
from tiny import training_text

import data
import evaluate
from evaluation.comparison import percent
from files import mask_files
from models.layers import find_layers
from models.loading import model_fingerprint


@pytest.fixture
def llama(folder):
    return hf_model(folder / "llama")


# --------------------------------------------------------------------------------------------------- text and sparsity


def test_tokens_of_the_text_and_of_the_windows(folder, tmp_path, llama, capsys):
    run(f"--model {folder}/llama --ppl {folder}/text.txt --seqlen 50 --nwindows 3 --save {tmp_path}/a.json")
    record, said = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    ids = llama[1]((folder / "text.txt").read_text()).input_ids
    assert len(ids) % 50 and (record["text_tokens"], record["tokens"], record["windows"]) == (len(ids), 150, 3)
    assert record["fingerprint"] == data.fingerprint(torch.tensor(ids[:150]).view(3, 50))
    assert f"150 tokens in the windows, {len(ids):,} in the text" in said and f"written to {tmp_path}/a.json" in said


def test_no_text(folder, tmp_path, capsys):
    run(f"--model {folder}/llama --ppl none --save {tmp_path}/a.json")
    assert "ppl" not in json.loads((tmp_path / "a.json").read_text())
    weights = sum(module.weight.numel() for module in find_layers(hf_model(folder / "llama")[0]).values())
    assert f"density 1.000000, {weights:,} of {weights:,} weights not zero\n" in capsys.readouterr().out


def sparse_copy(folder, target, change) -> None:
    """The Llama at 2:4 by position, every layer, then change(tensors)."""
    model, tokenizer = hf_model(folder / "llama")
    for module in find_layers(model).values():
        module.weight.data.view(-1, 4)[:, 1::2] = 0.0
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_exact_density(folder, tmp_path, capsys):
    """One weight less in one layer is seen, and is no breach of the pattern."""
    sparse_copy(folder, tmp_path / "sparse",
                lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1, 4)[5].zero_())
    run(f"--model {tmp_path}/sparse --ppl none --sparsity_type 2:4")
    weights = sum(module.weight.numel() for module in find_layers(hf_model(folder / "llama")[0]).values())
    record = json.loads((tmp_path / "sparse/evaluation.json").read_text())
    assert record["density"] == (weights // 2 - 2) / weights and record["sparsity_type"] == "2:4"
    assert "2:4 in every masked layer, density 0.49997" in (said := capsys.readouterr().out)
    assert f"{weights // 2 - 2:,} of {weights:,} weights not zero" in said


@pytest.mark.parametrize("value, words", [(1.0, r"down_proj \(1 blocks\)"), (-0.0, r"down_proj \(1 zeros are -0.0\)")])
def test_one_weight_breaks_the_pattern(folder, tmp_path, value, words):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].view(-1, 4)[7, 3] = value
    sparse_copy(folder, tmp_path / "sparse", change)
    with pytest.raises(UserError, match=f"1 of 14 layers are not 2:4 sparse: model.layers.1.mlp.{words}"):
        run(f"--model {tmp_path}/sparse --ppl none --sparsity_type 2:4")
    assert not (tmp_path / "sparse/evaluation.json").exists()
    run(f"--model {tmp_path}/sparse --ppl none --sparsity_type 2:4 --targets self_attn")


# ------------------------------------------------------------------------------------------------ where the numbers go


@pytest.fixture
def model_copy(models, tmp_path):
    return shutil.copytree(models["llama"], tmp_path / "model")


def test_beside_the_model_and_never_over_it(model_copy, capsys, request):
    run(f"--model {model_copy} --ppl none")
    assert json.loads((model_copy / "evaluation.json").read_text())["density"] == 1
    request.getfixturevalue("nothing_loads")
    with pytest.raises(UserError, match=r"evaluation.json exists already; choose another file with --save, or remove"):
        run(f"--model {model_copy} --ppl none")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_beside_the_mask(folder, model_copy, tmp_path, kind):
    model, _ = hf_model(model_copy)
    kept = torch.tensor([True, False, True, False])
    masks = {name: kept.repeat(module.weight.numel() // 4).view_as(module.weight)
             for name, module in find_layers(model).items()}
    mask = tmp_path / {"file": "mask.v1.safetensors", "folder": "mask.v1"}[kind]
    if kind == "file":
        mask_files.save(mask, masks, 2, 4, "model", model_fingerprint(model))
    else:
        mask_files.save(mask, masks, 2, 4)
    run(f"--model {model_copy} --mask {mask} --ppl none")
    record = json.loads((tmp_path / "mask.v1.evaluation.json").read_text())
    assert record["density"] == 0.5 and record["mask_fingerprint"] == mask_files.fingerprint(masks)
    assert not (model_copy / "evaluation.json").exists()
    with pytest.raises(UserError, match=r"mask.v1.evaluation.json exists already"):
        run(f"--model {model_copy} --mask {mask} --ppl none")
    shutil.rmtree(mask) if kind == "folder" else mask.unlink()
    other = {name: ~mask for name, mask in masks.items()}  # in the place of the first, and as dense
    if kind == "file":
        mask_files.save(mask, other, 2, 4, "model", model_fingerprint(model))
    else:
        mask_files.save(mask, other, 2, 4)
    with pytest.raises(UserError, match=rf"another model: the mask \({record['mask_fingerprint']} there, "):
        run(f"--model {model_copy} --mask {mask} --ppl {folder}/text.txt --seqlen 50")


def test_another_text_and_another_task_are_added(folder, model_copy, tmp_path, capsys, monkeypatch):
    """What was there stays as it was; each number is there once; the table has them in one row."""
    file, command = model_copy / "evaluation.json", f"--model {model_copy} --seqlen 50 --ppl"
    shutil.copyfile(folder / "text.txt", tmp_path / "again.txt")
    (tmp_path / "other.txt").write_text(" ".join(training_text()[60:90]))
    run(f"{command} {folder}/text.txt --nwindows 3")
    first = json.loads(file.read_text())
    run(f"{command} {tmp_path}/other.txt --nwindows 2")
    run(f"{command} {folder}/text.txt --nwindows 4 --bos --task_file {folder}/quiz.jsonl")
    whole = json.loads(file.read_text())
    later = whole.pop("later")
    assert whole == first and [record["windows"] for record in later] == [2, 4]
    assert [later[1]["bos"], list(later[1]["tasks"])] == [True, ["quiz"]] and "tasks" not in later[0]
    before = file.read_bytes()
    monkeypatch.setattr(evaluate, "batch_loss", None)  # none of these gets as far
    for flags, words in [(f"{folder}/text.txt --nwindows 3", f"the perplexity of these tokens, {first['ppl']}"),
                         (f"{tmp_path}/again.txt --nwindows 3", "the perplexity of these tokens"),
                         (f"{tmp_path}/other.txt --nwindows 2", "the perplexity of these tokens"),
                         (f"{folder}/text.txt --nwindows 4 --bos", "the perplexity of these tokens"),
                         (f"none --task_file {folder}/quiz.jsonl", "quiz"),
                         ("none", ""),
                         (f"{folder}/text.txt --dtype bfloat16", "--dtype (float32 there, bfloat16")]:
        with pytest.raises(UserError) as error:
            run(f"{command} {flags}")
        assert "evaluation.json exists already" in str(error.value) and words in str(error.value)
        assert str(error.value).endswith("; choose another file with --save, or remove it")
    assert file.read_bytes() == before
    capsys.readouterr()
    run(f"--compare {model_copy}")
    head, _, row = table_of(capsys.readouterr().out)
    assert head[3:] == [f"perplexity, {what}" for what in ("text.txt, 3 windows of 50 tokens",
                                                           "other.txt, 2 windows of 50 tokens",
                                                           "text.txt, 4 windows of 50 tokens after BOS")] + [
        "quiz acc (%, 24 items)", "quiz acc_norm (%, 24 items)"]
    assert row[3:7] == [*(f"{numbers['ppl']:.3f}" for numbers in (first, *later)), percent(later[1]["tasks"]["quiz"],
                                                                                          "acc")]


def test_what_was_added_meanwhile_is_kept(folder, model_copy, monkeypatch):
    """Two evaluations at a time: the one that ends last adds to what the other has written."""
    loss = evaluate.batch_loss

    def another_ends_first(*args, **names):
        monkeypatch.setattr(evaluate, "batch_loss", loss)
        run(f"--model {model_copy} --ppl {folder}/text.txt --seqlen 30 --nwindows 1")
        return loss(*args, **names)
    monkeypatch.setattr(evaluate, "batch_loss", another_ends_first)
    run(f"--model {model_copy} --ppl {folder}/text.txt --seqlen 40 --nwindows 1")
    record = json.loads((model_copy / "evaluation.json").read_text())
    assert [record["seqlen"], *(numbers["seqlen"] for numbers in record["later"])] == [30, 40]


@pytest.mark.parametrize("content", ["{", "[]", "{\"later\": [1]}", "{\"later\": 1}", "{\"tasks\": [1]}"])
def test_nothing_is_added_to_what_is_no_record(folder, model_copy, nothing_loads, content):
    (model_copy / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation.json exists already and is no record of evaluate.py.*--save"):
        run(f"--model {model_copy} --ppl {folder}/text.txt")
    assert (model_copy / "evaluation.json").read_text() == content


def test_a_folder_that_cannot_be_written(model_copy, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: False)
    run(f"--model {model_copy} --ppl none")
    assert not (model_copy / "evaluation.json").exists()
    assert f"not written: {model_copy} cannot be written to; --save FILE keeps the numbers" in capsys.readouterr().out


def test_a_hub_id(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", lambda **given: hf_model(folder / "llama"))
    run("--model someone/model --ppl none")
    assert "not written: someone/model is no folder here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
