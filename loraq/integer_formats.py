"""Integer formats beyond the symmetric ones: with a zero point, ternary, and with two levels of scales.

- int4_asymmetric and its kin: codes 0 .. 2^bits - 1, a bfloat16 scale and a zero point of `bits` bits a group.
- int4_offset and its kin: two's complement codes, a bfloat16 scale and a bfloat16 offset a group, as in HQQ, whose zero
  point is not rounded to an integer (https://mobiusml.github.io/hqq_blog).
- ternary: {-1, 0, 1}, five a byte, a bfloat16 scale a group.
- int4x2: int4 codes times a small integer a group, times a bfloat16 scale a row. The product of code and small integer
  fits int8, so that an integer kernel sums over the whole row; one scale a token is the activations' fitting kind
  (after QServe, arXiv 2405.04532).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from loraq.blocks import by_rows
from loraq.contracts import AbstractFormat, AbstractLookup
from loraq.formats import (
    codes_of,
    divided,
    grouped,
    integer_lookup,
    largest,
    no_integers,
    quotient,
    scaled,
    scaled_points,
    ungrouped,
    with_codes,
)
from loraq.layer import Coded, Lookup, Part, groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_LARGEST_MULTIPLIER = 15
"""int4x2: -8 times this is -120, which fits int8; 7 times it is 105."""


@attrs.frozen
class AsymmetricFormat(AbstractFormat):
    """Unsigned codes with a zero point: value = (code - zero) * scale, the group's range from its least to its largest.

    The range always holds 0, so that 0 is exact and the zero point fits the codes' width. `limits` shrinks the range
    around 0 by its ratio to the largest magnitude.
    """

    name: str
    bits: int

    integer = True
    block = None

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        groups = groups_of(columns, group)
        return {
            "codes": Part.codes(rows, columns, self.bits, signed=False),
            "scales": Part((rows, groups), "bfloat16", 16),
            "zeros": Part.codes(rows, groups, self.bits, signed=False),
        }

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # every code is in use
        rows, columns = values.shape
        low, high = _range_with_zero(values, group, limits)
        top = 2**self.bits - 1
        scales = (quotient(high, top) - quotient(low, top)).to(torch.bfloat16)
        zeros = divided(-low, scales.float(), 1).squeeze(-1).round().clamp(0, top)

        def rounded(part: Tensor, steps: Tensor, middles: Tensor) -> Tensor:
            units = divided(part, steps, group).round_().add_(middles.unsqueeze(-1)).clamp_(0, top)
            return ungrouped(units.to(torch.uint8), columns).contiguous()

        codes = by_rows(rounded, values, scales.float(), zeros)
        return Coded(self, (rows, columns), group, {"codes": codes, "scales": scales, "zeros": zeros.to(torch.uint8)})

    def decode(self, coded: Coded) -> Tensor:
        integers, scales, group = self.integer_view(coded)
        return scaled(integers, scales, group)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        kind = torch.int8 if self.bits < 8 else torch.int16
        zeros = coded.parts["zeros"].to(kind).repeat_interleave(coded.group, dim=1)[:, : coded.shape[1]]
        return coded.codes.to(kind) - zeros, coded.scales.float(), coded.group

    def points(self, coded: Coded) -> Tensor:
        levels = torch.arange(2**self.bits, dtype=torch.float32, device=coded.codes.device)
        return (levels - coded.parts["zeros"].float().unsqueeze(-1)) * coded.scales.float().unsqueeze(-1)

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, indices)


@attrs.frozen
class OffsetFormat(AbstractFormat, AbstractLookup):
    """Two's complement codes: value = code * scale + offset, the group's range from its least to its largest value.

    The range always holds 0, as AsymmetricFormat's, though 0 need not be a point. The offset is what the middle of the
    range is off zero, so that 16 bits lose nothing of it. `limits` shrinks the range around 0 by its ratio to the
    largest magnitude.
    """

    name: str
    bits: int

    integer = False
    block = None

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        part = Part((rows, groups_of(columns, group)), "bfloat16", 16)
        return {"codes": Part.codes(rows, columns, self.bits), "scales": part, "offsets": part}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # every code is in use
        rows, columns = values.shape
        low, high = _range_with_zero(values, group, limits)
        scales = quotient(high - low, 2**self.bits - 1).to(torch.bfloat16)
        # The codes' middle is at -1/2.
        offsets = (low / 2 + high / 2 + scales.float() / 2).to(torch.bfloat16)
        limit = 2 ** (self.bits - 1)

        def rounded(part: Tensor, steps: Tensor, middles: Tensor) -> Tensor:
            units = (grouped(part, group) - middles.unsqueeze(-1)).div_(steps.unsqueeze(-1)).round_()
            return ungrouped(units.clamp_(-limit, limit - 1).to(torch.int8), columns).contiguous()

        codes = by_rows(rounded, values, torch.where(scales == 0, torch.inf, scales.float()), offsets.float())
        return Coded(self, (rows, columns), group, {"codes": codes, "scales": scales, "offsets": offsets})

    def decode(self, coded: Coded) -> Tensor:
        def decoded(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
            products = grouped(codes.float(), coded.group) * scales.unsqueeze(-1)
            return ungrouped(products.add_(offsets.unsqueeze(-1)), coded.shape[1]).contiguous()

        return by_rows(decoded, coded.codes, coded.scales.float(), coded.parts["offsets"].float())

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        raise no_integers(self)

    def points(self, coded: Coded) -> Tensor:
        limit = 2 ** (self.bits - 1)
        levels = torch.arange(-limit, limit, dtype=torch.float32, device=coded.codes.device)
        return scaled_points(levels, coded.scales.float()) + coded.parts["offsets"].float().unsqueeze(-1)

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, indices - 2 ** (self.bits - 1))

    def lookup(self, coded: Coded) -> Lookup:
        return integer_lookup(coded.codes, coded.scales, coded.parts["offsets"].float())


def _range_with_zero(values: Tensor, group: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each group's least and largest value or 0, shrunk to `limits` where given: two of (rows, groups)."""
    low = by_rows(lambda part: grouped(part, group).amin(dim=-1), values).clamp(max=0)
    high = by_rows(lambda part: grouped(part, group).amax(dim=-1), values).clamp(min=0)
    if limits is None:
        return low, high
    reached = torch.maximum(-low, high)
    share = torch.where(reached > 0, limits / torch.where(reached > 0, reached, 1.0), 1.0)
    return low * share, high * share


