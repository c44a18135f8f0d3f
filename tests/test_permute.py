"""permute.py, and masks, orders and models that do not go together."""

import json
import shutil

import get_mask
import permute
import prune
from files import permutation_files
from masking.layers import apply_mask
from pruning.channels import apply_permutation, reorder
from utils import UserError

import pytest
import tiny
import torch
import transformers
from masked import same
from safetensors.torch import load_file

PLACE = "--dtype float32 --device cpu"
ORDER = "a.permutation.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    """A dense Llama, two orders of it, and masks of the dense model and of order a. Order b leaves
    the embeddings."""
    folder = tmp_path_factory.mktemp("permute")
    tiny.write_corpus(folder / "text.jsonl")
    shutil.copytree(models["llama"], folder / "dense")
    permute.main(
        f"--model {folder}/dense {PLACE} --dataset {folder}/text.jsonl --nsamples 8 --seqlen 64 "
        "--rounds 5 "
        f"--save_model {folder}/a".split()
    )
    b = load(folder / "dense")
    reorder(b, {"model.layers.0.hidden": torch.arange(b.config.intermediate_size).roll(1)[None]})
    b.save_pretrained(folder / "b")
    for name in ("dense", "a"):
        prune.main(
            f"--model {folder}/{name} {PLACE} --dataset {folder}/text.jsonl --nsamples 8 --seqlen "
            "64 "
            f"--save_model {folder}/sparse_{name}".split()
        )
        get_mask.main(f"--model {folder}/sparse_{name} --save {folder}/{name}.safetensors".split())
    return folder


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)


def test_the_script_writes_a_plain_folder_and_the_order(folder):
    dense, reordered = load(folder / "dense"), load(folder / "a")
    tokens = torch.randint(3, 300, (2, 32))
    assert torch.allclose(
        dense(input_ids=tokens).logits, reordered(input_ids=tokens).logits, atol=1e-4
    )
    for (name, before), after in zip(dense.named_parameters(), reordered.parameters()):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values), name
    assert (folder / ORDER).stat().st_size < 8192 and load_file(folder / ORDER)[
        "residual"
    ].dtype == torch.int32
    assert permutation_files.load(folder / ORDER)[1] == "dense"  # no local path
    shares = json.loads((folder / "a" / "permute.json").read_text())["summary"]["shares"]
    assert set(shares) == {"residual", "value", "hidden"}
    assert all(after > before for before, after in shares.values())


def test_the_original_model_the_order_and_the_mask_make_the_sparse_model(folder, tmp_path):
    permute.main(
        f"--model {folder}/dense --order {folder}/{ORDER} --save_model {tmp_path}/again".split()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    again = load(tmp_path / "again")
    assert same(again.state_dict(), load(folder / "a").state_dict())
    assert same(
        apply_mask(again, folder / "a.safetensors").state_dict(),
        load(folder / "sparse_a").state_dict(),
    )


@pytest.mark.parametrize(
    "model, mask",
    [
        ("dense", "a"),
        ("a", "dense"),
        ("b", "a"),
        ("b", "dense"),
        ("sparse_a", "dense"),
        ("sparse_dense", "a"),
    ],
)
def test_masks_of_another_order_are_refused(folder, model, mask):
    with pytest.raises(UserError, match="the order of the channels or the input embeddings differ"):
        apply_mask(load(folder / model), folder / f"{mask}.safetensors")


def test_orders_of_other_models_are_refused(folder, models):
    other = load(folder / "dense")
    other.get_input_embeddings().weight.data.neg_()
    for model in (load(folder / "a"), load(folder / "b"), load(models["gpt2"]), other):
        with pytest.raises(UserError, match="another model, or this model was reordered before"):
            apply_permutation(model, folder / ORDER)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--model {f}/a --save_model {t}/new", "reordered before"),
        (
            "--model {f}/a --order {f}/a.permutation.safetensors --save_model {t}/new",
            "reordered before",
        ),
        ("--model {f}/dense --save_model {f}/a", "exists already"),
        ("--model {f}/dense --save_model {t}/new --sparsity_type 3:5", "M = 5 does not divide"),
        (
            "--model {f}/absent --dataset {f}/gone.jsonl --save_model {t}/new",
            "gone.jsonl: no such file",
        ),
    ],
)
def test_errors_write_nothing(folder, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        permute.main(
            (
                f"{PLACE} --dataset {folder}/text.jsonl --nsamples 2 --seqlen 32 --rounds 1 "
                + flags.format(f=folder, t=tmp_path)
            ).split()
        )
    assert not list(tmp_path.iterdir())
