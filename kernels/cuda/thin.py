"""The thin rows of few tokens: the quantizer's sums added up in the order of the groups, and rounded.

With few tokens the quantizer's blocks take 8 groups each, so that there are enough of them, and leave
terms (groups, padded tokens, rank_groups · 64) float32 and their scales `steps` (groups, padded tokens). Here a warp
takes a token, each lane two neighbouring columns of every 64; 8 groups are read ahead of their additions. Codes and
scales come out as the quantizer would write them.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs

from . import codes
from .plan import Span
from .program import AbstractProgram

TOKENS = 4
"""Tokens a block."""


@attrs.frozen
class Thin(AbstractProgram):
    """Configuration: 64s of columns, the largest code, whether a token has one scale, else how many 64s have one."""

    rank_groups: int
    top: int
    whole: bool
    span: Span = 1

    @property
    def operands(self) -> str:
        return "UUUUss"

    @property
    def threads(self) -> int:
        return 32 * TOKENS

    @property
    def resident(self) -> int:
        return 4

    @property
    def shared_bytes(self) -> int:
        return 0

    def make(self, gpu: ModuleType) -> Callable[..., None]:
        return _make(gpu, self)


def _make(gpu: Any, program: Thin) -> Callable[..., None]:
    rank_groups, whole, registers, pairs = program.rank_groups, program.whole, gpu.registers, program.span == 2
    kept, read = rank_groups * 2, rank_groups * 16
    encode = codes.encoder(gpu, program.top)

    @gpu.device
    def largest(sums, group):
        found = gpu.fmax(gpu.fabs(sums[group * 2]), gpu.fabs(sums[group * 2 + 1]))
        found = gpu.fmax(found, gpu.as_float(gpu.lane_xor_1(gpu.bits(found))))
        found = gpu.fmax(found, gpu.as_float(gpu.lane_xor_2(gpu.bits(found))))
        found = gpu.fmax(found, gpu.as_float(gpu.lane_xor_4(gpu.bits(found))))
        found = gpu.fmax(found, gpu.as_float(gpu.lane_xor_8(gpu.bits(found))))
        return gpu.fmax(found, gpu.as_float(gpu.lane_xor_16(gpu.bits(found))))

    def kernel(terms, steps, thin, thin_scales, padded_tokens, groups):
        thread = gpu.thread()
        lane, token = thread & 31, gpu.block_x() * 4 + (thread >> 5)
        sums, ahead, scales = registers(kept, gpu.f32), registers(read, gpu.u32), registers(8, gpu.f32)
        for place in range(kept):
            sums[place] = gpu.f32(0)
        for base in range(0, groups, 8):
            for group in range(8):
                line, here = (base + group) * padded_tokens + token, gpu.u32(base + group < groups)
                scales[group] = gpu.as_float(gpu.ldg32_if(steps + gpu.u64(line * 4), here))
                for part in range(rank_groups):
                    pair = gpu.ldg64_if(terms + gpu.u64((line * rank_groups + part) * 256 + lane * 8), here)
                    ahead[(group * rank_groups + part) * 2] = pair[0]
                    ahead[(group * rank_groups + part) * 2 + 1] = pair[1]
            for group in range(8):
                for place in range(kept):
                    sums[place] = gpu.fma(gpu.as_float(ahead[group * kept + place]), scales[group], sums[place])
        limits, values, words = registers(rank_groups, gpu.f32), registers(4, gpu.f32), registers(1, gpu.u32)
        for part in range(rank_groups):
            limits[part] = largest(sums, part)
        if whole:
            for part in range(1, rank_groups):
                limits[0] = gpu.fmax(limits[0], limits[part])
        for part in range(rank_groups):
            for place in range(2):
                # Two lanes' columns make a word: the even lane writes its own and its neighbour's.
                values[place] = sums[part * 2 + place]
                values[2 + place] = gpu.as_float(gpu.lane_xor_1(gpu.bits(sums[part * 2 + place])))
            limit = limits[0] if whole else limits[part]
            if pairs:
                limit = gpu.fmax(limit, limits[part ^ 1])
            scale = encode(values, 0, 4, limit, words, 0)
            line = part * padded_tokens + token
            gpu.stg32_if(thin + gpu.u64(line * 64 + lane * 2), words[0], gpu.u32((lane & 1) == 0))
            gpu.stg32_if(thin_scales + gpu.u64(line * 4), gpu.bits(scale), gpu.u32(lane == 0))

    return kernel
