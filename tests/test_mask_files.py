"""files/mask_files.py: the three formats, and what damaged or hostile files get, a clear refusal."""
import io
import json
import os
import random
import struct
import zipfile

from utils import UserError

import numpy as np
import pytest
import torch
from masked import random_mask

from files import mask_files

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 40), "model.layers.0.mlp.down_proj": (5, 24)}


@pytest.fixture
def layers():
    return {name: random_mask(shape, 2, 4, i) for i, (name, shape) in enumerate(SHAPES.items())}


def write(kind, folder, layers):
    """One file (or folder) of the kind; (path, the file to damage)."""
    if kind == "pt":
        mask_files.save_folder(folder / "mask", layers)
        return folder / "mask", folder / "mask" / f"{next(iter(layers))}.pt"
    path = folder / f"mask.{kind}"
    mask_files.save_npz(path, layers) if kind == "npz" else mask_files.save(path, layers, 2, 4, "tiny", "f00d")
    return path, path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == torch.bool for k in a)


# ------------------------------------------------------------------------------------------------------------- formats

def test_the_three_formats_hold_the_same(tmp_path, layers):
    mask_files.save(tmp_path / "a.safetensors", layers, 2, 4, "tiny", "f00d")
    first = mask_files.load(tmp_path / "a.safetensors")
    assert (first.n, first.m, first.model, first.fingerprint) == (2, 4, "tiny", "f00d")
    mask_files.save_folder(tmp_path / "b", first.masks)
    second = mask_files.load(tmp_path / "b", 2, 4)
    mask_files.save_npz(tmp_path / "c.npz", second.masks)
    third = mask_files.load(tmp_path / "c.npz", shapes=SHAPES)
    assert (third.n, third.m, third.model, third.fingerprint) == (2, 4, "", "")
    assert all(same(found.masks, layers) for found in (first, second, third))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b", "c.npz"]  # nothing left beside


def test_reads_what_the_original_projects_write(tmp_path, layers):
    (tmp_path / "initial_mask").mkdir()
    for name, mask in layers.items():
        torch.save((mask * 0.5).half() != 0, tmp_path / "initial_mask" / f"{name}.pt")
    arrays = {f"{name}.weight.mask": np.packbits(mask.numpy().astype(bool)) for name, mask in layers.items()}
    np.savez_compressed(tmp_path / "maskllm.npz", **arrays)
    assert same(mask_files.load(tmp_path / "initial_mask").masks, layers)
    assert same(mask_files.load(tmp_path / "maskllm.npz", shapes=SHAPES).masks, layers)


@pytest.mark.parametrize(
    "n, m, found", [(2, 4, (2, 4)), (1, 2, (2, 4)), (1, 4, (1, 4)), (4, 8, (4, 8)), (2, 3, (2, 3))]
)
def test_the_pattern_is_inferred(tmp_path, n, m, found):
    mask_files.save_folder(tmp_path / "mask", {"a": random_mask((32, 48), n, m), "b": random_mask((32, 24), n, m)})
    loaded = mask_files.load(tmp_path / "mask")
    assert (loaded.n, loaded.m) == found
    assert mask_files.load(tmp_path / "mask", n, m).m == m


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
def test_refusals(tmp_path, layers, kind):
    path, _ = write(kind, tmp_path, layers)
    before = path.stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already"):
        write(kind, tmp_path, layers)
    assert path.stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="2:4, not 1:4"):
        mask_files.load(path, 1, 4, SHAPES)
    first = next(iter(SHAPES))
    with pytest.raises(UserError, match="not one of the model's"):
        mask_files.load(path, shapes={first: SHAPES[first]})
    with pytest.raises(UserError):
        mask_files.load(path, shapes=SHAPES | {first: (6, 80)})
    with pytest.raises(UserError, match="no such mask"):
        mask_files.load(tmp_path / f"absent.{kind}")


def test_an_unstrict_layer_is_named(tmp_path, layers):
    broken = list(layers)[1]
    layers[broken][3, 7] ^= True
    mask_files.save_folder(tmp_path / "mask", layers)
    mask_files.save_npz(tmp_path / "mask.npz", layers)
    for path in (tmp_path / "mask", tmp_path / "mask.npz"):
        for wanted in ((None, None), (2, 4)):
            with pytest.raises(UserError, match=f"layer {broken}: 1 of 30 blocks do not keep exactly 2 of 4"):
                mask_files.load(path, *wanted, shapes=SHAPES)
    with pytest.raises(UserError, match=f"layer {broken}: 1 of 30"):
        mask_files.save(tmp_path / "mask.safetensors", layers, 2, 4, "", "")
    assert not (tmp_path / "mask.safetensors").exists()


