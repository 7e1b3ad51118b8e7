"""GPTQ: rounding in which each column makes up for the errors of the columns before it, by what the inputs are like.

The scales are those of rounding to nearest and stay as they are; the codes then come from loraq/error_feedback.py,
which minimises the error of the layer's output over the calibration's tokens instead of the weight's. Columns are taken
in falling order of their input's mean square, as GPTQ's `act_order` has it, without which the error is a tenth larger.

Inside a fit's loop the rounding is to nearest, on the same grid: error feedback is for the final codes.

With `noise` the codes also allow for the rounding of the input (loraq/noisy_input.py): they aim at what is best for an
input with that noise. That needs more damping, lest directions that calibration hardly saw pass for noise: take 0.1
with all of it (`noise = 1`). With 4-bit inputs the output error falls by another 3 to 4 % (docs/notes/calibrated.md).

Source: GPTQ, arXiv 2210.17323; H-SVDQuant (Wang 2026) for the noise. Scales found anew at each group's start, as GPTQ's
authors have it for groups, gain nothing over static ones in this order (docs/notes/quantizers.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from loraq import error_feedback, formats, rounding
from loraq.activation import Activation, group_validator
from loraq.activation import activation as as_activation
from loraq.contracts import (
    AbstractCalibrated,
    AbstractFormat,
    AbstractPlainRounding,
    AbstractQuantizer,
    AbstractStatistic,
)
from loraq.input_statistics import Gram
from loraq.layer import Coded, LayerContext
from loraq.noisy_input import noisy_input, statistics_for

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class Gptq(AbstractQuantizer, AbstractCalibrated, AbstractPlainRounding):
    """Rounds column by column, each making up for the errors before it, as the layer's calibrated input asks."""

    weight: AbstractFormat = attrs.field(
        default=formats.INT4, converter=formats.named, validator=formats.scales_validator
    )
    """Format of the weight's codes; any that has scales."""
    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time: a format's name, {format, group} or "none"."""
    group: int | Literal["row"] = attrs.field(default=64, validator=group_validator("row"))
    """How many neighbouring columns share a scale; "row" gives each row one."""
    scale: rounding.Scale = attrs.field(default="search", validator=attrs.validators.in_(("search", "amax")))
    """Scales of least squared weight error ("search"), or from each group's largest magnitude ("amax")."""
    damping: float = attrs.field(default=0.01, validator=attrs.validators.ge(0))
    """What is added to the Gram matrix' diagonal, relative to its mean: more trusts the calibration less."""
    noise: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    """How much the noise of rounding the layer's input counts; 0 is plain GPTQ, 1 all that calibration saw."""
    act_order: bool = True
    """Round the columns of largest input first, not in the weight's order."""
    block: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    """Columns between two matrix products; speed alone, but sums round differently."""

    @property
    def format(self) -> AbstractFormat:
        return self.weight

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        return statistics_for(self.noise)

    def group_for(self, columns: int) -> int:
        return formats.group_within(self.weight, self.group, columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        metric, target, damping = context.statistics[Gram].mean, weight, self.damping
        if self.noise:
            input = noisy_input(context.statistics, self.activation, noise=self.noise, damping=self.damping)
            metric, target, damping = input.metric, input.target(weight), 0.0
        grid = self.round(target)
        return error_feedback.rounded(target, grid, metric, damping=damping, act_order=self.act_order, block=self.block)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        return rounding.rounded(weight, self.weight, self.group_for(weight.shape[1]), self.scale, guess)
