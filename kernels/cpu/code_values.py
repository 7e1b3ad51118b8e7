"""How a processor looks codes up in a table, or does without one: 32 codes, one a byte, to 32 float32.

Where a table fits into registers a lookup is a permutation; elsewhere it is a load a code. A table of 256 has room
there in 16 bits a value, and most have values that bfloat16 holds exactly: FP8, FP6, small integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from llvmlite import ir

from .vectors import BYTE, FLOAT, INT, LONG, SHORT, instruction, load, long, same, shuffled, zero

LANES = 16
CODES = 2 * LANES

FLOATS = ir.VectorType(FLOAT, LANES)
_INTEGERS = ir.VectorType(INT, LANES)


class CodeValues(ABC):
    """Writes the lookups of one decoder, given its table's address; what they share is loaded where this is made."""

    bits: int = 8
    """Codes are smaller than 2^bits."""

    def __init__(self, builder: Any, values: Any) -> None:
        self.builder = builder
        self.values = values

    @abstractmethod
    def halves(self, codes: Any) -> tuple[Any, Any]:
        """The values of 32 codes, a vector of bytes, as two vectors of float32."""

    def part(self, codes: Any, first: int, lanes: int) -> Any:
        """`lanes` codes from `first` on, as integers of 32 bits."""
        part = shuffled(self.builder, codes, list(range(first, first + lanes)))
        return self.builder.zext(part, ir.VectorType(INT, lanes))

    def joined(self, one: Any, other: Any) -> Any:
        """One vector of two."""
        lanes = one.type.count + other.type.count
        order = ir.Constant(ir.VectorType(INT, lanes), list(range(lanes)))
        return self.builder.shuffle_vector(one, other, order)


class BySixteen(CodeValues):
    """Sixteen codes after the other."""

    def halves(self, codes: Any) -> tuple[Any, Any]:
        return self.sixteen(codes, 0), self.sixteen(codes, LANES)

    @abstractmethod
    def sixteen(self, codes: Any, first: int) -> Any:
        """The values of the codes from `first` on."""


class Integers(BySixteen):
    """No table: the codes are two's complement integers."""

    def sixteen(self, codes: Any, first: int) -> Any:
        high = same(_INTEGERS, 24)
        bits = self.builder.shl(self.part(codes, first, LANES), high)
        return self.builder.sitofp(self.builder.ashr(bits, high), FLOATS)


class Loads(BySixteen):
    """Any processor: a load a code."""

    def sixteen(self, codes: Any, first: int) -> Any:
        builder, found = self.builder, ir.Constant(FLOATS, ir.Undefined)
        for lane in range(LANES):
            index = builder.zext(builder.extract_element(codes, ir.Constant(INT, first + lane)), LONG)
            value = load(builder, FLOAT, builder.add(self.values, builder.mul(index, long(4))))
            found = builder.insert_element(found, value, ir.Constant(INT, lane))
        return found


class Loads4(Loads):
    """The same for codes of 4 bits."""

    bits = 4


class PermutedFloats(BySixteen):
    """AVX-512, 4 bits: a table of 16 is one register (vpermps)."""

    bits = 4

    def __init__(self, builder: Any, values: Any) -> None:
        super().__init__(builder, values)
        self.table = load(builder, FLOATS, values)

    def sixteen(self, codes: Any, first: int) -> Any:
        return instruction(
            self.builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, self.table, self.part(codes, first, LANES)
        )


class PermutedHalves(CodeValues):
    """AVX-512, 8 bits, values that bfloat16 holds exactly: 8 registers, two of them a permutation (vpermi2w)."""

    def __init__(self, builder: Any, values: Any) -> None:
        super().__init__(builder, values)
        wide, self.shorts = ir.VectorType(INT, CODES), ir.VectorType(SHORT, CODES)
        self.tables = []
        for first in range(0, 256, CODES):
            bits = load(builder, wide, builder.add(values, long(4 * first)))
            self.tables.append(builder.trunc(builder.lshr(bits, same(wide, 16)), self.shorts))

    def halves(self, codes: Any) -> tuple[Any, Any]:
        builder = self.builder
        indices = builder.zext(codes, self.shorts)
        found = [
            instruction(self.builder, "llvm.x86.avx512.vpermi2var.hi.512", self.shorts, one, indices, other)
            for one, other in zip(self.tables[::2], self.tables[1::2], strict=True)
        ]
        for bit in (64, 128):
            chosen = builder.icmp_unsigned("!=", builder.and_(indices, same(self.shorts, bit)), zero(self.shorts))
            found = [builder.select(chosen, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        return self._floats(found[0], 0), self._floats(found[0], LANES)

    def _floats(self, halves: Any, first: int) -> Any:
        bits = self.builder.shl(self.part(halves, first, LANES), same(_INTEGERS, 16))
        return self.builder.bitcast(bits, FLOATS)


class PermutedTwice(CodeValues):
    """AVX2, 4 bits: two permutations of 8, and the fourth bit chooses."""

    bits = 4

    def __init__(self, builder: Any, values: Any) -> None:
        super().__init__(builder, values)
        self.eight = ir.VectorType(FLOAT, 8)
        self.tables = [load(builder, self.eight, builder.add(values, long(at))) for at in (0, 32)]

    def halves(self, codes: Any) -> tuple[Any, Any]:
        parts = [self._eight(codes, first) for first in range(0, CODES, 8)]
        return self.joined(*parts[:2]), self.joined(*parts[2:])

    def _eight(self, codes: Any, first: int) -> Any:
        indices = self.part(codes, first, 8)
        low, high = (
            instruction(self.builder, "llvm.x86.avx2.permps", self.eight, table, indices) for table in self.tables
        )
        return self.builder.select(self.builder.icmp_signed(">", indices, same(indices.type, 7)), high, low)


class TableBytes(CodeValues):
    """Arm, 4 bits: the table is 64 bytes, four registers, and each value's four bytes are looked up (tbl)."""

    bits = 4

    def __init__(self, builder: Any, values: Any) -> None:
        super().__init__(builder, values)
        self.bytes = ir.VectorType(BYTE, LANES)
        self.tables = [load(builder, self.bytes, builder.add(values, long(at))) for at in range(0, 64, LANES)]

    def halves(self, codes: Any) -> tuple[Any, Any]:
        builder = self.builder
        places = builder.shl(codes, same(codes.type, 2))
        parts = []
        for first in range(0, CODES, 4):
            repeated = shuffled(builder, places, [first + each // 4 for each in range(LANES)])
            indices = builder.or_(repeated, ir.Constant(self.bytes, [each % 4 for each in range(LANES)]))
            found = instruction(self.builder, "llvm.aarch64.neon.tbl4.v16i8", self.bytes, *self.tables, indices)
            parts.append(builder.bitcast(found, ir.VectorType(FLOAT, 4)))
        while len(parts) > 2:
            parts = [self.joined(one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0], parts[1]
