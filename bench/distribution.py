"""Chi-square of the compiled step's draws against the exact pattern probabilities, into the tails.

    python bench/distribution.py [--quick] [--json FILE] [--device cuda]

Rare flips are the whole learning signal, so they are what must be right: each gap row has N logits at `gap` and the
others at 0 (a little apart, so that all patterns differ), 10^9 block draws a row in full, 2 x 10^7 with --quick.
"""
import common
import torch

import pge
import step

args = common.parser(__doc__).parse_args()
draws = 2 * 10**7 if args.quick else 10**9
blocks = 2**20 if args.quick else 2**22
cases = [(2, 4, 0), (2, 4, 10), (2, 4, 16), (1, 4, 10), (4, 8, 10)]
rows = []
for n, m, gap in cases[1:3] if args.quick else cases:
    one = torch.tensor([float(gap)] * n + [0.0] * (m - n)) + torch.linspace(0, 0.5, m)
    logits = [torch.full((blocks,), value, device=args.device) for value in one.tolist()]
    table = pge.patterns(n, m)
    codes = step.mask_to_bits(table).long()
    bits = step.mask_to_bits(table[:1]).expand(blocks).contiguous().to(args.device)
    weight = torch.ones(blocks * m, device=args.device, dtype=torch.bfloat16)
    out = torch.empty_like(weight)
    run = step.step_function(pge.LinearSpace(n, m))
    nothing = torch.zeros((), device=args.device)
    counts = torch.zeros(2**m, dtype=torch.long, device=args.device)
    rounds = -(-draws // blocks)
    for t in range(rounds):
        run(logits, bits, weight, out, nothing, step.layer_keys(args.seed, t, 1)[0].to(args.device))
        counts += torch.bincount(bits.int(), minlength=2**m)
    seen = counts.cpu()[codes].double()
    expected = pge.pattern_probs(one[None].double(), n)[0] * blocks * rounds
    kept = expected >= 5  # a pattern expected less often than that is pooled with the others of its kind
    seen = torch.cat([seen[kept], seen[~kept].sum()[None]])
    expected = torch.cat([expected[kept], expected[~kept].sum()[None]])
    seen, expected = seen[expected >= 5], expected[expected >= 5]
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(seen) - 1
    p = float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(chi_square / 2).double()))
    rows.append({"N:M": f"{n}:{m}", "gap": gap, "draws": blocks * rounds, "patterns": len(table),
                 "left m0 (expected)": float((1 - pge.pattern_probs(one[None].double(), n).max()) * blocks * rounds),
                 "left m0 (seen)": int(blocks * rounds - counts.max()), "chi-square": chi_square, "freedom": freedom,
                 "p": p})
common.report(rows, args)
