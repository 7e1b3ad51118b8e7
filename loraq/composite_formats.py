"""Number formats made of several integer grids: rows of different widths, and codes with a binary residual.

    int3_mixed, int4_mixed      output channels of N - 1, N and N + 1 bits, N on average (MPQ-DM, arXiv 2412.11549)
    int1_binary to int3_binary  N-bit codes plus one more sign with a scale of its own (MPQ-DMv2, arXiv 2507.04290)

**Mixed widths.** As many rows have N - 1 bits as N + 1, so that the bytes are known before any weight is read and do
not depend on which rows those are. Every row stores N - 1 bits a code, the codes' upper bits, and one bit plane. A row
of N bits finds its lowest bit in its own plane; the k-th row of N + 1 bits has its two lowest bits in its own plane and
in that of the k-th row of N - 1 bits, which needs none.

**Binary residual.** value = scale * (code + 1/2) + residual_scale * sign: 2^(N+1) points a group, two copies of an
N-bit grid as far apart as the group needs, symmetric about 0. Unfitted, they are one even grid of N + 1 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs

from loraq.blocks import by_rows, pieces, row_blocks
from loraq.contracts import AbstractFormat
from loraq.formats import IntegerFormat, grouped, largest, no_integers, quotient, recoded, rows_of, scaled, ungrouped
from loraq.layer import Coded, Part, groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch


@attrs.frozen
class MixedWidthFormat(AbstractFormat):
    """Two's complement integers, rows of `bits` - 1, `bits` and `bits` + 1 bits; a bfloat16 scale a group.

    The part "widths" (1, rows) holds 0, 1 or 2 for them. `encode` gives more bits to the rows that gain most of them.
    """

    name: str
    bits: int = attrs.field(validator=[attrs.validators.ge(3), attrs.validators.le(7)])

    integer = True
    block = None

    @property
    def grids(self) -> tuple[IntegerFormat, IntegerFormat, IntegerFormat]:
        """The formats of the rows of `bits` - 1, `bits` and `bits` + 1 bits."""
        low, middle, high = (IntegerFormat(f"int{bits}", bits) for bits in range(self.bits - 1, self.bits + 2))
        return low, middle, high

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        return {
            "codes": Part.codes(rows, columns, self.bits - 1),
            "planes": Part.codes(rows, columns, 1, signed=False),
            "widths": Part.codes(1, rows, 2, signed=False),
            "scales": Part((rows, groups_of(columns, group)), "bfloat16", 16),
        }

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        choices = [grid.encode(values, group, limits, full_range=full_range) for grid in self.grids]
        return self.joined(choices, split(torch.stack([row_errors(values, choice) for choice in choices])))

    def joined(self, choices: list[Coded], widths: Tensor) -> Coded:
        """The rows of `choices`, all of the same matrix in the three grids: row r from `choices[widths[r]]`."""
        codes, scales = choices[0].codes.clone(), choices[0].scales.clone()
        for width in (1, 2):
            rows = (widths == width).nonzero().squeeze(1)
            codes[rows], scales[rows] = choices[width].codes[rows], choices[width].scales[rows]
        return self.with_rows(widths, codes, scales, choices[0].group)

    def with_rows(self, widths: Tensor, codes: Tensor, scales: Tensor, group: int) -> Coded:
        """The coded matrix of these `codes` (rows, columns) int8, each within its row's width of `widths` (rows,)."""
        parts = {"widths": widths.to(torch.uint8).unsqueeze(0), "scales": scales}
        return Coded(self, (codes.shape[0], codes.shape[1]), group, parts | self._codes(codes, widths))

    def widths(self, coded: Coded) -> Tensor:
        """0, 1 or 2 for each row of `bits` - 1, `bits` or `bits` + 1 bits, (rows,) int64."""
        return coded.parts["widths"][0].long()

    def _codes(self, codes: Tensor, widths: Tensor) -> dict[str, Tensor]:
        """The parts that hold `codes` (rows, columns), each within its row's width of `widths` (rows,)."""
        codes = codes.to(torch.int8)
        planes = codes & 1
        for low, high in _pairs(widths):
            many = codes[high]
            planes[high], planes[low] = (many >> 1) & 1, many & 1
        upper = codes >> widths.to(torch.int8).unsqueeze(1)
        return {"codes": upper.contiguous(), "planes": planes.view(torch.uint8).contiguous()}

    def integers(self, coded: Coded) -> Tensor:
        """The codes, (rows, columns) int8."""
        codes, planes = coded.codes, coded.parts["planes"].view(torch.int8)
        integers = (codes << 1).bitwise_or_(planes)
        for low, high in _pairs(self.widths(coded)):
            integers[high] = (integers[high] << 1) | planes[low]
            integers[low] = codes[low]
        return integers

    def decode(self, coded: Coded) -> Tensor:
        return scaled(self.integers(coded), coded.scales.float(), coded.group)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        return self.integers(coded), coded.scales.float(), coded.group

    def points(self, coded: Coded) -> Tensor:
        halves = 2 ** (self.bits - 2 + self.widths(coded)).unsqueeze(1)  # (rows, 1): how many codes are negative
        steps = torch.arange(2 ** (self.bits + 1), device=halves.device)
        levels = torch.minimum(steps, 2 * halves - 1) - halves
        return levels.float().unsqueeze(1) * coded.scales.float().unsqueeze(-1)

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        halves = 2 ** (self.bits - 2 + self.widths(coded)).unsqueeze(1)
        codes = self._codes(torch.minimum(indices, 2 * halves - 1) - halves, self.widths(coded))
        return attrs.evolve(coded, parts={**coded.parts, **codes})


