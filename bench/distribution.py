"""Chi-square of the compiled step's draws against the exact pattern probabilities, into the tails.

    python bench/distribution.py [--quick] [--json FILE] [--device cuda]

Rare flips are the whole learning signal, so they are what must be right: each gap row has N logits at `gap` and the
others at 0 (a little apart, so that all patterns differ), 10^9 block draws a row in full, 2 x 10^7 with --quick.
"""
import argparse

import common
from utils import run_script

import torch
from torch import Tensor

import pge
from masking.block_bits import mask_to_bits
from masking.kernels import Kernels
from masking.random_bits import layer_keys
from masking.spaces import LinearSpace

CASES = [(2, 4, 0), (2, 4, 10), (2, 4, 16), (1, 4, 10), (4, 8, 10)]  # N, M, gap


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return common.parser(__doc__).parse_args(argv)


def drawn_counts(one: Tensor, n: int, blocks: int, rounds: int, seed: int, device: str) -> Tensor:
    """How often each pattern is drawn, int64 `[2^M]` by the pattern's bits, in so many rounds of so many blocks that
    all have the logits `one` `[M]`."""
    m = len(one)
    logits = [torch.full((blocks,), value, device=device) for value in one.tolist()]
    bits = mask_to_bits(pge.patterns(n, m)[:1]).expand(blocks).contiguous().to(device)
    weight = torch.ones(blocks * m, device=device, dtype=torch.bfloat16)
    out, nothing = torch.empty_like(weight), torch.zeros((), device=device)
    kernels = Kernels(LinearSpace(n, m))
    counts = torch.zeros(2**m, dtype=torch.long, device=device)
    for t in range(rounds):
        kernels.update(logits, bits, weight, out, nothing, layer_keys(seed, t, 1)[0].to(device))
        counts += torch.bincount(bits.int(), minlength=2**m)
    return counts


def chi_square(seen: Tensor, expected: Tensor) -> tuple[float, int, float]:
    """Chi-square of counts `[patterns]` against those expected, its degrees of freedom, and the chance of more. A
    pattern expected less than 5 times is pooled with the others of its kind."""
    kept = expected >= 5
    seen = torch.cat([seen[kept], seen[~kept].sum()[None]])
    expected = torch.cat([expected[kept], expected[~kept].sum()[None]])
    seen, expected = seen[expected >= 5], expected[expected >= 5]
    found = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(seen) - 1
    p = float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(found / 2).double()))
    return found, freedom, p


def measure(n: int, m: int, gap: int, draws: int, blocks: int, seed: int, device: str) -> dict:
    """The table's row of one N:M and gap, from at least so many draws."""
    one = torch.tensor([float(gap)] * n + [0.0] * (m - n)) + torch.linspace(0, 0.5, m)
    rounds = -(-draws // blocks)
    counts = drawn_counts(one, n, blocks, rounds, seed, device)
    probs = pge.pattern_probs(one[None].double(), n)[0]
    table = pge.patterns(n, m)
    seen, expected = counts.cpu()[mask_to_bits(table).long()].double(), probs * blocks * rounds
    found, freedom, p = chi_square(seen, expected)
    return {"N:M": f"{n}:{m}", "gap": gap, "draws": blocks * rounds, "patterns": len(table),
            "left m0 (expected)": float((1 - probs.max()) * blocks * rounds),
            "left m0 (seen)": int(blocks * rounds - counts.max()), "chi-square": found, "freedom": freedom, "p": p}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    draws, blocks = (2 * 10**7, 2**20) if args.quick else (10**9, 2**22)
    cases = CASES[1:3] if args.quick else CASES
    common.report([measure(*case, draws, blocks, args.seed, args.device) for case in cases], args)


if __name__ == "__main__":
    run_script(main)
