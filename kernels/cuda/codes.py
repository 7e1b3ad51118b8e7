"""Rounding to codes: what the quantizer does with a group's values, here for any number of them.

    scale = bfloat16(limit / top), code = value / scale to nearest, ties to even, between -top and top

as loraq/formats.py has it, bit for bit. Dividing by the scale is multiplying by its reciprocal and correcting once:

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

_INFINITY = 0x7F800000
_UP, _DOWN = 2.0**64, 2.0**-64
_SMALL, _LARGE = 2.0**-60, 2.0**60


def encoder(gpu: Any, top: int) -> Any:
    """`encode(values, first, count, limit, words, at)`: `count` values to int8 codes, four a word; returns the scale.

    `values` (float32 registers) from `first` on are rounded with the scale of `limit`, `words` written from `at` on.
    """
    up, down, small, large, one = _UP, _DOWN, _SMALL, _LARGE, 1.0

    @gpu.device
    def code(value, scale, inverse, lift):
        lifted = gpu.fmul(value, lift)
        quotient = gpu.fmul(lifted, inverse)
        rest = gpu.fma(gpu.fmul(quotient, gpu.f32(-one)), scale, lifted)
        return gpu.smax(gpu.smin(gpu.to_int(gpu.fma(rest, inverse, quotient)), top), -top)

    @gpu.device
    def chosen(first, second, flag):
        return gpu.as_float(gpu.select(gpu.bits(gpu.f32(first)), gpu.bits(gpu.f32(second)), flag))

    @gpu.device
    def encode(values, first, count, limit, words, at):
        scale = gpu.as_float(gpu.u32(gpu.pack_bfloat16(gpu.fdiv(limit, gpu.f32(top)), gpu.f32(0)) << 16))
        lift = chosen(up, chosen(down, one, gpu.u32(scale > large)), gpu.u32(scale < small))
        # A scale of 0 has values of 0 alone: by infinity they stay codes of 0.
        moved = gpu.as_float(gpu.select(_INFINITY, gpu.bits(gpu.fmul(scale, lift)), gpu.u32(scale == 0)))
        inverse = gpu.reciprocal(moved)
        for word in range(count // 4):
            place = first + word * 4
            words[at + word] = gpu.pack_bytes(
                code(values[place], moved, inverse, lift),
                code(values[place + 1], moved, inverse, lift),
                code(values[place + 2], moved, inverse, lift),
                code(values[place + 3], moved, inverse, lift),
            )
        return scale

    return encode
