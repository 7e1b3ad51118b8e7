"""SVDQuant's branch: the largest singular values of the weight itself, kept out of the main codes.

    up @ down = SVD_r(W̃)        main = Qw(W̃ - qw(up) @ qw(down))

The branch takes the directions of largest magnitude, so that what is left has a smaller range to be rounded in; it does
not know the rounding error that it leaves. The main codes are those of the residual of the *rounded* branch, so with a
quantized branch its rounding error lands in the residual, not in the result.

Source: SVDQuant, arXiv 2411.05007, section 4.2, whose branch stays in 16 bits (branch_quantizer none).
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
class Svd(AbstractLowRank):
    """Takes the branch from the truncated SVD of the weight."""

    has_branch: ClassVar[bool] = True

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0:
            return none
        up, down = factors.coded(*factors.truncated_svd(weight, rank), branch, context)
        return factors.best(weight, [factors.finished(weight, up, down, main, context), none], context)
