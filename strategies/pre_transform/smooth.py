"""Smoothing by a weight-only rule: input channels with large weights are scaled down in the weight and up in the input.

x̃ = x / s and W̃ = W · s per input channel k, with

    s_k = (max_j |W_jk|)^(-strength), divided by its geometric mean

which is SmoothQuant's rule s_k = max|x_k|^α / max|W_k|^(1-α) (arXiv 2211.10438, equation 4) with nothing known of x, so
that max|x_k| counts as equal for all k and 1 - α is called `strength`. It evens out the weight's columns and so lowers
the *weight* error of groups that mix large and small channels; it knows nothing of activations and may make their
rounding worse, which is what calibrated smoothing is for. Channels of zeros keep s = 1.

The online part is `scales`, s in bfloat16 rounded to powers of two, so that dividing by it is exact in every floating
point format and the layer's function is unchanged bit for bit but for the order of sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from loraq.layer import LayerContext

from .channel_scales import AbstractChannelScales, centred, stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


@attrs.frozen(kw_only=True)
class Smooth(AbstractChannelScales):
    """Evens out the weight's input channels, moving their size into the input."""

    strength: float = attrs.field(default=0.5, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    """How much of a channel's size is moved, from 0 (nothing) to 1 (all channels equally large)."""

    def prepare(self, weight: Tensor, context: LayerContext) -> dict[str, Tensor]:
        del context
        largest = weight.abs().amax(dim=0)
        present = largest > 0
        exponents = -self.strength * torch.log2(torch.where(present, largest, 1.0))
        return stored(centred(exponents, present).round())
