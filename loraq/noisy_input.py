"""What an error of the main codes costs at a layer's output when its input is rounded at run time.

Rounding the input x̃ adds noise n to it, which the main product alone meets; to an input that it does not depend on it
adds, per channel, the variance

    s_i = E[max over the group of x̃²] / (12 κ²),    κ = 2^(bits-1) - 1

for symmetric integers. For any other format s is the mean squared rounding error on the sample of tokens (measured on
int4, both give the same fit), and 0 where the input is not rounded. With H = E[x̃ᵀx̃] the output's error is then

    E ||(x̃ + n) Ŵᵀ - x̃ Wᵀ||² = tr((W - Ŵ) H (W - Ŵ)ᵀ) + tr(Ŵ diag(s) Ŵᵀ)
                              = tr((W⊥ - Ŵ) (H + diag(s)) (W⊥ - Ŵ)ᵀ) + what no choice of Ŵ changes
    W⊥ = W H (H + diag(s))⁻¹

so that codes aim at W⊥, the Wiener solution, instead of W, weighed by H + diag(s): a weight is made smaller along those
directions where the input has little but noise. `noise` times s is taken, and H is damped first: along directions that
calibration hardly saw, H is an underestimate, and the solution would give up what other inputs need.

Source: H-SVDQuant (Wang 2026) for the noise and its variance; the target is the textbook's Wiener filter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from loraq import factors, formats
from loraq.activation import Activation
from loraq.contracts import AbstractStatistic
from loraq.input_statistics import Gram, InputStatistics, TokenSample

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_FLOOR = 1e-6
"""What keeps the target unique where neither the input nor its noise is there."""


@attrs.frozen(eq=False)
class NoisyInput:
    """A layer's input as the main product meets it, both parts relative to the mean of its Gram matrix' diagonal.

    `hessian` (inn, inn) float64, damped; `noise` (inn,) float64, the variance that rounding adds.
    """

    hessian: Tensor
    noise: Tensor

    @property
    def metric(self) -> Tensor:
        """H + diag(s), (inn, inn) float64: what an error in the codes costs."""
        return self.hessian + torch.diag(self.noise)

    def target(self, weight: Tensor) -> Tensor:
        """W⊥ (out, inn) float32, what codes for `weight` (out, inn) should come near to; itself without noise."""
        if not bool(self.noise.any()):
            return weight
        metric = self.metric
        root = factors.root(metric, _FLOOR)  # of the metric relative to its mean
        solution = torch.cholesky_solve(self.hessian @ weight.double().T, root) / metric.diagonal().mean()
        return solution.T.float().contiguous()


def statistics_for(noise: float) -> frozenset[type[AbstractStatistic]]:
    """What `noisy_input` reads: tokens only where noise counts."""
    return frozenset({Gram, TokenSample} if noise else {Gram})


def noisy_input(statistics: InputStatistics, activation: Activation, *, noise: float, damping: float) -> NoisyInput:
    """The calibrated input of a product that rounds it to `activation`; `noise` times the noise's variance counts.

    `damping` times the mean of the Gram matrix' diagonal is added to that diagonal. Without any input the Hessian is
    the identity, for which the weight's own error counts.
    """
    hessian = statistics[Gram].mean.double()
    mean = float(hessian.diagonal().mean())
    if not mean > 0:  # no token was seen, or only zeros
        return NoisyInput(torch.eye(len(hessian)).to(hessian), torch.zeros_like(hessian.diagonal()))
    hessian = hessian / mean
    hessian.diagonal().add_(damping)
    if not noise:
        return NoisyInput(hessian, torch.zeros_like(hessian.diagonal()))
    return NoisyInput(hessian, rounding_noise(statistics[TokenSample].tokens, activation) * (noise / mean))


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
