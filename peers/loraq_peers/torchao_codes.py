"""torchao's codes: rounding to nearest with scales from each group's range, by the library itself.

`IntxWeightOnlyConfig` with int4 codes: symmetric ones (LoRaQ's int4), or with an integer zero point (int4_asymmetric).
Scales are bfloat16, as for a bfloat16 model. Source: the package torchao (BSD-3-Clause), which is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from loraq import formats, integer_formats
from loraq.activation import Activation
from loraq.activation import activation as as_activation
from loraq.contracts import AbstractFormat, AbstractQuantizer
from loraq.layer import Coded, LayerContext

from .groups import dividing, imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


@attrs.frozen(kw_only=True)
class Torchao(AbstractQuantizer):
    """torchao's int4 weights, by the package."""

    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time, by LoRaQ: a format's name, {format, group} or "none"."""
    group: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    """How many neighbouring columns share a scale."""
    zero_point: bool = False
    """Whether groups have an integer zero point beside their scale."""

    @property
    def format(self) -> AbstractFormat:
        return integer_formats.INT4_ASYMMETRIC if self.zero_point else formats.INT4

    def group_for(self, columns: int) -> int:
        return dividing(columns, self.group)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context  # rounding to nearest looks at nothing but the weight
        return self.round(weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        del guess  # no search begins from it
        made, group = self.made(weight), self.group_for(weight.shape[1])
        parts = {"codes": made.qdata, "scales": made.scale}
        if self.zero_point:  # both shifted by 8, so that codes are unsigned
            parts["codes"] = (made.qdata.to(torch.int16) + 8).to(torch.uint8)
            parts["zeros"] = (made.zero_point.to(torch.int16) + 8).to(torch.uint8)
        return Coded(
            self.format,
            (weight.shape[0], weight.shape[1]),
            group,
            {name: part.detach().contiguous() for name, part in parts.items()},
        )

    def made(self, weight: Tensor) -> Any:
        """What the package makes of `weight` (out, inn): its tensor."""
        package = imported("torchao.quantization", "torchao")
        granularity = imported("torchao.quantization.granularity", "torchao")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
        types: Any = torch  # no stub has int4
        kind = package.MappingType.ASYMMETRIC if self.zero_point else package.MappingType.SYMMETRIC
        package.quantize_(
            layer,
            package.IntxWeightOnlyConfig(
                weight_dtype=types.int4,
                granularity=granularity.PerGroup(self.group_for(weight.shape[1])),
                mapping_type=kind,
            ),
        )
        return layer.weight
