"""LoRaQ: a branch trained, without data, against the rounding error of both quantizers.

    minimise over up, down    ||R - Qw(R)||²,    R = W̃ - qw(up) @ qw(down)

Qw is the main quantizer and qw the branch's. The branch is no approximation of the weight and none of a fixed error
(the SVD solves both): it moves the residual R to where the main grid has points. Gradient descent, E = R - Qw(R):

    d/d up = -2 E qw(down)ᵀ        d/d down = -2 qw(up)ᵀ E

- The codes and scales of Qw(R) are held constant within a step, which is the true gradient almost everywhere: codes are
  constant between steps of the grid and searched scales are at a minimum of the same error. Straight-through for Qw as
  well would be the gradient of R - R = 0. Straight-through is used for qw only: the gradient for qw(up) moves `up`.
- The start is the truncated SVD of W̃ in a randomly turned basis: up M, Mᵀ down with M orthogonal is the same product,
  but spreads the large singular values over all columns, which groups along rank like better; where the rounded product
  is nearer without the turn (single huge weights) there is none.
- Adam with gradients by hand, each factor moving in the frame of the other: coordinates in which the columns of the
  other are about orthonormal, so that no direction of the weight moves much faster than the rest. Without it one
  outlier of 170 times the root mean square made steps that were right for all else too large.
- The first step is relative to how much the start leaves to gain: the residual over what moving all columns together
  would change, less with a coarse branch quantizer, whose straight-through gradient is noisy. Steps fall to 0 along a
  cosine, and the best iterate is kept. Where the error rises above the start's, the descent begins anew, with half the
  step, for the steps that remain.

Source: LoRaQ, arXiv 2604.18117; what was measured for each of these choices is in docs/notes/fits.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import factors
from loraq.blocks import norm
from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import Coded, Fit, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_MOMENTUM = 0.8
_SECOND_MOMENTUM = 0.99
_LARGEST_STEP = 0.3
_ROUNDING_NOISE = 20.0
_FRAME_FLOOR = 0.1
_DIVERGED = 1.05


@attrs.frozen(kw_only=True)
class Loraq(AbstractLowRank):
    """Trains the quantized branch by gradient descent on the error that both quantizers leave."""

    has_branch: ClassVar[bool] = True

    steps: int = attrs.field(default=400, validator=attrs.validators.ge(1))
    """Steps of gradient descent a layer; time grows with them; 800 instead of 400 take 2 % off the error."""
    learning_rate: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    """How far the first step moves `up @ down` at most, relative to what the start leaves of the weight."""

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0 or not weight.any():
            return none
        up, down = factors.truncated_svd(weight, rank)
        start = factors.finished(weight, *factors.coded(up, down, branch, context), main, context)
        turn = factors.orthogonal(rank, context.generator).to(weight.device)
        bases = [(up @ turn, turn.T @ down), (up, down)]
        up, down = min(bases, key=lambda pair: _rounding_noise(pair[0], pair[1], branch))
        trained = self._trained(weight, up, down, main, branch)
        return factors.best(weight, [factors.finished(weight, *trained, main, context), start, none], context)

    def _trained(
        self, weight: Tensor, up: Tensor, down: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer
    ) -> tuple[Coded, Coded]:
        """The rounded factors of the best iterate, (up, down), from the given start."""
        coded_up, coded_down, coded_main = branch.round(up), branch.round(down), None
        unit = _root_mean_square(weight)  # errors are counted in it, so that no small weight's squares underflow
        step = self._first_step(weight, up, down, coded_up.decode() @ coded_down.decode())
        moving_up, moving_down = _Moving(up, down.T, step), _Moving(down.T, up, step)
        residual = torch.empty_like(weight)
        first, least, best = math.inf, math.inf, (coded_up, coded_down)
        for index in range(self.steps):
            rounded_up, rounded_down = coded_up.decode(), coded_down.decode()
            torch.addmm(weight, rounded_up, rounded_down, alpha=-1, out=residual)
            coded_main = main.round(residual, coded_main)
            error = factors.left_by(residual, coded_main, out=residual).div_(unit)
            loss = float(torch.linalg.vector_norm(error))
            first = loss if index == 0 else first
            if loss < least:
                least, best = loss, (coded_up, coded_down)
            elif loss > _DIVERGED * first:  # rare: a weight so uneven that the first step was too large for it
                step /= 2
                moving_up, moving_down = _Moving(up, down.T, step), _Moving(down.T, up, step)
                coded_up, coded_down, coded_main = branch.round(up), branch.round(down), None
                continue
            share = 0.5 * (1 + math.cos(math.pi * index / self.steps))
            coded_up = branch.round(moving_up.moved(error @ rounded_down.T, share), coded_up)
            coded_down = branch.round(moving_down.moved(error.T @ rounded_up, share).T, coded_down)
        return best

    def _first_step(self, weight: Tensor, up: Tensor, down: Tensor, rounded: Tensor) -> float:
        """The first step, relative to the factors, from `up` and `down` and their product after rounding."""
        residual, noise = _root_mean_square(weight, rounded), _root_mean_square(up @ down, rounded)
        if residual == 0:
            return 0.0
        together = up.shape[1] * _root_mean_square(up) * _root_mean_square(down)
        return min(_LARGEST_STEP, self.learning_rate * residual / together / (1 + _ROUNDING_NOISE * noise / residual))


class _Moving:
    """A factor on its way: the start plus what Adam moved it by, in the frame of the other factor.

    Both are tall here, (out, rank) and (inn, rank).
    """

    def __init__(self, start: Tensor, other: Tensor, step: float) -> None:
        self._start = start
        self._frame = _frame(other)
        self._step = step * _root_mean_square(start)
        self._move = torch.zeros_like(start)
        self._mean = torch.zeros_like(start)
        self._square = torch.zeros_like(start)
        self._count = 0

    def moved(self, direction: Tensor, share: float) -> Tensor:
        """The factor after a step along `direction`, minus the gradient up to a factor, of `share` of the first."""
        self._count += 1
        direction = direction @ self._frame
        self._mean.lerp_(direction, 1 - _MOMENTUM)
        self._square.mul_(_SECOND_MOMENTUM).addcmul_(direction, direction, value=1 - _SECOND_MOMENTUM)
        divisor = self._square.sqrt().add_(torch.finfo(torch.float32).tiny)
        correction = math.sqrt(1 - _SECOND_MOMENTUM**self._count) / (1 - _MOMENTUM**self._count)
        self._move.addcdiv_(self._mean, divisor, value=share * self._step * correction)
        return torch.addmm(self._start, self._move, self._frame)


def _frame(other: Tensor) -> Tensor:
    """The inverse root of `other`'s Gram matrix (rank, rank) relative to its mean, and bounded where it is singular."""
    values = other.double() / _root_mean_square(other)
    eigenvalues, vectors = torch.linalg.eigh(values.T @ values)
    roots = (eigenvalues.clamp(min=0) / eigenvalues.mean() + _FRAME_FLOOR).rsqrt()
    frame: Tensor = (vectors * roots @ vectors.T).float()
    return frame


def _root_mean_square(values: Tensor, other: Tensor | None = None) -> float:
    """The root mean square of a matrix, or of its difference to `other`."""
    return norm(values, other) / math.sqrt(max(1, values.numel()))


def _rounding_noise(up: Tensor, down: Tensor, branch: AbstractQuantizer) -> float:
    """How far rounding the factors takes their product, root mean square."""
    return _root_mean_square(branch.round(up).decode() @ branch.round(down).decode(), up @ down)
