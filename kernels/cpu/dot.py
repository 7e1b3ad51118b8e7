"""How a processor sums products of bytes: the part of an integer product in which machines differ.

A turn of the inner loop takes 16 columns. Weights come as vectors of four unsigned codes a lane (four columns of one
output), activations as four signed codes that are the same in every lane; a product adds, lane by lane, the four
products of the two to a sum of 32 bits. All sums are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from llvmlite import ir

from .vectors import BYTE, INT, SHORT, instruction, lane, load, same, shuffled, splat, zero

COLUMNS = 16
"""Columns of one turn."""


class Dot(ABC):
    """Writes the products of one tile with `bits`-wide weights, in vectors of `lanes` lanes."""

    chains: ClassVar[int] = 1
    """Sums that one token alone keeps for each vector, to hide the latency of its additions."""
    vector_by_vector: ClassVar[bool] = False
    """Whether a turn goes through all its columns with one vector of outputs before the next one's. Otherwise all
    vectors take eight columns before the next eight, so that few activations are held."""

    def __init__(self, builder: Any, lanes: int, bits: int) -> None:
        self.builder = builder
        self.bits = bits
        self.integers = ir.VectorType(INT, lanes)
        self.shorts = ir.VectorType(SHORT, 2 * lanes)
        self.bytes = ir.VectorType(BYTE, 4 * lanes)

    def order(self, vectors: int) -> Iterator[tuple[range, range]]:
        """The blocks of a turn: which vectors, and the first of each eight columns."""
        if self.vector_by_vector:
            for vector in range(vectors):
                yield range(vector, vector + 1), range(0, COLUMNS, 8)
        else:
            for first in range(0, COLUMNS, 8):
                yield range(vectors), range(first, first + 1)

    def start(self, offset: Any) -> Any:
        """What a segment's sum begins with, given -2^(bits - 1) Σ x in every lane."""
        return offset

    def open(self, sums: Any) -> Any:
        """What a block adds its products to: the sum itself."""
        return sums

    def close(self, sums: Any, block: Any) -> Any:
        """The sum after a block that was begun by `open`."""
        del sums
        return block

    @abstractmethod
    def weights(self, codes: Any) -> Any:
        """Four unsigned codes a lane, in the form that `add` wants."""

    @abstractmethod
    def activations(self, turn: Any, column: int) -> Any:
        """The four codes of `column` and the next three, a multiple of 4, of the turn whose codes lie at `turn`."""

    @abstractmethod
    def add(self, block: Any, weights: Any, activations: Any) -> Any:
        """`block` and four more products a lane."""

    def four(self, turn: Any, column: int) -> Any:
        """Four neighbouring activation codes in every lane."""
        place = self.builder.add(turn, ir.Constant(turn.type, column))
        return splat(self.builder, load(self.builder, INT, place), self.integers)


class Vpdpbusd(Dot):
    """x86 with VNNI: one instruction for unsigned weights and signed activations."""

    chains = 4

    def weights(self, codes: Any) -> Any:
        return codes

    def activations(self, turn: Any, column: int) -> Any:
        return self.four(turn, column)

    def add(self, block: Any, weights: Any, activations: Any) -> Any:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.integers.count}"
        return instruction(self.builder, name, self.integers, block, weights, activations)


class MultiplyAddBytes(Dot):
    """x86 with AVX2, 4-bit weights: vpmaddubsw sums two products in 16 bits, and so many fit that a turn needs one
    widening: |Σ of 8 products| is at most 8 * 15 * 128 = 15,360 a short. (8-bit weights would not: 2 * 255 * 128.)
    """

    vector_by_vector = True

    def open(self, sums: Any) -> Any:
        del sums
        return None

    def close(self, sums: Any, block: Any) -> Any:
        pairs = instruction(self.builder, "llvm.x86.avx2.pmadd.wd", self.integers, block, same(self.shorts, 1))
        return self.builder.add(sums, pairs)

    def weights(self, codes: Any) -> Any:
        return self.builder.bitcast(codes, self.bytes)

    def activations(self, turn: Any, column: int) -> Any:
        return self.builder.bitcast(self.four(turn, column), self.bytes)

    def add(self, block: Any, weights: Any, activations: Any) -> Any:
        pairs = instruction(self.builder, "llvm.x86.avx2.pmadd.ub.sw", self.shorts, weights, activations)
        return pairs if block is None else self.builder.add(block, pairs)


class SignedDot(Dot):
    """Arm with dotprod: sdot multiplies signed bytes, by one lane of a register that holds the activations of a turn.

    4-bit codes are the same signed or not. 8-bit ones are less their 128 in place, so that the sum needs no offset.
    """

    chains = 2

    def start(self, offset: Any) -> Any:
        return offset if self.bits == 4 else zero(self.integers)

    def weights(self, codes: Any) -> Any:
        codes = self.builder.bitcast(codes, self.bytes)
        return codes if self.bits == 4 else self.builder.xor(codes, same(self.bytes, -128))

    def activations(self, turn: Any, column: int) -> Any:
        held = load(self.builder, ir.VectorType(INT, COLUMNS // 4), turn)
        return self.builder.bitcast(lane(self.builder, held, column // 4, self.integers.count), self.bytes)

    def add(self, block: Any, weights: Any, activations: Any) -> Any:
        return instruction(
            self.builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", self.integers, block, weights, activations
        )


class MultiplyAddPairs(Dot):
    """Any processor: pairs of products of 16 bits in plain vector operations, which x86 (pmaddwd) and Arm (smull)
    both know.
    """

    chains = 4

    def weights(self, codes: Any) -> Any:
        mask, eight = same(self.integers, 0x00FF00FF), same(self.integers, 8)
        even, odd = self.builder.and_(codes, mask), self.builder.and_(self.builder.lshr(codes, eight), mask)
        return self.builder.bitcast(even, self.shorts), self.builder.bitcast(odd, self.shorts)

    def activations(self, turn: Any, column: int) -> Any:
        four, eight = self.builder.bitcast(self.four(turn, column), self.shorts), same(self.shorts, 8)
        return self.builder.ashr(self.builder.shl(four, eight), eight), self.builder.ashr(four, eight)

    def add(self, block: Any, weights: Any, activations: Any) -> Any:
        for codes, inputs in zip(weights, activations, strict=True):
            block = self.builder.add(block, self._pairs(codes, inputs))
        return block

    def _pairs(self, first: Any, second: Any) -> Any:
        """The sums of neighbouring products of two vectors of shorts."""
        builder, lanes = self.builder, self.integers.count
        wide = ir.VectorType(INT, 2 * lanes)
        products = builder.mul(builder.sext(first, wide), builder.sext(second, wide))
        even, odd = (shuffled(builder, products, list(range(side, 2 * lanes, 2))) for side in (0, 1))
        return builder.add(even, odd)
