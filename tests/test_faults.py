"""Files that are cut off or have a bit flipped: one line that names the file, or what was written,
and never more."""

import random

from files import mask_files, permutation_files
from training import baselines
from utils import UserError

import pytest
import torch
from faults import kill
from masked import random_mask

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 40), "model.layers.0.mlp.down_proj": (5, 24)}


def mask_file(name: str, n: int, m: int):
    """Reads a mask file of this name: layer -> bytes, N, M, model, fingerprint."""

    def make(folder):
        layers = {
            name: random_mask(shape, n, m, i) for i, (name, shape) in enumerate(SHAPES.items())
        }
        mask_files.save(folder / name, layers, n, m, "some/model", "0" * 16)

        def read():
            found = mask_files.load(folder / name, shapes=SHAPES)
            return {
                **vars(found),
                "masks": {layer: mask.numpy().tobytes() for layer, mask in found.masks.items()},
            }

        return sorted((folder / name).iterdir()) if not folder.joinpath(name).is_file() else [
            folder / name
        ], read

    return make


def permutation(folder):
    path = folder / "model.permutation.safetensors"
    orders = {
        "residual": torch.randperm(32).view(1, 32),
        "value": torch.stack([torch.randperm(8), torch.arange(8)]),
    }
    permutation_files.save(path, orders, "some/model", "0" * 16)

    def read():
        found, *metadata = permutation_files.load(path)
        return {name: order.tolist() for name, order in found.items()}, metadata

    return [path], read


def baseline(folder):
    path, losses = folder / "baseline.npz", [3 + i / 7 for i in range(24)]
    depends_on = {"model": "0" * 16, "tokens": "1" * 16, "dataset_size": "96", "batchsize": "4"}
    baselines.save(path, losses, depends_on)
    return [path], lambda: baselines.load(str(path), depends_on)


@pytest.mark.parametrize(
    "make",
    [
        mask_file("mask.safetensors", 2, 4),
        mask_file("mask.safetensors", 4, 8),
        mask_file("mask.npz", 2, 4),
        mask_file("mask", 2, 4),
        permutation,
        baseline,
    ],
    ids=["2:4", "4:8", "npz", "folder", "permutation", "baseline"],
)
def test_damaged_files(make, tmp_path):
    files, read = make(tmp_path)
    generator, original, refused = random.Random(0), read(), 0
    for _ in range(150):
        file = generator.choice(files)
        good = file.read_bytes()
        kill.tear(file, generator)
        refusal = None
        try:
            assert read() == original
        except UserError as error:
            refusal = str(error)
        if refusal is not None:
            assert str(tmp_path) in refusal and file.name in refusal and "\n" not in refusal
            refused += 1
        file.write_bytes(good)
    assert refused > 75
