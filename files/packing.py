"""N:M masks packed close to their entropy.

A mask is a bool tensor `[out, in]`. A block, M consecutive elements of a row, keeps exactly N: it is one of K = C(M, N)
patterns, numbered as `pge.patterns` lists them. `pack` writes the numbers as base-K digits, several to a little-endian
word of 1..7 bytes: 2:4 puts three blocks in a byte, 0.667 bit a weight where log2(6)/4 = 0.646 is the least possible.
"""

from functools import lru_cache
from math import gcd, log2, prod

from utils import UserError

import torch
from torch import Tensor

from pge import patterns

CHUNK = 1 << 18  # blocks at a time: temporaries stay in the cache, and small beside the mask
INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@lru_cache
def word_size(n: int, m: int) -> tuple[int, int]:
    """(W, b): bytes in a word and blocks in it, K**b <= 256**W. The shortest word within 3 % of the fewest bits."""
    bits = log2(len(patterns(n, m)))  # exact where K**b == 256**W is possible: powers of two
    sizes = [(width, int(8 * width / bits)) for width in range(1, 8) if 8 * width >= bits]  # 7 bytes fit an int64
    fewest = min(width / digits for width, digits in sizes)
    return next((width, digits) for width, digits in sizes if width / digits <= 1.03 * fewest)


def _block_bits(blocks: Tensor) -> Tensor:
    """bool [B, M] -> int [B] whose bit i is the block's element i."""
    m, width = blocks.shape[1], gcd(blocks.shape[1], 8)
    # Read `width` bools as one integer; the product moves byte i's bit to bit i of the top byte, without carries.
    magic = sum(1 << (8 * (width - 1) - 7 * i) for i in range(width))
    parts = ((blocks.view(INT[width]) * magic) >> (8 * (width - 1))) & ((1 << width) - 1)  # [B, M / width]
    bits = parts[:, 0].int()
    for j in range(1, m // width):
        bits |= parts[:, j].int() << (width * j)
    return bits


@lru_cache
def _code_table(n: int, m: int) -> Tensor:
    """[2**M]: the pattern's number by a block's bits; the dtype's maximum (never a number) for blocks that are none."""
    dtype = torch.uint8 if len(patterns(n, m)) <= 256 else torch.int16
    table = torch.full((2**m,), torch.iinfo(dtype).max, dtype=dtype)
    table[_block_bits(patterns(n, m))] = torch.arange(len(patterns(n, m))).to(dtype)
    return table


def _codes(mask: Tensor, n: int, m: int) -> tuple[Tensor, int]:
    """(codes [blocks], how many of them are no pattern); errors of shape as `pattern_codes`."""
    table = _code_table(n, m).to(mask.device)
    if mask.dtype != torch.bool or mask.dim() == 0 or mask.shape[-1] % m:
        raise ValueError(f"a mask is a bool tensor whose last dimension {m} divides, not {mask.dtype} {[*mask.shape]}")
    flat = mask.contiguous().view(-1)
    if flat.storage_offset() % gcd(m, 8):  # a view into another tensor, misaligned for wider integers
        flat = flat.clone()
    codes = torch.cat([table[_block_bits(blocks)] for blocks in flat.view(-1, m).split(CHUNK)])
    return codes, int((codes == torch.iinfo(table.dtype).max).sum())


def count_faults(mask: Tensor, n: int, m: int) -> int:
    """How many blocks of `mask` (bool [..., in]) do not keep exactly N. ValueError when M does not divide `in`."""
    return _codes(mask, n, m)[1]


def pattern_codes(mask: Tensor, n: int, m: int) -> Tensor:
    """mask bool [..., in] -> [blocks], each block's row in `patterns(n, m)`: uint8 when K <= 256, else int16.

    ValueError when M does not divide `in` or a block does not keep exactly N.
    """
    codes, bad = _codes(mask, n, m)
    if bad:
        raise ValueError(f"{bad} of {len(codes)} blocks do not keep exactly {n} of {m}")
    return codes


def codes_to_mask(codes: Tensor, shape: tuple[int, ...], n: int, m: int) -> Tensor:
    """The inverse of `pattern_codes`: codes [blocks] -> bool of `shape`. UserError for codes or shapes that misfit."""
    table = patterns(n, m).view(INT[gcd(m, 8)]).to(codes.device)  # [K, M / width], rows copied as wide integers
    if shape[-1] % m or prod(shape) != len(codes) * m:
        raise UserError(f"{len(codes)} blocks of {m} do not make a mask of shape {[*shape]}")
    if len(codes) and not 0 <= codes.min() <= codes.max() < len(table):
        raise UserError(f"a block's code is none of the {len(table)} patterns of {n}:{m}: the data are damaged")
    mask = torch.empty(len(codes), table.shape[1], dtype=table.dtype, device=codes.device)
    for i in range(0, len(codes), CHUNK):
        torch.index_select(table, 0, codes[i : i + CHUNK].int(), out=mask[i : i + CHUNK])
    return mask.view(torch.bool).view(*shape)


def pack(mask: Tensor, n: int, m: int) -> Tensor:
    """mask bool [..., in] -> uint8 [bytes], exactly: base-K digits in words of `word_size`, the last filled with 0.

    ValueError when M does not divide `in` or a block does not keep exactly N.
    """
    base, (width, digits) = len(patterns(n, m)), word_size(n, m)
    codes = pattern_codes(mask, n, m)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % digits)).view(-1, digits)  # [words, b]
    packed = torch.empty(len(codes), width, dtype=torch.uint8, device=mask.device)
    for some, out in zip(codes.split(CHUNK // digits), packed.split(CHUNK // digits), strict=True):
        words = torch.zeros(len(some), dtype=INT[4 if width < 4 else 8], device=mask.device)
        for j in reversed(range(digits)):
            words.mul_(base).add_(some[:, j])
        out.copy_(words.view(-1, 1).view(torch.uint8)[:, :width])
    return packed.view(-1)


def unpack(packed: Tensor, shape: tuple[int, ...], n: int, m: int) -> Tensor:
    """The inverse of `pack`: uint8 [bytes] -> bool of `shape`. UserError for bytes which `pack` does not write."""
    base, (width, digits) = len(patterns(n, m)), word_size(n, m)
    blocks = prod(shape) // m
    size = -(-blocks // digits)  # words
    if packed.dtype != torch.uint8 or shape[-1] % m or packed.numel() != size * width:
        found = f"{packed.numel()} of {packed.dtype}"
        raise UserError(f"a {n}:{m} mask of shape {[*shape]} takes {size * width} bytes, not {found}")
    codes = torch.empty(size, digits, dtype=_code_table(n, m).dtype, device=packed.device)
    packed = packed.view(size, width)
    for some, out in zip(packed.split(CHUNK // digits), codes.split(CHUNK // digits), strict=True):
        words = torch.zeros(len(some), 1, dtype=INT[4 if width < 4 else 8], device=packed.device)
        words.view(torch.uint8)[:, :width] = some
        words = words.view(-1)
        for j in range(digits):
            rest = torch.div(words, base, rounding_mode="trunc")
            out[:, j] = words.sub_(rest, alpha=base)
            words = rest
        if words.any():
            raise UserError(f"the packed bytes hold a number that is no {n}:{m} pattern: the data are damaged")
    if codes.view(-1)[blocks:].any():
        raise UserError("the packed bytes go on after the last block: the data are damaged")
    return codes_to_mask(codes.view(-1)[:blocks], shape, n, m)
