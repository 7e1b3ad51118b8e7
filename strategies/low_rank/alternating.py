"""Alternating refit: round what the branch leaves, fit the branch to what the codes leave, and again.

    main = Qw(W̃ - up @ down)        up @ down = SVD_r(W̃ - main)

from the SVD of W̃, as cache-dit and auto-round refine SVDQuant's branch. With a quantized branch each round codes the
factors, and the residual is that of the coded ones. The error need not fall in every round: the best is kept.

Source: LoftQ, arXiv 2310.08659, algorithm 1, which starts from zeros; SVDQuant's code iterates from the SVD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import factors
from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import Fit, LayerContext

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class Alternating(AbstractLowRank):
    """Alternates between rounding the residual and the SVD of what the codes leave."""

    has_branch: ClassVar[bool] = True

    rounds: int = attrs.field(default=20, validator=attrs.validators.ge(1))
    """How often the branch is fitted anew; each round takes one SVD."""

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0:
            return none
        target, best = weight, none
        for _ in range(self.rounds + 1):  # the first is the start: SVDQuant's branch
            up, down = factors.coded(*factors.truncated_svd(target, rank), branch, context)
            fit = factors.finished(weight, up, down, main, context)
            best = factors.best(weight, [best, fit], context)
            target = factors.left_by(weight, fit.main)
        return best
