"""No transform: the weight and the input as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from loraq.contracts import AbstractPreTransform
from loraq.layer import LayerContext, Part

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class NoTransform(AbstractPreTransform):
    """Leaves the layer as it is."""

    def parts(self, inn: int) -> dict[str, Part]:
        del inn
        return {}

    def prepare(self, weight: Tensor, context: LayerContext) -> dict[str, Tensor]:
        del weight, context
        return {}

    def weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        del tensors
        return weight

    def input(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        del tensors
        return input
