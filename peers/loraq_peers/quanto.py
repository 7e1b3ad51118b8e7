"""optimum-quanto's codes: rounding to nearest over each group's range, by the library itself.

qint4 has 16 codes from the group's least to its largest value, computed and stored in bfloat16, as for a bfloat16
model. Source: the package optimum-quanto (Apache-2.0), which is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from loraq import formats
from loraq.activation import Activation
from loraq.activation import activation as as_activation
from loraq.contracts import AbstractFormat, AbstractQuantizer
from loraq.layer import Coded, LayerContext

from .formats import UINT4_OFFSET
from .groups import dividing, imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


@attrs.frozen(kw_only=True)
class Quanto(AbstractQuantizer):
    """optimum-quanto's qint4, by the package; it rounds weights only."""

    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time, by LoRaQ: a format's name, {format, group} or "none"."""
    group: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    """How many neighbouring columns share a scale; the package's own choice is 128."""

    @property
    def format(self) -> AbstractFormat:
        return UINT4_OFFSET

    def group_for(self, columns: int) -> int:
        return dividing(columns, self.group)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context  # rounding to nearest looks at nothing but the weight
        return self.round(weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        del guess  # no search begins from it
        made, group = self.made(weight), self.group_for(weight.shape[1])
        codes = made._data.unpack() if hasattr(made._data, "unpack") else made._data
        rows = weight.shape[0]
        return UINT4_OFFSET.made(
            codes.reshape(weight.shape), made._scale.reshape(rows, -1), -made._shift.reshape(rows, -1), group
        )

    def made(self, weight: Tensor) -> Any:
        """What the package makes of `weight` (out, inn): its tensor."""
        package, group = imported("optimum.quanto", "optimum-quanto"), self.group_for(weight.shape[1])
        values = weight.to(torch.bfloat16)
        scale, shift = package.MaxOptimizer()(values, package.qint4, 0, group)
        # A group of equal values has no range, and the package divides by it.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return package.quantize_weight(values, package.qint4, 0, scale, shift, group, optimized=False)
