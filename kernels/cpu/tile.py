"""The inner loop of the products: one llvmlite intrinsic computes a panel of 32 outputs for any number of tokens.

A panel is made of micro-tiles: several tokens that share each load of the weights, and fewer for those that are left;
single ones hide the latency by several sums a vector instead. For each segment (a run of columns that shares one scale
on either side) a tile multiplies codes in integers, converts the sums, scales them by the weights' scales, and adds
them times the activations' scales by a fused multiply-add, in the order and precision of loraq/ops.py. The weights'
codes are unsigned, q + 2^(bits - 1): the accumulators start at -2^(bits - 1) Σ x_q, which takes that away again.

Axes and layouts (all addresses are integers; `slot` columns hold one segment, padded with zero activations):

    activations     int8    [token][segment][slot]
    scales          float32 [token][segment]
    offsets         int32   [token][segment]                        -2^(bits - 1) Σ x_q
    weights, int4   uint8   [segment][slot / 8][32 outputs][4]      low nibble: column k, high nibble: column k + 4
    weights, int8   uint8   [segment][slot / 4][32 outputs][4]
    weight scales   bfloat16 [segment][32 outputs]
    output          float32 [token][32 of the outputs]

The loop is the same for every processor; a `Machine` says how wide its vectors are and how four neighbouring products
are summed (machines.py, dot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from .dot import COLUMNS
from .machines import Machine
from .memory import called_with
from .vectors import BYTE, FLOAT, INT, LONG, SHORT, instruction, llvm, load, long, same, splat, store, zero

OUTPUTS = 32
"""Outputs (weight rows) of one panel of weights."""
STEP = COLUMNS
"""Columns that one turn of the inner loop takes: slots are padded to a multiple of it."""

_Place = tuple[int, int, int]
"""A sum of a tile: token, vector, chain."""

ARGUMENTS = (
    "activations",
    "scales",
    "offsets",
    "segments",
    "slot",
    "weights",
    "weight_scales",
    "bias",
    "output",
    "output_stride",
    "accumulate",
    "tokens",
    "ahead",
)
"""What a panel takes, int64 one after the other in memory. `output_stride` is in bytes, the bias float32; `accumulate`
not 0 begins the sums with what the output holds. `ahead` bytes behind each weight lies what will be wanted next: it is
fetched into the cache while this panel is multiplied."""


def panel(machine: Machine, bits: int) -> Any:
    """The intrinsic of a panel with weights of `bits` (4 or 8): Numba code calls it with the address of ARGUMENTS."""

    def write(builder: Any, values: dict[str, Any]) -> None:
        write_panel(builder, machine, bits, values)

    return called_with(f"panel_{machine.name}_int{bits}", ARGUMENTS, write)


def write_panel(builder: Any, machine: Machine, bits: int, values: dict[str, Any]) -> None:
    """Write a panel's code, given the values of ARGUMENTS by name."""
    if machine.function_features:  # llvmlite's own check knows only attributes without a value
        set.add(builder.function.attributes, f'"target-features"="{machine.function_features}"')

    def tile(size: int, token: Any) -> None:
        _Tile(builder, machine, bits, size, _from_token(builder, values, token)).build()

    micro_tiles(builder, machine.tokens, values["tokens"], tile)


def micro_tiles(builder: Any, sizes: tuple[int, ...], tokens: Any, tile: Callable[[int, Any], None]) -> None:
    """Loops over `tokens` by `sizes`, descending to 1 and each a multiple of the next: as many as will fill it go
    through the first, the rest through the others. `tile(size, token)` writes the code for `size` of them.
    """
    start = long(0)
    for size in sizes:
        stop = builder.mul(builder.udiv(tokens, long(size)), long(size))
        with llvm.for_range_slice(builder, start, stop, long(size), LONG) as (token, _):
            tile(size, token)
        start = stop


def _from_token(builder: Any, values: dict[str, Any], token: Any) -> dict[str, Any]:
    """The values of a tile that begins at `token`."""
    segments = builder.mul(token, values["segments"])
    steps = {
        "activations": builder.mul(segments, values["slot"]),
        "scales": builder.mul(segments, long(4)),
        "offsets": builder.mul(segments, long(4)),
        "output": builder.mul(token, values["output_stride"]),
    }
    return values | {name: builder.add(values[name], step) for name, step in steps.items()}


