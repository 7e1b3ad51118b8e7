"""Rounding to nearest for the factors of the branch, and for the inputs of both its products.

The same as main_quantizer/rtn.py with an 8-bit default: all arithmetic is in loraq/rounding.py. `down` (rank, inn) is
grouped along inn and `up` (out, rank) along rank, the contracted axes, so that both products run in integers.

`activation` rounds the branch's input and the thin intermediate between its products. Four bits there cost more than
the branch gains (measured: the output error rises to that of no branch), so W4A8 is the narrow choice, not W4A4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from loraq import formats, rounding
from loraq.activation import Activation, group_validator
from loraq.activation import activation as as_activation
from loraq.contracts import AbstractFormat, AbstractPlainRounding, AbstractQuantizer
from loraq.layer import Coded, LayerContext

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class Rtn(AbstractQuantizer, AbstractPlainRounding):
    """Rounds both factors of the branch to the nearest point of each group's grid."""

    weight: AbstractFormat = attrs.field(default=formats.INT8, converter=formats.named)
    """Format of the factors' codes."""
    activation: Activation = attrs.field(default=Activation(formats.INT8), converter=as_activation)
    """How the inputs of both products are rounded at run time: a format's name, {format, group} or "none"."""
    group: int | Literal["row"] = attrs.field(default=64, validator=group_validator("row"))
    """How many neighbouring columns share a scale; "row" gives each row one."""
    scale: rounding.Scale = attrs.field(default="search", validator=attrs.validators.in_(("search", "amax")))
    """Scales of least squared error ("search"), or from each group's largest magnitude ("amax")."""

    @property
    def format(self) -> AbstractFormat:
        return self.weight

    def group_for(self, columns: int) -> int:
        return formats.group_within(self.weight, self.group, columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context  # rounding to nearest looks at nothing but the weight
        return self.round(weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        return rounding.rounded(weight, self.weight, self.group_for(weight.shape[1]), self.scale, guess)
