"""Stage `main_quantizer`: the low-bit codes of the weight, or of what the branch leaves of it."""

from __future__ import annotations

from typing import ClassVar

import attrs

from loraq.contracts import AbstractQuantizer, AbstractStage
from loraq.pipeline import LayerRecipe


@attrs.frozen(kw_only=True)
class MainQuantizerStage(AbstractStage):
    """Sets the main quantizer."""

    kind: ClassVar[str] = "main_quantizer"
    repeatable: ClassVar[bool] = False

    strategy: AbstractQuantizer
    name: str = "main_quantizer"

    def bind(self, recipe: LayerRecipe) -> LayerRecipe:
        return attrs.evolve(recipe, main=self.strategy)
