"""What mask files of version 1 hold, written by other means than files/packing.py reads it."""
from itertools import combinations

import torch

WORDS = {(1, 2): (1, 8), (2, 3): (1, 5), (1, 4): (1, 4), (2, 4): (1, 3), (3, 5): (3, 7), (4, 8): (4, 5),
         (8, 16): (7, 4)}  # N:M -> bytes and blocks in a word


def words_of(mask: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The blocks' numbers as base-K digits of words, the lowest first, the last word filled with 0; uint8 [bytes]."""
    width, blocks = WORDS[n, m]
    patterns = [*combinations(range(m), n)]
    numbers = [patterns.index(tuple(block.nonzero().flatten().tolist())) for block in mask.view(-1, m)]
    written = b""
    for start in range(0, len(numbers), blocks):
        word = sum(number * len(patterns)**i for i, number in enumerate(numbers[start:start + blocks]))
        written += word.to_bytes(width, "little")
    return torch.tensor(list(written), dtype=torch.uint8)
