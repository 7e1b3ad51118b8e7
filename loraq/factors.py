"""What every low-rank strategy needs: the truncated SVD, codes for both factors, and never being worse than none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraq.contracts import AbstractQuantizer
from loraq.input_statistics import Gram
from loraq.layer import Coded, Fit, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up` (out, rank) and `down` (rank, inn) float32 with up @ down the best approximation of `weight` of this rank.

    Each singular value is shared evenly: column k of `up` and row k of `down` have the norm of its square root. From
    the eigenvectors of the smaller Gram matrix in float64, whose squaring costs nothing that float32 could hold, in a
    fifth of the time of a full SVD. Columns beyond the weight's own rank, or its smaller side, are zero.
    """
    out, inn = weight.shape
    if out < inn:
        up, down = truncated_svd(weight.T, rank)
        return down.T.contiguous(), up.T.contiguous()
    values = weight.double()
    peak = float(values.abs().max()) if values.numel() else 0.0
    if peak == 0:
        return weight.new_zeros(out, rank), weight.new_zeros(rank, inn)
    values = values / peak  # so that no square underflows
    eigenvalues, vectors = torch.linalg.eigh(values.T @ values)
    missing = max(0, rank - inn)
    squares = torch.nn.functional.pad(eigenvalues.flip(0)[:rank].clamp(min=0), (0, missing))
    squares = torch.where(squares > 1e-13 * squares[0], squares, 0)
    roots = squares.pow(0.25) * math.sqrt(peak)
    inverse = torch.where(roots > 0, peak / roots, 0)
    right = torch.nn.functional.pad(vectors.flip(1)[:, :rank], (0, missing))
    return (values @ right * inverse).float(), (right * roots).T.float().contiguous()


def coded(up: Tensor, down: Tensor, branch: AbstractQuantizer, context: LayerContext) -> tuple[Coded, Coded]:
    """The final codes of both factors, (up, down)."""
    return branch.encode(up, context), branch.encode(down, context)


def finished(weight: Tensor, up: Coded, down: Coded, main: AbstractQuantizer, context: LayerContext) -> Fit:
    """The fit with this branch: the main codes are those of what the *rounded* branch leaves of `weight`."""
    residual = torch.addmm(weight, up.decode(), down.decode(), alpha=-1)
    return Fit(main.encode(residual, context), down, up)


def without_branch(
    weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
) -> Fit:
    """The main quantizer alone; with a rank, beside a branch of zeros, so that the layer has the shape it was given."""
    only = main.encode(weight, context)
    if rank == 0:
        return Fit(only)
    up, down = coded(weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight.shape[1]), branch, context)
    return Fit(only, down, up)


def best(weight: Tensor, fits: list[Fit], context: LayerContext) -> Fit:
    """The fit of least error, as `error` judges; of equals the first."""
    return min(fits, key=lambda fit: error(weight, fit, context))


def error(weight: Tensor, fit: Fit, context: LayerContext | None = None) -> float:
    """How far `fit` is from `weight`: of the output where the input's Gram matrix is known, else of the weight."""
    return deviation(weight - fit.decode(), context)


def deviation(difference: Tensor, context: LayerContext | None = None) -> float:
    """The norm of a `difference` (out, inn) of two weights, float64 so that small weights' squares do not underflow.

    Where `context` knows the input's Gram matrix, the root mean square over tokens of what the difference does to the
    output, `sqrt(tr(D E[x xᵀ] Dᵀ))`; else the Frobenius norm.
    """
    gram = None if context is None else context.statistics.get(Gram)
    values = difference.double()
    if gram is None:
        return float(torch.linalg.vector_norm(values))
    return math.sqrt(max(0.0, float((values @ gram.mean.double()).mul_(values).sum())))
