"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune a layer and let the kept weights make up for the pruned.

Minimises ||W X - W' X||^2 over a layer's inputs X, column by column with the inverse Hessian, H = X X^T.
"""
from utils import UserError

import torch
from torch import Tensor

import pge


def inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """Upper Cholesky factor U of (H + damp I)^-1 = U^T U; float32 `[in, in]`, damp = percdamp * mean(diag H).

    Row i of U, from i on, is what column i's error spreads by once columns before i are final. Inputs that never
    fired get a diagonal of 1. Damping grows tenfold, five times at most, where H is not positive definite in float32.
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
    raise UserError("a layer's Hessian is not positive definite; raise --percdamp, or give more calibration text")


def _kept(weight: Tensor, diagonal: Tensor, n: int) -> Tensor:
    """Keep the n of these m columns whose removal would cost most, w^2 / U_ii^2; `[out, m]` -> bool."""
    return pge.mode(weight.square() / diagonal.square(), n)


def solve(weight: Tensor, hessian: Tensor, pattern: tuple[int, int] | None, sparsity: float = 0.5,
          percdamp: float = 0.01, blocksize: int = 128) -> tuple[Tensor, Tensor]:
    """(updated weight float32, mask bool), both `[out, in]`, pruned weights +0.0.

    weight `[out, in]`, hessian float32 `[in, in]`, pattern (N, M), or None for unstructured: the share `sparsity` of
    each run of `blocksize` columns goes. ValueError where M does not divide `in`.
    """
    columns = weight.shape[1]
    if pattern:
        n, m = pattern
        if columns % m:
            raise ValueError(f"{m} does not divide {columns}")
        blocksize = max(m, blocksize // m * m)  # a block of M is decided in one run
    weight = weight.float().clone()
    weight[:, hessian.diagonal() == 0] = 0  # inputs that never fire
    mask = torch.zeros_like(weight, dtype=torch.bool)
    upper = inverse_factor(hessian, percdamp)
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        run, factor = weight[:, start:end], upper[start:end, start:end]  # a view: written in place
        errors = torch.zeros_like(run)
        if not pattern:
            cost = run.square() / factor.diagonal().square()
            threshold = cost.flatten().kthvalue(max(1, int(sparsity * cost.numel()))).values
            mask[:, start:end] = cost > threshold
        for i in range(end - start):
            if pattern and i % m == 0:
                mask[:, start + i:start + i + m] = _kept(run[:, i:i + m], factor.diagonal()[i:i + m], n)
            column = run[:, i]
            final = torch.where(mask[:, start + i], column, 0.0)
            errors[:, i] = (column - final) / factor[i, i]
            run[:, i:] -= errors[:, i:i + 1] * factor[i, i:]
            run[:, i] = final
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight, mask
