"""Block Walsh-Hadamard rotation: spreads outlier channels over a block, so that no channel dictates a group's scale.

x̃ = x R and W̃ = W R with R block-diagonal, each block the Sylvester Hadamard matrix of the largest power of two that
divides `inn` (at most `largest_block`) over the square root of its size. R is orthogonal and symmetric, so x̃ W̃ᵀ = x Wᵀ
and R is its own inverse. The online part is the block size alone, which follows from `inn` and the option; the input is
rotated by the fast transform, log2(block) passes of additions, in every forward pass. An odd `inn` has blocks of one:
nothing happens.

With `signs`, x̃ = (x · s) R and W̃ = (W · s) R for random signs s = ±1, so that no input is so regular that a row of R
gathers it in one place; the signs, a bit an input channel, are stored.

Source: QuaRot, arXiv 2404.00456, which rotates whole power-of-two widths; blocks make it fit 1152 = 9·128 and 5600.
Random signs: QuIP#, arXiv 2402.04396, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from loraq.blocks import by_rows
from loraq.contracts import AbstractPreTransform
from loraq.layer import LayerContext, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


def _power_of_two(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    del instance
    if value < 1 or value & (value - 1):
        raise ValueError(f"'{attribute.name}' must be a power of two, got {value}")


@attrs.frozen(kw_only=True)
class Hadamard(AbstractPreTransform):
    """Rotates blocks of input channels by a Hadamard matrix."""

    largest_block: int = attrs.field(default=128, validator=_power_of_two)
    """Largest block, a power of two; the block is the largest power of two up to this that divides `inn`."""
    signs: bool = False
    """Whether channels first get random signs, one stored bit each."""

    def parts(self, inn: int) -> dict[str, Part]:
        return {"signs": Part((inn,), "uint8", 1)} if self.signs else {}

    def prepare(self, weight: Tensor, context: LayerContext) -> dict[str, Tensor]:
        if not self.signs:
            return {}
        generator = context.generator
        drawn = torch.randint(2, (weight.shape[1],), generator=generator, device=generator.device, dtype=torch.uint8)
        return {"signs": drawn.to(weight.device)}

    def weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return by_rows(lambda rows: self._rotated(self._signed(rows, tensors)), weight)

    def input(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._rotated(self._signed(input, tensors))

    def _signed(self, values: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """`values` (rows, inn) with the columns whose stored sign is 1 negated."""
        return values * (1 - 2 * tensors["signs"].to(values.dtype)) if self.signs else values

    def _rotated(self, values: Tensor) -> Tensor:
        """`values` (rows, inn) with each block of columns rotated."""
        rows, inn = values.shape
        block = math.gcd(inn, self.largest_block)
        result = values.reshape(rows, -1, block)
        step = 1
        while step < block:
            pairs = result.reshape(rows, -1, 2, step)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            result = torch.stack((first + second, first - second), dim=2)
            step *= 2
        return result.reshape(rows, inn) * (1 / math.sqrt(block))
