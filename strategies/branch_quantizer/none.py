"""No quantization of the branch: both factors are stored and multiplied in 16 bits, as SVDQuant does.

The baseline that the quantized branches are compared with at equal stored bytes: rank 32 in 16 bits takes the bytes of
rank 62 in 8 bits and of rank 120 in 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from loraq import formats
from loraq.activation import NONE, Activation
from loraq.contracts import AbstractFormat, AbstractQuantizer
from loraq.layer import Coded, LayerContext

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class SixteenBit(AbstractQuantizer):
    """Keeps both factors of the branch in bfloat16, and their inputs as they are."""

    @property
    def format(self) -> AbstractFormat:
        return formats.BFLOAT16

    @property
    def activation(self) -> Activation:
        return NONE

    def group_for(self, columns: int) -> int:
        return max(1, columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context
        return self.round(weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        del guess
        return self.format.encode(weight, self.group_for(weight.shape[1]))
