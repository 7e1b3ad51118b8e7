"""QERA's branch: the exact minimum of the output error for given main codes.

    main = Qw(W̃)        up @ down = SVD_r((W̃ - main) C^½) C^-½        C = E[x̃ x̃ᵀ]

which minimises E||x̃ (W̃ - main - up @ down)ᵀ||². The main codes stay those of the weight itself: rounding anew what the
branch leaves was worse in every case (docs/notes/calibrated.md), for the new error has nothing of what the branch took.

Any root of C gives the same product, so a Cholesky factor is taken; and `down` is Uᵀ (W̃ - main) for the left singular
vectors U, so that nothing is inverted and a singular C does no harm. `damping` times the mean of C's diagonal is added
to that diagonal: it keeps the factorisation from failing and counts a little of the weight's own error, for inputs that
calibration has not seen.

Source: QERA, arXiv 2410.06040, theorem 1 (QERA-exact).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import factors
from loraq.contracts import AbstractCalibrated, AbstractLowRank, AbstractQuantizer, AbstractStatistic
from loraq.input_statistics import Gram
from loraq.layer import Fit, LayerContext

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class Qera(AbstractLowRank, AbstractCalibrated):
    """Takes the branch that minimises the output error beside the main codes of the weight itself."""

    has_branch: ClassVar[bool] = True

    damping: float = attrs.field(default=0.01, validator=attrs.validators.gt(0))
    """What is added to the diagonal of the input's Gram matrix, relative to its mean."""

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        return frozenset({Gram})

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0:
            return none
        error = factors.left_by(weight, none.main)
        root = factors.root(context.statistics[Gram].mean, self.damping)
        up, down = factors.coded(*factors.weighted_svd(error, root, rank), branch, context)
        return factors.best(weight, [Fit(none.main, down, up), none], context)
