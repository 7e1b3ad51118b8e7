"""The instructions that plain.py uses, for one thread at a time: the `gpu` for Numba's own CUDA simulator.

    NUMBA_ENABLE_CUDASIM=1: numba.cuda.jit(program.make(simulator))[grid, threads](*addresses and numbers)

The simulator runs each CUDA thread as a thread of Python. It knows neither tensor cores nor asynchronous copies, so it
takes the simple kernel only; emulator.py takes all.
"""

# ruff: noqa: D103 - instructions.py says what each instruction does.

from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any


def _place(name: str, axis: str) -> int:
    """Where the current thread is: the simulator's threads know."""
    return int(getattr(getattr(threading.current_thread(), name), axis))


def thread() -> int:
    return _place("threadIdx", "x")


def block_x() -> int:
    return _place("blockIdx", "x")


def block_y() -> int:
    return _place("blockIdx", "y")


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def u32(value: int) -> int:
    return ctypes.c_uint32(value).value


def s32(value: int) -> int:
    return ctypes.c_int32(value).value


def u64(value: int) -> int:
    return ctypes.c_uint64(value).value


def f32(value: float) -> float:
    return ctypes.c_float(value).value


def _read(address: int, size: int, flag: int) -> int:
    return int.from_bytes(ctypes.string_at(address, size), "little") if flag else 0


def ldg8_if(address: int, flag: int) -> int:
    return _read(address, 1, flag)


def ldg16_if(address: int, flag: int) -> int:
    return _read(address, 2, flag)


def ldg32_if(address: int, flag: int) -> int:
    return _read(address, 4, flag)


def stg32_if(address: int, word: int, flag: int) -> None:
    if flag:
        ctypes.memmove(address, u32(word).to_bytes(4, "little"), 4)


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def as_float(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


def to_float(value: int) -> float:
    return f32(value)


def fadd(first: float, second: float) -> float:
    """Rounded once: a sum of two float32 in float64, rounded to float32, is the float32 sum."""
    return f32(first + second)


def fma(first: float, second: float, third: float) -> float:
    """Rounded once: the product is exact in float64, the sum to odd where it is not (emulator.py)."""
    product = first * second
    total = product + third
    if math.isfinite(total) and struct.pack("<d", total)[0] % 2 == 0:
        error = Fraction(product) + Fraction(third) - Fraction(total)
        total = math.nextafter(total, math.copysign(math.inf, error)) if error else total
    return f32(total)


def fmul(first: float, second: float) -> float:
    return f32(first * second)