class _Tile:
    """Writes the LLVM code of one tile; made for one call site and then dropped."""

    def __init__(self, builder: Any, machine: Machine, bits: int, tokens: int, values: dict[str, Any]) -> None:
        self.builder = builder
        self.dot = machine.dot(builder, machine.lanes, bits)
        self.lanes = machine.lanes
        self.bits = bits
        self.tokens = tokens
        self.values = values
        self.vectors = OUTPUTS // machine.lanes
        self.integers = ir.VectorType(INT, machine.lanes)
        self.floats = ir.VectorType(FLOAT, machine.lanes)
        # Enough independent sums to hide the instruction's latency: one token alone gets several a vector.
        self.chains = self.dot.chains if tokens == 1 else 1

    def build(self) -> None:
        """The loop over segments, and the store."""
        builder, values = self.builder, self.values
        before = builder.block
        loop, after = builder.append_basic_block("segment"), builder.append_basic_block("stored")
        stride = builder.mul(values["segments"], values["slot"])
        rows = [builder.add(values["activations"], builder.mul(stride, long(token))) for token in range(self.tokens)]
        panel_step = builder.mul(values["slot"], long(OUTPUTS * self.bits // 8))
        begun = self._begun()
        builder.branch(loop)

        builder.position_at_end(loop)
        segment, column, weights = (builder.phi(LONG) for _ in range(3))
        totals = [[builder.phi(self.floats) for _ in range(self.vectors)] for _ in range(self.tokens)]
        for phi, start in ((segment, long(0)), (column, long(0)), (weights, values["weights"])):
            phi.add_incoming(start, before)
        for phi, start in zip(_flat(totals), _flat(begun), strict=True):
            phi.add_incoming(start, before)
        sums = self._products(segment, [builder.add(row, column) for row in rows], weights)
        added = self._scaled(segment, sums, totals)
        end = builder.block
        for phi, step in ((segment, long(1)), (column, values["slot"]), (weights, panel_step)):
            phi.add_incoming(builder.add(phi, step), end)
        for phi, value in zip(_flat(totals), _flat(added), strict=True):
            phi.add_incoming(value, end)
        more = builder.icmp_signed("<", builder.add(segment, long(1)), values["segments"])
        builder.cbranch(more, loop, after)

        builder.position_at_end(after)
        self._store(added)

    def _products(self, segment: Any, rows: list[Any], weights: Any) -> list[list[Any]]:
        """The exact integer sums of one segment: [token][vector]."""
        builder = self.builder
        before = builder.block
        loop, after = builder.append_basic_block("columns"), builder.append_basic_block("summed")
        starts = {}
        for token in range(self.tokens):
            offset = splat(builder, load(builder, INT, self._of_token("offsets", token, segment)), self.integers)
            for vector in range(self.vectors):
                starts[token, vector, 0] = self.dot.start(offset)
                starts |= {(token, vector, chain): zero(self.integers) for chain in range(1, self.chains)}
        builder.branch(loop)

        builder.position_at_end(loop)
        column = builder.phi(LONG)
        column.add_incoming(long(0), before)
        phis = {place: builder.phi(self.integers) for place in starts}
        panel = builder.add(weights, builder.mul(column, long(OUTPUTS * self.bits // 8)))
        turns = [builder.add(row, column) for row in rows]
        if self.tokens > 1:  # a single token goes through the weights but once, in order, which processors foresee
            self._fetch(builder.add(panel, self.values["ahead"]), STEP * OUTPUTS * self.bits // 8)
        sums = dict(phis)
        for vectors, firsts in self.dot.order(self.vectors):
            sums |= self._block(vectors, firsts, turns, panel, sums)
        end = builder.block
        following = builder.add(column, long(STEP))
        column.add_incoming(following, end)
        for place, phi in phis.items():
            phi.add_incoming(starts[place], before)
            phi.add_incoming(sums[place], end)
        builder.cbranch(builder.icmp_signed("<", following, self.values["slot"]), loop, after)

        builder.position_at_end(after)
        return [[self._sum(sums, token, vector) for vector in range(self.vectors)] for token in range(self.tokens)]

    def _block(
        self, vectors: range, firsts: range, turns: list[Any], panel: Any, sums: dict[_Place, Any]
    ) -> dict[_Place, Any]:
        """The sums of `vectors` with the products of each eight columns from `firsts` on."""
        blocks = {place: self.dot.open(value) for place, value in sums.items() if place[1] in vectors}
        for first in firsts:
            inputs = [[self.dot.activations(turn, first + 4 * half) for turn in turns] for half in range(2)]
            for vector in vectors:
                for half, codes in enumerate(self._codes(panel, first, vector)):
                    weights = self.dot.weights(codes)
                    for token in range(self.tokens):
                        place = token, vector, (first // 4 + half) % self.chains
                        blocks[place] = self.dot.add(blocks[place], weights, inputs[half][token])
        return {place: self.dot.close(sums[place], block) for place, block in blocks.items()}

    def _codes(self, panel: Any, first: int, vector: int) -> list[Any]:
        """The unsigned codes of columns `first` to `first + 3` and of the four behind them, four a lane."""
        builder, width = self.builder, self.lanes * 4
        if self.bits == 8:
            places = [(first // 4 + half) * OUTPUTS * 4 + vector * width for half in range(2)]
            return [load(builder, self.integers, builder.add(panel, long(place)), width) for place in places]
        place = first // 8 * OUTPUTS * 4 + vector * width
        both = load(builder, self.integers, builder.add(panel, long(place)), width)
        packed = builder.bitcast(both, self.dot.bytes)
        halves = builder.and_(packed, same(self.dot.bytes, 15)), builder.lshr(packed, same(self.dot.bytes, 4))
        return [builder.bitcast(half, self.integers) for half in halves]

    def _scaled(self, segment: Any, sums: list[list[Any]], totals: list[list[Any]]) -> list[list[Any]]:
        """`total + (float(sum) * weight scale) * activation scale`, the outer product and the sum rounded once."""
        builder, lanes = self.builder, self.lanes
        place = builder.add(self.values["weight_scales"], builder.mul(segment, long(OUTPUTS * 2)))
        sixteen = same(self.integers, 16)
        weight_scales = []
        for vector in range(self.vectors):
            raw = load(builder, ir.VectorType(SHORT, lanes), builder.add(place, long(vector * lanes * 2)), 2)
            bits = builder.shl(builder.zext(raw, self.integers), sixteen)
            weight_scales.append(builder.bitcast(bits, self.floats))
        added = []
        for token in range(self.tokens):
            scale = splat(builder, load(builder, FLOAT, self._of_token("scales", token, segment)), self.floats)
            row = []
            for vector in range(self.vectors):
                scaled = builder.fmul(builder.sitofp(sums[token][vector], self.floats), weight_scales[vector])
                row.append(_fused(builder, scaled, scale, totals[token][vector]))
            added.append(row)
        return added

    def _store(self, totals: list[list[Any]]) -> None:
        """Write the tile, the bias added."""
        builder, values, width = self.builder, self.values, self.lanes * 4
        for token in range(self.tokens):
            row = builder.add(values["output"], builder.mul(values["output_stride"], long(token)))
            for vector in range(self.vectors):
                place = builder.add(row, long(vector * width))
                bias = load(builder, self.floats, builder.add(values["bias"], long(vector * width)))
                store(builder, builder.fadd(totals[token][vector], bias), place)

    def _begun(self) -> list[list[Any]]:
        """What the sums begin with: what the output holds where `accumulate` says so, else 0, [token][vector].

        The tile's cache lines are asked for to write to: they arrive while the products are made.
        """
        builder, values = self.builder, self.values
        accumulate = builder.icmp_signed("!=", values["accumulate"], long(0))
        begun = []
        for token in range(self.tokens):
            row = builder.add(values["output"], builder.mul(values["output_stride"], long(token)))
            self._fetch(row, OUTPUTS * 4, write=True)
            places = [builder.add(row, long(vector * self.lanes * 4)) for vector in range(self.vectors)]
            # What is not yet written may be anything, even not a number: chosen, not multiplied away.
            held = [load(builder, self.floats, place) for place in places]
            begun.append([builder.select(accumulate, each, zero(self.floats)) for each in held])
        return begun

    def _fetch(self, address: Any, size: int, write: bool = False) -> None:
        """Ask for the cache lines of `size` bytes at `address`, which may lie anywhere."""
        builder, flags = self.builder, [ir.Constant(INT, flag) for flag in (int(write), 3, 1)]  # to keep, data
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [BYTE.as_pointer()], kind)
        for line in range(0, size, 64):
            builder.call(fetch, [builder.inttoptr(builder.add(address, long(line)), BYTE.as_pointer()), *flags])

    def _of_token(self, name: str, token: int, segment: Any) -> Any:
        """The address of a token's four-byte value for `segment`."""
        builder = self.builder
        index = builder.add(builder.mul(self.values["segments"], long(token)), segment)
        return builder.add(self.values[name], builder.mul(index, long(4)))

    def _sum(self, sums: dict[_Place, Any], token: int, vector: int) -> Any:
        total = sums[token, vector, 0]
        for chain in range(1, self.chains):
            total = self.builder.add(total, sums[token, vector, chain])
        return total


def _fused(builder: Any, one: Any, other: Any, total: Any) -> Any:
    """The multiply-add that is rounded once, an instruction of every processor with AVX2 and of every 64-bit Arm."""
    return instruction(builder, f"llvm.fma.v{total.type.count}f32", total.type, one, other, total)


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [each for row in rows for each in row]
