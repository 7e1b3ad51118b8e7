"""Activations made ready for the product: transformed, rounded, multiplied with `down`, and the thin result rounded.

One pass over x (tokens, inn). A block of 4 warps takes 16 tokens; each warp takes 128 columns at a time, two groups,
its lanes 16 neighbouring columns of a group for two tokens, which is what a tensor-core fragment of codes wants:

    x̃ = x / factors or x · factors, then rotated by blocks of at most 128 columns: butterflies in and between lanes
    limit = max |x̃| of the group (or of the token), scale = bfloat16(limit / top), code = x̃ / scale to nearest

The product with `down` uses the codes while they are in registers. Its float sums must be added in the order of the
groups, but the warps meet the groups in another: so each sum goes to shared memory, times the weight's scale and with
the token's beside it, and after every 8 groups each thread multiplies and adds up, in order, its 8 places of the thin
rows (`rank_groups` x 64 columns) that it keeps in registers.

With `whole` or `branch_whole` the scale is the token's: a first pass over x finds the limits. With a span of 2 it is of
both groups, and so may be a segment of the product with `down`, whose sum then runs on through both.
Rounding is loraq/formats.py's (IntegerFormat.encode), the rotation strategies/pre_transform/hadamard.py's, bit for bit.
Arguments: x, factors (padded columns,) float32, codes and scales out (matmul.py says how they lie), `down` (groups,
rank_groups · 4, 1024) int8, thin_bytes of layouts.py, and its scales (groups, rank_groups · 64) bfloat16, thin codes
and scales out; with `split` terms (groups, padded tokens, rank_groups · 64) float32 and their scales (groups, padded
tokens) out instead of thin codes and scales, which thin.py adds up. Last of the numbers is `columns`, rank_groups · 64.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import attrs

from . import codes, rows
from .instructions import MAGIC, MAGIC_FLOAT
from .plan import Span
from .program import AbstractProgram

TOKENS, GROUPS_AT_ONCE = 16, 8
"""What a block takes: tokens, and groups of 64 columns at a time."""


@attrs.frozen
class Quantizer(AbstractProgram):
    """Configuration: the input's type; what factors do to it; the rotation's block; what codes reach.

    `top` and `branch_top` are the largest codes of the main product's and of the branch's activation; `rank_groups` 0
    means no branch, and `thin_whole` that thin rows have one scale a token. With `native` main codes have
    4 bits in memory, else 8.
    """

    input: rows.Kind
    aligned: bool
    factors: Literal["none", "divide", "multiply"]
    block: int
    top: int
    native: bool
    whole: bool
    rank_groups: int
    branch_top: int
    branch_whole: bool
    thin_whole: bool
    span: Span = 1
    """Groups of 64 columns with one scale, in the main activation; of the branch's; in `down`; of thin rows."""
    branch_span: Span = 1
    down_span: Span = 1
    thin_span: Span = 1
    split: bool = False
    """Whether a block takes 8 groups alone, block_y which, and leaves the sums in memory: for few tokens."""

    @property
    def operands(self) -> str:
        return "UUUUUUUUsssss"

    @property
    def threads(self) -> int:
        return 128

    @property
    def resident(self) -> int:
        return 2

    @property
    def shared_bytes(self) -> int:
        if self.split:
            return 0
        limits = 4 * TOKENS * 4 if self.whole or self.branch_whole else 0
        return max(limits, GROUPS_AT_ONCE // self.down_span * TOKENS * self.stride * 4)

    @property
    def stride(self) -> int:
        """Floats from one thin row in shared memory to the next: 4 more, against bank conflicts and for the scale."""
        return self.rank_groups * 64 + 4 if self.rank_groups else 0

    def make(self, gpu: ModuleType) -> Callable[..., None]:
        return _make(gpu, self)


def _make(gpu: Any, program: Quantizer) -> Callable[..., None]:
    rank_groups, stride = program.rank_groups, program.stride
    has_branch, span, branch_span = rank_groups > 0, program.span, program.branch_span
    same = (program.branch_top, program.branch_whole, branch_span) == (program.top, program.whole, span)
    first_pass, whole, branch_whole = program.whole or program.branch_whole, program.whole, program.branch_whole
    load = _load(gpu, program)
    encode = codes.encoder(gpu, program.top)
    encode_branch = encode if same else codes.encoder(gpu, program.branch_top)
    put = _put(gpu, program.native)
    split = program.split
    down_span = program.down_span
    multiply = _multiply(gpu, rank_groups * 64 if split else stride, split, down_span)
    add_up, finish = _add_up(gpu, program), _finish(gpu, program)
    keep_steps = _keep_steps(gpu, stride, split, down_span)
    largest, token_limits = _largest(gpu), _token_limits(gpu)
    thin_count, kept, registers = rank_groups * 8, max(1, rank_groups * 8), gpu.registers

    @gpu.device
    def take(values, limits, words, branch_words, step, side, group, groups, token, padded_tokens, a, scales, member):
        """Round a lane's columns of two groups of a token, and write the main product's codes."""
        low, high = largest(values, 0), largest(values, 16)
        both = gpu.fmax(low, high)
        for half in range(2):
            at, here = (side * 2 + half) * 4, gpu.u32(group + half < groups)
            limit = high if half == 1 else low
            scale = encode(values, half * 16, 16, limits[side] if whole else both if span == 2 else limit, words, at)
            line = (group + half) * padded_tokens + token
            put(a, line, member, words, at, here)
            first = gpu.u32((group + half < groups) & (member == 0))
            gpu.stg32_if(scales + gpu.u64(line * 4), gpu.bits(scale), first)
            if has_branch:
                if same:
                    step[side * 2 + half] = scale
                else:
                    reached = limits[side] if branch_whole else both if branch_span == 2 else limit
                    step[side * 2 + half] = encode_branch(values, half * 16, 16, reached, branch_words, at)

    def kernel(
        x, factors, a, scales, down, down_scales, thin, thin_scales, tokens, padded_tokens, inn, groups, columns
    ):
        thread = gpu.thread()
        lane, warp = thread & 31, thread >> 5
        row, member = lane >> 2, lane & 3
        memory, first_token = gpu.shared(), gpu.block_x() * 16
        values, limits = registers(32, gpu.f32), registers(2, gpu.f32)
        words, branch_words, step = registers(16, gpu.u32), registers(16, gpu.u32), registers(4, gpu.f32)
        sums = registers(kept, gpu.f32)
        for place in range(thin_count):
            sums[place] = gpu.f32(0)
        if first_pass:
            limits[0], limits[1] = gpu.f32(0), gpu.f32(0)
            for base in range(0, groups, 8):
                column, token = (base + warp * 2) * 64 + member * 16, first_token + row
                load(x, factors, token, tokens, column, inn, values, lane)
                limits[0] = gpu.fmax(limits[0], gpu.fmax(largest(values, 0), largest(values, 16)))
                load(x, factors, token + 8, tokens, column, inn, values, lane)
                limits[1] = gpu.fmax(limits[1], gpu.fmax(largest(values, 0), largest(values, 16)))
            token_limits(memory, limits, row, member, warp)
        first_base, last_base = (gpu.block_y() * 8, gpu.block_y() * 8 + 1) if split else (0, groups)
        for base in range(first_base, last_base, 8):
            group = base + warp * 2
            column, token = group * 64 + member * 16, first_token + row
            # Not in a loop: one with so much in it is not unrolled, and then words would lie in memory.
            load(x, factors, token, tokens, column, inn, values, lane)
            take(values, limits, words, branch_words, step, 0, group, groups, token, padded_tokens, a, scales, member)
            token += 8
            load(x, factors, token, tokens, column, inn, values, lane)
            take(values, limits, words, branch_words, step, 1, group, groups, token, padded_tokens, a, scales, member)
            if has_branch:
                codes_of, slot, here = words if same else branch_words, warp * 2 // down_span, gpu.u32(group < groups)
                if split:
                    place = thin + gpu.u64((group // down_span * padded_tokens + first_token) * (rank_groups * 256))
                    beyond = place + gpu.u64(padded_tokens * (rank_groups * 256))
                else:
                    place = memory + slot * (16 * stride * 4)
                    beyond = place + 16 * stride * 4
                keep_steps(place, thin_scales, step, group, groups, first_token, padded_tokens, row, member)
                multiply(down, down_scales, group, columns, codes_of, 0, place, row, member, here)
                if down_span == 1:
                    here = gpu.u32(group + 1 < groups)
                    multiply(down, down_scales, group + 1, columns, codes_of, 1, beyond, row, member, here)
                if not split:
                    gpu.barrier()
                    add_up(memory, sums, min(8, groups - base) // down_span, thread)
                    gpu.barrier()
        if has_branch and not split:
            finish(sums, thin, thin_scales, first_token, padded_tokens, thread)

    return kernel


def _load(gpu: Any, program: Quantizer) -> Any:
    """A function that fills `values`: 16 columns from `column` and 16 from `column + 64`, transformed."""
    block, has_factors, multiplied = program.block, program.factors != "none", program.factors == "multiply"
    get = rows.aligned_load(gpu, program.input) if program.aligned else rows.single_loads(gpu, program.input)
    shrink = 1 / math.sqrt(block)
    steps = min(4, block.bit_length() - 1)
    over_1, over_2, over_groups = block > 16, block > 32, block > 64

    @gpu.device
    def between(values, sign, bit):
        """The butterfly with another lane: that lane's value plus this one's, times `sign`, -1 in the upper lane."""
        for place in range(32):
            own = gpu.bits(values[place])
            other = gpu.lane_xor_1(own) if bit == 1 else gpu.lane_xor_2(own)
            values[place] = gpu.fma(values[place], sign, gpu.as_float(other))

    @gpu.device
    def within(values, step):
        for first in range(0, 32, 2 * step):
            for place in range(first, first + step):
                low, high = values[place], values[place + step]
                values[place] = gpu.fadd(low, high)
                values[place + step] = gpu.fsub(low, high)

    @gpu.device
    def load(x, factors, token, tokens, column, inn, values, lane):
        get(x, token, tokens, column, inn, values, 0)
        get(x, token, tokens, column + 64, inn, values, 16)
        if has_factors:
            for part in range(8):
                four = gpu.ldg128(factors + gpu.u64((column + (part // 4) * 64 + (part % 4) * 4) * 4))
                for place in range(4):
                    at, factor = part * 4 + place, gpu.as_float(four[place])
                    values[at] = gpu.fmul(values[at], factor) if multiplied else gpu.fdiv(values[at], factor)
        if steps > 0:
            within(values, 1)
        if steps > 1:
            within(values, 2)
        if steps > 2:
            within(values, 4)
        if steps > 3:
            within(values, 8)
        if over_1:
            between(values, gpu.as_float(gpu.u32(0x3F800000 | ((lane & 1) << 31))), 1)
        if over_2:
            between(values, gpu.as_float(gpu.u32(0x3F800000 | ((lane & 2) << 30))), 2)
        if over_groups:
            within(values, 16)
        if block > 1:
            for place in range(32):
                values[place] = gpu.fmul(values[place], gpu.f32(shrink))

    return load


def _largest(gpu: Any) -> Any:
    """A function that gives the largest magnitude of a group, the same in its four lanes."""

    @gpu.device
    def largest(values, first):
        found = gpu.fabs(values[first])
        for place in range(1, 16):
            found = gpu.fmax(found, gpu.fabs(values[first + place]))
        found = gpu.fmax(found, gpu.as_float(gpu.lane_xor_1(gpu.bits(found))))
        return gpu.fmax(found, gpu.as_float(gpu.lane_xor_2(gpu.bits(found))))

    return largest


def _token_limits(gpu: Any) -> Any:
    """A function that makes each warp's limits of 16 tokens the block's."""

    @gpu.device
    def token_limits(memory, limits, row, member, warp):
        for side in range(2):
            here = gpu.u32(member == 0)
            gpu.sts32_if(memory + (warp * 16 + row + side * 8) * 4, gpu.bits(limits[side]), here)
        gpu.barrier()
        for side in range(2):
            for other in range(4):
                found = gpu.as_float(gpu.lds32(memory + (other * 16 + row + side * 8) * 4))
                limits[side] = gpu.fmax(limits[side], found)
        gpu.barrier()

    return token_limits


def _put(gpu: Any, native: bool) -> Any:
    """A function that writes a lane's 16 codes of a row: 16 bytes, or 8 with two codes a byte, 4 columns apart."""

    @gpu.device
    def put(a, line, member, words, at, here):
        if native:
            low = gpu.u32((words[at] & 0x0F0F0F0F) | ((words[at + 1] & 0x0F0F0F0F) << 4))
            high = gpu.u32((words[at + 2] & 0x0F0F0F0F) | ((words[at + 3] & 0x0F0F0F0F) << 4))
            gpu.stg64_if(a + gpu.u64(line * 32 + member * 8), low, high, here)
        else:
            at_byte = a + gpu.u64(line * 64 + member * 16)
            gpu.stg128_if(at_byte, words[at], words[at + 1], words[at + 2], words[at + 3], here)

    return put


def _multiply(gpu: Any, stride: int, split: bool, span: Span) -> Any:
    """A function that multiplies the codes of a span with `down` and leaves the sums, times its scales, at `place`.

    That is in shared memory, or in global memory with `split`; `stride` floats lie between a token's and the next's.
    """
    less, start, two_groups = -MAGIC_FLOAT, MAGIC, span == 2

    @gpu.device
    def keep_global(place, at, first, second, here):
        gpu.stg64_if(place + gpu.u64(at), first, second, here)

    @gpu.device
    def keep_shared(place, at, first, second, here):
        gpu.sts64(place + at, first, second)

    keep = keep_global if split else keep_shared

    @gpu.device
    def product(codes, words, b, here, c):
        """16 thin columns of 8 tokens over a group, on top of the sums `c`."""
        one, two = gpu.ldg128_if(codes, here), gpu.ldg128_if(codes + gpu.u64(512), here)
        c = gpu.mma_s8(one[0], one[1], one[2], one[3], words[b], words[b + 1], c[0], c[1], c[2], c[3])
        return gpu.mma_s8(two[0], two[1], two[2], two[3], words[b + 2], words[b + 3], c[0], c[1], c[2], c[3])

    @gpu.device
    def tile(codes, scales, plane, words, half, place, at, here):
        """16 thin columns of 16 tokens; the sums begin at matmul.py's number."""
        pair, s = gpu.ldg32_if(scales, here), gpu.s32(start)
        low, high = gpu.as_float(gpu.u32(pair << 16)), gpu.as_float(gpu.u32(pair & 0xFFFF0000))
        low_less, high_less = gpu.fmul(low, gpu.f32(less)), gpu.fmul(high, gpu.f32(less))
        for side in range(2):
            c = product(codes, words, side * 8 + half * 4, here, (s, s, s, s))
            if two_groups:
                c = product(codes + plane, words, side * 8 + half * 4 + 4, here, c)
            for token in range(2):
                first = gpu.fma(gpu.as_float(gpu.as_unsigned(c[token])), low, low_less)
                second = gpu.fma(gpu.as_float(gpu.as_unsigned(c[2 + token])), high, high_less)
                keep(place, at + (side * 8 + token) * (stride * 4), gpu.bits(first), gpu.bits(second), here)

    @gpu.device
    def multiply(down, down_scales, group, columns, words, half, place, row, member, here):
        plane = gpu.u64(columns * 64)
        codes = down + gpu.u64(group * columns * 64 + (row * 4 + member) * 16)
        scales = down_scales + gpu.u64((group * columns + row * 2) * 2)
        at = gpu.s32((member * 2 * stride + row * 2) * 4)
        # `columns` is an argument so that the compiler does not unroll this loop, read everything first and spill.
        for _ in range(0, columns, 32):
            tile(codes, scales, plane, words, half, place, at, here)
            tile(codes + gpu.u64(1024), scales + gpu.u64(32), plane, words, half, place, at + 64, here)
            codes, scales, at = codes + gpu.u64(2048), scales + gpu.u64(64), gpu.s32(at + 128)

    return multiply


def _keep_steps(gpu: Any, stride: int, split: bool, span: Span) -> Any:
    """A function that leaves the scales of two groups' 16 tokens: behind the thin rows, or in memory with `split`."""
    terms = 2 // span

    @gpu.device
    def keep_steps(place, steps, step, group, groups, first_token, padded_tokens, row, member):
        for side in range(2):
            for half in range(terms):
                scale, token = gpu.bits(step[side * 2 + half]), row + side * 8
                if split:
                    here = gpu.u32((member == 0) & (group + half < groups))
                    line = (group // span + half) * padded_tokens + first_token
                    gpu.stg32_if(steps + gpu.u64((line + token) * 4), scale, here)
                else:
                    at = place + ((half * 16 + token) * stride + stride - 4) * 4
                    gpu.sts32_if(at, scale, gpu.u32(member == 0))

    return keep_steps


def _add_up(gpu: Any, program: Quantizer) -> Any:
    """A function that adds `count` groups' terms, in order, to the 8 places of each rank group that a thread keeps."""
    rank_groups, stride = program.rank_groups, program.stride

    @gpu.device
    def add_up(memory, sums, count, thread):
        token, piece = thread >> 3, thread & 7
        for group in range(count):
            line = memory + (group * 16 + token) * stride * 4
            start, scale = line + piece * 16, gpu.as_float(gpu.lds32(line + (stride - 4) * 4))
            for part in range(rank_groups * 2):
                four = gpu.lds128(start + part * 128)
                for place in range(4):
                    at = part * 4 + place
                    sums[at] = gpu.fma(gpu.as_float(four[place]), scale, sums[at])

    return add_up


def _finish(gpu: Any, program: Quantizer) -> Any:
    """A function that rounds the thin rows and writes their codes and scales; eight threads hold a row."""
    rank_groups, whole, encode = program.rank_groups, program.thin_whole, codes.encoder(gpu, program.branch_top)
    pairs = program.thin_span == 2
    kept, registers = max(1, rank_groups), gpu.registers

    @gpu.device
    def limit_of(sums, group):
        found = gpu.fabs(sums[group * 8])
        for place in range(1, 8):
            found = gpu.fmax(found, gpu.fabs(sums[group * 8 + place]))
        found = gpu.fmax(found, gpu.as_float(gpu.lane_xor_1(gpu.bits(found))))
        found = gpu.fmax(found, gpu.as_float(gpu.lane_xor_2(gpu.bits(found))))
        return gpu.fmax(found, gpu.as_float(gpu.lane_xor_4(gpu.bits(found))))

    @gpu.device
    def finish(sums, thin, thin_scales, first_token, padded_tokens, thread):
        token, piece = first_token + (thread >> 3), thread & 7
        limits, words = registers(kept, gpu.f32), registers(2, gpu.u32)
        for group in range(rank_groups):
            limits[group] = limit_of(sums, group)
        for group in range(1, rank_groups):
            if whole:
                limits[0] = gpu.fmax(limits[0], limits[group])
        for group in range(rank_groups):
            limit = limits[0] if whole else limits[group]
            if pairs:
                limit = gpu.fmax(limit, limits[group ^ 1])
            scale = encode(sums, group * 8, 8, limit, words, 0)
            line = group * padded_tokens + token
            for half in range(2):
                gpu.stg32_if(thin + gpu.u64(line * 64 + half * 32 + piece * 4), words[half], 1)
            gpu.stg32_if(thin_scales + gpu.u64(line * 4), gpu.bits(scale), gpu.u32(piece == 0))

    return finish
