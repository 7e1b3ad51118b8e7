"""Flexible residual: N-bit codes plus one binary residual, each with its own scale a group, fitted to one another.

    w ≈ s1 · (code + 1/2) + s2 · sign

Two copies of a coarse grid as far apart as the group needs: side by side they are one even grid of N + 1 bits; farther
apart they reach outliers while the middle keeps its fine steps. From several starts (how far the grid reaches, and the
ratio of the scales), codes and scales are fitted in turn: each element takes the nearest point, then both scales are
those of least squares, which is a system of two equations a group. Each group keeps its best. Inside a fit's loop the
scales are those that fit the guess's codes, and each element is rounded once.

Source: MPQ-DMv2, arXiv 2507.04290, section "flexible residual mixed quantization".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq import composite_formats, formats, rounding
from loraq.activation import Activation, group_validator
from loraq.activation import activation as as_activation
from loraq.composite_formats import BinaryResidualFormat
from loraq.contracts import AbstractFormat, AbstractQuantizer
from loraq.layer import Coded, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_REACHES = (1.0, 0.85, 0.7, 0.55)
"""Starts: how much of the group's largest magnitude the grid reaches."""
_RATIOS = (0.25, 1.0)
"""Starts: the residual's scale over the codes' scale; 1/4 is an even grid, 1 reaches far with the middle doubled."""


def _is_binary(instance: object, attribute: attrs.Attribute[Any], value: AbstractFormat) -> None:
    del instance
    if not isinstance(value, BinaryResidualFormat):
        raise ValueError(
            f"'{attribute.name}' must be a format with a binary residual, 'int3_binary' or 'int2_binary', "
            f"got '{value.name}'"
        )


@attrs.frozen(kw_only=True)
class ResidualBinary(AbstractQuantizer):
    """Adds one sign with a scale of its own to each code, and fits both scales together."""

    weight: AbstractFormat = attrs.field(
        default=composite_formats.INT3_BINARY, converter=formats.named, validator=_is_binary
    )
    """Format of the weight's codes: "int3_binary" stores 3 + 1 bits a weight and two scales a group."""
    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time: a format's name, {format, group} or "none"."""
    group: int | Literal["row"] = attrs.field(default=64, validator=group_validator("row"))
    """How many neighbouring columns share their scales; "row" gives each row one pair."""
    steps: int = attrs.field(default=5, validator=attrs.validators.ge(1))
    """How often codes and scales are fitted to one another from each start."""

    @property
    def format(self) -> AbstractFormat:
        return self.weight

    def group_for(self, columns: int) -> int:
        return formats.group_within(self.weight, self.group, columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context  # data-free
        return formats.coded_by_rows(self._searched, weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        return formats.coded_by_rows(self._searched if guess is None else self._fitted, weight, guess)

    @property
    def _binary(self) -> BinaryResidualFormat:
        assert isinstance(self.weight, BinaryResidualFormat)
        return self.weight

    def _searched(self, weight: Tensor) -> Coded:
        """The best of all starts, each group by itself."""
        group = self.group_for(weight.shape[1])
        plain = self._binary.encode(weight, group)
        best = plain
        for reach in _REACHES:
            for ratio in _RATIOS:
                scales = plain.scales.float() * reach
                coded = self._binary.rounded(weight, group, scales, scales * ratio)
                for _ in range(self.steps):
                    coded = self._fitted(weight, coded)
                best = self._better(weight, best, coded)
        return best

    def _fitted(self, weight: Tensor, coded: Coded) -> Coded:
        """`weight` rounded with the scales of least squares for the codes and signs of `coded`."""
        codes = formats.grouped(coded.codes.float() + 0.5, coded.group)
        signs = formats.grouped(coded.parts["signs"].float() * 2 - 1, coded.group)  # 0 in padding, as its codes must be
        values = formats.grouped(weight, coded.group)
        unit = values.abs().amax(dim=-1, keepdim=True)
        values = values / torch.where(unit > 0, unit, 1.0)  # so that no product underflows
        a, b, c = codes.square().sum(-1), (codes * signs).sum(-1), signs.square().sum(-1)
        p, q = (codes * values).sum(-1), (signs * values).sum(-1)
        determinant = a * c - b * b  # of whole quarters: 0 exactly where codes and signs are parallel
        solvable = determinant > 0
        divisor = torch.where(solvable, determinant, 1.0)
        peak = unit.squeeze(-1)
        even = self._binary.even_scales(peak)  # for a group of zeros, which no scales fit best, or one that was
        scales = torch.where(solvable, (p * c - q * b) / divisor * peak, even)
        residual = torch.where(solvable, (q * a - p * b) / divisor * peak, even / 4)
        return self._binary.rounded(weight, coded.group, scales, residual)

    def _better(self, weight: Tensor, one: Coded, other: Coded) -> Coded:
        """Each group as in `one`, or as in `other` where that has the smaller error."""
        better = rounding.squared_error(weight, other) < rounding.squared_error(weight, one)
        scales = torch.where(better, other.scales, one.scales)
        residual = torch.where(better, other.parts["residual_scales"], one.parts["residual_scales"])
        return self._binary.rounded(weight, one.group, scales, residual)
