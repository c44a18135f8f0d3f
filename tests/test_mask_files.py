"""files/mask_files.py: the three formats, and what damaged or foreign files get, one line."""

import hashlib
import json
from contextlib import nullcontext
from itertools import combinations

from files import mask_files
from utils import UserError

import numpy as np
import pytest
import torch
from masked import random_mask, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 40), "model.layers.0.mlp.down_proj": (5, 24)}
KINDS = ["safetensors", "npz", "pt"]


@pytest.fixture
def layers():
    return {name: random_mask(shape, 2, 4, i) for i, (name, shape) in enumerate(SHAPES.items())}


def write(kind, folder, layers):
    """One file, or folder of .pt, of the kind."""
    path = folder / ("mask" if kind == "pt" else f"mask.{kind}")
    mask_files.save(path, layers, 2, 4, "tiny", "f00d")
    return path


def write_by_hand(folder, layers):
    """The other projects' formats, of any masks."""
    (folder / "mask").mkdir()
    for name, mask in layers.items():
        torch.save((mask * 0.5).half() != 0, folder / "mask" / f"{name}.pt")
    arrays = {
        f"{name}.weight.mask": np.packbits(mask.numpy().astype(bool))
        for name, mask in layers.items()
    }
    np.savez_compressed(folder / "mask.npz", **arrays)
    return folder / "mask", folder / "mask.npz"


# ------------------------------------------------------------------------------------------ formats


def test_reads_what_the_original_projects_write(tmp_path, layers):
    for path in write_by_hand(tmp_path, layers):
        assert same(mask_files.load(path, shapes=SHAPES).masks, layers)


def test_reads_a_file_that_was_made_by_other_means(tmp_path):
    """As the format is described: three patterns' numbers in a byte, and a checksum over all of
    it."""
    layers = {"b": random_mask((5, 28), 2, 4, 1), "a": random_mask((3, 4), 2, 4, 2)}
    numbers = {
        name: [
            [*combinations(range(4), 2)].index(tuple(block.nonzero().flatten().tolist()))
            for block in mask.view(-1, 4)
        ]
        + [0, 0]
        for name, mask in layers.items()
    }
    packed = {
        name: torch.tensor(
            [a + 6 * b + 36 * c for a, b, c in zip(of[::3], of[1::3], of[2::3])]
        ).byte()
        for name, of in numbers.items()
    }
    metadata = {
        "format": "maskpro-mask",
        "version": "1",
        "sparsity": "2:4",
        "model": "tiny",
        "fingerprint": "f00d",
        "shapes": json.dumps({name: [*mask.shape] for name, mask in layers.items()}),
    }
    everything = json.dumps(metadata, sort_keys=True).encode() + bytes(
        packed["a"].tolist() + packed["b"].tolist()
    )
    save_file(
        packed,
        tmp_path / "made.safetensors",
        metadata | {"checksum": hashlib.sha256(everything).hexdigest()},
    )
    found = mask_files.load(tmp_path / "made.safetensors")
    assert (found.n, found.m, found.model, found.fingerprint) == (2, 4, "tiny", "f00d") and same(
        found.masks, layers
    )


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (1, 4), (4, 8), (2, 3)])
def test_foreign_masks_are_of_the_pattern_asked_for_or_2_4(tmp_path, n, m):
    path, _ = write_by_hand(
        tmp_path, {"a": random_mask((32, 48), n, m), "b": random_mask((32, 24), n, m)}
    )
    assert (mask_files.load(path, (n, m)).n, mask_files.load(path, (n, m)).m) == (n, m)
    with (
        nullcontext()
        if 2 * n == m < 8
        else pytest.raises(UserError, match=r"layer a: .* 2 of 4; .*--sparsity_type")
    ):
        assert mask_files.load(path).m == 4  # 1:2 keeps 2 of 4, too


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", KINDS)
def test_refusals(tmp_path, layers, kind):
    path = write(kind, tmp_path, layers)
    with pytest.raises(UserError, match="exists already"):
        write(kind, tmp_path, layers)
    with pytest.raises(UserError, match=r"2:4, not 1:4|keep exactly 1 of 4"):
        mask_files.load(path, (1, 4), SHAPES)
    with pytest.raises(UserError, match="no such mask"):
        mask_files.load(tmp_path / f"absent.{kind}")


def test_an_npz_of_another_model(tmp_path, layers):
    path = write("npz", tmp_path, layers)
    first = next(iter(SHAPES))
    with pytest.raises(UserError, match="not one of the model's"):
        mask_files.load(path, shapes={first: SHAPES[first]})
    with pytest.raises(UserError, match="does not hold the bits of a mask"):
        mask_files.load(path, shapes=SHAPES | {first: (6, 80)})
    with pytest.raises(UserError, match="does not store the shapes"):
        mask_files.load(path)


def test_an_unstrict_layer_is_named(tmp_path, layers):
    broken = list(layers)[1]
    layers[broken][3, 7] ^= True
    for path in write_by_hand(tmp_path, layers):
        for wanted in (None, (2, 4)):
            with pytest.raises(
                UserError, match=f"layer {broken}: 1 of 30 blocks do not keep exactly 2 of 4"
            ):
                mask_files.load(path, wanted, SHAPES)
    with pytest.raises(UserError, match=f"layer {broken}: 1 of 30"):
        mask_files.save(tmp_path / "mask.safetensors", layers, 2, 4)
    with pytest.raises(UserError, match="layer q: 5 does not divide its 8 inputs"):
        mask_files.save(tmp_path / "mask.safetensors", {"q": random_mask((4, 8), 2, 4)}, 2, 5)
    assert not (tmp_path / "mask.safetensors").exists()


def test_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    (tmp_path / "mask").mkdir()
    torch.save(Evil(), tmp_path / "mask" / "a.pt")
    np.savez(tmp_path / "mask.npz", **{"a.weight.mask": np.array([Evil()], dtype=object)})
    for name, words in (
        ("mask", "mask: a.pt cannot be read"),
        ("mask.npz", "mask.npz cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            mask_files.load(tmp_path / name, shapes={"a": (64, 64)})
    assert not (tmp_path / "touched").exists()


def test_not_a_mask_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.npz").write_text("no zip")
    save_file({"weight": torch.zeros(3)}, tmp_path / "d.safetensors")
    (tmp_path / "dense").mkdir()
    torch.save(torch.ones(4, 8, dtype=torch.bool), tmp_path / "dense" / "f.pt")
    for name in ("empty", "b.npz", "d.safetensors", "dense"):
        with pytest.raises(UserError, match=name):
            mask_files.load(tmp_path / name, shapes=SHAPES)


def test_metadata_that_are_not_those_written(tmp_path, layers):
    path = write("safetensors", tmp_path, layers)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"sparsity": "1:4"})
    with pytest.raises(
        UserError, match=r"mask.safetensors cannot be read .*checksum.*; restore it or make it anew"
    ):
        mask_files.load(path)
