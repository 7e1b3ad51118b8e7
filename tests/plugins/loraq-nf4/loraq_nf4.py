"""A third party's distribution: the NF4 format, a main quantizer that uses it, and a stage of its own.

NF4's sixteen values are quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq.activation import Activation, activation
from loraq.contracts import AbstractQuantizer, AbstractStage
from loraq.formats import TableFormat
from loraq.layer import Coded, LayerContext
from loraq.pipeline import LayerRecipe

if TYPE_CHECKING:
    from torch import Tensor

NF4 = TableFormat(
    "nf4",
    4,
    (
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ),
)  # fmt: skip


@attrs.frozen(kw_only=True)
class NormalFloat(AbstractQuantizer):
    """NF4 codes with one scale a group."""

    activation: Activation = attrs.field(default="int8", converter=activation)
    group: int = attrs.field(default=64, validator=attrs.validators.ge(1))

    @property
    def format(self) -> TableFormat:
        return NF4

    def group_for(self, columns: int) -> int:
        return min(self.group, columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context
        return self.round(weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        del guess
        return NF4.encode(weight, self.group_for(weight.shape[1]))


@attrs.frozen(kw_only=True)
class ClipStage(AbstractStage):
    """Clips each weight to so many standard deviations before the fit: a third party's own stage."""

    kind: ClassVar[str] = "clip"
    repeatable: ClassVar[bool] = False

    name: str = "clip"
    deviations: float = attrs.field(default=4.0, validator=attrs.validators.gt(0))

    def bind(self, recipe: LayerRecipe) -> LayerRecipe:
        def clip(weight: Tensor, context: LayerContext) -> Tensor:
            del context
            bound = float(weight.std()) * self.deviations
            return weight.clamp(-bound, bound)

        return attrs.evolve(recipe, before_fit=(*recipe.before_fit, clip))
