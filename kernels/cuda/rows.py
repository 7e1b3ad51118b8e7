"""Rows of floating point numbers in global memory: runs of 4 to 16 neighbours a thread, in any of torch's three types.

Rows whose length is a multiple of 8 are read and written 16 bytes at a time; others, which are not aligned, one number
at a time.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["float32", "bfloat16", "float16"]


def aligned_store(gpu: Any, kind: Kind, count: Literal[4, 8] = 8) -> Any:
    """`put(y, row, rows, column, columns, values)`: `count` values to a row, where the row and the columns exist."""
    wide, pack = kind == "float32", gpu.pack_float16 if kind == "float16" else gpu.pack_bfloat16

    @gpu.device
    def put(y, row, rows, column, columns, values):
        here = gpu.u32((row < rows) & (column < columns))
        if wide:
            at = y + gpu.u64((row * columns + column) * 4)
            for half in range(0, count, 4):
                gpu.stg128_if(
                    at + gpu.u64(half * 4),
                    gpu.bits(values[half]),
                    gpu.bits(values[half + 1]),
                    gpu.bits(values[half + 2]),
                    gpu.bits(values[half + 3]),
                    here,
                )
        elif count == 4:
            first, second = pack(values[0], values[1]), pack(values[2], values[3])
            gpu.stg64_if(y + gpu.u64((row * columns + column) * 2), first, second, here)
        else:
            gpu.stg128_if(
                y + gpu.u64((row * columns + column) * 2),
                pack(values[0], values[1]),
                pack(values[2], values[3]),
                pack(values[4], values[5]),
                pack(values[6], values[7]),
                here,
            )

    return put


def single_store(gpu: Any, kind: Kind) -> Any:
    """`put(y, row, rows, column, columns, value)`: one value."""
    wide, pack = kind == "float32", gpu.pack_float16 if kind == "float16" else gpu.pack_bfloat16

    @gpu.device
    def put(y, row, rows, column, columns, value):
        here = gpu.u32((row < rows) & (column < columns))
        element = row * columns + column
        if wide:
            gpu.stg32_if(y + gpu.u64(element * 4), gpu.bits(value), here)
        else:
            gpu.stg16_if(y + gpu.u64(element * 2), pack(value, value), here)

    return put


def single_stores(gpu: Any, kind: Kind, count: int = 8) -> Any:
    """As `aligned_store`, for rows of any length."""
    put_one = single_store(gpu, kind)

    @gpu.device
    def put(y, row, rows, column, columns, values):
        for place in range(count):
            put_one(y, row, rows, column + place, columns, values[place])

    return put


def aligned_load(gpu: Any, kind: Kind) -> Any:
    """`get(x, row, rows, column, columns, values, first)`: 16 numbers of a row to values[first:], zeros beyond it."""
    wide, half = kind == "float32", kind == "float16"

    @gpu.device
    def get(x, row, rows, column, columns, values, first):
        for part in range(4 if wide else 2):
            start = column + part * (4 if wide else 8)
            here = gpu.u32((row < rows) & (start < columns))
            words = gpu.ldg128_if(x + gpu.u64((row * columns + start) * (4 if wide else 2)), here)
            for place in range(4):
                if wide:
                    values[first + part * 4 + place] = gpu.as_float(words[place])
                elif half:
                    pair = gpu.unpack_float16(words[place])
                    values[first + part * 8 + place * 2] = pair[0]
                    values[first + part * 8 + place * 2 + 1] = pair[1]
                else:
                    values[first + part * 8 + place * 2] = gpu.as_float(gpu.u32(words[place] << 16))
                    values[first + part * 8 + place * 2 + 1] = gpu.as_float(gpu.u32(words[place] & 0xFFFF0000))

    return get


def single_loads(gpu: Any, kind: Kind) -> Any:
    """The same for rows of any length."""
    wide, half = kind == "float32", kind == "float16"

    @gpu.device
    def get(x, row, rows, column, columns, values, first):
        for place in range(16):
            here = gpu.u32((row < rows) & (column + place < columns))
            element = row * columns + column + place
            if wide:
                values[first + place] = gpu.as_float(gpu.ldg32_if(x + gpu.u64(element * 4), here))
            elif half:
                values[first + place] = gpu.unpack_float16(gpu.ldg16_if(x + gpu.u64(element * 2), here))[0]
            else:
                values[first + place] = gpu.as_float(gpu.u32(gpu.ldg16_if(x + gpu.u64(element * 2), here) << 16))

    return get
