"""What llvmlite code says again and again: constants, splats, and loads and stores at addresses kept as int64."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

llvm: Any = cgutils
"""numba.core.cgutils, which has no annotations."""

BYTE, SHORT, INT, LONG, FLOAT = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())


def long(value: int) -> ir.Constant:
    """An int64 constant."""
    return ir.Constant(LONG, value)


def same(kind: Any, value: float) -> ir.Constant:
    """The constant vector of type `kind` with `value` in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def zero(kind: Any) -> ir.Constant:
    """The constant of type `kind` whose bits are all zero."""
    return ir.Constant(kind, None)


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """The vector of type `kind` with the scalar `value` in every lane."""
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT, 0))
    return lane(builder, single, 0, kind.count)


def lane(builder: Any, vector: Any, index: int, lanes: int) -> Any:
    """A vector of `lanes` lanes, all of them lane `index` of `vector`."""
    return shuffled(builder, vector, [index] * lanes)


def shuffled(builder: Any, vector: Any, order: list[int]) -> Any:
    """The vector whose lane i is lane `order[i]` of `vector`."""
    indices = ir.Constant(ir.VectorType(INT, len(order)), order)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), indices)


def load(builder: Any, kind: Any, address: Any, align: int = 4) -> Any:
    """What lies at `address`, as `kind`; `align` in bytes is what the address is known to be a multiple of."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    """Write `value` to `address`."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def instruction(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call what LLVM calls `name`, which gives the type `result`."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(llvm.get_or_insert_function(builder.module, kind, name), arguments)
