"""Rounding with error feedback: each column takes the errors of the columns before it into account (GPTQ, LDLQ).

    minimise over codes    tr((W - Ŵ) H (W - Ŵ)ᵀ),    H = E[x xᵀ]

column by column, greedily: with H = (U + I) D (U + I)ᵀ, U strictly upper triangular,

    ŵ_k = nearest(w_k + Σ_{j<k} (w_j - ŵ_j) U_jk)

which is what GPTQ computes by updating the weights that are left with rows of the inverse Hessian's Cholesky factor
(arXiv 2210.17323, algorithm 1), as theorem 6 of QuIP shows (arXiv 2307.13304). This form needs one Cholesky
factorisation, of H with its columns in reverse, and no inverse at all.

Columns are rounded in blocks: the errors of all blocks before come in by one matrix product, those within a block one
after the other. The scales stay those that are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraq import factors, formats
from loraq.layer import Coded

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


def rounded(weight: Tensor, grid: Coded, gram: Tensor, *, damping: float, act_order: bool, block: int = 128) -> Coded:
    """`weight` (out, inn) rounded onto the points of `grid`, whose scales are kept, for the input's `gram` (inn, inn).

    `damping` times the mean of the Gram matrix' diagonal is added to that diagonal. `act_order` rounds the columns of
    largest input first; groups stay where they are. `block` columns are rounded between two matrix products, which is
    speed alone. A channel that never had an input is rounded to nearest, and so is everything where none had.
    """
    columns = weight.shape[1]
    sizes = gram.diagonal() if act_order else torch.zeros_like(gram.diagonal())
    order = torch.argsort(sizes, descending=True, stable=True)
    upper = feedback(gram[order][:, order], damping)
    values = weight.float()[:, order]
    points = grid.format.points(grid)
    groups = order // grid.group
    errors = torch.zeros_like(values)
    indices = torch.empty(values.shape, dtype=torch.int64, device=weight.device)
    for first in range(0, columns, block):
        part = slice(first, min(first + block, columns))
        wanted = torch.addmm(values[:, part], errors[:, :first], upper[:first, part])
        inner = upper[part, part].contiguous()
        indices[:, part] = _block(wanted, values[:, part], inner, points, groups[part], errors[:, part])
    found = torch.empty_like(indices)
    found[:, order] = indices
    return grid.format.with_points(grid, found)


def feedback(gram: Tensor, damping: float) -> Tensor:
    """U (inn, inn) float32, strictly upper triangular, with (U + I) D (U + I)ᵀ the damped Gram matrix.

    A matrix that is singular beyond what `damping` mends is damped more (`factors.root`); of zeros U is 0.
    """
    upper = factors.root(gram.flip(0, 1), damping).flip(0, 1)
    strictly: Tensor = (upper / upper.diagonal()).triu(1).float()
    return strictly


def _block(wanted: Tensor, values: Tensor, upper: Tensor, points: Tensor, groups: Tensor, errors: Tensor) -> Tensor:
    """The points' indices (out, block) int64 for one block of columns; its `errors` (out, block) are written in place.

    `wanted` (out, block), overwritten, is `values` plus the feedback of the blocks before, `upper` (block, block) the
    feedback within.
    """
    indices = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    for column, group in enumerate(groups.tolist()):
        choices = points[:, group]
        index = formats.nearest(wanted[:, column : column + 1], choices)
        indices[:, column : column + 1] = index
        error = values[:, column : column + 1] - choices.gather(1, index)
        errors[:, column : column + 1] = error
        wanted[:, column + 1 :] += error * upper[column, column + 1 :]
    return indices
