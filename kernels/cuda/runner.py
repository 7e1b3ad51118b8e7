"""One call of a prepared layer: scratch memory, then two launches, or three with few tokens and a branch.

A `Runner` belongs to a prepared layer, a way, a device, input and output types, and a thread; its launches are made at
the first call, with every argument that stays the same, so that a call sets addresses and starts kernels. It neither
synchronizes nor allocates but through torch, so CUDA graphs may capture it once the first call is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from . import hopper, skinny
from .device import AbstractDevice
from .hopper import Hopper
from .layouts import padded
from .matmul import TILE_OUTPUTS, TILE_TOKENS, WIDE_ARCHITECTURES, Matmul
from .plan import KEPT_RANK_GROUPS, Plan
from .prepared import Prepared
from .quantizer import GROUPS_AT_ONCE, TOKENS, Quantizer
from .skinny import Skinny
from .thin import TOKENS as THIN_TOKENS
from .thin import Thin

if TYPE_CHECKING:
    from torch import Tensor

    from .program import AbstractProgram
    from .rows import Kind

KINDS: dict[torch.dtype, Kind] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
NAMES = {name: dtype for dtype, name in KINDS.items()}
SPLIT_TOKENS = 512
"""Up to so many tokens, blocks of 16 tokens alone would leave most of a large GPU idle."""
WIDE_BLOCKS = 264
"""From so many blocks on they may be of fewer, wider warps: two for each multiprocessor of an H100 or H200, which then
has as many warps as one block of narrow ones would give it."""
_ALIGNED = 8
"""Rows of a multiple of so many numbers are read and written 16 bytes at a time."""


FEW, SOME, MANY, PLENTY = range(4)
"""How many tokens a call has, as far as it decides the way. No enumeration: those take longer to look up by."""
SIZES = (FEW, SOME, MANY, PLENTY)


def size_of(plan: Plan, tokens: int) -> int:
    """The size of a call."""
    if tokens <= skinny.TOKENS:
        return FEW
    if tokens <= SPLIT_TOKENS:
        return SOME
    blocks = padded(tokens, TILE_TOKENS) // TILE_TOKENS * plan.padded_out // TILE_OUTPUTS
    return PLENTY if blocks >= WIDE_BLOCKS else MANY


@attrs.frozen
class Way:
    """How so many tokens are computed: whether the quantizer's blocks share the columns, and which product."""

    split: bool
    skinny: bool
    wide: bool = False

    @classmethod
    def of(cls, plan: Plan, size: int, architecture: str) -> Way:
        """The way for calls of a size."""
        # A token's scale needs all its columns, which blocks that share them do not see.
        whole = plan.whole or (plan.branch_whole and plan.rank > 0)
        split = size <= SOME or plan.rank_groups > KEPT_RANK_GROUPS
        # Integer sums and Hopper's own product have no kernel for few tokens; theirs takes any number.
        scaled = not plan.integers and not plan.for_hopper(architecture)
        narrow = plan.span > 1 or plan.up_span > 1
        wide = size == PLENTY and scaled and not narrow and architecture in WIDE_ARCHITECTURES
        return cls(split=split and not whole, skinny=size == FEW and scaled, wide=wide)

    def rows(self, tokens: int) -> int:
        """Tokens, filled up to the kernels' tiles."""
        return padded(tokens, skinny.TOKENS if self.skinny else TILE_TOKENS)


@attrs.frozen
class Programs:
    """What a call runs, in this order; `thin` only where the quantizer is split and there is a branch."""

    quantizer: Quantizer
    thin: Thin | None
    product: Matmul | Skinny | Hopper

    @classmethod
    def of(
        cls, plan: Plan, way: Way, input: torch.dtype, output: torch.dtype, bias: bool, architecture: str
    ) -> Programs:
        """The programs of a layer for inputs and outputs of these types."""
        native, aligned = plan.native(architecture), plan.out % _ALIGNED == 0
        quantizer = Quantizer(
            input=KINDS[input],
            aligned=plan.inn % _ALIGNED == 0,
            factors=plan.factors,
            block=plan.block,
            top=plan.top,
            native=native,
            whole=plan.whole,
            rank_groups=plan.rank_groups,
            branch_top=plan.branch_top,
            branch_whole=plan.branch_whole,
            thin_whole=plan.thin_whole,
            span=plan.input_span,
            branch_span=plan.branch_input_span,
            down_span=plan.down_span,
            thin_span=plan.thin_span,
            split=way.split,
        )
        thin = None
        if way.split and plan.rank:
            thin = Thin(plan.rank_groups, plan.branch_top, plan.thin_whole, plan.thin_span)
        if way.skinny:
            spans = plan.span, plan.up_span
            return cls(quantizer, thin, Skinny(plan.weight_bits, native, plan.rank > 0, bias, KINDS[output], *spans))
        if plan.for_hopper(architecture):
            return cls(quantizer, thin, Hopper(plan.integers, plan.rank > 0, bias, KINDS[output], aligned))
        product = Matmul(
            weight_bits=plan.weight_bits,
            native=native,
            branch=plan.rank > 0,
            bias=bias,
            output=KINDS[output],
            aligned=aligned,
            integers=plan.integers,
            wide=way.wide,
            span=plan.span,
            up_span=plan.up_span,
        )
        return cls(quantizer, thin, product.fitted(architecture))

    def list(self) -> list[AbstractProgram]:
        """Those that there are."""
        return [each for each in (self.quantizer, self.thin, self.product) if each is not None]