def test_a_failed_write_leaves_nothing(tmp_path, layers, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for kind in ("safetensors", "npz", "pt"):
        with pytest.raises(UserError, match="No space left"):
            write(kind, tmp_path, layers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../escape", "/abs", "a/b", ".hidden", ""])
def test_names_that_are_paths_are_refused(tmp_path, name):
    mask = random_mask((4, 8), 2, 4)
    with pytest.raises(UserError, match="module name"):
        mask_files.save_folder(tmp_path / "mask", {name: mask})
    np.savez(tmp_path / "mask.npz", **{f"{name}.weight.mask": np.packbits(mask.numpy())})
    with pytest.raises(UserError):
        mask_files.load(tmp_path / "mask.npz", shapes={name: (4, 8)})


# ------------------------------------------------------------------------------------------------------- hostile files

def edit_safetensors(path, change):
    """Rewrite the header by `change(header)`, leaving the data."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def huge_tensor(header):
    header[next(iter(SHAPES))].update(shape=[2**40], data_offsets=[0, 2**40])


def huge_mask(header):
    meta = header["__metadata__"]
    meta["shapes"] = json.dumps(json.loads(meta["shapes"]) | {next(iter(SHAPES)): [2**30, 2**30]})


@pytest.mark.parametrize("change", [huge_tensor, huge_mask, lambda h: h["__metadata__"].update(sparsity="1:4")])
def test_claims_of_a_safetensors_header(tmp_path, layers, change):
    path, _ = write("safetensors", tmp_path, layers)
    edit_safetensors(path, lambda header: None)
    assert same(mask_files.load(path).masks, layers)
    edit_safetensors(path, change)
    with pytest.raises(UserError, match=r"mask.safetensors"):
        mask_files.load(path)


def test_huge_shape_with_a_matching_checksum(tmp_path, layers):
    path, _ = write("safetensors", tmp_path, layers)

    def change(header):
        huge_mask(header)
        meta = header["__metadata__"]
        del meta["checksum"]
        with mask_files.safe_open(path, framework="pt") as file:
            names = file.keys()
            meta["checksum"] = mask_files._digest(meta, {name: file.get_tensor(name) for name in names})

    edit_safetensors(path, change)
    with pytest.raises(UserError, match=r"takes .* bytes"):
        mask_files.load(path)


def test_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    (tmp_path / "mask").mkdir()
    torch.save(Evil(), tmp_path / "mask" / "a.pt")
    np.savez(tmp_path / "mask.npz", **{"a.weight.mask": np.array([Evil()], dtype=object)})
    for path in (tmp_path / "mask", tmp_path / "mask.npz"):
        with pytest.raises(UserError):
            mask_files.load(path, shapes={"a": (64, 64)})
    assert not (tmp_path / "touched").exists()


def test_a_pt_that_claims_more_than_it_holds(tmp_path):
    (tmp_path / "mask").mkdir()
    file = tmp_path / "mask" / "a.pt"
    torch.save(torch.ones(10, 20, dtype=torch.bool), file)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    assert b"K\xc8" in members[pickled] and b"K\x0aK\x14" in members[pickled]  # 200 elements, (10, 20)
    huge = b"J\x00\x00\x00\x7f"  # 2**31 - 2**24
    members[pickled] = members[pickled].replace(b"K\xc8", huge).replace(b"K\x0aK\x14", huge + b"K\x01")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"a.pt"):
        mask_files.load(tmp_path / "mask")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        npy(np.zeros(30, np.uint8))[:-1],
        npy(np.zeros(31, np.uint8)),
        npy(np.zeros(30, np.int8)),
        npy(np.zeros((30, 1), np.uint8)),
        npy(np.zeros(30, np.uint8)).replace(b"(30,), ", b"(9**9,)"),
        bytes(50_000_000),  # deflates to 50 kB
    ],
)
def test_an_npz_member_that_is_no_mask(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "mask.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.weight.mask.npy", content)
    with pytest.raises(UserError, match=r"mask.npz"):
        mask_files.load(tmp_path / "mask.npz", shapes={"a": (10, 24)})


def test_an_npz_bomb_that_understates_its_size(tmp_path):
    path = tmp_path / "mask.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.weight.mask.npy", bytes(50_000_000))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 50_000_000), struct.pack("<I", 158)))
    with pytest.raises(UserError, match=r"mask.npz"):
        mask_files.load(path, shapes={"a": (10, 24)})


def test_an_npz_that_lost_a_layer_from_its_directory(tmp_path, layers):
    path, _ = write("npz", tmp_path, layers)
    raw = bytearray(path.read_bytes())
    first = raw.index(b"PK\x01\x02")
    raw[first + 32 : first + 34] = struct.pack("<H", raw.index(b"PK\x05\x06") - raw.rindex(b"PK\x01\x02"))
    path.write_bytes(raw)  # the first entry's comment now swallows the second entry
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 1
    with pytest.raises(UserError, match="lost members"):
        mask_files.load(path, shapes=SHAPES)


def test_not_a_mask_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "b.npz").write_text("no zip")
    (tmp_path / "c.txt").write_text("text")
    mask_files.save_file({"weight": torch.zeros(3)}, tmp_path / "d.safetensors")
    for name in ("empty", "a.safetensors", "b.npz", "c.txt", "d.safetensors"):
        with pytest.raises(UserError, match=name):
            mask_files.load(tmp_path / name, shapes=SHAPES)
    mask_files.save_npz(tmp_path / "e.npz", {"a": random_mask((2, 4), 2, 4)})
    with pytest.raises(UserError, match="shapes"):
        mask_files.load(tmp_path / "e.npz")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
def test_fuzz(tmp_path, layers, kind):
    """Damage gives a clear error or the mask that was written, never another mask."""
    path, target = write(kind, tmp_path, layers)
    good, rng, refused = target.read_bytes(), random.Random(kind), 0
    for i in range(150):
        bad = bytearray(good)
        if i % 3 == 0:
            bad = bad[: rng.randrange(len(bad))]
        else:
            for _ in range(rng.choice((1, 1, 4))):
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        target.write_bytes(bad)
        refusal = None
        try:
            found = mask_files.load(path, shapes=SHAPES).masks
        except UserError as error:
            refusal = str(error)
        if refusal is None:
            assert same(found, layers)
        else:
            assert str(path) in refusal and "\n" not in refusal
            refused += 1
    assert refused > 75
