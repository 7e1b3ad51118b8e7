"""From a panel's codes to float32, for products that are not in integers: a table's value times the group's scale.

Every format whose codes stand for `values[code] * scale + offset` is decoded by the same loop. Codes of up to 16 values
take 4 bits here; on AVX-512 such a table lies in one register and a lookup is one instruction (vpermps), elsewhere it
is a load a code. Integers of 8 bits are converted instead.

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

from .memory import called_with, llvm
from .tile import OUTPUTS, VNNI512, Machine

LANES = 16
_BYTE, _INT, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES, _INTEGERS, _FLOATS = (ir.VectorType(kind, LANES) for kind in (_BYTE, _INT, _FLOAT))


ARGUMENTS = ("codes", "values", "scales", "offsets", "result", "first", "columns", "group")
"""What a decoder takes, int64 one after the other in memory: the panel's addresses (`offsets` 0: none), and which
columns of it to decode. `first` is a multiple of `group`, and with 4 bits `group` is even."""


def decoder(machine: Machine, bits: int, *, integers: bool = False) -> Any:
    """The intrinsic that decodes columns of a panel of `bits`, 4 or 8: called with the address of ARGUMENTS.

    `integers` takes the codes for two's complement integers of 8 bits, without a table.
    """

    def write(builder: Any, given: dict[str, Any]) -> None:
        lookup = _integers(builder) if integers else _lookup(builder, machine, bits, given["values"])
        group, columns = given["group"], given["columns"]
        with llvm.for_range_slice(builder, _long(0), columns, group, _LONG) as (start, _):
            rest = builder.sub(columns, start)
            count = builder.select(builder.icmp_signed("<", rest, group), rest, group)
            _decode_group(builder, bits, lookup, given, start, count)

    return called_with(f"decoder_{machine.name}_{bits}{'_integers' if integers else ''}", ARGUMENTS, write)


def _decode_group(builder: Any, bits: int, lookup: Any, given: dict[str, Any], start: Any, count: Any) -> None:
    """Decode `count` columns of one group, `start` columns behind the first; an odd one takes its neighbour along."""
    step = 8 // bits
    group = builder.mul(builder.udiv(builder.add(given["first"], start), given["group"]), _long(OUTPUTS * 4))
    scales = builder.add(given["scales"], group)
    factors = [_load(builder, scales, 64 * half, _FLOATS) for half in range(2)]
    shifted = builder.icmp_signed("!=", given["offsets"], _long(0))
    # Where there are no offsets, an address that may be read, and the number whose addition changes nothing.
    offsets = builder.select(shifted, builder.add(given["offsets"], group), scales)
    nothing = ir.Constant(_FLOATS, [-0.0] * LANES)
    shifts = [builder.select(shifted, _load(builder, offsets, 64 * half, _FLOATS), nothing) for half in range(2)]
    begin = builder.add(
        given["codes"], builder.mul(builder.udiv(builder.add(given["first"], start), _long(step)), _long(OUTPUTS))
    )
    result = builder.add(given["result"], builder.mul(start, _long(OUTPUTS * 4)))
    with llvm.for_range_slice(builder, _long(0), count, _long(step), _LONG) as (column, _):
        place = builder.add(begin, builder.mul(builder.udiv(column, _long(step)), _long(OUTPUTS)))
        target = builder.add(result, builder.mul(column, _long(OUTPUTS * 4)))
        for half in range(2):
            packed = builder.zext(_load(builder, place, LANES * half, _BYTES), _INTEGERS)
            for each in range(step):
                indices = packed
                if step == 2:
                    four, low = (ir.Constant(_INTEGERS, [value] * LANES) for value in (4, 15))
                    indices = builder.lshr(packed, four) if each else builder.and_(packed, low)
                value = builder.fadd(builder.fmul(lookup(indices), factors[half]), shifts[half])
                _store(builder, target, OUTPUTS * 4 * each + 64 * half, value)


def _integers(builder: Any) -> Any:
    """A function from 16 bytes, zero-extended, to the two's complement integers in them."""
    high = ir.Constant(_INTEGERS, [24] * LANES)
    return lambda codes: builder.sitofp(builder.ashr(builder.shl(codes, high), high), _FLOATS)


def _lookup(builder: Any, machine: Machine, bits: int, values: Any) -> Any:
    """A function from 16 indices to 16 of the float32 at `values`."""
    if machine is VNNI512 and bits == 4:
        table = _load(builder, values, 0, _FLOATS)
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTEGERS])
        permute = llvm.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
        return lambda indices: builder.call(permute, [table, indices])

    def gathered(indices: Any) -> Any:
        found = ir.Constant(_FLOATS, ir.Undefined)
        for lane in range(LANES):
            index = builder.zext(builder.extract_element(indices, ir.Constant(_INT, lane)), _LONG)
            place = builder.inttoptr(builder.add(values, builder.mul(index, _long(4))), _FLOAT.as_pointer())
            found = builder.insert_element(found, builder.load(place, align=4), ir.Constant(_INT, lane))
        return found

    return gathered


def _load(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    place = builder.inttoptr(builder.add(base, _long(offset)), kind.as_pointer())
    return builder.load(place, align=1 if kind is _BYTES else 4)


def _store(builder: Any, base: Any, offset: int, value: Any) -> None:
    builder.store(value, builder.inttoptr(builder.add(base, _long(offset)), value.type.as_pointer()), align=4)


def _long(value: int) -> ir.Constant:
    return ir.Constant(_LONG, value)
