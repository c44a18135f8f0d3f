"""files/packing.py: exact round trips, size, and bytes that are refused."""
from itertools import combinations
from math import comb, log2

from utils import UserError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import random_mask

import pge
from files import packing

SMALL = [(n, m) for m in range(2, 9) for n in range(1, m)]
LARGE = [(1, 9), (5, 11), (3, 13), (7, 15), (1, 16), (8, 16), (15, 16)]


@pytest.mark.parametrize("n, m", SMALL + LARGE)
def test_round_trip(n, m):
    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**32))
    def check(rows, blocks, seed):
        mask = random_mask((rows, blocks * m), n, m, seed)
        packed, codes = packing.pack(mask, n, m), packing.pattern_codes(mask, n, m)
        assert packed.dtype == torch.uint8 and codes.dtype == (torch.uint8 if comb(m, n) <= 256 else torch.int16)
        assert torch.equal(packing.unpack(packed, mask.shape, n, m), mask)
        assert torch.equal(packing.codes_to_mask(codes, mask.shape, n, m), mask)
        assert torch.equal(pge.patterns(n, m)[codes.long()].view_as(mask), mask)
        assert packing.count_faults(mask, n, m) == 0

    check()


def test_patterns_are_in_lexicographic_order():
    assert [tuple(row.nonzero().flatten().tolist()) for row in pge.patterns(2, 4)] == [*combinations(range(4), 2)]
    assert len(pge.patterns(3, 7)) == comb(7, 3)
    for n, m in [(0, 4), (4, 4), (5, 4), (1, 17)]:
        with pytest.raises(ValueError, match="N < M <= 16"):
            pge.patterns(n, m)


@pytest.mark.parametrize("n, m", SMALL)
def test_bits_per_weight(n, m):
    mask = random_mask((64, 72 * m), n, m)
    assert 8 * len(packing.pack(mask, n, m)) / mask.numel() <= 1.05 * log2(comb(m, n)) / m


def test_two_four_puts_three_blocks_in_a_byte():
    mask = packing.codes_to_mask(torch.tensor([1, 2, 5, 4], dtype=torch.uint8), (1, 16), 2, 4)
    assert packing.word_size(2, 4) == (1, 3)
    assert packing.pack(mask, 2, 4).tolist() == [1 + 2 * 6 + 5 * 36, 4]


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (3, 7)])
def test_across_chunks_and_views(n, m, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 50)
    mask = random_mask((31, 9 * m), n, m)
    assert torch.equal(packing.unpack(packing.pack(mask, n, m), mask.shape, n, m), mask)
    shifted = torch.cat([torch.zeros(1, dtype=torch.bool), mask.flatten()])[1:].view_as(mask)
    columns = torch.cat([~mask, mask], 1)[:, 9 * m :]
    spaced = mask.flatten().repeat_interleave(2)[::2]
    for view in (shifted, columns, spaced):
        assert torch.equal(packing.pack(view, n, m), packing.pack(mask, n, m))


def test_a_block_without_exactly_n_is_refused():
    mask = random_mask((4, 16), 2, 4)
    mask[1, 4:8] = mask[2, :4] = True
    assert packing.count_faults(mask, 2, 4) == 2
    for function in (packing.pack, packing.pattern_codes):
        with pytest.raises(ValueError, match="2 of 16 blocks"):
            function(mask, 2, 4)
        with pytest.raises(ValueError, match="last dimension"):
            function(mask[:, :6], 2, 4)
        with pytest.raises(ValueError, match="bool"):
            function(mask.float(), 2, 4)


def test_bytes_that_pack_does_not_write_are_refused():
    packed = packing.pack(random_mask((1, 16), 2, 4), 2, 4)  # 4 blocks in 2 bytes: 2 digits of the last are padding
    for bad in (packed[:1], packed.repeat(2), packed.int(), torch.tensor([216, 0], dtype=torch.uint8)):
        with pytest.raises(UserError):
            packing.unpack(bad, (1, 16), 2, 4)
    with pytest.raises(UserError, match="after the last block"):
        packing.unpack(torch.tensor([0, 6], dtype=torch.uint8), (1, 16), 2, 4)
    with pytest.raises(UserError, match="patterns"):
        packing.codes_to_mask(torch.tensor([6]), (1, 4), 2, 4)
