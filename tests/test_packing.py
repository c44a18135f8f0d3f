"""files/packing.py: exact round trips, and sizes."""

from itertools import combinations
from math import comb, log2

import pge
from files import packing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import random_mask

PATTERNS = [(n, m) for m in range(2, 9) for n in range(1, m)] + [
    (5, 11),
    (7, 15),
    (1, 16),
    (8, 16),
    (15, 16),
]


@pytest.mark.parametrize("n, m", PATTERNS)
def test_round_trip(n, m):
    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**32))
    def check(rows, blocks, seed):
        mask = random_mask((rows, blocks * m), n, m, seed)
        columns = torch.cat([~mask, mask], 1)[:, blocks * m :]  # not contiguous
        for view in (mask, columns):
            packed = packing.pack(view, n, m)
            assert packed.dtype == torch.uint8 and torch.equal(
                packing.unpack(packed, mask.shape, n, m), mask
            )

    check()


def test_patterns_are_in_lexicographic_order():
    assert [tuple(row.nonzero().flatten().tolist()) for row in pge.patterns(2, 4)] == [
        *combinations(range(4), 2)
    ]
    assert len(pge.patterns(3, 7)) == comb(7, 3)
    for n, m in [(0, 4), (4, 4), (5, 4), (1, 17)]:
        with pytest.raises(ValueError, match="N < M <= 16"):
            pge.patterns(n, m)


@pytest.mark.parametrize(
    "n, m, most", [(2, 4, 0.667), (1, 4, 0.52), (1, 2, 0.52), (4, 8, 0.79), (8, 16, 1.0)]
)
def test_bits_per_weight(n, m, most):
    mask = random_mask((256, 72 * m), n, m)
    assert log2(comb(m, n)) / m <= 8 * len(packing.pack(mask, n, m)) / mask.numel() <= most
