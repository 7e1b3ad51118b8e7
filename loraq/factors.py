"""What every low-rank strategy needs: the truncated SVD, codes for both factors, and never being worse than none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraq.blocks import norm, row_blocks
from loraq.contracts import AbstractQuantizer
from loraq.errors import ModelError
from loraq.formats import rows_of
from loraq.input_statistics import Gram
from loraq.layer import Coded, Fit, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_OVERSAMPLING = 24
"""Columns beyond the rank that a randomised SVD draws."""
_POWER_ITERATIONS = 2
_CANCELLED = 3e-5
"""An output error smaller than so much of ||D||² ||H|| is summed in float64: float32 has lost its fifth digit there."""
_SMALL = 4
"""A side shorter than so many times the columns drawn is decomposed whole: that is faster (measured)."""


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
    peak = max((abs(float(end)) for end in torch.aminmax(weight)), default=0.0) if weight.numel() else 0.0
    if peak == 0:
        return weight.new_zeros(out, rank, dtype=torch.float32), weight.new_zeros(rank, inn, dtype=torch.float32)
    blocks = torch.split(weight, max(1, inn // 4))  # no copy in float64 of more than a quarter of the Gram matrix
    gram = torch.zeros(inn, inn, dtype=torch.float64, device=weight.device)
    for block in blocks:
        values = block.double() / peak  # so that no square underflows
        gram.addmm_(values.T, values)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    del gram
    missing = max(0, rank - inn)
    squares = torch.nn.functional.pad(eigenvalues.flip(0)[:rank].clamp(min=0), (0, missing))
    squares = torch.where(squares > 1e-13 * squares[0], squares, 0)
    roots = squares.pow(0.25) * math.sqrt(peak)
    inverse = torch.where(roots > 0, peak / roots, 0)
    right = torch.nn.functional.pad(vectors.flip(1)[:, :rank], (0, missing))
    up = torch.cat([(block.double() / peak @ right * inverse).float() for block in blocks])
    return up, (right * roots).T.float().contiguous()


def approximate_svd(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """About `truncated_svd` in a fraction of its time: the start of a descent, which will move both factors anyway.

    What is left of the weight is larger than what the best factors of this rank leave, by some tenths of a percent. A
    small side of the weight takes the eigenvectors of its Gram matrix in float32; else a random projection of `rank +
    oversampling` columns is turned into the range by two power iterations. Source: Halko, Martinsson & Tropp, arXiv
    0909.4061, algorithm 4.4.
    """
    out, inn = weight.shape
    if out < inn:
        up, down = approximate_svd(weight.T, rank, generator)
        return down.T.contiguous(), up.T.contiguous()
    width = rank + _OVERSAMPLING
    if _SMALL * width > inn:
        eigenvalues, vectors = torch.linalg.eigh(weight.T @ weight)
        kept = min(rank, inn)
        roots = eigenvalues.flip(0)[:kept].clamp(min=0).pow(0.25)
        right = vectors.flip(1)[:, :kept]
        up, down = weight @ (right * _inverse(roots)), (right * roots).T
        padding = rank - kept
        return torch.nn.functional.pad(up, (0, padding)), torch.nn.functional.pad(down, (0, 0, 0, padding))
    omega = torch.randn(inn, width, generator=generator, dtype=torch.float32, device=generator.device).to(weight.device)
    basis = weight @ omega
    for _ in range(_POWER_ITERATIONS):
        basis = weight @ torch.linalg.qr(weight.T @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q
    inner = basis.T @ weight
    eigenvalues, vectors = torch.linalg.eigh((inner @ inner.T).double())
    roots = eigenvalues.flip(0)[:rank].clamp(min=0).pow(0.25).float()
    left = vectors.flip(1)[:, :rank].float()
    return basis @ (left * roots), _inverse(roots).unsqueeze(1) * (left.T @ inner)


def _inverse(roots: Tensor) -> Tensor:
    """1 / roots, falling; 0 for those that are no more than rounding noise."""
    return torch.where(roots > 1e-3 * roots[0], 1 / roots, 0)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (size, size) float32, on the generator's device."""
    normal = torch.randn(size, size, generator=generator, dtype=torch.float32, device=generator.device)
    found: Tensor = torch.linalg.qr(normal).Q
    return found


