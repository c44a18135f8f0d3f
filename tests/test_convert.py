"""get_mask.py --convert between the three formats, and apply_mask: the mask's way to whoever has
the base model."""

import json
import shutil

import eval as evaluate
import get_mask
import prune
import train
from files import mask_files
from masking.layers import apply_mask
from models.loading import model_fingerprint
from utils import UserError

import pytest
import torch
from masked import patch_file, same
from mistakes import edited
from tiny import write_corpus
from transformers import AutoModelForCausalLM

PLACE = "--dtype float32 --device cpu"


@pytest.fixture(scope="module")
def w(tmp_path_factory, models):
    """A Llama, a Llama of other weights, and a GPT-2, pruned 2:4 by magnitude, with their masks."""
    w = tmp_path_factory.mktemp("convert")
    write_corpus(w / "text.jsonl", 12)
    for kind in ("llama", "gpt2"):
        shutil.copytree(models[kind], w / kind)
    edited(w / "llama", w / "other", lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    for kind in ("llama", "gpt2", "other"):
        prune.main(
            (
                f"--model {w}/{kind} {PLACE} --prune_method magnitude --save_model "
                f"{w}/sparse_{kind}"
            ).split()
        )
        get_mask.main(f"--model {w}/sparse_{kind} --save {w}/{kind}.safetensors".split())
    return w


def dense(w, kind):
    return AutoModelForCausalLM.from_pretrained(w / kind)


def convert(source, target, *arguments):
    get_mask.main(["--convert", str(source), "--save", str(target), *map(str, arguments)])
    return target


def same_bits(model, other):
    """Every parameter equal bit by bit: +0.0 is not -0.0."""
    return all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


# ------------------------------------------------------------------------------------------ convert


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_round_trip_through_the_three_formats(w, tmp_path, kind):
    first = w / f"{kind}.safetensors"
    folder = convert(first, tmp_path / "folder")
    npz = convert(folder, tmp_path / "mask.npz")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").touch()
    convert(npz, tmp_path / "run/mask.safetensors", "--model", w / kind)
    back = convert(tmp_path / "run", tmp_path / "back.safetensors")
    wanted, found = mask_files.load(first), mask_files.load(back)
    assert sorted(file.stem for file in folder.iterdir()) == sorted(wanted.masks)
    assert same(found.masks, wanted.masks)
    # no local path
    assert (found.n, found.m, found.fingerprint, found.model) == (2, 4, wanted.fingerprint, kind)


def test_without_a_model_a_foreign_mask_gets_no_fingerprint_and_a_warning(w, tmp_path, capsys):
    wanted, named = dense(w, "llama"), ("--base_model", "some/llama")
    copy = mask_files.load(convert(w / "llama.safetensors", tmp_path / "copy.safetensors", *named))
    assert (copy.model, copy.fingerprint) == ("some/llama", model_fingerprint(wanted))
    assert "warning" not in capsys.readouterr().err
    folder = convert(w / "llama.safetensors", tmp_path / "folder")
    bare = convert(folder, tmp_path / "bare.safetensors")
    assert "no fingerprint" in capsys.readouterr().err
    assert mask_files.load(bare).fingerprint == ""
    full = mask_files.load(convert(folder, tmp_path / "full.safetensors", "--model", w / "llama"))
    assert full.fingerprint == model_fingerprint(wanted)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--convert {w}/gpt2.safetensors --model {w}/llama", "another model: transformer.h.0"),
        (
            "--convert {w}/llama.safetensors --model {w}/other",
            "of another model: .* the input embeddings differ",
        ),
        ("--convert {w}/llama.safetensors --sparsity_type 4:8", "2:4, not 4:8"),
        (
            "--convert {w}/llama.safetensors --save {t}/new.bin",
            "new.bin must end in .safetensors, in .npz",
        ),
    ],
)
def test_refusals(w, tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        get_mask.main(f"--save {tmp_path}/new {arguments}".format(w=w, t=tmp_path).split())
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- PATCH


@pytest.fixture
def sparse_weights(w):
    model = AutoModelForCausalLM.from_pretrained(w / "sparse_llama")
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_mask_of_patch_is_read_to_the_bit(w, tmp_path, sparse_weights):
    file = patch_file(tmp_path / "mask.npz", sparse_weights)
    wanted = mask_files.load(w / "llama.safetensors")
    alone = mask_files.load(convert(file, tmp_path / "alone.safetensors"))
    assert same(alone.masks, wanted.masks) and alone.model == "some/llama"
    held = mask_files.load(convert(file, tmp_path / "held.safetensors", "--model", w / "llama"))
    assert same(held.masks, wanted.masks) and held.fingerprint == wanted.fingerprint


def test_a_block_of_patch_whose_kept_weight_was_zero_is_filled_up(tmp_path, sparse_weights, capsys):
    name = "model.layers.0.mlp.up_proj"
    weight = sparse_weights[f"{name}.weight"]
    weight[0, :4] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    got = mask_files.load(patch_file(tmp_path / "mask.npz", sparse_weights))
    assert got.masks[name][0, :4].tolist() == [True, False, False, True]
    assert torch.equal(got.masks[name][0, 4:], weight[0, 4:] != 0)
    assert "1 blocks of" in capsys.readouterr().err


def test_dense_tiles_of_patch_are_refused_by_name(tmp_path, sparse_weights):
    sparse_weights["model.layers.1.mlp.up_proj.weight"].fill_(1.0)
    file = patch_file(tmp_path / "mask.npz", sparse_weights, "Dense/2:4 tiles")
    with pytest.raises(UserError, match=r"pattern is Dense/2:4 tiles, .*layers.1.mlp.up_proj"):
        mask_files.load(file)


def test_a_mask_of_some_layers_says_of_which_there_is_none(w, tmp_path, sparse_weights, capsys):
    some = {name: weight for name, weight in sparse_weights.items() if "self_attn" in name}
    file = patch_file(tmp_path / "mask.npz", some)
    convert(file, tmp_path / "mask.safetensors", "--model", w / "llama")
    said = capsys.readouterr().out
    assert "no mask for model.layers.*.mlp.down_proj, model.layers.*.mlp.gate_proj, model." in said


# --------------------------------------------------------------------------------------- apply_mask


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_apply_mask_is_what_pruning_did(w, tmp_path, kind):
    model = dense(w, kind)
    assert apply_mask(model, w / f"{kind}.safetensors") is model
    assert same_bits(model, dense(w, f"sparse_{kind}"))
    npz = convert(w / f"{kind}.safetensors", tmp_path / "mask.npz")
    assert same_bits(apply_mask(dense(w, kind), npz), model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_apply_mask_is_what_train_saves_and_evaluate_measures(w, tmp_path, kind):
    train.main(
        f"--model {w}/{kind} {PLACE} --mask {w}/{kind}.safetensors --dataset {w}/text.jsonl "
        "--dataset_size 8 --batchsize 4 --sqlen 32 --baseline online --logits 0.1 --lr 99 "
        "--max_step 2 "
        f"--out {tmp_path}/run".split()
    )
    # a run stands for its mask, and for its model
    model = apply_mask(dense(w, kind), tmp_path / "run")
    assert not same_bits(model, dense(w, f"sparse_{kind}"))  # another mask than that
    assert same_bits(model, AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint"))
    for name, measured in (
        ("a", f"{tmp_path}/run"),
        ("b", f"{w}/{kind} --mask {tmp_path}/run/mask.safetensors"),
    ):
        evaluate.main(
            f"--model {measured} {PLACE} --ppl {w}/text.jsonl --seqlen 64 --nwindows 4 "
            f"--save {tmp_path}/{name}.json".split()
        )
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["ppl"] == second["ppl"]
