"""The inner loop of the products: one llvmlite intrinsic computes a panel of 32 outputs for any number of tokens.

A panel is made of micro-tiles: several tokens that share each load of the weights, and fewer for those that are left;
single ones hide the latency by several sums a vector instead. For each segment (a run of columns that shares one scale
on either side) a tile multiplies codes in integers, converts the sums, and scales and adds them in the order and
precision of loraq/ops.py; no multiply-add is fused. The weights' codes are unsigned, q + 2^(bits - 1):
the accumulators start at -2^(bits - 1) Σ x_q, which takes that away again.

Axes and layouts (all addresses are integers; `slot` columns hold one segment, padded with zero activations):

    activations     int8    [token][segment][slot]
    scales          float32 [token][segment]
    offsets         int32   [token][segment]                        -2^(bits - 1) Σ x_q
    weights, int4   uint8   [segment][slot / 8][32 outputs][4]      low nibble: column k, high nibble: column k + 4
    weights, int8   uint8   [segment][slot / 4][32 outputs][4]
    weight scales   bfloat16 [segment][32 outputs]
    output          float32 [token][32 of the outputs]

The loop is the same for every processor; a `Machine` says how wide its vectors are and how four neighbouring products
are summed. `VNNI512` and `VNNI256` have an instruction for it (vpdpbusd); `PORTABLE` is written in plain vector
operations that LLVM lowers for any processor: pairs of 16-bit products, which x86 (pmaddwd) and Arm (smull) both know.
Machines differ in speed alone: integer sums are exact and the floating point operations are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from llvmlite import ir

from .memory import called_with, llvm

OUTPUTS = 32
"""Outputs (weight rows) of one panel of weights."""
STEP = 16
"""Columns that one turn of the inner loop takes: slots are padded to a multiple of it."""

_BYTE, _SHORT, _INT, _LONG, _FLOAT = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())


@attrs.frozen
class Machine:
    """How a processor's vectors are used: `lanes` 32-bit lanes, `instruction` the LLVM name of vpdpbusd or None."""

    name: str
    lanes: int
    instruction: str | None


VNNI512 = Machine("avx512-vnni", 16, "llvm.x86.avx512.vpdpbusd.512")
VNNI256 = Machine("avx-vnni", 8, "llvm.x86.avx512.vpdpbusd.256")
PORTABLE = Machine("portable", 8, None)

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
)
"""What a panel takes, int64 one after the other in memory. `output_stride` is in bytes, the bias float32; `accumulate`
not 0 adds to what the output holds."""


def panel(machine: Machine, bits: int, *sizes: int) -> Any:
    """The intrinsic of a panel with weights of `bits` (4 or 8): Numba code calls it with the address of ARGUMENTS.

    `sizes` are the tokens of a micro-tile, descending to 1, each a multiple of the next: as many go through the first
    as will fill it, the rest through the others.
    """

    def write(builder: Any, values: dict[str, Any]) -> None:
        def tile(size: int, token: Any) -> None:
            _Tile(builder, machine, bits, size, _from_token(builder, values, token)).build()

        micro_tiles(builder, sizes, values["tokens"], tile)

    return called_with(f"panel_{machine.name}_int{bits}", ARGUMENTS, write)


def micro_tiles(builder: Any, sizes: tuple[int, ...], tokens: Any, tile: Callable[[int, Any], None]) -> None:
    """Loops over `tokens` by `sizes`, see `panel`; `tile(size, token)` writes the code for `size` of them."""
    start = _long(0)
    for size in sizes:
        stop = builder.mul(builder.udiv(tokens, _long(size)), _long(size))
        with llvm.for_range_slice(builder, start, stop, _long(size), _LONG) as (token, _):
            tile(size, token)
        start = stop


def _from_token(builder: Any, values: dict[str, Any], token: Any) -> dict[str, Any]:
    """The values of a tile that begins at `token`."""
    segments = builder.mul(token, values["segments"])
    steps = {
        "activations": builder.mul(segments, values["slot"]),
        "scales": builder.mul(segments, _long(4)),
        "offsets": builder.mul(segments, _long(4)),
        "output": builder.mul(token, values["output_stride"]),
    }
    return values | {name: builder.add(values[name], step) for name, step in steps.items()}


