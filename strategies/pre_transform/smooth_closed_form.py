"""Smoothing in closed form: the scales that balance the rounding errors of the weight and of the input.

x̃ = x / d and W̃ = W · d per input channel i, with

    d_i = (h_i / Σ_j |P_ji|^p)^(1 / (p + 2)), divided by its geometric mean

h_i = E[x_i²] is the Gram matrix' diagonal and P (out, inn) what the main quantizer will round: the weight, or with
`rank` what its largest singular values leave, which a branch will carry. With p = 2 the scale is the square root of the
input's root mean square over the column's norm, SmoothQuant's rule with α = 0.5 and means for maxima; larger p look at
the column's largest weights. Channels whose input or column is zero keep d = 1. After a rotation the statistics are
those of the rotated input.

Source: H-SVDQuant (Wang 2026), the smoothing in closed form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from loraq import factors
from loraq.contracts import AbstractCalibrated, AbstractStatistic
from loraq.input_statistics import Gram
from loraq.layer import LayerContext

from .channel_scales import AbstractChannelScales, centred, stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


@attrs.frozen(kw_only=True)
class SmoothClosedForm(AbstractChannelScales, AbstractCalibrated):
    """Balances the rounding errors of input and weight by a formula over the calibrated input's mean squares."""

    power: float = attrs.field(default=2.0, validator=attrs.validators.gt(0))
    """p, the norm by which a column of the weight is measured; large ones look at its largest weights alone."""
    rank: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """How many of the weight's largest singular values are left to a branch and not measured."""

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        return frozenset({Gram})

    def prepare(self, weight: Tensor, context: LayerContext) -> dict[str, Tensor]:
        gram = context.statistics[Gram]
        squares = gram.sums.diagonal().double() / gram.count.clamp(min=1)
        if self.rank:
            up, down = factors.truncated_svd(weight, self.rank)
            weight = torch.addmm(weight, up, down, alpha=-1)
        columns = weight.abs().double()
        largest = columns.amax(dim=0)
        present = (squares > 0) & (largest > 0)
        # Relative to the column's largest weight, so that no power of it leaves the range of floats.
        relative = (columns / torch.where(present, largest, 1.0)).pow(self.power).sum(dim=0)
        of_weight = torch.log2(torch.where(present, relative, 1.0))
        of_weight = of_weight + self.power * torch.log2(torch.where(present, largest, 1.0))
        of_input = torch.log2(torch.where(present, squares, 1.0))
        return stored(centred((of_input - of_weight) / (self.power + 2), present))
