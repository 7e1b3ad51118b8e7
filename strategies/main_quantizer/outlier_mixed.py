"""Outlier-driven mixed precision within a layer: output channels of N - 1, N and N + 1 bits, N on average.

As many channels are moved down as up, so the stored bytes are the same whichever they are. Every channel is rounded in
each width with searched scales; the channels are ordered, and as many of the first get one bit more, and of the last
one bit less, as leave the least error: of the output where the input's Gram matrix is known, else of the weight.
`order` = "error" puts those first whose error depends most on their width; "kurtosis" those with the heaviest tails.

Inside a fit's loop the split of the guess is kept.

Source: MPQ-DM, arXiv 2412.11549, section "outlier-driven mixed quantization", which orders by kurtosis and moves the
number of channels of least reconstruction error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq import composite_formats, formats, rounding
from loraq.activation import Activation, group_validator
from loraq.activation import activation as as_activation
from loraq.blocks import by_rows, pieces
from loraq.composite_formats import MixedWidthFormat
from loraq.contracts import AbstractFormat, AbstractQuantizer
from loraq.input_statistics import Gram
from loraq.layer import Coded, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


def _is_mixed(instance: object, attribute: attrs.Attribute[Any], value: AbstractFormat) -> None:
    del instance
    if not isinstance(value, MixedWidthFormat):
        raise ValueError(
            f"'{attribute.name}' must be a format of mixed widths, 'int3_mixed' or 'int4_mixed', got '{value.name}'"
        )


@attrs.frozen(kw_only=True)
class OutlierMixed(AbstractQuantizer):
    """Gives one bit more to output channels that need it and one less to as many others."""

    weight: AbstractFormat = attrs.field(
        default=composite_formats.INT4_MIXED, converter=formats.named, validator=_is_mixed
    )
    """Format of the weight's codes, of mixed widths: "int4_mixed" has rows of 3, 4 and 5 bits."""
    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time: a format's name, {format, group} or "none"."""
    group: int | Literal["row"] = attrs.field(default=64, validator=group_validator("row"))
    """How many neighbouring columns share a scale; "row" gives each row one."""
    order: Literal["error", "kurtosis"] = attrs.field(
        default="error", validator=attrs.validators.in_(("error", "kurtosis"))
    )
    """Which channels come first: those that gain most, or those of highest kurtosis."""

    @property
    def format(self) -> AbstractFormat:
        return self.weight

    def group_for(self, columns: int) -> int:
        return formats.group_within(self.weight, self.group, columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        return self._split(weight, context.statistics.get(Gram))

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        if guess is None:
            return self._split(weight, None)
        mixed = self._mixed
        integers, widths = mixed.integers(guess), mixed.widths(guess)
        codes, scales = torch.empty_like(integers), torch.empty_like(guess.scales)
        for width, grid in enumerate(mixed.grids):
            for rows in pieces((widths == width).nonzero().squeeze(1)):
                before = Coded(
                    grid,
                    (len(rows), weight.shape[1]),
                    guess.group,
                    {"codes": integers[rows], "scales": guess.scales[rows]},
                )
                found = rounding.searched(weight[rows], grid, guess.group, before)
                codes[rows], scales[rows] = found.codes, found.scales
        return mixed.with_rows(widths, codes, scales, guess.group)

    @property
    def _mixed(self) -> MixedWidthFormat:
        assert isinstance(self.weight, MixedWidthFormat)
        return self.weight

    def _split(self, weight: Tensor, gram: Gram | None) -> Coded:
        """`weight` rounded with the split of least error."""
        mixed, group = self._mixed, self.group_for(weight.shape[1])
        choices = [rounding.searched(weight, grid, group) for grid in mixed.grids]
        metric = None if gram is None else gram.mean
        errors = torch.stack([composite_formats.row_errors(weight, choice, metric) for choice in choices])
        order = None if self.order == "error" else torch.argsort(_kurtosis(weight), descending=True, stable=True)
        return mixed.joined(choices, composite_formats.split(errors, order))


def _kurtosis(weight: Tensor) -> Tensor:
    """Each row's fourth moment over its squared second, (rows,) float64; 0 for a row without spread."""

    def moments(rows: Tensor) -> Tensor:
        values = rows.double()
        values = values - values.mean(dim=1, keepdim=True)
        peak = values.abs().amax(dim=1, keepdim=True)
        values = values / torch.where(peak > 0, peak, 1.0)
        second = values.square().mean(dim=1)
        return values.pow(4).mean(dim=1) / torch.where(second > 0, second, torch.inf).square()

    return by_rows(moments, weight)
