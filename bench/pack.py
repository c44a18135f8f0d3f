"""How small a mask gets, and how fast: bits a weight against the least possible, packed and unpacked weights a second.

    python bench/pack.py [--quick] [--json FILE] [--device cuda]

One mask of a 4096 x 11008 layer (--quick: a sixteenth of it), its blocks' patterns drawn uniformly, which no code holds
in less than log2 C(M,N) bits a block. First masks.pack and masks.unpack, every round trip compared bit by bit. Then the
files of a 2:4 mask in the three formats: they add names, headers, checksums and the disk, and reading verifies them.
"""
import tempfile
from itertools import count
from math import comb, log2
from pathlib import Path

import common
import torch

import mask_files
import masks
import pge

args = common.parser(__doc__).parse_args()
shape = (1024, 2752) if args.quick else (4096, 11008)
weights = shape[0] * shape[1]
repeats = 3 if args.quick else 5
torch.manual_seed(args.seed)


def random_mask(n: int, m: int) -> torch.Tensor:
    return pge.patterns(n, m)[torch.randint(comb(m, n), (weights // m,))].view(shape)


def row(n: int, m: int, kept_as: str, size_bytes: int, write_s: float, read_s: float, exact: bool) -> dict:
    bits, least = 8 * size_bytes / weights, log2(comb(m, n)) / m
    return {"N:M": f"{n}:{m}", "as": kept_as, "bits a weight": bits, "log2 C(M,N) / M": least,
            "excess (%)": 100 * (bits / least - 1), "pack (M weights/s)": weights / write_s / 1e6,
            "unpack (M weights/s)": weights / read_s / 1e6, "exact": "yes" if exact else "NO"}


def packed_row(n: int, m: int) -> dict:
    mask = random_mask(n, m).to(args.device)
    packed = masks.pack(mask, n, m)
    exact = torch.equal(masks.unpack(packed, shape, n, m), mask)
    pack_s = common.median_s(lambda: masks.pack(mask, n, m), args.device, repeats)
    unpack_s = common.median_s(lambda: masks.unpack(packed, shape, n, m), args.device, repeats)
    width, blocks = masks.word_size(n, m)
    return row(n, m, f"{blocks} blocks in {8 * width} bits", packed.numel(), pack_s, unpack_s, exact)


def file_row(kept_as: str, ending: str, write) -> dict:
    """write: function of a path and of masks by layer name."""
    layers = {"layer": random_mask(2, 4)}
    with tempfile.TemporaryDirectory() as folder:
        paths = (Path(folder) / f"{number}{ending}" for number in count())  # no format overwrites
        write_s = common.median_s(lambda: write(next(paths), layers), "cpu", repeats)
        write(path := next(paths), layers)
        size_bytes = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        found = mask_files.load(path, 2, 4, {"layer": shape}).masks["layer"]
        read_s = common.median_s(lambda: mask_files.load(path, 2, 4, {"layer": shape}), "cpu", repeats)
    return row(2, 4, kept_as, size_bytes, write_s, read_s, torch.equal(found, layers["layer"]))


patterns = [(1, 2), *((n, 4) for n in range(1, 4)), *((n, 8) for n in range(1, 8)), (8, 16)]
rows = [packed_row(n, m) for n, m in patterns]
rows += [file_row("a .safetensors", ".safetensors", lambda path, layers: mask_files.save(path, layers, 2, 4, "", "")),
         file_row("MaskLLM's .npz", ".npz", mask_files.save_npz),
         file_row("the authors' folder of .pt", "", mask_files.save_folder)]
common.report(rows, args)
