"""sdnq's branch: the largest singular values of the weight, by a randomized SVD, in 16 bits, by the library itself.

    up @ down = svd_lowrank(W̃, rank, 8 iterations)        main = Qw(W̃ - up @ down)

It is SVDQuant's branch (arXiv 2411.05007), fitted once and blind to the rounding error. With the branch quantizer
"none" it is what sdnq stores; others round the same factors. Source: the package sdnq (GPL-3.0), which is called.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

import attrs

from loraq import factors
from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import Fit, LayerContext

from .groups import imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_CHANCE = threading.Lock()
"""The package draws from torch's own generator, which all threads share."""


@attrs.frozen(kw_only=True)
class SdnqSvd(AbstractLowRank):
    """sdnq's `use_svd`, by the package: a branch from the SVD of the weight."""

    has_branch: ClassVar[bool] = True

    steps: int = attrs.field(default=8, validator=attrs.validators.ge(0))
    """The package's `svd_steps`: iterations of the randomized SVD."""

    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        none = factors.without_branch(weight, main, branch, rank, context)
        if rank == 0:
            return none
        residual, up, down = self.factors(weight, rank, context.generator)
        fit = Fit(main.encode(residual, context), branch.encode(down, context), branch.encode(up, context))
        return factors.best(weight, [fit, none], context)

    def factors(self, weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(residual, up, down) of `weight` (out, inn), float32; missing directions of a small weight are zeros."""
        possible = min(rank, *weight.shape)
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        with _CHANCE, torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            residual, up, down = imported("sdnq.quant_utils", "sdnq").apply_svdquant(
                weight, rank=possible, steps=self.steps, dtype=torch.bfloat16
            )
        pad = torch.nn.functional.pad
        return residual.float(), pad(up.float(), (0, rank - possible)), pad(down.float(), (0, 0, 0, rank - possible))
