"""The product of two integer matrices with scales, one thread an output: easy to read, for every integer format.

    y[t, o] += a_scales[t, segment's group] · (w_scales[o, segment's group] · Σ_k a[t, k] · w[o, k])

A segment is a run of columns within one group of either side, as in loraq/ops.py, whose order and rounding this has.
It serves the formats and groups that the tensor-core kernels do not take, and is what those can be compared with.

`a` (tokens, columns) is int8 or int16. `w` lies by columns, so that neighbouring threads read neighbouring bytes:
(columns, out) int8 or int16, or (columns / 2, out) bytes with the even column in the low half. With `accumulate` not 0
the sum begins with what `y` holds.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import attrs

from .program import AbstractProgram

OUTPUTS = 128
"""Outputs a block, of one token."""
LARGEST_COLUMNS = 2**15
"""A sum of products of 9-bit integers over more columns would not fit 32 bits."""


@attrs.frozen
class Plain(AbstractProgram):
    """Configuration: the width of the codes of either side in memory."""

    input_bits: Literal[8, 16]
    weight_bits: Literal[4, 8, 16]

    @property
    def operands(self) -> str:
        return "UUUUUsssssss"

    @property
    def threads(self) -> int:
        return OUTPUTS

    @property
    def resident(self) -> int:
        return 8

    @property
    def shared_bytes(self) -> int:
        return 0

    def make(self, gpu: ModuleType) -> Callable[..., None]:
        return _make(gpu, self)


def _make(gpu: Any, program: Plain) -> Callable[..., None]:
    input_code, weight_code = _code(gpu, program.input_bits), _code(gpu, program.weight_bits)

    @gpu.device
    def next_cut(column, group):
        """Where the group that `column` lies in ends."""
        return (column // group + 1) * group

    def kernel(a, a_scales, w, w_scales, y, out, columns, a_group, w_group, a_groups, w_groups, accumulate):
        token, output = gpu.block_x(), gpu.block_y() * 128 + gpu.thread()
        here = gpu.u32(output < out)
        place = y + gpu.u64((token * out + output) * 4)
        total = gpu.as_float(gpu.ldg32_if(place, gpu.u32(here & (accumulate != 0))))
        start = 0
        while start < columns:
            end = min(columns, min(next_cut(start, a_group), next_cut(start, w_group)))
            sum = gpu.s32(0)
            for column in range(start, end):
                input = input_code(a, token, columns, column, here, 1)
                weight = weight_code(w, output, 1, column, here, out)
                sum = gpu.s32(sum + input * weight)
            a_scale = gpu.as_float(gpu.ldg32_if(a_scales + gpu.u64((token * a_groups + start // a_group) * 4), here))
            w_scale = gpu.as_float(gpu.ldg32_if(w_scales + gpu.u64((output * w_groups + start // w_group) * 4), here))
            total = gpu.fma(gpu.fmul(gpu.to_float(sum), w_scale), a_scale, total)
            start = end
        gpu.stg32_if(place, gpu.bits(total), here)

    return kernel


def _code(gpu: Any, bits: int) -> Any:
    """A function that reads one signed code: `row_step` from row to row, `column_step` from column to column."""

    @gpu.device
    def nibble(codes, row, row_step, column, here, column_step):
        at = codes + gpu.u64(row * row_step + (column // 2) * column_step)
        return gpu.s32(((gpu.ldg8_if(at, here) >> ((column % 2) * 4)) & 15) ^ 8) - 8

    @gpu.device
    def byte(codes, row, row_step, column, here, column_step):
        return gpu.s32(gpu.ldg8_if(codes + gpu.u64(row * row_step + column * column_step), here) ^ 128) - 128

    @gpu.device
    def pair(codes, row, row_step, column, here, column_step):
        at = codes + gpu.u64((row * row_step + column * column_step) * 2)
        return gpu.s32(gpu.ldg16_if(at, here) ^ 32768) - 32768

    return {4: nibble, 8: byte, 16: pair}[bits]
