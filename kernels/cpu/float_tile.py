"""The inner loop of the products that are not in integers: a panel of 32 outputs, float32 on both sides.

For what has no integers: a 16-bit branch, weights of a table format, activations that are not rounded. Micro-tiles of
tokens share each load of the weights, as in tile.py; sums run along the columns one after the other, fused where the
processor can (llvm.fmuladd), so they agree with a matrix product of torch's up to the order of its sums.

Axes and layouts (all addresses are integers):

    activations     float32 [token][column], tokens `stride` bytes apart
    weights         float32 [column][32 outputs]
    output          float32 [token][32 of the outputs]
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .machines import Machine
from .memory import called_with
from .tile import OUTPUTS, micro_tiles
from .vectors import FLOAT, LONG, instruction, load, long, splat, store, zero

ARGUMENTS = (
    "activations",
    "stride",
    "columns",
    "weights",
    "bias",
    "output",
    "output_stride",
    "accumulate",
    "tokens",
)
"""What a panel takes, int64 one after the other in memory. Strides are in bytes, the bias float32; `accumulate` not 0
adds to what the output holds."""


def float_panel(machine: Machine, *sizes: int) -> Any:
    """The intrinsic of a panel: Numba code calls it with the address of ARGUMENTS; `sizes` as in micro_tiles."""

    def write(builder: Any, values: dict[str, Any]) -> None:
        def tile(size: int, token: Any) -> None:
            _tile(builder, machine.lanes, size, values, token)

        micro_tiles(builder, sizes, values["tokens"], tile)

    return called_with(f"float_panel_{machine.name}", ARGUMENTS, write)


def _tile(builder: Any, lanes: int, tokens: int, values: dict[str, Any], first: Any) -> None:
    """The code of `tokens` tokens beginning with `first`: the loop over columns, and the store."""
    floats, vectors = ir.VectorType(FLOAT, lanes), OUTPUTS // lanes
    rows = [
        builder.add(values["activations"], builder.mul(values["stride"], builder.add(first, long(token))))
        for token in range(tokens)
    ]
    before = builder.block
    loop, after = builder.append_basic_block("columns"), builder.append_basic_block("summed")
    builder.branch(loop)

    builder.position_at_end(loop)
    column = builder.phi(LONG)
    column.add_incoming(long(0), before)
    totals = [[builder.phi(floats) for _ in range(vectors)] for _ in range(tokens)]
    for total in (each for row in totals for each in row):
        total.add_incoming(zero(floats), before)
    panel = builder.add(values["weights"], builder.mul(column, long(OUTPUTS * 4)))
    weights = [load(builder, floats, builder.add(panel, long(vector * lanes * 4))) for vector in range(vectors)]
    offset = builder.mul(column, long(4))
    sums = []
    for row, old in zip(rows, totals, strict=True):
        value = splat(builder, load(builder, FLOAT, builder.add(row, offset)), floats)
        sums.append([_multiply_add(builder, value, weight, total) for weight, total in zip(weights, old, strict=True)])
    following = builder.add(column, long(1))
    column.add_incoming(following, loop)
    for total, new in zip((e for row in totals for e in row), (e for row in sums for e in row), strict=True):
        total.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, values["columns"]), loop, after)

    builder.position_at_end(after)
    accumulate = builder.icmp_signed("!=", values["accumulate"], long(0))
    for token, row in enumerate(sums):
        output = builder.add(values["output"], builder.mul(values["output_stride"], builder.add(first, long(token))))
        for vector, total in enumerate(row):
            step = long(vector * lanes * 4)
            place = builder.add(output, step)
            # What is not yet written may be anything, even not a number: chosen, not multiplied away.
            held = builder.select(accumulate, load(builder, floats, place), zero(floats))
            bias = load(builder, floats, builder.add(values["bias"], step))
            total = builder.fadd(builder.fadd(held, total), bias)
            store(builder, total, place)


def _multiply_add(builder: Any, one: Any, other: Any, total: Any) -> Any:
    return instruction(builder, f"llvm.fmuladd.v{total.type.count}f32", total.type, one, other, total)
