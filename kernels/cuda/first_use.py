"""The first use of a kernel on a GPU: what it gives is compared with the torch reference before it is relied on.

What is shown without a GPU (the emulator, the assembler's report) says nothing of the code generators, the driver or
the chip. So a GPU's record keeps which programs have proved themselves there in this process. A call that started one
that has not is followed by the reference on some of its tokens, the first and the last; where the two agree, the call's
programs are never looked at again, and where they do not, the reference runs from then on and a warning says so.

This costs some milliseconds and one synchronization a program. A call that is captured into a CUDA graph cannot be
compared; nor can one whose output is not finite, or all zeros. The next one is then.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import torch

from loraq import ops

from .program import name

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.layout import Layout

    from .program import AbstractProgram

TOKENS = 64
"""As many tokens of a call are compared at most."""
TOLERANCE = 1e-3
"""Of the reference's norm. Both should give the same bits."""
LEAST_EQUAL = 0.99
"""The share of outputs that must be the reference's bits: a race spoils few of them, a wrong lane more."""


@attrs.define(eq=False)
class FirstUses:
    """A GPU's record: the programs that proved themselves, and the sentence about those that failed."""

    proved: set[AbstractProgram] = attrs.field(factory=set)
    failure: str | None = None
    _local: threading.local = attrs.field(factory=threading.local, init=False)

    def started(self, program: AbstractProgram) -> None:
        """Note that this thread has started a program that is not proved."""
        programs: set[AbstractProgram] | None = getattr(self._local, "programs", None)
        if programs is None:
            programs = self._local.programs = set()
        programs.add(program)

    def pending(self) -> set[AbstractProgram]:
        """What this thread has started since it was last asked and nobody has proved."""
        programs: set[AbstractProgram] | None = getattr(self._local, "programs", None)
        if not programs:
            return set()
        self._local.programs = set()
        return programs - self.proved

    def judged(
        self,
        output: Tensor,
        programs: set[AbstractProgram],
        input: Tensor,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        layout: Layout,
    ) -> str | None:
        """Compare a call's `output` (tokens, out), made by `programs`, with the reference of its `input`.

        Returns None where they agree or cannot be compared, else the sentence that is kept as `failure`.
        """
        if input.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        rows = _rows(len(input), input.device)
        with torch.no_grad():
            wanted = ops.reference(input[rows], tensors, bias, layout).float()
            found = output[rows].float()
            size = float(torch.linalg.vector_norm(wanted))
            if size - size != 0:  # infinite, or not a number
                return None
            apart = float(torch.linalg.vector_norm(found - wanted))
            equal = float((found == wanted).float().mean())
        if apart <= TOLERANCE * size and equal >= LEAST_EQUAL:
            if size > 0:  # zeros prove nothing
                self.proved |= programs
            return None
        relative = f"{apart / size:.3g} of its norm" if size else f"{apart:.3g} where all should be zero"
        relative += f", {equal:.1%} of the outputs are the same"
        self.failure = (
            f"on this GPU the CUDA kernels ({', '.join(sorted(map(name, programs)))}) do not give what the torch "
            f"reference gives: a layer of {layout.inn} x {layout.out} with {len(input)} tokens is off by {relative}. "
            "Packed layers run in plain torch from here on; please report this. LORAQ_CUDA_CHECK=0 runs the kernels "
            "unchecked"
        )
        return self.failure


def _rows(tokens: int, device: torch.device) -> Tensor:
    """Which tokens are compared: all, or the first and the last."""
    if tokens <= TOKENS:
        return torch.arange(tokens, device=device)
    half = TOKENS // 2
    return torch.cat([torch.arange(half, device=device), torch.arange(tokens - half, tokens, device=device)])
