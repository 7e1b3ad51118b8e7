"""No branch: the main quantizer alone, which every branch has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import Fit, LayerContext

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class NoBranch(AbstractLowRank):
    """Makes no branch."""

    has_branch: ClassVar[bool] = False

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        del branch, rank
        return Fit(main.encode(weight, context))
