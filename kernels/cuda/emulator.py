"""The instructions in numpy: runs a kernel's own source without a GPU, a block in lock step, and checks what it does.

A value is an array over the block's threads; control flow is the block's (instructions.py has the rules). So a block of
256 threads takes as many numpy calls as one thread has instructions, and small problems take a fraction of a second.

    x, y = Memory.of(input), Memory.of(output, written=False)
    run(kernel, grid=(4, 2), threads=256, shared_bytes=0, arguments=[x.start, y.start, 5], memories=[x, y])

Every access is checked, and a fault raises EmulatedError:

- global memory: only inside the given buffers, aligned, never reading bytes of an output that nothing wrote;
- shared memory: inside its size, aligned, never reading bytes that nothing wrote; bytes of an asynchronous copy exist
  only after the wait that completes it, when they are taken from its source, and for other threads only after a barrier
  behind that;
- races: between two barriers no thread may read or write bytes that another thread wrote, nor write bytes that another
  thread read. Threads of a warp count as well: kernels here never rely on a warp's order;
- arithmetic that the kernels rely on: an integer sum that leaves int32.

What it cannot show: what the compiler makes of the source, time, and memory models weaker than barriers.
Fragment layouts: PTX ISA 9.0, figures of mma.m16n8k32 and mma.m16n8k64.
"""

# ruff: noqa: D103 - instructions.py says what each instruction does.

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from .emulated_memory import Array, Block, EmulatedError, Memory
from .instructions import MAGIC

WARP = 32
_current = threading.local()


def _block() -> Block:
    block: Block = _current.block
    return block


def run(
    kernel: Callable[..., None],
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[int],
    memories: Sequence[Memory],
) -> None:
    """Run every block of a kernel that was made with this module as its `gpu`, one after the other.

    `arguments` are addresses and numbers; `memories` is all the global memory that there is.
    """
    for block_y in range(grid[1]):
        for block_x in range(grid[0]):
            block = _current.block = Block((block_x, block_y), threads, shared_bytes, memories)
            with warnings.catch_warnings(), numpy.errstate(all="ignore"):
                kernel(*arguments)
            if any(block.copies):
                raise EmulatedError("the kernel ended before its copies were waited for")


# Conversions, and what a kernel takes for granted.


def _converted(value: Any, dtype: Any) -> Array:
    """An array over the threads from one, or from a plain number."""
    array = numpy.asarray(value)
    if array.dtype == numpy.float64 or array.dtype == numpy.float32:
        found = array.astype(dtype)
    else:  # integers wrap around
        found = array.astype(numpy.uint64 if array.dtype == numpy.uint64 else numpy.int64).astype(dtype)
    return numpy.broadcast_to(found, (_block().threads,))


def number(value: int) -> int:
    """A number that is the same in all threads stays one of Python's."""
    return value


def u32(value: Any) -> Array:
    return _converted(value, numpy.uint32)


def s32(value: Any) -> Array:
    return _converted(value, numpy.int32)


def u64(value: Any) -> Array:
    return _converted(value, numpy.uint64)


def f32(value: Any) -> Array:
    return _converted(value, numpy.float32)


def registers(size: int, kind: Any) -> list[Any]:
    """An array in registers: a list, one array over the threads a place."""
    del kind
    return [None] * size


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def shared() -> Array:
    return s32(0)


def thread() -> Array:
    return s32(_block().numbers)


def block_x() -> int:
    return _block().number[0]


def block_y() -> int:
    return _block().number[1]


# Memory.


def _load(width: int, *, guarded: bool) -> Callable[..., Any]:
    def load(address: Any, flag: Any = 1) -> Any:
        found = _block().read(u64(address), width, u32(flag))
        if width < 4:
            found = numpy.pad(found, ((0, 0), (0, 4 - width)))
        words = numpy.ascontiguousarray(found).view(numpy.uint32)
        return words[:, 0] if words.shape[1] == 1 else tuple(words.T)

    def whole(address: Any) -> Any:
        return load(address)

    return load if guarded else whole


def _bytes(words: Sequence[Any], width: int) -> Array:
    stacked = numpy.stack([u32(word) for word in words], axis=1)
    return numpy.ascontiguousarray(stacked).view(numpy.uint8)[:, :width]


def _store(width: int) -> Callable[..., None]:
    def store(address: Any, *operands: Any) -> None:
        *words, flag = operands
        _block().write(u64(address), _bytes(words, width), u32(flag))

    return store


