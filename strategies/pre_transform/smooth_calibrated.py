"""SmoothQuant: large input channels are scaled down, and the weight's columns up, as far as calibration says.

x̃ = x / s and W̃ = W · s per input channel k, with

    s_k = max|x_k|^α / max_j |W_jk|^(1-α), divided by its geometric mean

α shares the difficulty between both sides: 0 leaves the weight's columns equally large, 1 the input's channels. A
number is taken for every layer; "search" tries 0, 0.05, ..., 1, and no smoothing, for each layer and keeps what has the
least output error on the sample of tokens, both sides rounded to nearest on trial:

    || Q_trial(x / s) Q_trial(W · s)ᵀ - x Wᵀ ||

A pre-transform is not told of the quantizers that come after it, hence the trial's own formats; they are those of the
default main quantizer, without a branch and without transforms in between. Channels whose input or weight is zero keep
s = 1. After a rotation the statistics are those of the rotated input.

Source: SmoothQuant, arXiv 2211.10438, equation 4; the search as in AWQ, arXiv 2306.00978, section 3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq import formats, rounding
from loraq.activation import Activation, group_validator
from loraq.activation import activation as as_activation
from loraq.contracts import AbstractCalibrated, AbstractFormat, AbstractStatistic
from loraq.input_statistics import ChannelMaxima, TokenSample
from loraq.layer import LayerContext

from .channel_scales import AbstractChannelScales, centred, stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

ALPHAS = tuple(step / 20 for step in range(21))
"""What the search tries beside no smoothing."""


def _share(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    del instance
    if value != "search" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
        raise ValueError(f"'{attribute.name}' must be a number from 0 to 1 or 'search', got {value!r}")


@attrs.frozen(kw_only=True)
class SmoothCalibrated(AbstractChannelScales, AbstractCalibrated):
    """Evens out the input's channels by their calibrated maxima (SmoothQuant), with a given or a searched share."""

    alpha: float | Literal["search"] = attrs.field(default="search", validator=_share)
    """How much of the input's unevenness moves into the weight, from 0 to 1; "search" finds it for each layer."""
    trial_weight: AbstractFormat = attrs.field(default=formats.INT4, converter=formats.named)
    """Format that the search rounds the weight to."""
    trial_activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the search rounds the input: a format's name, {format, group} or "none"."""
    trial_group: int | Literal["row"] = attrs.field(default=64, validator=group_validator("row"))
    """How many neighbouring columns of the weight share a scale in the search."""

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        return frozenset({ChannelMaxima, TokenSample} if self.alpha == "search" else {ChannelMaxima})

    def prepare(self, weight: Tensor, context: LayerContext) -> dict[str, Tensor]:
        inputs, columns = context.statistics[ChannelMaxima].values, weight.abs().amax(dim=0)
        present = (inputs > 0) & (columns > 0)
        of_input, of_weight = (torch.log2(torch.where(present, each, 1.0)) for each in (inputs, columns))

        def scales(alpha: float) -> dict[str, Tensor]:
            return stored(centred(alpha * of_input - (1 - alpha) * of_weight, present))

        if self.alpha != "search":
            return scales(self.alpha)
        tokens = context.statistics[TokenSample].tokens
        tried = [stored(torch.zeros_like(of_input)), *(scales(alpha) for alpha in ALPHAS)]
        expected = tokens @ weight.T
        return min(tried, key=lambda online: self._error(weight, tokens, expected, online))

    def _error(self, weight: Tensor, tokens: Tensor, expected: Tensor, online: dict[str, Tensor]) -> float:
        """The norm of what rounding both sides on trial does to the output of `tokens`."""
        smoothed, input = self.weight(weight, online), self.input(tokens, online)
        group = formats.group_within(self.trial_weight, self.trial_group, weight.shape[1])
        coded = rounding.searched(smoothed, self.trial_weight, group)
        kind = self.trial_activation
        if kind.format is not None:
            input = kind.format.encode(input, kind.group_for(input.shape[1])).decode()
        return float(torch.linalg.vector_norm((input @ coded.decode().T - expected).double()))
