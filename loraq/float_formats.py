"""Small floating point formats: FP8, the OCP Microscaling (MX) family, and NVFP4.

A grid is data: exponent and mantissa widths, and how many codes at the top are not numbers. Its codes are IEEE-like
(sign, exponent, mantissa), so that ordered codes are ordered magnitudes. Three kinds of scale go with the grids:

    fp8_e4m3, fp8_e5m2                 bfloat16 a group        limit / top, as the integers have it
    mxfp8, mxfp6_*, mxfp4, mxint*      E8M0 a block of 32      2^(floor(log2 limit) - emax), the OCP rule; it saturates
    nvfp4                              E4M3 a block of 16, and one float32 a matrix

Rounding is to nearest, ties to even, and saturates: what lies beyond the top becomes the top, never infinity or NaN.

Sources: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats (MX) 1.0, sections 5 and 6; NVIDIA's NVFP4
as cuDNN and Transformer Engine have it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import attrs

from loraq.contracts import AbstractFormat, AbstractLookup
from loraq.formats import (
    codes_of,
    integer_lookup,
    largest,
    no_integers,
    quotient,
    scaled,
    scaled_points,
    with_codes,
)
from loraq.layer import Coded, Lookup, Part, groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_E8M0_BIAS = 127
_E8M0_LARGEST = 254
"""255 is NaN."""


@attrs.frozen
class Minifloat:
    """A grid of floating point values: a sign, `exponent` bits with the usual bias, `mantissa` bits, subnormals.

    `reserved` counts the topmost magnitudes that are infinity or NaN.
    """

    exponent: int
    mantissa: int
    reserved: int = 0

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa

    def magnitudes(self) -> list[float]:
        """The magnitude of each code without its sign, ascending, reserved ones left out."""
        bias = 2 ** (self.exponent - 1) - 1
        values = []
        for code in range(2 ** (self.exponent + self.mantissa) - self.reserved):
            exponent, fraction = code >> self.mantissa, code & (2**self.mantissa - 1)
            hidden = 0 if exponent == 0 else 2**self.mantissa
            values.append((hidden + fraction) * 2.0 ** (max(exponent, 1) - bias - self.mantissa))
        return values

    @property
    def top(self) -> float:
        """The largest value."""
        return self.magnitudes()[-1]

    @property
    def largest_exponent(self) -> int:
        """floor(log2(top)): emax of the MX rule."""
        return len(bin(int(self.top))) - 3

    def encode(self, values: Tensor) -> Tensor:
        """The codes of `values`, uint8, nearest, ties to even, saturating; zeros keep their sign."""
        least = 2 - 2 ** (self.exponent - 1)  # of normal numbers; below it steps grow no smaller
        # What is no number counts as largest, as infinity does.
        magnitudes = torch.where(values.abs() < self.top, values.abs(), self.top)
        exponents = ((magnitudes.view(torch.int32) >> 23) - 127).clamp_(min=least)
        # One step there is 2^(exponent - mantissa): dividing by it is exact.
        per_step = ((127 + self.mantissa - exponents) << 23).view(torch.float32)
        codes = (magnitudes * per_step).round_().to(torch.int32)
        codes += (exponents - least) << self.mantissa
        return (codes + (torch.signbit(values).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of uint8 `codes`, float32."""
        return self.values(codes.device)[codes.long()]

    def values(self, device: torch.device) -> Tensor:
        """What each code stands for, float32; nothing that is a number for the reserved ones."""
        padding = [float("nan")] * self.reserved
        table = torch.tensor(self.magnitudes() + padding, dtype=torch.float32, device=device)
        return torch.cat([table, -table])

    def levels(self, device: torch.device) -> Tensor:
        """All values, ascending, float32; zero once."""
        magnitudes = self.magnitudes()
        values = [-magnitude for magnitude in reversed(magnitudes[1:])] + magnitudes
        return torch.tensor(values, dtype=torch.float32, device=device)

    def codes_at(self, indices: Tensor) -> Tensor:
        """The uint8 codes of the values at `indices` of `levels`."""
        steps = indices - (len(self.magnitudes()) - 1)
        return (steps.abs() + ((steps < 0).long() << (self.bits - 1))).to(torch.uint8)