ldg32, ldg64, ldg128 = (_load(width, guarded=False) for width in (4, 8, 16))
ldg8_if, ldg16_if, ldg32_if, ldg64_if, ldg128_if = (_load(width, guarded=True) for width in (1, 2, 4, 8, 16))
stg16_if, stg32_if, stg64_if, stg128_if = (_store(width) for width in (2, 4, 8, 16))


def _load_shared(width: int) -> Callable[[Any], Any]:
    def load(address: Any) -> Any:
        words = numpy.ascontiguousarray(_block().load(u32(address), width)).view(numpy.uint32)
        return words[:, 0] if width == 4 else tuple(words.T)

    return load


lds32, lds64, lds128 = (_load_shared(width) for width in (4, 8, 16))


def sts32(address: Any, word: Any) -> None:
    sts32_if(address, word, 1)


def sts32_if(address: Any, word: Any, flag: Any) -> None:
    _block().store(u32(address), _bytes([word], 4), u32(flag))


def sts64(address: Any, low: Any, high: Any) -> None:
    _block().store(u32(address), _bytes([low, high], 8), u32(1))


def barrier() -> None:
    _block().barrier()


def copy16_if(target: Any, source: Any, flag: Any) -> None:
    _block().copy(u32(target), u64(source), u32(flag))


def copy_commit() -> None:
    _block().commit()


def copy_wait_0() -> None:
    _block().wait(0)


def copy_wait_1() -> None:
    _block().wait(1)


def copy_wait_2() -> None:
    _block().wait(2)


# Other lanes.


def _lane_xor(bit: int) -> Callable[[Any], Array]:
    def other_lane(value: Any) -> Array:
        words = u32(value)
        exchanged: Array = words[numpy.arange(len(words)) ^ bit]
        return exchanged

    return other_lane


lane_xor_1, lane_xor_2, lane_xor_4, lane_xor_8, lane_xor_16 = (_lane_xor(bit) for bit in (1, 2, 4, 8, 16))


# Tensor cores. Codes of a register, lowest first; which row, column and depth each has in its fragment.


def _codes(words: Array, bits: int) -> Array:
    """(..., codes) int64, the two's complement codes of `bits` bits in each word."""
    shifts = numpy.arange(0, 32, bits, dtype=numpy.uint32)
    parts = ((words[..., None] >> shifts) & numpy.uint32((1 << bits) - 1)).astype(numpy.int64)
    return parts - ((parts >> (bits - 1)) << bits)