def _pairs(widths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of width 0 and those of width 2, of which there are as many: (some of the one, those of the other)."""
    low, high = ((widths == width).nonzero().squeeze(1) for width in (0, 2))
    return zip(pieces(low), pieces(high), strict=True)


def row_errors(values: Tensor, coded: Coded, gram: Tensor | None = None) -> Tensor:
    """Each row's squared rounding error, (rows,) float64: of the output where `gram` (inn, inn) is given."""
    metric = None if gram is None else gram.double()
    found = torch.empty(len(values), dtype=torch.float64, device=values.device)
    decoded = rows_of(coded)
    for rows in row_blocks(values):
        errors = (values[rows] - decoded(rows)).double()
        found[rows] = ((errors if metric is None else errors @ metric) * errors).sum(dim=1)
    return found


def split(errors: Tensor, order: Tensor | None = None) -> Tensor:
    """Which rows get fewer bits (0) and which more (2), (rows,) int64, from each row's `errors` (3, rows) by width.

    The first rows of `order` may get more bits and as many of its last ones fewer; as many move as leave the least sum
    of errors. Without `order`, the rows whose error depends most on their width come first.
    """
    few, middle, many = errors
    if order is None:
        order = torch.argsort(few - many, descending=True, stable=True)
    pairs = len(order) // 2
    gained = (middle - many)[order[:pairs]]
    lost = (few - middle)[order.flip(0)[:pairs]]
    savings = torch.cumsum(gained - lost, dim=0)
    moved = int(savings.argmax()) + 1 if pairs and float(savings.max()) > 0 else 0
    widths = torch.ones_like(order)
    widths[order[:moved]] = 2
    widths[order.flip(0)[:moved]] = 0
    return widths


@attrs.frozen
class BinaryResidualFormat(AbstractFormat):
    """value = scale * (code + 1/2) + residual_scale * sign: codes of `bits` - 1 bits, and two bfloat16 scales a group.

    A group that is all zeros has scales of 0; elsewhere 0 need not be a point.
    """

    name: str
    bits: int = attrs.field(validator=[attrs.validators.ge(2), attrs.validators.le(8)])

    integer = False
    block = None

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        scales = Part((rows, groups_of(columns, group)), "bfloat16", 16)
        return {
            "codes": Part.codes(rows, columns, self.bits - 1),
            "signs": Part.codes(rows, columns, 1, signed=False),  # 1 is plus
            "scales": scales,
            "residual_scales": scales,
        }

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # every point is in use
        scales = self.even_scales(largest(values, group) if limits is None else limits)
        return self.rounded(values, group, scales, scales / 4)

    def even_scales(self, limits: Tensor) -> Tensor:
        """The scales with which, the residual's being a quarter of them, an even grid reaches to `limits`."""
        return quotient(limits, (1 << (self.bits - 2)) - 0.25)

    def rounded(self, values: Tensor, group: int, scales: Tensor, residual_scales: Tensor) -> Coded:
        """`values` (rows, columns) at the nearest points under the given scales, both (rows, groups)."""
        parts = {
            "codes": torch.zeros(values.shape, dtype=torch.int8, device=values.device),
            "signs": torch.zeros(values.shape, dtype=torch.uint8, device=values.device),
            "scales": scales.to(torch.bfloat16),
            "residual_scales": residual_scales.to(torch.bfloat16),
        }
        return recoded(values, Coded(self, (values.shape[0], values.shape[1]), group, parts))

    def decode(self, coded: Coded) -> Tensor:
        def decoded(codes: Tensor, signs: Tensor, scales: Tensor, residual_scales: Tensor) -> Tensor:
            main = grouped(codes.float() + 0.5, coded.group) * scales.unsqueeze(-1)
            residual = grouped(signs.float() * 2 - 1, coded.group) * residual_scales.unsqueeze(-1)
            return ungrouped(main + residual, coded.shape[1]).contiguous()

        signs, residual_scales = coded.parts["signs"], coded.parts["residual_scales"].float()
        return by_rows(decoded, coded.codes, signs, coded.scales.float(), residual_scales)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        raise no_integers(self)

    def points(self, coded: Coded) -> Tensor:
        return self._ladder(coded)[0]

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        _, order = self._ladder(coded)
        chosen = ungrouped(order.gather(-1, grouped(indices, coded.group)), coded.shape[1])
        parts = {
            **coded.parts,
            "codes": ((chosen >> 1) - 2 ** (self.bits - 2)).to(torch.int8).contiguous(),
            "signs": (chosen & 1).to(torch.uint8).contiguous(),
        }
        return attrs.evolve(coded, parts=parts)

    def _ladder(self, coded: Coded) -> tuple[Tensor, Tensor]:
        """The points ascending, (rows, groups, points), and the code and sign of each as 2 * (code + lowest) + sign."""
        both = torch.arange(2**self.bits, device=coded.codes.device)
        codes = ((both >> 1) - 2 ** (self.bits - 2) + 0.5) * coded.scales.float().unsqueeze(-1)
        points = codes + ((both & 1) * 2 - 1).float() * coded.parts["residual_scales"].float().unsqueeze(-1)
        ascending, order = torch.sort(points, dim=-1, stable=True)
        return ascending, order


INT3_MIXED = MixedWidthFormat("int3_mixed", 3)
INT4_MIXED = MixedWidthFormat("int4_mixed", 4)
INT1_BINARY = BinaryResidualFormat("int1_binary", 2)
INT2_BINARY = BinaryResidualFormat("int2_binary", 3)
INT3_BINARY = BinaryResidualFormat("int3_binary", 4)
