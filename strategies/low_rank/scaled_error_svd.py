"""L2QER's branch: the SVD of the main quantizer's error, its columns weighted by how large their inputs are.

    main = Qw(W̃)        up @ down = SVD_r((W̃ - main) S) S⁻¹        S = diag(E|x̃|)

An error in a column counts as much as its input channel is large on average. The main codes stay those of the weight
itself: rounding anew what the branch leaves was worse in every case (docs/notes/calibrated.md), for the new error has
nothing of what the branch took. S is not inverted: `down` is Uᵀ (W̃ - main) for the singular vectors U, so channels
that never had an input do no harm. Correlations between channels, which L2QER leaves out, are what qera adds.

Source: LQER, arXiv 2402.02446, section 3.2 (L2QER), without its normalisation of S, which cancels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import factors
from loraq.contracts import AbstractCalibrated, AbstractLowRank, AbstractQuantizer, AbstractStatistic
from loraq.input_statistics import ChannelMeans
from loraq.layer import Fit, LayerContext

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class ScaledErrorSvd(AbstractLowRank, AbstractCalibrated):
    """Takes the branch from the SVD of the main quantizer's error, weighted by the mean size of each input channel."""

    has_branch: ClassVar[bool] = True

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        return frozenset({ChannelMeans})

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0:
            return none
        means = context.statistics[ChannelMeans].mean.double()
        error = factors.left_by(weight, none.main)
        up, down = factors.coded(*factors.weighted_svd(error, means, rank), branch, context)
        return factors.best(weight, [Fit(none.main, down, up), none], context)
