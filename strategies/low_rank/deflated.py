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

Rounding the layer's input adds noise of variance s to each channel, which the main product alone meets:

    s_i = E[max over the group of x̃²] / (12 κ²),    κ = 2^(bits-1) - 1

for symmetric integers; for any other format s is the mean squared rounding error on the sample of tokens (measured on
int4, both give the same fit), and 0 where the input is not rounded. λ diag(s), `noise` times that, is added to the
metric of steps 1, 2 and 4. With `wiener` the noise also moves the target of both roundings to what is best for an input
with that noise, the Wiener solution W⊥ = W̃ H⊥ (H⊥ + λ diag(s))⁻¹: the branch takes over what the main codes, whose
input is coarse, would only amplify.

The main quantizer gives the grid by `round`; its own `encode` is not asked, so that "gptq" and "rtn" fit the same.

Source: H-SVDQuant (Wang 2026), deflated Hessian, closed-form refit and noise term; GPTQ, arXiv 2210.17323, for the
rounding. What was measured is in docs/notes/calibrated.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import error_feedback, factors, formats
from loraq.activation import Activation
from loraq.contracts import (
    AbstractCalibrated,
    AbstractConditional,
    AbstractLowRank,
    AbstractQuantizer,
    AbstractStatistic,
)
from loraq.input_statistics import Gram, TokenSample
from loraq.layer import Coded, Fit, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraq.pipeline import LayerRecipe
else:
    from loraq.lazy import torch

_FLOOR = 1e-6
"""What keeps the solution for the Wiener target unique where neither the input nor its noise is there."""
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
        return frozenset({Gram, TokenSample} if self.noise else {Gram})

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
        hessian, noise = self._hessian_and_noise(main.activation, context)
        root = factors.root(hessian + torch.diag(noise), _FLOOR)
        down = branch.encode(factors.weighted_svd(weight, root, rank)[1], context)
        refit = _Refit(down, hessian)
        first = self._rounded(weight - refit.best(weight), refit.deflated, noise, main)
        up = branch.encode(refit.up(weight - first.decode()).float(), context)
        residual = torch.addmm(weight, up.decode(), down.decode(), alpha=-1)
        second = self._rounded(residual, hessian, noise, main)
        return factors.best(weight, [Fit(first, down, up), Fit(second, down, up), none], context)

    def _hessian_and_noise(self, activation: Activation, context: LayerContext) -> tuple[Tensor, Tensor]:
        """The damped H (inn, inn) and λ s (inn,), float64, both relative to the mean of H's diagonal."""
        hessian = context.statistics[Gram].mean.double()
        mean = float(hessian.diagonal().mean())
        if not mean > 0:  # no token was seen, or only zeros: the weight's own error counts
            return torch.eye(len(hessian), dtype=torch.float64, device=hessian.device), hessian.diagonal() * 0
        hessian = hessian / mean
        hessian.diagonal().add_(self.damping)
        if not self.noise:
            return hessian, torch.zeros_like(hessian.diagonal())
        return hessian, rounding_noise(context.statistics[TokenSample].tokens, activation) * (self.noise / mean)

    def _rounded(self, target: Tensor, hessian: Tensor, noise: Tensor, main: AbstractQuantizer) -> Coded:
        """`target` (out, inn) on the grid that `main` would round it to, with error feedback."""
        metric = hessian + torch.diag(noise)
        if self.wiener and bool(noise.any()):
            root = torch.linalg.cholesky(metric + _FLOOR * torch.eye(len(metric)).to(metric))
            target = torch.cholesky_solve(hessian @ target.double().T, root).T.float().contiguous()
        return error_feedback.rounded(target, main.round(target), metric, damping=_FEEDBACK_DAMPING, act_order=True)


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


def rounding_noise(tokens: Tensor, activation: Activation) -> Tensor:
    """The variance s (inn,) float64 that rounding `tokens` (tokens, inn) adds to each channel; 0 where none is done."""
    inn = tokens.shape[1]
    if activation.format is None or not len(tokens):
        return torch.zeros(inn, dtype=torch.float64, device=tokens.device)
    group = activation.group_for(inn)
    if isinstance(activation.format, formats.IntegerFormat):
        squares = formats.largest(tokens, group).double().square().mean(dim=0)
        return (squares / (12 * activation.format.limit**2)).repeat_interleave(min(group, inn))[:inn]
    errors: Tensor = activation.format.encode(tokens, group).decode() - tokens
    return errors.double().square().mean(dim=0)