@attrs.frozen
class TernaryFormat(AbstractFormat):
    """{-1, 0, 1} times a bfloat16 scale a group: its mean magnitude, as TerDiT has it, unless `limits` are given."""

    name: str

    bits = 2
    integer = True
    block = None

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        codes = Part((rows, columns), "int8", 2, levels=3)
        return {"codes": codes, "scales": Part((rows, groups_of(columns, group)), "bfloat16", 16)}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # there are three codes
        rows, columns = values.shape
        if limits is None:
            present = grouped(torch.ones_like(values[:1]), group).sum(dim=-1)  # padding does not count
            limits = by_rows(lambda part: grouped(part, group).abs().sum(dim=-1), values) / present
        scales = limits.to(torch.bfloat16)
        codes = codes_of(lambda x: x.round_().clamp_(-1, 1).to(torch.int8), values, scales, group)
        return Coded(self, (rows, columns), group, {"codes": codes, "scales": scales})

    def decode(self, coded: Coded) -> Tensor:
        return scaled(coded.codes, coded.scales.float(), coded.group)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        return coded.codes, coded.scales.float(), coded.group

    def points(self, coded: Coded) -> Tensor:
        return scaled_points(
            torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float32, device=coded.codes.device), coded.scales.float()
        )

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, indices - 1)


@attrs.frozen
class TwoLevelIntegerFormat(AbstractFormat):
    """int4 codes times an integer from 0 to 15 a group times a bfloat16 scale a row."""

    name: str

    bits = 4
    integer = True
    block = None

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        return {
            "codes": Part.codes(rows, columns, 4),
            "multipliers": Part((rows, groups_of(columns, group)), "uint8", 8),
            "row_scales": Part((rows, 1), "bfloat16", 16),
        }

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        rows, columns = values.shape
        reached = largest(values, group) if limits is None else limits
        wanted = quotient(reached, 7)
        row_scales = quotient(wanted.amax(dim=1, keepdim=True), _LARGEST_MULTIPLIER).to(torch.bfloat16)
        multipliers = divided(wanted, row_scales.float(), wanted.shape[1]).squeeze(1)
        # A group that is not all zeros has at least 1, or it would vanish.
        multipliers = torch.where(reached > 0, multipliers.round().clamp(1, _LARGEST_MULTIPLIER), 0)
        lowest = -8 if full_range else -7
        scales = multipliers * row_scales.float()
        parts = {
            "codes": codes_of(lambda x: x.round_().clamp_(lowest, 7).to(torch.int8), values, scales, group),
            "multipliers": multipliers.to(torch.uint8),
            "row_scales": row_scales,
        }
        return Coded(self, (rows, columns), group, parts)

    def decode(self, coded: Coded) -> Tensor:
        integers, scales, group = self.integer_view(coded)
        return scaled(integers, scales, group)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        multipliers = coded.parts["multipliers"].to(torch.int8)
        integers = coded.codes * multipliers.repeat_interleave(coded.group, dim=1)[:, : coded.shape[1]]
        return integers, coded.parts["row_scales"].float(), max(1, coded.shape[1])

    def points(self, coded: Coded) -> Tensor:
        levels = torch.arange(-8, 8, dtype=torch.float32, device=coded.codes.device)
        integers = scaled_points(levels, coded.parts["multipliers"].float())
        return integers * coded.parts["row_scales"].float().unsqueeze(-1)

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, indices - 8)


INT2_ASYMMETRIC = AsymmetricFormat("int2_asymmetric", 2)
INT3_ASYMMETRIC = AsymmetricFormat("int3_asymmetric", 3)
INT4_ASYMMETRIC = AsymmetricFormat("int4_asymmetric", 4)
INT6_ASYMMETRIC = AsymmetricFormat("int6_asymmetric", 6)
INT8_ASYMMETRIC = AsymmetricFormat("int8_asymmetric", 8)
INT2_OFFSET = OffsetFormat("int2_offset", 2)
INT3_OFFSET = OffsetFormat("int3_offset", 3)
INT4_OFFSET = OffsetFormat("int4_offset", 4)
TERNARY = TernaryFormat("ternary")
INT4X2 = TwoLevelIntegerFormat("int4x2")
