"""Stage `pre_transform`: rewrite the weight and the input before anything is rounded.

May be listed several times; the transforms run in the recipe's order (a rotation, then smoothing of what it gives).
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from loraq.contracts import AbstractPreTransform, AbstractStage
from loraq.pipeline import LayerRecipe


@attrs.frozen(kw_only=True)
class PreTransformStage(AbstractStage):
    """Adds one transform."""

    kind: ClassVar[str] = "pre_transform"
    repeatable: ClassVar[bool] = True

    strategy: AbstractPreTransform
    name: str = "pre_transform"

    def bind(self, recipe: LayerRecipe) -> LayerRecipe:
        return attrs.evolve(recipe, transforms=(*recipe.transforms, self.strategy))
