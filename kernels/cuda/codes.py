"""Rounding to codes: what the quantizer does with a group's values, here for any number of them.

    scale = bfloat16(limit / top), code = value / scale to nearest, ties to even

as loraq/formats.py has it, bit for bit. That no code is beyond top follows: a scale of 8 bits is at most 2^-8 of itself
too small, and top · (1 + 2^-8) is nearer to top than to the next number. Scales below 2^-126 have fewer bits: there the
codes are 0, as they are where a scale is 0, infinite or not a number. Rounding is an addition of 1.5 · 2^23, whose
result has the code in its lowest byte.

Dividing by the scale is multiplying by its reciprocal and correcting once:

    r = 1/s,  q = v·r,  code = round(fma(v - q·s, r, q))

which is the correctly rounded quotient: v - q·s is exact, and q + (v - q·s)·r is off by some 2^-46 of itself, while the
quotient of 24 bits by a scale's 8 stays 2^-33 away from the middle of two floats. Source: Markstein, IBM J. Res. Dev.
34, 1990.
Scales at the ends of float32's range are first moved inwards, with their values, by a power of two.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from typing import Any

from .instructions import MAGIC_FLOAT

_LEAST, _MOST = 2.0**-126, 2.0**127 * (2 - 2.0**-7)
"""The ends of bfloat16's normal numbers."""
_UP, _DOWN = 2.0**64, 2.0**-64
_SMALL, _LARGE = 2.0**-60, 2.0**60


def encoder(gpu: Any, top: int) -> Any:
    """`encode(values, first, count, limit, words, at)`: `count` values to int8 codes, four a word; returns the scale.

    `values` (float32 registers) from `first` on are rounded with the scale of `limit`, `words` written from `at` on.
    """
    up, down, small, large, one, magic = _UP, _DOWN, _SMALL, _LARGE, 1.0, MAGIC_FLOAT
    least, most = _LEAST, _MOST

    @gpu.device
    def code(value, less, inverse, lift):
        lifted = gpu.fmul(value, lift)
        quotient = gpu.fmul(lifted, inverse)
        rest = gpu.fma(quotient, less, lifted)
        return gpu.as_int(gpu.bits(gpu.fadd(gpu.fma(rest, inverse, quotient), gpu.f32(magic))))

    @gpu.device
    def chosen(first, second, flag):
        return gpu.as_float(gpu.select(gpu.bits(gpu.f32(first)), gpu.bits(gpu.f32(second)), flag))

    @gpu.device
    def encode(values, first, count, limit, words, at):
        scale = gpu.as_float(gpu.u32(gpu.pack_bfloat16(gpu.fdiv(limit, gpu.f32(top)), gpu.f32(0)) << 16))
        lift = chosen(up, chosen(down, one, gpu.u32(scale > large)), gpu.u32(scale < small))
        moved = gpu.fmul(scale, lift)
        inverse, less = gpu.reciprocal(moved), gpu.fmul(moved, gpu.f32(-one))
        kept = gpu.select(0xFFFFFFFF, 0, gpu.u32((scale >= least) & (scale <= most)))
        for word in range(count // 4):
            place = first + word * 4
            packed = gpu.pack_bytes(
                code(values[place], less, inverse, lift),
                code(values[place + 1], less, inverse, lift),
                code(values[place + 2], less, inverse, lift),
                code(values[place + 3], less, inverse, lift),
            )
            words[at + word] = gpu.u32(packed & kept)
        return scale

    return encode
