"""Small llvmlite intrinsics for Numba code that works on raw addresses: pointers, atomics, calls, and vector loops.

Everything takes and gives int64 unless said otherwise. The vector loops are written in LLVM's generic vectors of 16
lanes, which every processor's back end splits as it must; Numba's own loops do not vectorize reductions of floating
point numbers, and stop at the first call. `count` is a multiple of 16 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir
from numba import types

from .vectors import BYTE, FLOAT, INT, LONG, instruction, llvm, load, long, same, shuffled, splat

LANES = 16

_BYTES, _INTEGERS, _FLOATS = (ir.VectorType(kind, LANES) for kind in (BYTE, INT, FLOAT))
_NEAREST = 1.5 * 2**23
"""Added to a float32 below 2^22 it rounds it to the nearest integer, ties to even, and leaves that in the low bits."""


def intrinsic(definition: Callable[..., Any]) -> Any:
    """numba.extending.intrinsic: called from Numba code without the typing context, which types do not say."""
    return numba.extending.intrinsic(definition)


def called_with(name: str, arguments: tuple[str, ...], write: Callable[[Any, dict[str, Any]], None]) -> Any:
    """The intrinsic `name`, which takes the address of its arguments, int64 one after the other in memory.

    `write(builder, values)` writes its code, given the arguments' values by name.
    """

    def typed(typing_context: Any, address: Any) -> Any:
        del typing_context, address

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            del signature
            write(builder, values_at(builder, given[0], arguments))
            return context.get_dummy_value()

        return types.void(types.int64), generate

    typed.__name__ = name.replace("-", "_")
    return intrinsic(typed)


def values_at(builder: Any, address: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The int64 that lie one after the other at `address`, by name."""
    return {name: load(builder, LONG, builder.add(address, long(8 * index)), 8) for index, name in enumerate(names)}


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An untyped pointer from an address, for numba.carray."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.inttoptr(arguments[0], llvm.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def take_ticket(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`, which is counted up by one in the same atomic step."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        place = builder.inttoptr(arguments[0], LONG.as_pointer())
        return builder.atomic_rmw("add", place, long(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def call(typing_context: Any, function: Any, argument: Any) -> Any:
    """Call the compiled function at the address `function` with one int64; it returns nothing."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        kind = ir.FunctionType(ir.VoidType(), [LONG])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def largest_bits(typing_context: Any, source: Any, count: Any) -> Any:
    """The largest magnitude of `count` float32 at `source`, as its bits: what is not a number counts as largest."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        source, count = arguments
        magnitude = same(_INTEGERS, 0x7FFFFFFF)

        def body(index: Any, largest: Any) -> Any:
            bits = builder.and_(_load(builder, source, index, _INTEGERS), magnitude)
            return builder.select(builder.icmp_signed(">", bits, largest), bits, largest)

        largest = _loop(builder, count, ir.Constant(_INTEGERS, None), body)
        return builder.zext(_reduce(builder, "smax", largest), LONG)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def encode(typing_context: Any, source: Any, target: Any, count: Any, divisor: Any, top: Any) -> Any:
    """Round `count` float32 at `source` to int8 codes at `target`; gives the sum of the codes.

    A code is value / divisor rounded to nearest, ties to even, and held to [-top, top] (both float32). The bounds are
    integers, so that holding before rounding is the same.
    """
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        source, target, count, divisor, top = arguments
        divisors, tops = splat(builder, divisor, _FLOATS), splat(builder, top, _FLOATS)
        bottoms = builder.fneg(tops)
        nearest = same(_FLOATS, _NEAREST)
        high = same(_INTEGERS, 24)

        def body(index: Any, total: Any) -> Any:
            value = builder.fdiv(_load(builder, source, index, _FLOATS), divisors)
            value = builder.select(builder.fcmp_ordered(">", value, tops), tops, value)
            value = builder.select(builder.fcmp_ordered("<", value, bottoms), bottoms, value)
            bits = builder.bitcast(builder.fadd(value, nearest), _INTEGERS)
            _store(builder, target, index, builder.trunc(bits, _BYTES))
            return builder.add(total, builder.ashr(builder.shl(bits, high), high))

        return builder.sext(_reduce(builder, "add", _loop(builder, count, ir.Constant(_INTEGERS, None), body)), LONG)

    return types.int64(types.int64, types.int64, types.int64, types.float32, types.float32), generate


def _butterflies(vectors: int) -> Any:
    """The intrinsic `(address, count)`: unscaled Hadamard transforms, in place, of runs of 16 * `vectors` float32."""

    def typed(typing_context: Any, values: Any, count: Any) -> Any:
        del typing_context, values, count

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del signature
            address, count = arguments

            def body(index: Any, unused: Any) -> Any:
                places = [builder.add(index, long(LANES * each)) for each in range(vectors)]
                held = [_load(builder, address, place, _FLOATS) for place in places]
                for step in (1, 2, 4, 8):
                    held = [_within(builder, vector, step) for vector in held]
                step = 1
                while step < vectors:
                    for first in (each for each in range(vectors) if not each & step):
                        one, other = held[first], held[first + step]
                        held[first], held[first + step] = builder.fadd(one, other), builder.fsub(one, other)
                    step *= 2
                for place, vector in zip(places, held, strict=True):
                    _store(builder, address, place, vector)
                return unused

            _loop(builder, count, ir.Constant(_INTEGERS, None), body, LANES * vectors)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    typed.__name__ = f"butterflies_{LANES * vectors}"
    return intrinsic(typed)


def _within(builder: Any, vector: Any, step: int) -> Any:
    """One pass within a vector: each lane's sum or difference with the lane `step` away, as other + (±own)."""
    signs = ir.Constant(_INTEGERS, [-(2**31) if lane & step else 0 for lane in range(LANES)])
    own = builder.bitcast(builder.xor(builder.bitcast(vector, _INTEGERS), signs), _FLOATS)
    return builder.fadd(shuffled(builder, vector, [lane ^ step for lane in range(LANES)]), own)


butterflies_16, butterflies_128 = _butterflies(1), _butterflies(8)


def _loop(builder: Any, count: Any, start: Any, body: Any, step: int = LANES) -> Any:
    """`state = body(index, state)` for index = 0, `step`, ... below `count`; the last state."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index, state = builder.phi(LONG), builder.phi(start.type)
    index.add_incoming(long(0), before)
    state.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    following = body(index, state)
    index.add_incoming(builder.add(index, long(step)), builder.block)
    state.add_incoming(following, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return state


def _address(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    size = kind.element.width // 8 if isinstance(kind.element, ir.IntType) else 4
    place = builder.add(base, builder.mul(index, long(size)))
    return builder.inttoptr(place, kind.as_pointer())


def _load(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    return builder.load(_address(builder, base, index, kind), align=1 if kind is _BYTES else 4)


def _store(builder: Any, base: Any, index: Any, value: Any) -> None:
    builder.store(value, _address(builder, base, index, value.type), align=1 if value.type == _BYTES else 4)


def _reduce(builder: Any, operation: str, vector: Any) -> Any:
    return instruction(builder, f"llvm.vector.reduce.{operation}.v{LANES}i32", INT, vector)
