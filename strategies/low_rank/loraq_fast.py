"""LoRaQ in a tenth of the time: the same objective as `loraq`, by normalised least-squares steps.

    minimise over up, down    ||R - Qw(R)||²,    R = W̃ - qw(up) @ qw(down)

as strategies/low_rank/loraq.py has it, with codes held constant within a step and straight-through for qw. What differs
was found by measuring (docs/notes/fits.md), each against the same number of steps of Adam:

- Steps go along G P: the gradient G = E downᵀ (its twin upᵀ E) times P, the inverse of the other factor's Gram matrix,
  as a least-squares step has it. Momentum and a length of its own for each element gain nothing; a length of its own
  for each channel, that does not fall when the channel's gradient does, takes 4 % off weights with outliers.
- Their length is one law for all ranks, bits and layers: each factor moves the product by about the rounding error that
  the start leaves, less for a coarse branch. It stays for a quarter of the steps and falls to 0 over the others.
- The branch's scales are those of the start. Searching them anew in every step changes a group's codes all at once, a
  noise that cost 2 % at 6 and 4 bits.
- Where the branch's own rounding is coarse, errors count the more the nearer a weight is to flipping its main code
  (`crest` in loraq/residual.py): 6 % at 4 bits. A fine branch can move all weights, and there it only costs.
- With `noise` the loss also counts what the main product makes of rounding the layer's input, n ||R||² beside ||E||²,
  n the variance that rounding adds to a normal input of variance 1 (loraq/noisy_input.py), 0.012 for int4 in groups of
  64. A coarse branch else grows R by a tenth while it shrinks E, and with 4-bit inputs pays for it at the output: 4 %
  at the bytes of rank8@16 (docs/notes/calibrated.md). Nothing is calibrated.
- Products run in bfloat16 where that is fast, and the residual's rounding is one compiled pass (loraq/residual.py).
- The start is a randomised SVD, in the basis that coded factors like better, as in `loraq`.

Source: LoRaQ, arXiv 2604.18117, for the objective; the iteration is this project's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import factors, formats, residual_torch
from loraq.blocks import norm
from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import Coded, Fit, LayerContext
from loraq.noisy_input import rounding_noise
from loraq.residual import ResidualRounding, product_dtype, root_mean_square

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_FRAME_FLOOR = 0.1
"""Added to the Gram matrix relative to its mean: P stays bounded along directions that the factor hardly has."""
_CREST = 10.0
"""One over the branch's rounding noise, relative to the residual, from which `crest` counts in full."""
_CAUTION = 3.0
"""How fast the step falls with it."""
_EXTREME = 120
"""The unit's exponent is no larger, so that its inverse is a float32 as well."""
_STEADY = 0.25
"""Share of the steps at full length."""
_NORMAL_TOKENS = 512
"""Tokens on which the noise of rounding a normal input is measured."""


