"""permute.py, and what follows from it: masks, orders and models that do not go together part."""
import json
import shutil

from utils import UserError

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import get_mask
import permute
import prune
import train
from files import permutation_files
from masking.layers import apply_mask
from models.loading import model_fingerprint
from pruning.channels import apply_permutation, channel_sets

PLACE = "--dtype float32 --device cpu"


# ----------------------------------------------------------------------------------------- the script, and what follows

@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    """A dense Llama, two orders of it, and masks of the dense model and of the first order."""
    folder = tmp_path_factory.mktemp("permute")
    tiny.write_corpus(folder / "text.jsonl")
    shutil.copytree(models["llama"], folder / "dense")
    for name, flags in (("a", ""), ("b", "--channels hidden value --seed 1")):
        permute.main(f"--model {folder}/dense {PLACE} --dataset {folder}/text.jsonl --nsamples 8 --seqlen 64 --steps 5 "
                     f"--save_model {folder}/{name} {flags}".split())
    for name in ("dense", "a"):
        prune.main(f"--model {folder}/{name} {PLACE} --dataset {folder}/text.jsonl --nsamples 8 --seqlen 64 "
                   f"--save_model {folder}/sparse_{name}".split())
        get_mask.main(f"--model {folder}/sparse_{name} --save {folder}/{name}.safetensors".split())
    return folder


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_script_writes_a_plain_folder_and_the_order(folder):
    dense, reordered = load(folder / "dense"), load(folder / "a")
    tokens = torch.randint(3, 300, (2, 32))
    assert torch.allclose(dense(input_ids=tokens).logits, reordered(input_ids=tokens).logits, atol=1e-4)
    for (name, before), after in zip(dense.named_parameters(), reordered.parameters()):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values), name
    file = folder / "a.permutation.safetensors"
    assert file.stat().st_size < 8192 and load_file(file)["residual"].dtype == torch.uint16
    record = json.loads((folder / "a" / "permute.json").read_text())
    assert set(record["summary"]["kinds"]) == {"residual", "value", "hidden"}
    assert all(kind["after"] > kind["before"] for kind in record["summary"]["kinds"].values())
    assert set(load_file(folder / "b.permutation.safetensors")) == {
        f"model.layers.{i}.{kind}" for i in range(2) for kind in ("hidden", "value")}


def test_the_model_the_order_and_the_mask_are_all_that_is_shipped(folder):
    """apply_mask on the original makes the pruned folder to the bit."""
    model = apply_mask(load(folder / "dense"), folder / "a.safetensors", folder / "a.permutation.safetensors")
    assert same_bits(model, load(folder / "sparse_a"))


def test_learning_goes_on_from_it(folder, tmp_path):
    train.main(f"--model {folder}/a {PLACE} --mask {folder}/a.safetensors --dataset {folder}/text.jsonl --dataset_size "
               f"8 --batchsize 4 --sqlen 32 --baseline online --init random --max_step 2 --step eager --out "
               f"{tmp_path}/run".split())
    model = apply_mask(load(folder / "dense"), tmp_path / "run/mask.safetensors", folder / "a.permutation.safetensors")
    assert same_bits(model, load(tmp_path / "run/checkpoint"))


@pytest.mark.parametrize("model, mask, permutation", [
    ("dense", "a", None), ("a", "dense", None), ("b", "a", None), ("b", "dense", None), ("dense", "a", "b"),
    ("dense", "dense", "b"), ("sparse_a", "dense", None), ("sparse_dense", "a", None)])
def test_masks_of_another_order_are_refused(folder, model, mask, permutation):
    """Order b leaves the embeddings alone: that it is another is known from the config, and kept by what is pruned."""
    loaded = load(folder / model)
    with pytest.raises(UserError, match="the order of the channels or the input embeddings differ"):
        apply_mask(loaded, folder / f"{mask}.safetensors",
                   permutation and folder / f"{permutation}.permutation.safetensors")


def test_pruning_leaves_the_fingerprint(folder):
    found = {name: model_fingerprint(load(folder / name)) for name in ("dense", "a", "b", "sparse_a", "sparse_dense")}
    assert found["a"] == found["sparse_a"] and found["dense"] == found["sparse_dense"]
    assert len(set(found.values())) == 3


def test_orders_of_other_models_are_refused(folder, models):
    file = folder / "a.permutation.safetensors"
    for name in ("a", "b"):
        with pytest.raises(UserError, match="another model than this one, or its channels are reordered already"):
            apply_permutation(load(folder / name), file)
    with pytest.raises(UserError, match="is of another model: it orders"):
        apply_permutation(load(models["gpt2"]), file)
    other = load(folder / "dense")
    other.get_input_embeddings().weight.data.neg_()
    with pytest.raises(UserError, match="another model than this one"):
        apply_permutation(other, file)


def test_damaged_files_are_refused(folder, tmp_path):
    model, whole = load(folder / "dense"), (folder / "a.permutation.safetensors").read_bytes()
    file = tmp_path / "damaged.safetensors"
    for damaged in (whole[:-8], whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]), b"", whole.replace(b"maskpro-perm",
                                                                                                   b"maskpro-mask")):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged\.safetensors"):
            apply_permutation(model, file)
    twice = permutation_files.load(folder / "a.permutation.safetensors",
                                   {name: (s.groups, s.size) for name, s in channel_sets(model).items()})
    twice.orders["residual"][0, 0] = twice.orders["residual"][0, 1]
    file.unlink()
    permutation_files.save(file, twice)
    with pytest.raises(UserError, match="names a channel twice"):
        apply_permutation(model, file)
    with pytest.raises(UserError, match="no such file"):
        apply_permutation(model, tmp_path / "none")
    assert same_bits(model, load(folder / "dense"))


@pytest.mark.parametrize("flags, words", [
    ("--model {f}/a --save_model {t}/new", "reordered already"),
    ("--model {f}/dense --save_model {f}/a", "exists already"),
    ("--model {f}/dense --save_model {t}/new --sparsity_type 3:5", "M = 5 does not divide"),
    ("--model {f}/dense --save_model {t}/new --seqlen 1", "at least 2 tokens"),
])
def test_errors_write_nothing(folder, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        permute.main((f"{PLACE} --dataset {folder}/text.jsonl --nsamples 2 --seqlen 32 --steps 1 "
                      + flags.format(f=folder, t=tmp_path)).split())
    assert not list(tmp_path.iterdir())
