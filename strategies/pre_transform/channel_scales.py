"""What the smoothings share: one stored scale an input channel, x̃ = x / s and W̃ = W · s.

The scales are stored in bfloat16 and used as stored on both sides, so that whatever rounding they met cancels: the
layer's function is unchanged to the float rounding of one product and one quotient, powers of two or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraq.contracts import AbstractPreTransform
from loraq.layer import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_WIDEST = 60.0
"""Scales stay within 2^±60, so that neither a product nor a quotient leaves float32's range."""


class AbstractChannelScales(AbstractPreTransform):
    """A pre-transform whose online part is `scales` (inn,); what is left to say is which."""

    def parts(self, inn: int) -> dict[str, Part]:
        return {"scales": Part((inn,), "bfloat16", 16)}

    def weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return weight * tensors["scales"].float()

    def input(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return input / tensors["scales"].float()


def centred(exponents: Tensor, present: Tensor) -> Tensor:
    """`exponents` (inn,), base 2, less their mean over the channels that are `present`; 0 for all others.

    So the scales 2^exponents have a geometric mean of 1, and channels without a size of their own stay as they are.
    """
    mean = torch.where(present, exponents, 0.0).sum() / present.sum().clamp(min=1)
    return torch.where(present, exponents - mean, 0.0)


def stored(exponents: Tensor) -> dict[str, Tensor]:
    """The online part for scales 2^`exponents` (inn,)."""
    return {"scales": torch.exp2(exponents.clamp(-_WIDEST, _WIDEST)).to(torch.bfloat16)}