def root(gram: Tensor, damping: float) -> Tensor:
    """A lower triangular L (inn, inn) float64 with L Lᵀ = gram / m + damping · I, m the mean of gram's diagonal.

    Any such root serves where only || E gram^½ || counts, as in `weighted_svd`, and this one costs a fraction of what
    eigenvectors do. A Gram matrix that is singular beyond what `damping` mends is damped ten times more until it is
    not; of zeros, whose input was never seen, the root is the identity.
    """
    values = gram.double()
    mean = float(values.diagonal().mean()) if values.numel() else 0.0
    if not math.isfinite(mean):
        raise ModelError("a Gram matrix has values that are not finite; calibrate again with inputs that are.")
    if not mean > 0:
        return torch.eye(len(values), dtype=torch.float64, device=values.device)
    values = values / mean
    share = damping
    while True:
        damped = values.clone()
        damped.diagonal().add_(share)
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return lower
        share = max(10 * share, 1e-10)


def weighted_svd(weight: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up` (out, rank) and `down` (rank, inn) float32 that minimise ||(weight - up @ down) root||.

    `root` is a matrix (inn, inn), or (inn,) for a diagonal one. The minimum is SVD_r(weight root) root⁻¹, which is
    U Uᵀ weight with U the first left singular vectors of `weight root`: nothing is inverted, so `root` may be singular,
    and the product is never larger than `weight` in any column. The singular values are shared as in `truncated_svd`.
    """
    values = weight.double()
    up, _ = truncated_svd(values * root if root.dim() == 1 else values @ root, rank)
    columns = up.double()
    singular = columns.square().sum(dim=0)  # of up's columns U Σ^½
    inverse = torch.where(singular > 0, 1 / singular, 0)
    return up.float(), ((columns * inverse).T @ values).float().contiguous()


def left_by(weight: Tensor, main: Coded, out: Tensor | None = None) -> Tensor:
    """What the main codes leave of `weight`, (out, inn) float32; written to `out`, which may be `weight`, if given."""
    left, decoded = torch.empty_like(weight) if out is None else out, rows_of(main)
    for rows in row_blocks(weight):
        torch.sub(weight[rows], decoded(rows), out=left[rows])
    return left


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
    if context is None or context.statistics.get(Gram) is None:
        return distance(weight, fit)
    return deviation(weight - fit.decode(), context)


def distance(weight: Tensor, fit: Fit) -> float:
    """`||weight - fit||`, of formats whose rows stand alone without decoding the whole matrix."""
    main, up = rows_of(fit.main), None if fit.up is None else rows_of(fit.up)
    down = None if fit.down is None else fit.down.decode()
    total = 0.0
    for rows in row_blocks(weight):
        found = main(rows)
        if up is not None and down is not None:
            found = found.addmm(up(rows), down)
        total = math.hypot(total, norm(weight[rows], found))
    return total


def deviation(difference: Tensor, context: LayerContext | None = None) -> float:
    """The norm of a `difference` (out, inn) of two weights, safe from underflow, to a relative 1e-5.

    Where `context` knows the input's Gram matrix, the root mean square over tokens of what the difference does to the
    output, `sqrt(tr(D E[x xᵀ] Dᵀ))`; else the Frobenius norm.
    """
    gram = None if context is None else context.statistics.get(Gram)
    if gram is None:
        return norm(difference)
    mean = gram.mean
    peaks = [float(each.abs().max()) if each.numel() else 0.0 for each in (difference, mean)]
    if not min(peaks) > 0:
        return 0.0
    unit, size = (2.0 ** (math.frexp(peak)[1] - 1) for peak in peaks)  # powers of two, by which division rounds nothing
    values, scaled = (difference / unit).float(), mean / size
    square = float((values @ scaled).mul_(values).sum(dtype=torch.float64))
    most = float(torch.linalg.vector_norm(values)) ** 2 * float(torch.linalg.vector_norm(scaled))
    if not square > _CANCELLED * most:  # the difference avoids all that is large in the input
        exact = values.double()
        square = float((exact @ scaled.double()).mul_(exact).sum())
    return unit * math.sqrt(size) * math.sqrt(max(0.0, square))
