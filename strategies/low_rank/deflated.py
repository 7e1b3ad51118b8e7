"""H-SVDQuant's fit: the main codes are chosen for what a branch, refitted afterwards, cannot make up for.

With H = E[x̃ᵀx̃] and L = downᵀ, the best `up` beside given main codes Q is W̃ - Q weighted by H, and what error is left
then is that of Q under the deflated Hessian, which is blind to all that `down` reaches:

    up = (W̃ - Q) H L (Lᵀ H L)⁺          H⊥ = H - H L (Lᵀ H L)⁺ Lᵀ H

    1. down spans H_reg^-½ [H_reg^½ W̃ᵀ]_r, is coded by the branch quantizer and given from then on
    2. Q: error feedback (loraq/error_feedback.py) under H⊥, on the grid of main.round for W̃ less the best branch
    3. up: as above, coded by the branch quantizer
    4. Q once more, under H for what the *rounded* branch leaves; the better of both is kept

Step 4 is for quantized branches, whose `up` lost in its rounding what step 2 relied on: with 4 bits it halves the
error. A 16-bit branch keeps step 3's. H is damped by `damping` times the mean of its diagonal everywhere.

Rounding the layer's input adds noise of variance s to each channel, which the main product alone meets
(loraq/noisy_input.py). λ diag(s), `noise` times that, is added to the metric of steps 1, 2 and 4. With `wiener` the
noise also moves the target of both roundings to what is best for an input with that noise: the branch takes over what
the main codes, whose input is coarse, would only amplify.

The main quantizer gives the grid by `round`; its own `encode` is not asked, so that "gptq" and "rtn" fit the same.

Source: H-SVDQuant (Wang 2026), deflated Hessian, closed-form refit and noise term; GPTQ, arXiv 2210.17323, for the
rounding. What was measured is in docs/notes/calibrated.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import error_feedback, factors, formats
from loraq.contracts import (
    AbstractCalibrated,
    AbstractConditional,
    AbstractLowRank,
    AbstractQuantizer,
    AbstractStatistic,
)
from loraq.layer import Coded, Fit, LayerContext
from loraq.noisy_input import NoisyInput, noisy_input, statistics_for

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraq.pipeline import LayerRecipe
else:
    from loraq.lazy import torch

_FLOOR = 1e-6
"""Damping of the root in step 1, beside the Hessian's own."""
_FEEDBACK_DAMPING = 1e-4
"""For the roundings, whose metric is damped already but singular along `down`."""


@attrs.frozen(kw_only=True)
class Deflated(AbstractLowRank, AbstractCalibrated, AbstractConditional):
    """Chooses the main codes for what a refitted branch cannot make up for (H-SVDQuant), then refits the branch."""

    has_branch: ClassVar[bool] = True

    noise: float = attrs.field(default=0.05, validator=attrs.validators.ge(0))
    """How much the noise of rounding the layer's input counts, λ; 1 is all of it, as calibration saw it."""
    damping: float = attrs.field(default=0.01, validator=attrs.validators.gt(0))
    """What is added to the diagonal of the input's Gram matrix, relative to its mean."""
    wiener: bool = False
    """Whether the main codes aim at what is best for the noisy input, beside being weighed with its noise."""

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        return statistics_for(self.noise)

    def objection(self, recipe: LayerRecipe) -> str | None:
        if recipe.main is not None and isinstance(recipe.main.format, formats.FloatFormat):
            return (
                f"low_rank 'deflated' rounds onto the scales of the main codes and {recipe.main.format.name} has none; "
                'give main_quantizer a format with scales, such as "int4", or take another low_rank strategy'
            )
        return None

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0 or not weight.any():
            return none
        input = noisy_input(context.statistics, main.activation, noise=self.noise, damping=self.damping)
        root = factors.root(input.metric, _FLOOR)
        down = branch.encode(factors.weighted_svd(weight, root, rank)[1], context)
        refit = _Refit(down, input.hessian)
        deflated = attrs.evolve(input, hessian=refit.deflated)
        first = self._rounded(weight - refit.best(weight), deflated, main)
        up = branch.encode(refit.up(weight - first.decode()).float(), context)
        residual = torch.addmm(weight, up.decode(), down.decode(), alpha=-1)
        second = self._rounded(residual, input, main)
        return factors.best(weight, [Fit(first, down, up), Fit(second, down, up), none], context)

    def _rounded(self, weight: Tensor, input: NoisyInput, main: AbstractQuantizer) -> Coded:
        """`weight` (out, inn) on the grid that `main` would round it to, with error feedback."""
        target = input.target(weight) if self.wiener else weight
        grid = main.round(target)
        return error_feedback.rounded(target, grid, input.metric, damping=_FEEDBACK_DAMPING, act_order=True)


class _Refit:
    """The weighted least squares of `up` beside a given `down` (rank, inn), and the metric that it leaves."""

    def __init__(self, down: Coded, hessian: Tensor) -> None:
        self._down = down.decode().double()
        reached = hessian @ self._down.T
        # Rows of `down` that were rounded to zero, or to multiples of others, are no directions of their own.
        self._solution = reached @ torch.linalg.pinv(self._down @ reached, hermitian=True, rtol=1e-12)
        deflated = hessian - self._solution @ reached.T
        self.deflated = (deflated + deflated.T) / 2

    def up(self, weight: Tensor) -> Tensor:
        """`up` (out, rank) float64 that is nearest to `weight` (out, inn), together with `down`."""
        return weight.double().matmul(self._solution)

    def best(self, weight: Tensor) -> Tensor:
        """`up @ down` for that, (out, inn) float32."""
        return (self.up(weight) @ self._down).float()