class _Tile:
    """Writes the LLVM code of one tile; made for one call site and then dropped."""

    def __init__(self, builder: Any, machine: Machine, bits: int, tokens: int, values: dict[str, Any]) -> None:
        self.builder = builder
        self.machine = machine
        self.bits = bits
        self.tokens = tokens
        self.values = values
        self.vectors = OUTPUTS // machine.lanes
        self.integers = ir.VectorType(_INT, machine.lanes)
        self.floats = ir.VectorType(_FLOAT, machine.lanes)
        # Enough independent sums to hide the instruction's latency: one token alone gets several a vector.
        self.chains = 4 if tokens == 1 else 1

    def build(self) -> None:
        """The loop over segments, and the store."""
        builder, values = self.builder, self.values
        before = builder.block
        loop, after = builder.append_basic_block("segment"), builder.append_basic_block("stored")
        stride = builder.mul(values["segments"], values["slot"])
        rows = [builder.add(values["activations"], builder.mul(stride, _long(token))) for token in range(self.tokens)]
        panel_step = builder.mul(values["slot"], _long(OUTPUTS * self.bits // 8))
        self._fetch_output()
        builder.branch(loop)

        builder.position_at_end(loop)
        segment, column, weights = (builder.phi(_LONG) for _ in range(3))
        totals = [[builder.phi(self.floats) for _ in range(self.vectors)] for _ in range(self.tokens)]
        for phi, start in ((segment, _long(0)), (column, _long(0)), (weights, values["weights"])):
            phi.add_incoming(start, before)
        for phi in _flat(totals):
            phi.add_incoming(ir.Constant(self.floats, None), before)
        sums = self._products(segment, [builder.add(row, column) for row in rows], weights)
        added = self._scaled(segment, sums, totals)
        end = builder.block
        for phi, step in ((segment, _long(1)), (column, values["slot"]), (weights, panel_step)):
            phi.add_incoming(builder.add(phi, step), end)
        for phi, value in zip(_flat(totals), _flat(added), strict=True):
            phi.add_incoming(value, end)
        more = builder.icmp_signed("<", builder.add(segment, _long(1)), values["segments"])
        builder.cbranch(more, loop, after)

        builder.position_at_end(after)
        self._store(added)

    def _products(self, segment: Any, rows: list[Any], weights: Any) -> list[list[Any]]:
        """The exact integer sums of one segment: [token][vector]."""
        builder = self.builder
        zero = ir.Constant(self.integers, None)
        before = builder.block
        loop, after = builder.append_basic_block("columns"), builder.append_basic_block("summed")
        starts = []
        for token in range(self.tokens):
            offset = self._splat(self._load(_INT, self._of_token("offsets", token, segment)), self.integers)
            starts.append([[offset] + [zero] * (self.chains - 1) for _ in range(self.vectors)])
        builder.branch(loop)

        builder.position_at_end(loop)
        column = builder.phi(_LONG)
        column.add_incoming(_long(0), before)
        phis = [[[builder.phi(self.integers) for _ in chains] for chains in token] for token in starts]
        sums = [[list(chains) for chains in token] for token in phis]
        panel = builder.add(weights, builder.mul(column, _long(OUTPUTS * self.bits // 8)))
        for quad in range(0, STEP, 8):
            self._eight_columns(quad, [builder.add(row, column) for row in rows], panel, sums)
        end = builder.block
        following = builder.add(column, _long(STEP))
        column.add_incoming(following, end)
        for phi, start, value in zip(_flat(_flat(phis)), _flat(_flat(starts)), _flat(_flat(sums)), strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, end)
        builder.cbranch(builder.icmp_signed("<", following, self.values["slot"]), loop, after)

        builder.position_at_end(after)
        return [[self._sum(chains) for chains in token] for token in sums]

    def _eight_columns(self, first: int, rows: list[Any], panel: Any, sums: list[list[list[Any]]]) -> None:
        """Add the products of columns `first` to `first + 7` of a turn to `sums` [token][vector][chain]."""
        builder = self.builder
        inputs = [[self._input(row, first + 4 * half) for row in rows] for half in range(2)]
        width = self.machine.lanes * 4
        for vector in range(self.vectors):
            if self.bits == 4:
                place = first // 8 * OUTPUTS * 4 + vector * width
                both = self._load(self.integers, builder.add(panel, _long(place)), align=width)
                low = self._splat(ir.Constant(_INT, 0x0F0F0F0F), self.integers)
                shift = self._splat(ir.Constant(_INT, 4), self.integers)
                halves = [builder.and_(both, low), builder.and_(builder.lshr(both, shift), low)]
            else:
                places = [(first // 4 + half) * OUTPUTS * 4 + vector * width for half in range(2)]
                halves = [self._load(self.integers, builder.add(panel, _long(each)), align=width) for each in places]
            for half in range(2):
                chain = (first // 4 + half) % self.chains
                weights = self._weights(halves[half])
                for token in range(self.tokens):
                    old = sums[token][vector][chain]
                    sums[token][vector][chain] = self._dot(old, weights, inputs[half][token])

    def _weights(self, codes: Any) -> Any:
        """Four unsigned codes a lane, in the form that `_dot` wants."""
        if self.machine.instruction is not None:
            return codes
        mask = self._splat(ir.Constant(_INT, 0x00FF00FF), self.integers)
        eight = self._splat(ir.Constant(_INT, 8), self.integers)
        shorts = ir.VectorType(_SHORT, 2 * self.machine.lanes)
        even, odd = self.builder.and_(codes, mask), self.builder.and_(self.builder.lshr(codes, eight), mask)
        return self.builder.bitcast(even, shorts), self.builder.bitcast(odd, shorts)

    def _input(self, row: Any, column: int) -> Any:
        """Four neighbouring activation codes in every lane, in the form that `_dot` wants."""
        builder = self.builder
        four = self._splat(self._load(_INT, builder.add(row, _long(column))), self.integers)
        if self.machine.instruction is not None:
            return four
        shorts = ir.VectorType(_SHORT, 2 * self.machine.lanes)
        four = builder.bitcast(four, shorts)
        eight = ir.Constant(shorts, [8] * shorts.count)
        return builder.ashr(builder.shl(four, eight), eight), builder.ashr(four, eight)

    def _dot(self, sums: Any, weights: Any, inputs: Any) -> Any:
        """`sums` plus, lane by lane, four unsigned weights times four signed activations."""
        builder = self.builder
        if self.machine.instruction is not None:
            kind = ir.FunctionType(self.integers, [self.integers] * 3)
            function = llvm.get_or_insert_function(builder.module, kind, self.machine.instruction)
            return builder.call(function, [sums, weights, inputs])
        for codes, activations in zip(weights, inputs, strict=True):
            sums = builder.add(sums, self._pairs(codes, activations))
        return sums

    def _pairs(self, first: Any, second: Any) -> Any:
        """The sums of neighbouring products of two vectors of 16-bit integers: pmaddwd, where there is one."""
        builder, lanes = self.builder, self.machine.lanes
        wide = ir.VectorType(_INT, 2 * lanes)
        products = builder.mul(builder.sext(first, wide), builder.sext(second, wide))
        nothing = ir.Constant(wide, ir.Undefined)
        even, odd = (
            builder.shuffle_vector(
                products, nothing, ir.Constant(self.integers, [2 * lane + side for lane in range(lanes)])
            )
            for side in (0, 1)
        )
        return builder.add(even, odd)

    def _scaled(self, segment: Any, sums: list[list[Any]], totals: list[list[Any]]) -> list[list[Any]]:
        """`total + float(sum) * activation scale * weight scale`, each operation rounded on its own."""
        builder, lanes = self.builder, self.machine.lanes
        place = builder.add(self.values["weight_scales"], builder.mul(segment, _long(OUTPUTS * 2)))
        sixteen = self._splat(ir.Constant(_INT, 16), self.integers)
        weight_scales = []
        for vector in range(self.vectors):
            raw = self._load(ir.VectorType(_SHORT, lanes), builder.add(place, _long(vector * lanes * 2)), align=2)
            bits = builder.shl(builder.zext(raw, self.integers), sixteen)
            weight_scales.append(builder.bitcast(bits, self.floats))
        added = []
        for token in range(self.tokens):
            scale = self._splat(self._load(_FLOAT, self._of_token("scales", token, segment)), self.floats)
            row = []
            for vector in range(self.vectors):
                scaled = builder.fmul(builder.sitofp(sums[token][vector], self.floats), scale)
                row.append(builder.fadd(totals[token][vector], builder.fmul(scaled, weight_scales[vector])))
            added.append(row)
        return added

    def _store(self, totals: list[list[Any]]) -> None:
        """Write the tile: what was there is added first where `accumulate` says so, the bias last."""
        builder, values, width = self.builder, self.values, self.machine.lanes * 4
        accumulate = builder.icmp_signed("!=", values["accumulate"], _long(0))
        zero = ir.Constant(self.floats, None)
        for token in range(self.tokens):
            row = builder.add(values["output"], builder.mul(values["output_stride"], _long(token)))
            for vector in range(self.vectors):
                place = builder.add(row, _long(vector * width))
                # What is not yet written may be anything, even not a number: chosen, not multiplied away.
                before = builder.select(accumulate, self._load(self.floats, place, align=4), zero)
                bias = self._load(self.floats, builder.add(values["bias"], _long(vector * width)), align=4)
                total = builder.fadd(builder.fadd(before, totals[token][vector]), bias)
                pointer = builder.inttoptr(place, self.floats.as_pointer())
                builder.store(total, pointer, align=4)

    def _fetch_output(self) -> None:
        """Ask for the tile's cache lines to write to: they arrive while the products are made."""
        builder, flags = self.builder, [ir.Constant(_INT, flag) for flag in (1, 3, 1)]  # to write, to keep, data
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE.as_pointer()], kind)
        for token in range(self.tokens):
            row = builder.add(self.values["output"], builder.mul(self.values["output_stride"], _long(token)))
            for line in range(0, OUTPUTS * 4, 64):
                builder.call(fetch, [builder.inttoptr(builder.add(row, _long(line)), _BYTE.as_pointer()), *flags])

    def _of_token(self, name: str, token: int, segment: Any) -> Any:
        """The address of a token's four-byte value for `segment`."""
        builder = self.builder
        index = builder.add(builder.mul(self.values["segments"], _long(token)), segment)
        return builder.add(self.values[name], builder.mul(index, _long(4)))

    def _sum(self, parts: list[Any]) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = self.builder.add(total, part)
        return total

    def _load(self, kind: Any, address: Any, align: int | None = None) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def _splat(self, value: Any, kind: Any) -> Any:
        if isinstance(value, ir.Constant):
            return ir.Constant(kind, [value.constant] * kind.count)
        single = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
        lanes = ir.Constant(ir.VectorType(_INT, kind.count), None)
        return self.builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), lanes)


def _long(value: int) -> ir.Constant:
    return ir.Constant(_LONG, value)


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [each for row in rows for each in row]