@attrs.frozen(kw_only=True)
class LoraqFast(AbstractLowRank):
    """Trains the quantized branch by normalised least-squares steps on the error that both quantizers leave."""

    has_branch: ClassVar[bool] = True

    steps: int = attrs.field(default=60, validator=attrs.validators.ge(1))
    """Steps a layer; time grows with them; 60 are as good as 300 of `loraq`, 200 take another 5 % off the error."""
    step: float = attrs.field(default=0.85, validator=attrs.validators.gt(0))
    """How far a factor's first step moves the product, relative to the rounding error that the start leaves."""
    noise: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    """How much the noise of rounding the layer's input counts; 1 is all of it; more suits error feedback (gptq)."""

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        if rank == 0 or not weight.any():
            return factors.without_branch(weight, main, branch, rank, context)
        # Everything in units of the weight's own size, a power of two: small weights' squares must not underflow.
        exponent = round(math.log2(norm(weight) / math.sqrt(weight.numel())))
        unit = 2.0 ** min(max(exponent, -_EXTREME), _EXTREME)
        up, down = factors.approximate_svd(weight / unit, rank, context.generator)
        turn = factors.orthogonal(rank, context.generator).to(weight.device)
        bases = [
            (_Factor(up @ turn, branch, unit, rows=True), _Factor(turn.T @ down, branch, 1.0, rows=False)),
            (_Factor(up, branch, unit, rows=True), _Factor(down, branch, 1.0, rows=False)),
        ]
        moving = min(bases, key=lambda pair: _rounding_noise(*pair))
        rounding = ResidualRounding(weight, main, unit=unit, noise=self._input_noise(main, weight.shape[1]))
        coded = self._trained(*moving, rounding)
        del rounding, bases, moving  # the first holds matrices of the weight's size
        fit = factors.finished(weight, *coded, main, context)
        if factors.error(weight, fit, context) <= factors.error(weight, Fit(main.encode(weight, context)), context):
            return fit
        return factors.without_branch(weight, main, branch, rank, context)

    def _trained(self, up: _Factor, down: _Factor, rounding: ResidualRounding) -> tuple[Coded, Coded]:
        """The codes of the best iterate, (up, down), from where the factors are."""
        residual, error = rounding.start(up.rounded @ down.rounded)
        if residual == 0 or error == 0:
            return up.coded(), down.coded()
        noise = _rounding_noise(up, down) / residual
        rounding.crest = min(1.0, (_CREST * noise) ** 2)
        step = self.step * error / (1 + _CAUTION * noise) / math.sqrt(up.values.shape[1])
        up_step, down_step = step / root_mean_square(down.values), step / root_mean_square(up.values)
        up_frame, down_frame = _frame(down.values @ down.values.T), _frame(up.values.T @ up.values)
        up_frame, down_frame = up_frame.to(up.rounded.dtype), down_frame.to(up.rounded.dtype)
        least: float | Tensor = math.inf
        for index in range(self.steps):
            errors, loss = rounding.step(up.rounded @ down.rounded)
            least = _kept_best(loss, least, up, down)
            share = min(1.0, (1 - (index + 0.5) / self.steps) / (1 - _STEADY))
            up_direction = errors @ down.rounded.T @ up_frame
            down_direction = down_frame @ (up.rounded.T @ errors)
            up.move(up_direction, share * up_step)
            down.move(down_direction, share * down_step)
        return up.coded(), down.coded()

    def _input_noise(self, main: AbstractQuantizer, inn: int) -> float:
        """What counts of the variance that the layer's rounding adds to an input of normal channels of variance 1."""
        if not self.noise:
            return 0.0
        # The same numbers for every layer: the fit's own randomness stays what it is without noise.
        tokens = torch.randn(_NORMAL_TOKENS, inn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return self.noise * float(rounding_noise(tokens, main.activation).mean())


class _Factor:
    """One factor on its way: `values`, and `rounded`, what the branch quantizer makes of `values * unit`, in `unit`.

    Codes keep the scales of the start; 16-bit values have none. A line, a row of `up` or a column of `down`, is what an
    output or input channel of the weight depends on.
    """

    def __init__(self, values: Tensor, branch: AbstractQuantizer, unit: float, *, rows: bool) -> None:
        self.values = values.contiguous()
        self._branch = branch
        self._unit = unit
        self._rows = rows
        self._dtype = product_dtype(values.device.type)
        self._coded = branch.round(self.values * unit)
        self._limit = 0  # of the integer format whose rounding is compiled
        self._moving: residual_torch.Moving | None = None
        if isinstance(branch.format, formats.IntegerFormat):
            scales, limit = self._coded.scales.float() / unit, branch.format.limit
            if self.values.device.type != "cpu":
                self._moving = residual_torch.Moving(scales, self._coded.shape, self._coded.group, limit)
            elif self._dtype == torch.bfloat16:
                self._scales, self._limit = scales, limit
        self.rounded = (self._coded.decode() / unit).to(self._dtype)
        self._kept = self.values
        self._shares: Tensor | None = None

    def move(self, direction: Tensor, length: float) -> None:
        """Move the values along `direction`, by a root mean square of `length`, and round them.

        Each line by its share of the first direction's length, whatever its share is now: lines of large weights would
        else take all of the step for themselves.
        """
        squares = self._squares(direction)
        lines = squares / (direction.numel() / squares.numel())  # mean squares
        if self._shares is None:
            self._shares = lines / lines.mean().clamp(min=torch.finfo(torch.float32).tiny)
        lengths = (self._shares / lines).sqrt_().mul_(length).nan_to_num_(nan=0.0, posinf=0.0)
        if self._limit:
            from loraq import residual_numba

            group = self._coded.group
            self.rounded = residual_numba.moved(self.values, direction, lengths, self._scales, group, self._limit)
        else:
            self.values = torch.addcmul(self.values, direction.float(), lengths)
            if self._moving is not None:
                self.rounded = self._moving.rounded(self.values, self._dtype)
            else:
                self.rounded = (self._code(self.values).decode() / self._unit).to(self._dtype)

    def _squares(self, direction: Tensor) -> Tensor:
        """Each line's sum of squares, (out, 1) or (1, inn) float32."""
        if self._limit:
            from loraq import residual_numba

            return residual_numba.squares(direction, rows=self._rows)
        return direction.float().square().sum(dim=1 if self._rows else 0, keepdim=True)

    def keep(self, better: Tensor | None = None) -> None:
        """Remember where the factor is; only where `better` is true, if it is given: of no dimension, on its device."""
        self._kept = self.values.clone() if better is None else torch.where(better, self.values, self._kept)

    def coded(self) -> Coded:
        """The codes of the remembered values."""
        return self._code(self._kept)

    def _code(self, values: Tensor) -> Coded:
        values = values * self._unit
        if isinstance(self._coded.format, formats.FloatFormat):
            return self._branch.round(values)
        return formats.recoded(values, self._coded)

    def noise(self) -> Tensor:
        """What rounding changed, float32."""
        return self.rounded.float() - self.values


def _kept_best(loss: float | Tensor, least: float | Tensor, *moving: _Factor) -> float | Tensor:
    """The smaller loss; where that is the new one, the factors are remembered. A device's number is not waited for."""
    if not isinstance(loss, float):
        better = loss < least
        for each in moving:
            each.keep(better)
        return torch.where(better, loss, least)
    if loss < least:
        for each in moving:
            each.keep()
        return loss
    return least


def _rounding_noise(up: _Factor, down: _Factor) -> float:
    """How far rounding both factors takes their product, root mean square, but for the product of both changes."""
    up_part = (up.noise() @ (down.values @ down.values.T)).mul_(up.noise()).sum()
    down_part = ((up.values.T @ up.values) @ down.noise()).mul_(down.noise()).sum()
    elements = up.values.shape[0] * down.values.shape[1]
    return math.sqrt(max(0.0, float(up_part + down_part)) / elements)


def _frame(gram: Tensor) -> Tensor:
    """The inverse of a factor's Gram matrix (rank, rank), relative to its mean and bounded where it is singular."""
    damped = gram / gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped.diagonal().add_(_FRAME_FLOOR)
    frame: Tensor = torch.linalg.inv(damped)
    return frame
