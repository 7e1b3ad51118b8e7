"""LoRC's and LQER's branch: the largest singular values of the error that the main quantizer leaves.

    main = Qw(W̃)        up @ down = SVD_r(W̃ - main)

The main codes are those of the weight itself, so the branch can only add to them; SVDQuant and LoRaQ round what the
branch leaves instead. Rounding errors are close to noise, whose singular values hardly fall, so a small rank takes
little of them.

Source: ZeroQuant-V2, arXiv 2303.08302, section 4 (LoRC); LQER, arXiv 2402.02446, equation 5, whose scaling by
activations is scaled_error_svd.py.
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
class ErrorSvd(AbstractLowRank):
    """Takes the branch from the truncated SVD of the main quantizer's error."""

    has_branch: ClassVar[bool] = True

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0:
            return none
        error = factors.left_by(weight, none.main)
        up, down = factors.coded(*factors.truncated_svd(error, rank), branch, context)
        return factors.best(weight, [Fit(none.main, down, up), none], context)
