"""sdnq's rotation: blocks of input channels times a Hadamard matrix, by the library itself.

x̃ = x R and W̃ = W R, R symmetric and orthogonal in blocks of up to 256. Unlike LoRaQ's `hadamard` its blocks are larger
and its matrix is not Sylvester's where the block is a power of 4. Source: the package sdnq (GPL-3.0), which is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from loraq.contracts import AbstractPreTransform
from loraq.layer import LayerContext, Part

from .groups import imported

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class SdnqHadamard(AbstractPreTransform):
    """sdnq's `use_hadamard`, by the package: rotates blocks of input channels."""

    group: int = attrs.field(default=256, validator=attrs.validators.ge(1))
    """The package's `hadamard_group_size`: the largest block."""

    def parts(self, inn: int) -> dict[str, Part]:
        del inn
        return {}

    def prepare(self, weight: Tensor, context: LayerContext) -> dict[str, Tensor]:
        del weight, context
        return {}

    def weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        del tensors
        return self._rotated(weight)

    def input(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        del tensors
        return self._rotated(input)

    def _rotated(self, values: Tensor) -> Tensor:
        """`values` (rows, inn) with each block of columns rotated."""
        package: Any = imported("sdnq.quant_utils", "sdnq")
        used, block = package.get_hadamard_group_size(values.shape[1], self.group)
        if not used:
            return values
        rotated: Tensor = package.rotate_hadamard(values, group_size=block)
        return rotated