def _mma(bits: int) -> Callable[..., tuple[Array, ...]]:
    codes = 32 // bits
    depth = 8 * codes
    lane = numpy.arange(WARP)
    group, member = lane // 4, lane % 4

    def product(*operands: Any) -> tuple[Array, ...]:
        words = numpy.stack([u32(each) for each in operands[:6]], axis=1).reshape(-1, WARP, 6)
        warps, values = len(words), _codes(words, bits)
        a, b = numpy.zeros((warps, 16, depth)), numpy.zeros((warps, depth, 8))
        for place in range(codes):
            for register in range(4):
                row, column = group + 8 * (register % 2), codes * member + place + depth // 2 * (register // 2)
                a[:, row, column] = values[:, :, register, place]
            for register in range(2):
                b[:, codes * member + place + depth // 2 * register, group] = values[:, :, 4 + register, place]
        sums = a @ b  # exact: far below 2^53
        start = numpy.stack([s32(each) for each in operands[6:]], axis=1).reshape(-1, WARP, 4).astype(numpy.int64)
        for place in range(4):
            start[:, :, place] += sums[:, group + 8 * (place // 2), 2 * member + place % 2].astype(numpy.int64)
        if numpy.any(start != start.astype(numpy.int32)):
            raise EmulatedError("an integer sum leaves int32")
        return tuple(start.reshape(-1, 4).astype(numpy.int32).T)

    return product


mma_s8, mma_s4 = _mma(8), _mma(4)


def fence_async() -> None:
    _block().fence()


def zeros() -> tuple[Array, ...]:
    return (s32(0),) * 64


def magic_zeros() -> tuple[Array, ...]:
    return (s32(MAGIC),) * 64


def wgmma_s8(*operands: Any) -> tuple[Array, ...]:
    words = numpy.stack([u32(each) for each in operands[:8]], axis=1).reshape(-1, 4, WARP, 2, 4)
    descriptors = numpy.stack([u64(each) for each in operands[8:10]], axis=1).reshape(-1, 4 * WARP, 2)
    sums = numpy.stack([s32(each) for each in operands[10:]], axis=1).reshape(-1, 4, WARP, 64).astype(numpy.int64)
    if numpy.any(descriptors != descriptors[:, :1]):
        raise EmulatedError("a warpgroup's lanes have different descriptors")
    lane, codes = numpy.arange(WARP), _codes(words, 8)
    group, member = lane // 4, lane % 4
    for warpgroup in range(len(words)):
        for step in range(2):
            descriptor = int(descriptors[warpgroup, 0, step])
            start, along, across = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
            b = _block().core_matrices(start, along, across).view(numpy.int8).astype(numpy.float64)
            a = numpy.zeros((4, 16, 32))
            for register in range(4):
                for place in range(4):
                    row, column = group + 8 * (register % 2), 4 * member + place + 16 * (register // 2)
                    a[:, row, column] = codes[warpgroup, :, :, step, register, place]
            product = a @ b.T
            for place in range(64):
                row, column = group + 8 * (place % 4 // 2), place // 4 * 8 + 2 * member + place % 2
                sums[warpgroup, :, :, place] += product[:, row, column].astype(numpy.int64)
    if numpy.any(sums != sums.astype(numpy.int32)):
        raise EmulatedError("an integer sum leaves int32")
    return tuple(sums.reshape(-1, 64).astype(numpy.int32).T)


# Arithmetic.


def fadd(first: Any, second: Any) -> Array:
    return f32(first) + f32(second)


def fsub(first: Any, second: Any) -> Array:
    return f32(first) - f32(second)


def fmul(first: Any, second: Any) -> Array:
    return f32(first) * f32(second)


def fdiv(first: Any, second: Any) -> Array:
    return f32(first) / f32(second)


def reciprocal(value: Any) -> Array:
    return numpy.float32(1) / f32(value)


def fma(first: Any, second: Any, third: Any) -> Array:
    """Rounded once: the product is exact in float64, the sum to odd where it is not, as float32 needs it."""
    product, addend = f32(first).astype(numpy.float64) * f32(second), f32(third).astype(numpy.float64)
    total = product + addend
    other = total - product
    lost = (product - (total - other)) + (addend - other)
    even = (total.view(numpy.int64) & 1) == 0
    towards = numpy.where((lost > 0) == (total > 0), 1, -1)
    odd = (total.view(numpy.int64) + towards).view(numpy.float64)
    inexact = numpy.isfinite(total) & (lost != 0) & even
    return numpy.where(inexact, odd, total).astype(numpy.float32)


def fabs(value: Any) -> Array:
    return numpy.abs(f32(value))


def fmax(first: Any, second: Any) -> Array:
    return numpy.maximum(f32(first), f32(second))  # a NaN stays, as in max.NaN


def to_float(value: Any) -> Array:
    return s32(value).astype(numpy.float32)


def select(first: Any, second: Any, flag: Any) -> Array:
    return numpy.where(u32(flag) != 0, u32(first), u32(second))


def bits(value: Any) -> Array:
    return numpy.ascontiguousarray(f32(value)).view(numpy.uint32)


def as_float(value: Any) -> Array:
    return numpy.ascontiguousarray(u32(value)).view(numpy.float32)


def as_int(value: Any) -> Array:
    return numpy.ascontiguousarray(u32(value)).view(numpy.int32)


def as_unsigned(value: Any) -> Array:
    return numpy.ascontiguousarray(s32(value)).view(numpy.uint32)


def _bfloat16(value: Any) -> Array:
    """The bits of the nearest bfloat16, ties to even."""
    words = bits(value)
    rounded = (words + numpy.uint32(0x7FFF) + ((words >> numpy.uint32(16)) & numpy.uint32(1))) >> numpy.uint32(16)
    return numpy.where(numpy.isnan(f32(value)), numpy.uint32(0x7FFF), rounded)


def pack_bfloat16(low: Any, high: Any) -> Array:
    packed: Array = _bfloat16(low) | (_bfloat16(high) << numpy.uint32(16))
    return packed


def pack_float16(low: Any, high: Any) -> Array:
    halves = numpy.stack([f32(low).astype(numpy.float16), f32(high).astype(numpy.float16)], axis=1)
    return numpy.ascontiguousarray(halves).view(numpy.uint32)[:, 0]


def unpack_float16(pair: Any) -> tuple[Array, ...]:
    halves = numpy.ascontiguousarray(u32(pair)).view(numpy.float16).reshape(-1, 2)
    return tuple(halves.astype(numpy.float32).T)


def pack_bytes(*values: Any) -> Array:
    low = numpy.stack([as_unsigned(value) & numpy.uint32(0xFF) for value in values], axis=1).astype(numpy.uint8)
    return numpy.ascontiguousarray(low).view(numpy.uint32)[:, 0]


GPU = sys.modules[__name__]
"""This module, as the `gpu` of a kernel's factory."""