def programs_of(
    plan: Plan, input: torch.dtype, output: torch.dtype, bias: bool, architecture: str
) -> list[AbstractProgram]:
    """Every program that calls of such a layer may run, for any number of tokens."""
    ways = [Way.of(plan, size, architecture) for size in SIZES]
    found = [each for way in ways for each in Programs.of(plan, way, input, output, bias, architecture).list()]
    return list(dict.fromkeys(found))


class Runner:
    """The launches of a layer one way, for inputs and outputs of one type, with or without a bias."""

    def __init__(
        self, prepared: Prepared, way: Way, device: AbstractDevice, input: torch.dtype, output: torch.dtype, bias: bool
    ) -> None:
        plan, empty = prepared.plan, 0
        native = plan.native(device.architecture)
        programs = Programs.of(plan, way, input, output, bias, device.architecture)
        self._way, self._device, self._output, self._out = way, device, output, plan.out
        # One piece of scratch memory, in bytes a row: codes, thin codes, scales, thin scales; with `thin` the terms of
        # the thin rows and their scales.
        groups, rank_groups = plan.groups, plan.rank_groups
        thin_at = groups * (32 if native else 64)
        scales_at = thin_at + rank_groups * 64
        thin_scales_at = scales_at + groups * 4
        terms_at = thin_scales_at + rank_groups * 4
        terms = groups // plan.down_span
        steps_at = terms_at + terms * rank_groups * 256
        self._row_bytes = terms_at if programs.thin is None else steps_at + terms * 4
        thin_parts = ((6, thin_at), (7, thin_scales_at)) if programs.thin is None else ((6, terms_at), (7, steps_at))
        self._quantizer_parts = ((2, 0), (3, scales_at), *thin_parts)
        self._thin_parts = ((0, terms_at), (1, steps_at), (2, thin_at), (3, thin_scales_at))
        self._product_parts = ((0, 0), (1, scales_at), (4, thin_at), (5, thin_scales_at))
        self._parts_of_columns = -(-groups // GROUPS_AT_ONCE) if way.split else 1
        of_outputs = {Skinny: skinny.OUTPUTS, Matmul: TILE_OUTPUTS, Hopper: hopper.TILE_OUTPUTS}[type(programs.product)]
        self._tiles_of_outputs = -(-plan.padded_out // of_outputs)
        down, up, main = prepared.down, prepared.up, prepared.main
        factors = empty if prepared.factors is None else prepared.factors
        down_codes, down_scales = (empty, empty) if down is None else (down.codes, down.scales)
        up_codes, up_scales = (empty, empty) if up is None else (up.codes, up.scales)
        given = [empty, factors, empty, empty, down_codes, down_scales, empty, empty]
        self._quantizer = device.launch(
            programs.quantizer, [*given, 0, 0, plan.inn, plan.groups, 64 * plan.rank_groups]
        )
        self._thin = None
        if programs.thin is not None:
            self._thin = device.launch(programs.thin, [empty, empty, empty, empty, 0, terms])
        given = [empty, empty, main.codes, main.scales, empty, empty, up_codes, up_scales, empty, empty]
        # The product counts its stages: a span each.
        sizes = [0, 0, plan.out, plan.padded_out, plan.groups // plan.span, plan.rank_groups // plan.up_span]
        if not way.skinny:
            given.append(empty if main.row_scales is None else main.row_scales)
        self._sizes_at = len(given)
        self._product = device.launch(programs.product, [*given, *sizes])

    def __call__(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The product, (tokens, out), of contiguous `input` (tokens, inn); `bias` (padded out,) float32."""
        device, quantizer, thin, product = self._device, self._quantizer, self._thin, self._product
        tokens, few = input.shape[0], self._way.skinny
        rows = self._way.rows(tokens)
        scratch = device.empty((rows * self._row_bytes,), torch.uint8, input.device)
        output = device.empty((tokens, self._out), self._output, input.device)
        quantizer.set(0, input)
        quantizer.set_parts(self._quantizer_parts, scratch, rows)
        quantizer.set(8, tokens)
        quantizer.set(9, rows)
        quantizer.start(rows // TOKENS, self._parts_of_columns)
        if thin is not None:
            thin.set_parts(self._thin_parts, scratch, rows)
            thin.set(4, rows)
            thin.start(rows // THIN_TOKENS, 1)
        product.set_parts(self._product_parts, scratch, rows)
        if bias is not None:
            product.set(8, bias)
        product.set(9, output)
        product.set(self._sizes_at, tokens)
        product.set(self._sizes_at + 1, rows)
        if few:
            product.start(self._tiles_of_outputs, 1)
        else:
            product.start(rows // TILE_TOKENS, self._tiles_of_outputs)
        return output