E4M3 = Minifloat(4, 3, reserved=1)
E5M2 = Minifloat(5, 2, reserved=4)
E3M2 = Minifloat(3, 2)
E2M3 = Minifloat(2, 3)
E2M1 = Minifloat(2, 1)


@attrs.frozen
class FloatGroupFormat(AbstractFormat, AbstractLookup):
    """Floating point codes with one bfloat16 scale a group."""

    name: str
    grid: Minifloat

    integer = False
    block = None

    @property
    def bits(self) -> int:
        return self.grid.bits

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        scales = Part((rows, groups_of(columns, group)), "bfloat16", 16)
        return {"codes": Part.codes(rows, columns, self.bits, signed=False), "scales": scales}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # the sign is a bit of its own
        rows, columns = values.shape
        reached = largest(values, group) if limits is None else limits
        scales = quotient(reached, self.grid.top).to(torch.bfloat16)
        codes = codes_of(self.grid.encode, values, scales, group)
        return Coded(self, (rows, columns), group, {"codes": codes, "scales": scales})

    def decode(self, coded: Coded) -> Tensor:
        return scaled(coded.codes, coded.scales.float(), coded.group, self.grid.values(coded.codes.device))

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        raise no_integers(self)

    def points(self, coded: Coded) -> Tensor:
        return scaled_points(self.grid.levels(coded.codes.device), coded.scales.float())

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, self.grid.codes_at(indices))

    def lookup(self, coded: Coded) -> Lookup:
        return Lookup(coded.codes, self.grid.values(coded.codes.device), coded.scales.float())


@attrs.frozen
class MicroscalingFormat(AbstractFormat, AbstractLookup):
    """MX: blocks of 32 floating point or integer codes with one power of two, E8M0, a block.

    `grid` is a Minifloat, or the width in bits of two's complement integers whose implied scale makes their largest
    exponent 0 (MXINT8 has 2^-6, its narrow kin 2^-4 and 2^-2).
    """

    name: str
    grid: Minifloat | int

    block = 32

    @property
    def bits(self) -> int:
        return self.grid if isinstance(self.grid, int) else self.grid.bits

    @property
    def integer(self) -> bool:
        return isinstance(self.grid, int)

    @property
    def _shift(self) -> int:
        """The power of two between a block's exponent and its codes' unit."""
        return self.grid - 2 if isinstance(self.grid, int) else 0

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        codes = Part.codes(rows, columns, self.bits, signed=self.integer)
        return {"codes": codes, "exponents": Part((rows, groups_of(columns, group)), "uint8", 8)}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        rows, columns = values.shape
        reached = largest(values, group) if limits is None else limits
        emax = 0 if isinstance(self.grid, int) else self.grid.largest_exponent
        exponents = torch.frexp(reached).exponent - 1 - emax + _E8M0_BIAS
        exponents = torch.where(reached > 0, exponents.clamp(0, _E8M0_LARGEST), 0).to(torch.uint8)
        codes = codes_of(functools.partial(self._codes, full_range=full_range), values, self._scales(exponents), group)
        return Coded(self, (rows, columns), group, {"codes": codes, "exponents": exponents})

    def _codes(self, units: Tensor, *, full_range: bool) -> Tensor:
        """The codes of values in units of their block's scale."""
        if not isinstance(self.grid, int):
            return self.grid.encode(units)
        limit = 2 ** (self.grid - 1) - 1
        return units.round().clamp(-limit - 1 if full_range else -limit, limit).to(torch.int8)

    def _scales(self, exponents: Tensor) -> Tensor:
        """What one unit of a block's codes is worth, float32; exact powers of two."""
        # In float64, whose exponents reach further: the smallest powers are denormal in float32.
        return torch.exp2(exponents.double() - _E8M0_BIAS - self._shift).float()

    def decode(self, coded: Coded) -> Tensor:
        table = None if isinstance(self.grid, int) else self.grid.values(coded.codes.device)
        return scaled(coded.codes, self._scales(coded.parts["exponents"]), coded.group, table)

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        if not self.integer:
            raise no_integers(self)
        return coded.codes, self._scales(coded.parts["exponents"]), coded.group

    def points(self, coded: Coded) -> Tensor:
        device = coded.codes.device
        if isinstance(self.grid, int):
            limit = 2 ** (self.grid - 1)
            levels = torch.arange(-limit, limit, dtype=torch.float32, device=device)
        else:
            levels = self.grid.levels(device)
        return scaled_points(levels, self._scales(coded.parts["exponents"]))

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        if isinstance(self.grid, int):
            return with_codes(coded, indices - 2 ** (self.grid - 1))
        return with_codes(coded, self.grid.codes_at(indices))

    def lookup(self, coded: Coded) -> Lookup:
        scales = self._scales(coded.parts["exponents"])
        if isinstance(self.grid, int):
            return integer_lookup(coded.codes, scales)
        return Lookup(coded.codes, self.grid.values(coded.codes.device), scales)


