"""`residual.ResidualRounding.step` for integer formats in few operations of torch: for GPUs.

A GPU's time in a fit's loop is what it takes to start its operations, some microseconds each, and to wait for it where
a number is read. So the whole matrix is done at once: the step before's scale and its two neighbours are tried side by
side, three copies of the matrix; nothing is read back, the loss stays where it is. A step of `loraq_fast` starts 66
operations and reads nothing, where the formats' own code started 198 and read two numbers (docs/notes/fits.md).

The same rounding as in residual_numba.py, to the last digits of the loss.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraq import rounding
from loraq.formats import IntegerFormat, divisors, grouped, ungrouped

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


class Fused:
    """The rounding error of `weight` (out, inn) float32 less a product, in units of `unit`, a power of two.

    `scales` (out, groups) float32 are what one step hands to the next.
    """

    def __init__(self, weight: Tensor, format: IntegerFormat, group: int, unit: float) -> None:
        self._weight = weight / unit
        self._limit = format.limit
        self._group = group
        self._factors = weight.new_tensor(rounding.NEIGHBOURS).reshape(-1, 1, 1)
        self.scales = weight.new_empty(0)

    def step(self, product: Tensor, crest: float, noise: float) -> tuple[Tensor, Tensor]:
        """(E in the dtype of `product`; the loss, of no dimension), see ResidualRounding."""
        residual = self._weight - product
        parts = grouped(residual, self._group)
        # An all-zero group has a scale of 0, from which multiplying would never get away.
        anew = torch.linalg.vector_norm(parts, math.inf, dim=-1).mul_(1 / self._limit)
        scales = torch.where(self.scales > 0, self.scales, anew) * self._factors
        lowest, highest = -self._limit - 1, self._limit
        codes = (parts / divisors(scales)).round_().clamp_(lowest, highest)
        errors = codes.mul_(scales.unsqueeze(-1)).sub_(parts)  # with the other sign, which is turned at the end
        sizes, best = torch.linalg.vector_norm(errors, dim=-1).min(dim=0, keepdim=True)
        self.scales = scales.gather(0, best)[0]
        error = errors.gather(0, best.unsqueeze(-1).expand(1, *parts.shape))[0]
        loss = torch.linalg.vector_norm(sizes)
        if crest > 0:
            shares = (error / divisors(self.scales)).square_().mul_(4 * crest).clamp_(max=4 * crest).add_(1 - crest)
            error.mul_(shares)
        error = ungrouped(error, residual.shape[1])
        if noise > 0:
            loss = torch.hypot(loss, torch.linalg.vector_norm(residual) * noise**0.5)
            error = residual.mul_(noise).sub_(error)
        else:
            error = error.neg()
        return error.to(product.dtype), loss


class Moving:
    """A factor (rows, columns) that is rounded to codes of fixed scales (rows, groups) float32 after every move."""

    def __init__(self, scales: Tensor, shape: tuple[int, int], group: int, limit: int) -> None:
        steps = scales.repeat_interleave(group, dim=1)[:, : shape[1]].contiguous()
        self._steps = steps
        self._inverse = torch.where(steps > 0, 1 / steps, 0)
        self._limit = limit

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """`values` (rows, columns) rounded, in `dtype`."""
        codes = (values * self._inverse).round_().clamp_(-self._limit - 1, self._limit)
        return codes.mul_(self._steps).to(dtype)
