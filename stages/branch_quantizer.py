"""Stage `branch_quantizer`: how the two factors of the branch are stored, and how their inputs are rounded."""

from __future__ import annotations

from typing import ClassVar

import attrs

from loraq.contracts import AbstractQuantizer, AbstractStage
from loraq.pipeline import LayerRecipe


@attrs.frozen(kw_only=True)
class BranchQuantizerStage(AbstractStage):
    """Sets the branch quantizer."""

    kind: ClassVar[str] = "branch_quantizer"
    repeatable: ClassVar[bool] = False

    strategy: AbstractQuantizer
    name: str = "branch_quantizer"

    def bind(self, recipe: LayerRecipe) -> LayerRecipe:
        return attrs.evolve(recipe, branch=self.strategy)