@attrs.frozen
class TwoLevelFloatFormat(AbstractFormat, AbstractLookup):
    """NVFP4: blocks of 16 E2M1 codes, an E4M3 scale a block, and one float32 scale for the whole matrix.

    The matrix's scale maps its largest magnitude to the top of both grids, 6 * 448, so that no block's scale overflows.
    """

    name: str

    bits = E2M1.bits
    integer = False
    block = 16

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        return {
            "codes": Part.codes(rows, columns, self.bits, signed=False),
            "scales": Part((rows, groups_of(columns, group)), "uint8", 8),
            "matrix_scale": Part((1,), "float32", 32),
        }

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # the sign is a bit of its own
        rows, columns = values.shape
        reached = largest(values, group) if limits is None else limits
        peak = reached.amax() if reached.numel() else reached.new_zeros(())
        matrix_scale = quotient(peak, E2M1.top * E4M3.top).reshape(1)
        divisor = torch.where(matrix_scale > 0, matrix_scale, torch.inf)
        scales = E4M3.encode(quotient(reached, E2M1.top) / divisor)
        codes = codes_of(E2M1.encode, values, E4M3.decode(scales) * matrix_scale, group)
        parts = {"codes": codes, "scales": scales, "matrix_scale": matrix_scale}
        return Coded(self, (rows, columns), group, parts)

    def decode(self, coded: Coded) -> Tensor:
        return scaled(coded.codes, self._scales(coded), coded.group, E2M1.values(coded.codes.device))

    def _scales(self, coded: Coded) -> Tensor:
        """What one unit of a block's codes is worth, (rows, groups) float32."""
        return E4M3.decode(coded.parts["scales"]) * coded.parts["matrix_scale"]

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        raise no_integers(self)

    def points(self, coded: Coded) -> Tensor:
        return scaled_points(E2M1.levels(coded.codes.device), self._scales(coded))

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, E2M1.codes_at(indices))

    def lookup(self, coded: Coded) -> Lookup:
        return Lookup(coded.codes, E2M1.values(coded.codes.device), self._scales(coded))


FP8_E4M3 = FloatGroupFormat("fp8_e4m3", E4M3)
FP8_E5M2 = FloatGroupFormat("fp8_e5m2", E5M2)
MXFP8 = MicroscalingFormat("mxfp8", E4M3)
MXFP6_E2M3 = MicroscalingFormat("mxfp6_e2m3", E2M3)
MXFP6_E3M2 = MicroscalingFormat("mxfp6_e3m2", E3M2)
MXFP4 = MicroscalingFormat("mxfp4", E2M1)
MXINT8 = MicroscalingFormat("mxint8", 8)
MXINT6 = MicroscalingFormat("mxint6", 6)
MXINT4 = MicroscalingFormat("mxint4", 4)
NVFP4 = TwoLevelFloatFormat("nvfp4")
