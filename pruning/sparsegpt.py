"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune a layer and update the kept weights to
make up for it.

It minimises ||W X - W' X||^2 over a layer's inputs X, column by column, with the inverse of the
Hessian H = X X^T.
"""

import pge
from utils import UserError

import torch
from torch import Tensor


def inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """Return the upper Cholesky factor U of (H + damp I)^-1 = U^T U, float32 `[in, in]`. damp =
    percdamp * mean(diag H).

    Row i of U, from i on, spreads column i's error over the later columns, once the columns before
    i are final. Inputs that are always 0 get a diagonal of 1. If H is not positive definite in
    float32, damping is increased up to five times, each time by ten times as much. Raises UserError
    if that does not help.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    damp = percdamp * diagonal.mean()
    for _ in range(6):
        diagonal += damp
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
        damp = damp * 10
    raise UserError("a layer's Hessian is not positive definite; give more calibration text")


def solve(
    weight: Tensor,
    hessian: Tensor,
    pattern: tuple[int, int],
    percdamp: float = 0.01,
    blocksize: int = 128,
) -> tuple[Tensor, Tensor]:
    """Return the updated weight, float32, and the mask, bool, both `[out, in]`. Pruned weights are
    +0.0.

    weight `[out, in]`; hessian: float32 `[in, in]`; pattern: (N, M); blocksize: columns that are
    pruned before the later ones are updated. Of every M columns the N stay whose removal costs
    most, w^2 / U_ii^2. Raises ValueError unless M divides `in`.
    """
    columns, (n, m) = weight.shape[1], pattern
    if columns % m:
        raise ValueError(f"{m} does not divide {columns}")
    blocksize = max(m, blocksize // m * m)  # a block of M is decided in one run
    weight = weight.float().clone()
    weight[:, hessian.diagonal() == 0] = 0  # inputs that are always 0
    mask = torch.zeros_like(weight, dtype=torch.bool)
    upper = inverse_factor(hessian, percdamp)
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        # these three are views
        run = weight[:, start:end]
        kept = mask[:, start:end]
        factor = upper[start:end, start:end]
        errors = torch.zeros_like(run)
        for i in range(end - start):
            if i % m == 0:
                block = slice(i, i + m)
                kept[:, block] = pge.mode(
                    run[:, block].square() / factor.diagonal()[block].square(), n
                )
            column = run[:, i]
            final = torch.where(kept[:, i], column, 0.0)
            errors[:, i] = (column - final) / factor[i, i]
            run[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
            run[:, i] = final
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight, mask
