"""One step of a fit's loop: what the main quantizer's rounding leaves of `weight - up @ down`.

    R = W - up @ down        E = R - Qw(R)

E is what the branch can still make up for. `ResidualRounding` keeps what one step hands to the next, the scales of the
main codes, from which the next step's search begins.

Where the main quantizer rounds plainly to integers on the CPU (`AbstractPlainRounding`), subtraction, search, rounding
and E are one pass of a Numba kernel (loraq/residual_numba.py), 0.9 ns a weight on one AVX-512 core where the torch
reference here takes a dozen passes; on other devices the same rounding is a third of the operations to start, and none
to wait for (loraq/residual_torch.py). Elsewhere the quantizer's own `round` is called. They may disagree in codes that
lie within float rounding of the middle between two, and so agree to the loss's last digits, not bit for bit.

Loops need their products E downᵀ and upᵀ E to no more than a percent, so these run in bfloat16 where the device
multiplies it faster than float32: four times as fast on a core with AVX512-BF16 (docs/notes/fits.md).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from loraq import formats, residual_torch
from loraq.blocks import by_rows, norm, row_blocks
from loraq.contracts import AbstractPlainRounding, AbstractQuantizer
from loraq.factors import distance
from loraq.formats import rows_of
from loraq.layer import Coded, Fit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraq import residual_numba
else:
    from loraq.lazy import torch


@functools.cache
def product_dtype(device_type: str) -> torch.dtype:
    """The dtype in which a loop multiplies on this kind of device: bfloat16 where that is fast, else float32."""
    if device_type == "cpu":
        import llvmlite.binding

        features = llvmlite.binding.get_host_cpu_features()
        return torch.bfloat16 if features.get("avx512bf16") or features.get("amx-bf16") else torch.float32
    return torch.bfloat16


class ResidualRounding:
    """The rounding error that `main` leaves of `weight` (out, inn) less a product, step after step.

    Products and errors are in units of `unit`, a power of two: R = weight / unit - product. With `crest` above 0 an
    error counts the more the nearer it is to half a step of the grid, E (1 - crest + crest (2 E / step)²): those are
    the weights whose codes are about to flip, and where the branch's own rounding is coarse they alone are worth
    moving. Only integer formats have one step a group; others are not weighted. `noise` n adds n ||R||² to the loss and
    n R to the error: what the main product makes of an input whose rounding adds noise of that variance.
    """

    def __init__(
        self,
        weight: Tensor,
        main: AbstractQuantizer,
        *,
        unit: float = 1.0,
        crest: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self._weight = weight
        self._main = main
        self._unit = unit
        self._noise = noise
        self.crest = crest
        self._guess: Coded | None = None
        self._fused: residual_numba.Fused | residual_torch.Fused | None = None
        plain = isinstance(main, AbstractPlainRounding) and main.scale == "search"
        if plain and isinstance(main.format, formats.IntegerFormat):
            group = main.group_for(weight.shape[1])
            if weight.device.type == "cpu":
                from loraq import residual_numba  # compiles, or loads what it compiled before: only where it is used

                self._fused = residual_numba.Fused(weight, main.format, group, unit)
            else:
                self._fused = residual_torch.Fused(weight, main.format, group, unit)

    def start(self, product: Tensor) -> tuple[float, float]:
        """The root mean squares of R and E for `product` (out, inn), with scales searched anew."""
        residual = torch.empty_like(self._weight)
        for rows in row_blocks(residual):
            torch.sub(self._weight[rows], product[rows].float(), alpha=self._unit, out=residual[rows])
        self._guess = self._main.round(residual)
        if self._fused is not None:
            self._fused.scales = (self._guess.scales.float() / self._unit).contiguous()
        size = math.sqrt(max(1, residual.numel())) * self._unit
        return norm(residual) / size, distance(residual, Fit(self._guess)) / size

    def step(self, product: Tensor) -> tuple[Tensor, float | Tensor]:
        """(E weighted by crest, in the dtype of `product`, and ||E||) for `product` (out, inn), noise included.

        Off the CPU the norm may be a tensor of no dimension there, which is not waited for.
        """
        if self._fused is not None:
            return self._fused.step(product, self.crest, self._noise)
        residual = by_rows(lambda part, taken: part - taken.float() * self._unit, self._weight, product)
        guess = self._guess = self._main.round(residual, self._guess)
        decoded = rows_of(guess)
        steps, group = self._steps(guess) if self.crest > 0 and guess.format.integer else (None, 0)
        errors, loss = torch.empty_like(product), 0.0
        for rows in row_blocks(residual):
            error, norms = self._error(residual[rows], decoded(rows), None if steps is None else steps[rows], group)
            errors[rows] = error.to(product.dtype)
            loss = math.hypot(loss, *norms)
        return errors, loss

    def _steps(self, guess: Coded) -> tuple[Tensor, int]:
        """Each group's step of the grid, (rows, groups, 1) in units, infinite where it is 0; a group's columns."""
        _, scales, group = guess.format.integer_view(guess)
        return formats.divisors(scales / self._unit), group

    def _error(
        self, residual: Tensor, decoded: Tensor, steps: Tensor | None, group: int
    ) -> tuple[Tensor, tuple[float, float]]:
        """E weighted by crest and with the noise's share, both parts of the loss, for R and Qw(R) times the unit."""
        error = (residual - decoded) / self._unit
        loss, noise = float(torch.linalg.vector_norm(error)), 0.0
        if steps is not None:
            in_steps = formats.ungrouped(formats.grouped(error, group) / steps, error.shape[1])
            share = (2 * in_steps).square_().clamp_(max=4)
            error = error * (1 - self.crest + self.crest * share)
        if self._noise:
            rounded = residual / self._unit
            error = torch.add(error, rounded, alpha=self._noise)
            noise = math.sqrt(self._noise) * float(torch.linalg.vector_norm(rounded))
        return error, (loss, noise)


def root_mean_square(values: Tensor) -> float:
    """The root mean square of all elements; 0 of none."""
    return float(torch.linalg.vector_norm(values)) / math.sqrt(max(1, values.numel()))
