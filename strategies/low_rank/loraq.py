"""LoRaQ: a branch trained, without data, against the rounding error of both quantizers.

    minimise over up, down    ||R - Qw(R)||²,    R = W̃ - qw(up) @ qw(down)

Qw is the main quantizer and qw the branch's. The branch is no approximation of the weight and none of a fixed error
(the SVD solves both): it moves the residual R to where the main grid has points. Gradient descent, E = R - Qw(R):

    d/d up = -2 E qw(down)ᵀ        d/d down = -2 qw(up)ᵀ E

- The codes and scales of Qw(R) are held constant within a step, which is the true gradient almost everywhere: codes are
  constant between steps of the grid and searched scales are at a minimum of the same error. Straight-through for Qw as
  well would be the gradient of R - R = 0. Straight-through is used for qw only: the gradient for qw(up) moves `up`.
- The start is the truncated SVD of W̃ in a randomly turned basis: up M, Mᵀ down with M orthogonal is the same product,
  but spreads the large singular values over all columns, which the branch quantizer's groups along rank like better.
- Adam, manual gradients. A step is relative to the factors' root mean square, so that scaling the weight changes
  nothing, and shrinks with the rank (all columns move together) and with the branch quantizer's own rounding error
  (the straight-through gradient is the noisier for it). It falls to 0 along a cosine; the best iterate is kept.

Source: LoRaQ, arXiv 2604.18117; what was measured for each of these choices is in docs/notes/fits.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import factors
from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import Coded, Fit, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_MOMENTUM = 0.8
_SECOND_MOMENTUM = 0.99
_LARGEST_STEP = 0.15
_ROUNDING_NOISE = 20.0
_TINY = 1e-30


@attrs.frozen(kw_only=True)
class Loraq(AbstractLowRank):
    """Trains the quantized branch by gradient descent on the error that both quantizers leave."""

    has_branch: ClassVar[bool] = True

    steps: int = attrs.field(default=400, validator=attrs.validators.ge(1))
    """Steps of gradient descent a layer; time grows with them, the error falls by a few percent from 300 to 1000."""
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
        turn = _orthogonal(rank, context).to(weight.device)
        trained = self._trained(weight, up @ turn, turn.T @ down, main, branch)
        return factors.best(weight, [factors.finished(weight, *trained, main, context), start, none])

    def _trained(
        self, weight: Tensor, up: Tensor, down: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer
    ) -> tuple[Coded, Coded]:
        """The rounded factors of the best iterate, (up, down), from the given start."""
        coded_up, coded_down, coded_main = branch.round(up), branch.round(down), None
        unit = _root_mean_square(weight)  # errors are counted in it, so that no small weight's squares underflow
        step = self._first_step(weight, up, down, coded_up.decode() @ coded_down.decode())
        movers = (_Adam(up, step * _root_mean_square(up)), _Adam(down, step * _root_mean_square(down)))
        residual = torch.empty_like(weight)
        least, best = math.inf, (coded_up, coded_down)
        for index in range(self.steps):
            rounded_up, rounded_down = coded_up.decode(), coded_down.decode()
            torch.addmm(weight, rounded_up, rounded_down, alpha=-1, out=residual)
            coded_main = main.round(residual, coded_main)
            error = residual.sub_(coded_main.decode()).div_(unit)
            loss = float(torch.linalg.vector_norm(error))
            if loss < least:
                least, best = loss, (coded_up, coded_down)
            share = 0.5 * (1 + math.cos(math.pi * index / self.steps))
            movers[0].descend(error @ rounded_down.T, share)
            movers[1].descend(rounded_up.T @ error, share)
            coded_up = branch.round(movers[0].values, coded_up)
            coded_down = branch.round(movers[1].values, coded_down)
        return best

    def _first_step(self, weight: Tensor, up: Tensor, down: Tensor, rounded: Tensor) -> float:
        """The first step, relative to the factors, from `up` and `down` and their product after rounding."""
        residual, noise = _root_mean_square(weight - rounded), _root_mean_square(up @ down - rounded)
        if residual == 0:
            return 0.0
        together = up.shape[1] * _root_mean_square(up) * _root_mean_square(down)
        return min(_LARGEST_STEP, self.learning_rate * residual / together / (1 + _ROUNDING_NOISE * noise / residual))


class _Adam:
    """Adam for one matrix whose descent directions are worked out by hand."""

    def __init__(self, values: Tensor, step: float) -> None:
        self.values = values.clone(memory_format=torch.contiguous_format)
        self._step = step
        self._mean = torch.zeros_like(self.values)
        self._square = torch.zeros_like(self.values)
        self._count = 0

    def descend(self, direction: Tensor, share: float) -> None:
        """Move `values` along `direction`, minus the gradient up to a factor, by `share` of the step."""
        self._count += 1
        self._mean.lerp_(direction, 1 - _MOMENTUM)
        self._square.mul_(_SECOND_MOMENTUM).addcmul_(direction, direction, value=1 - _SECOND_MOMENTUM)
        divisor = self._square.sqrt().add_(_TINY)
        correction = math.sqrt(1 - _SECOND_MOMENTUM**self._count) / (1 - _MOMENTUM**self._count)
        self.values.addcdiv_(self._mean, divisor, value=share * self._step * correction)


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _orthogonal(size: int, context: LayerContext) -> Tensor:
    """A random orthogonal matrix (size, size)."""
    normal = torch.randn(size, size, generator=context.generator, device=context.generator.device)
    return torch.linalg.qr(normal).Q
