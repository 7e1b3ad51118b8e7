"""HQQ's codes by its own package: zero points fitted to an error norm that forgives outliers.

Beside LoRaQ's own `hqq`, which is written after the same description. The package computes scales and zero points in
float32 and stores them in bfloat16, as for a bfloat16 model. Source: Badri and Shaji 2023
(https://mobiusml.github.io/hqq_blog), the package hqq (Apache-2.0), which is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from loraq import formats
from loraq.activation import Activation
from loraq.activation import activation as as_activation
from loraq.contracts import AbstractFormat, AbstractQuantizer
from loraq.layer import Coded, LayerContext

from .formats import UINT4_ZERO
from .groups import dividing, imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


@attrs.frozen(kw_only=True)
class HqqPackage(AbstractQuantizer):
    """HQQ's rounding, by the package hqq; it rounds weights only."""

    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time, by LoRaQ: a format's name, {format, group} or "none"."""
    group: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    """How many neighbouring columns share a scale; the package's own choice is 64."""

    @property
    def format(self) -> AbstractFormat:
        return UINT4_ZERO

    def group_for(self, columns: int) -> int:
        return dividing(columns, self.group)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context  # data-free
        return self.round(weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        del guess  # the package begins from each group's range
        codes, meta = self.made(weight)
        rows, columns = weight.shape
        scales, zeros = (meta[name].reshape(rows, -1).to(torch.bfloat16) for name in ("scale", "zero"))
        return UINT4_ZERO.made(codes.reshape(rows, columns), scales, zeros, self.group_for(columns))

    def made(self, weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the package makes of `weight` (out, inn): (codes, unpacked; its table of scales and zero points)."""
        quantizer = imported("hqq.core.quantize", "hqq").Quantizer
        found: tuple[Tensor, dict[str, Any]] = quantizer.quantize(
            weight.clone(),
            nbits=4,
            group_size=self.group_for(weight.shape[1]),
            axis=1,
            bitpack=False,
            compute_dtype=torch.bfloat16,
            device=str(weight.device),
        )
        return found
