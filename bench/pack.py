"""How small a mask gets, and how fast: bits a weight against the least possible, packed and unpacked weights a second.

    python bench/pack.py [--quick] [--json FILE]

One mask of a 4096 x 11008 layer (--quick: a sixteenth of it), its blocks' patterns drawn uniformly, which no code holds
in less than log2 C(M,N) bits a block. First packing.pack and packing.unpack, every round trip compared bit by bit. Then
the files of a 2:4 mask in the three formats: they add names, headers, checksums and the disk, and reading verifies
them.
"""
import argparse
import tempfile
from itertools import count
from math import comb, log2, prod
from pathlib import Path

import common
from utils import run_script

import torch
from torch import Tensor

import pge
from files import mask_files, packing

PATTERNS = [(1, 2), *((n, 4) for n in range(1, 4)), *((n, 8) for n in range(1, 8)), (8, 16)]
FORMATS = {"a .safetensors": ".safetensors", "MaskLLM's .npz": ".npz", "the authors' folder of .pt": ""}
Shape = tuple[int, int]  # [out, in]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return common.parser(__doc__).parse_args(argv)


def random_mask(shape: Shape, n: int, m: int) -> Tensor:
    """Patterns drawn uniformly, bool `[out, in]`."""
    return pge.patterns(n, m)[torch.randint(comb(m, n), (prod(shape) // m,))].view(shape)


def table_row(n: int, m: int, kept_as: str, weights: int, size_bytes: int, write_s: float, read_s: float,
              exact: bool) -> dict:
    bits, least = 8 * size_bytes / weights, log2(comb(m, n)) / m
    return {"N:M": f"{n}:{m}", "as": kept_as, "bits a weight": bits, "log2 C(M,N) / M": least,
            "excess (%)": 100 * (bits / least - 1), "pack (M weights/s)": weights / write_s / 1e6,
            "unpack (M weights/s)": weights / read_s / 1e6, "exact": "yes" if exact else "NO"}


def measure_packing(shape: Shape, n: int, m: int, repeats: int) -> dict:
    """The table's row of `pack` and `unpack`."""
    mask = random_mask(shape, n, m)
    packed = packing.pack(mask, n, m)
    exact = torch.equal(packing.unpack(packed, shape, n, m), mask)
    pack_s = common.median_s(lambda: packing.pack(mask, n, m), "cpu", repeats)
    unpack_s = common.median_s(lambda: packing.unpack(packed, shape, n, m), "cpu", repeats)
    kept_as = "three blocks in a byte" if (n, m) == (2, 4) else "deflated bits"
    return table_row(n, m, kept_as, prod(shape), packed.numel(), pack_s, unpack_s, exact)


def measure_file(shape: Shape, kept_as: str, ending: str, repeats: int) -> dict:
    """The table's row of a 2:4 mask's file in one format."""
    masks = {"layer": random_mask(shape, 2, 4)}
    with tempfile.TemporaryDirectory() as folder:
        paths = (Path(folder) / f"{number}{ending}" for number in count())  # no format overwrites
        write_s = common.median_s(lambda: mask_files.save(next(paths), masks, 2, 4), "cpu", repeats)
        mask_files.save(path := next(paths), masks, 2, 4)
        size_bytes = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        found = mask_files.load(path, 2, 4, {"layer": shape}).masks["layer"]
        read_s = common.median_s(lambda: mask_files.load(path, 2, 4, {"layer": shape}), "cpu", repeats)
    return table_row(2, 4, kept_as, prod(shape), size_bytes, write_s, read_s, torch.equal(found, masks["layer"]))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shape, repeats = ((1024, 2752), 3) if args.quick else ((4096, 11008), 5)
    torch.manual_seed(args.seed)
    rows = [measure_packing(shape, n, m, repeats) for n, m in PATTERNS]
    rows += [measure_file(shape, name, ending, repeats) for name, ending in FORMATS.items()]
    common.report(rows, args)


if __name__ == "__main__":
    run_script(main)
