"""From a panel's codes to float32, for products that are not in integers: a table's value times the group's scale.

Every format whose codes stand for `values[code] * scale + offset` is decoded by the same loop; how a code becomes its
value is the processor's (code_values.py). Codes of up to 16 values take 4 bits here.

Axes and layouts, of one panel (all addresses are integers):

    codes, 4 bits   uint8   [column / 2][32 outputs]    low nibble: even column, high nibble: the one behind it
    codes, 8 bits   uint8   [column][32 outputs]
    values          float32 [16 or 256]
    scales, offsets float32 [group][32 outputs]
    result          float32 [column][32 outputs]
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .code_values import CODES, FLOATS, LANES, CodeValues
from .memory import called_with
from .tile import OUTPUTS
from .vectors import BYTE, LONG, llvm, load, long, same, store

_BYTES = ir.VectorType(BYTE, CODES)

ARGUMENTS = ("codes", "values", "scales", "offsets", "result", "first", "columns", "group")
"""What a decoder takes, int64 one after the other in memory: the panel's addresses (`offsets` 0: none), and which
columns of it to decode. `first` is a multiple of `group`, and with 4 bits `group` is even."""


def decoder(kind: type[CodeValues]) -> Any:
    """The intrinsic that decodes columns of a panel: called with the address of ARGUMENTS."""

    def write(builder: Any, given: dict[str, Any]) -> None:
        write_decoder(builder, kind, given)

    return called_with(f"decoder_{kind.__name__}", ARGUMENTS, write)


def write_decoder(builder: Any, kind: type[CodeValues], given: dict[str, Any]) -> None:
    """Write a decoder's code, given the values of ARGUMENTS by name."""
    code_values = kind(builder, given["values"])
    group, columns = given["group"], given["columns"]
    with llvm.for_range_slice(builder, long(0), columns, group, LONG) as (start, _):
        rest = builder.sub(columns, start)
        count = builder.select(builder.icmp_signed("<", rest, group), rest, group)
        _decode_group(builder, code_values, given, start, count)


def _decode_group(builder: Any, code_values: CodeValues, given: dict[str, Any], start: Any, count: Any) -> None:
    """Decode `count` columns of one group, `start` columns behind the first; an odd one takes its neighbour along."""
    step = 8 // code_values.bits
    group = builder.mul(builder.udiv(builder.add(given["first"], start), given["group"]), long(OUTPUTS * 4))
    scales = builder.add(given["scales"], group)
    factors = [load(builder, FLOATS, builder.add(scales, long(64 * half))) for half in range(2)]
    shifted = builder.icmp_signed("!=", given["offsets"], long(0))
    # Where there are no offsets, an address that may be read, and the number whose addition changes nothing.
    offsets = builder.select(shifted, builder.add(given["offsets"], group), scales)
    nothing = same(FLOATS, -0.0)
    shifts = [
        builder.select(shifted, load(builder, FLOATS, builder.add(offsets, long(64 * half))), nothing)
        for half in range(2)
    ]
    begin = builder.add(
        given["codes"], builder.mul(builder.udiv(builder.add(given["first"], start), long(step)), long(OUTPUTS))
    )
    result = builder.add(given["result"], builder.mul(start, long(OUTPUTS * 4)))
    with llvm.for_range_slice(builder, long(0), count, long(step), LONG) as (column, _):
        place = builder.add(begin, builder.mul(builder.udiv(column, long(step)), long(OUTPUTS)))
        target = builder.add(result, builder.mul(column, long(OUTPUTS * 4)))
        packed = load(builder, _BYTES, place, 1)
        codes = [packed]
        if step == 2:
            codes = [builder.and_(packed, same(_BYTES, 15)), builder.lshr(packed, same(_BYTES, 4))]
        for each, indices in enumerate(codes):
            for half, value in enumerate(code_values.halves(indices)):
                value = builder.fadd(builder.fmul(value, factors[half]), shifts[half])
                store(builder, value, builder.add(target, long(OUTPUTS * 4 * each + 4 * LANES * half)))
