"""Stage `packing`: lay the codes and scales out as the tensors of a checkpoint."""

from __future__ import annotations

from typing import ClassVar

import attrs

from loraq.contracts import AbstractPacking, AbstractStage
from loraq.pipeline import LayerRecipe


@attrs.frozen(kw_only=True)
class PackingStage(AbstractStage):
    """Sets the packing."""

    kind: ClassVar[str] = "packing"
    repeatable: ClassVar[bool] = False

    strategy: AbstractPacking
    name: str = "packing"

    def bind(self, recipe: LayerRecipe) -> LayerRecipe:
        return attrs.evolve(recipe, packing=self.strategy)
