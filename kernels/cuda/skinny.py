"""The product of a packed layer for at most 16 tokens: every weight is read once, the sooner the better.

A block of 8 warps makes 16 outputs of all tokens. Each warp takes two groups of 64 columns a round, or a span of two,
reading weights and codes straight into registers, the next round's before it computes this one's. Float sums must be
added in the order of the groups, which are spread over the warps: so sums times the weights' scales go to shared
memory, the tokens' scales beside them, and after each round every thread multiplies and adds up 16 groups, in order,
for its one output of one token. Two halves of the memory take turns: one barrier a round. The branch is a round more.

Layouts and arguments are those of matmul.py, with 16 rows of activations. Outputs of a block: 2 of every 4 among 32.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import attrs

from . import rows
from .plan import Span
from .program import AbstractProgram

TOKENS, OUTPUTS, GROUPS_AT_ONCE = 16, 16, 16
_STRIDE = OUTPUTS + 4
"""Floats from a token's sums to the next one's in shared memory; 4 more than there are, against bank conflicts."""
_ROUND = GROUPS_AT_ONCE * TOKENS * _STRIDE * 4


@attrs.frozen
class Skinny(AbstractProgram):
    """Configuration: as Matmul's."""

    weight_bits: Literal[4, 8]
    native: bool
    branch: bool
    bias: bool
    output: rows.Kind
    span: Span = 1
    up_span: Span = 1

    @property
    def operands(self) -> str:
        return "UUUUUUUUUUssssss"

    @property
    def threads(self) -> int:
        return 256

    @property
    def resident(self) -> int:
        return 2

    @property
    def shared_bytes(self) -> int:
        return 2 * _ROUND

    def make(self, gpu: ModuleType) -> Callable[..., None]:
        return _make(gpu, self)


def _make(gpu: Any, program: Skinny) -> Callable[..., None]:
    branch, has_bias, registers = program.branch, program.bias, gpu.registers
    span, up_span = program.span, program.up_span
    read_main, multiply_main = _group(gpu, program.weight_bits, program.native, span)
    read_branch, multiply_branch = _group(gpu, 8, False, up_span)
    terms, up_terms, at_once = 2 // span, 2 // up_span, 16 // span
    put = rows.single_store(gpu, program.output)
    stride, round_bytes = _STRIDE, _ROUND

    @gpu.device
    def with_term(total, memory, thread, slot):
        """`total` and a group's scaled sum for this thread's output."""
        line = memory + (slot * 16 + (thread >> 4)) * (stride * 4)
        term, scale = gpu.lds32(line + (thread & 15) * 4), gpu.lds32(line + (stride - 4) * 4)
        return gpu.fma(gpu.as_float(term), gpu.as_float(scale), total)

    def kernel(
        a, a_scales, w, w_scales, thin, thin_scales, up, up_scales, bias, y,
        tokens, padded_tokens, out, padded_out, groups, branch_groups
    ):  # fmt: skip
        thread = gpu.thread()
        lane, warp = thread & 31, thread >> 5
        memory, block = gpu.shared(), gpu.block_x()
        b, following = registers(16, gpu.u32), registers(16, gpu.u32)
        planes, up_planes = groups * span, branch_groups * up_span
        for half in range(2):
            read_main(w, warp * 2 + half, planes, block, padded_out, lane, b, half * 8)
        total, turn = gpu.f32(0), 0
        for base in range(0, groups, at_once):
            for half in range(2):
                plane = base * span + 16 + warp * 2 + half
                read_main(w, plane, planes, block, padded_out, lane, following, half * 8)
            for half in range(terms):
                slot = warp * terms + half
                place = memory + turn * round_bytes + slot * (16 * stride * 4)
                multiply_main(a, a_scales, w_scales, base + slot, groups, block, padded_out, lane, b, half * 8, place)
            gpu.barrier()
            for slot in range(min(at_once, groups - base)):
                total = with_term(total, memory + turn * round_bytes, thread, slot)
            for place in range(16):
                b[place] = following[place]
            turn = 1 - turn
        if branch:
            for half in range(2):
                read_branch(up, warp * 2 + half, up_planes, block, padded_out, lane, b, half * 8)
            for half in range(up_terms):
                slot = warp * up_terms + half
                place = memory + turn * round_bytes + slot * (16 * stride * 4)
                multiply_branch(
                    thin, thin_scales, up_scales, slot, branch_groups, block, padded_out, lane, b, half * 8, place
                )
            gpu.barrier()
            for slot in range(branch_groups):
                total = with_term(total, memory + turn * round_bytes, thread, slot)
        place = thread & 15
        output = (block >> 1) * 32 + (place >> 1) * 4 + (block & 1) * 2 + (place & 1)
        if has_bias:
            total = gpu.fadd(total, gpu.as_float(gpu.ldg32(bias + gpu.u64(output * 4))))
        put(y, thread >> 4, tokens, output, out, total)

    return kernel


def _group(gpu: Any, weight_bits: int, native: bool, span: Span) -> tuple[Any, Any]:
    """Functions that read a group's weights of 16 outputs, and that multiply a span's and leave the sums at `place`."""
    nibbles = weight_bits == 4
    stride, registers, two_groups, count = _STRIDE, gpu.registers, span == 2, 8 * span

    @gpu.device
    def read(w, group, groups, block, padded_out, lane, b, at):
        here = gpu.u32(group < groups)
        for part in range(1 if nibbles else 2):
            place = (group * padded_out + block * 16) * (32 if nibbles else 64) + part * 512 + lane * 16
            four = gpu.ldg128_if(w + gpu.u64(place), here)
            for word in range(4):
                b[at + part * 4 + word] = four[word]

    @gpu.device
    def read_tokens(a, group, lane, words, at, here):
        """16 columns of a token of either half: four words, or two with two codes a byte."""
        for side in range(2):
            row = group * 16 + (lane >> 2) + side * 8
            if native:
                pair = gpu.ldg64_if(a + gpu.u64(row * 32 + (lane & 3) * 8), here)
                words[at + side * 4], words[at + side * 4 + 1] = pair[0], pair[1]
            else:
                four = gpu.ldg128_if(a + gpu.u64(row * 64 + (lane & 3) * 16), here)
                for word in range(4):
                    words[at + side * 4 + word] = four[word]

    @gpu.device
    def shifted(w, at, step, x, y, c):
        """A product of 32 columns by codes that lie two in a byte, on top of the sums `c`."""
        one, two = w[at + step * 2], w[at + step * 2 + 1]
        a0, a1 = gpu.u32((one << 4) & 0xF0F0F0F0), gpu.u32((two << 4) & 0xF0F0F0F0)
        a2, a3 = gpu.u32(one & 0xF0F0F0F0), gpu.u32(two & 0xF0F0F0F0)
        return gpu.mma_s8(a0, a1, a2, a3, x, y, c[0], c[1], c[2], c[3])

    @gpu.device
    def product(words, w, at, side, c):
        """The integer sums of 16 outputs and 8 tokens over a group, on top of the sums `c`."""
        x = side * 4
        if native:
            return gpu.mma_s4(w[at], w[at + 1], w[at + 2], w[at + 3], words[x], words[x + 1], c[0], c[1], c[2], c[3])
        if nibbles:
            c = shifted(w, at, 0, words[x], words[x + 1], c)
            return shifted(w, at, 1, words[x + 2], words[x + 3], c)
        c = gpu.mma_s8(w[at], w[at + 1], w[at + 2], w[at + 3], words[x], words[x + 1], c[0], c[1], c[2], c[3])
        last = w[at + 4], w[at + 5], w[at + 6], w[at + 7]
        return gpu.mma_s8(*last, words[x + 2], words[x + 3], c[0], c[1], c[2], c[3])

    @gpu.device
    def scaled(sum, by_output):
        return gpu.bits(gpu.fmul(gpu.to_float(sum), by_output))

    @gpu.device
    def multiply(a, a_scales, w_scales, group, groups, block, padded_out, lane, b, at, place):
        here = gpu.u32(group < groups)
        row, member = lane >> 2, lane & 3
        words = registers(count, gpu.u32)
        for plane in range(span):
            read_tokens(a, group * span + plane, lane, words, plane * 8, here)
        output = (block >> 1) * 32 + row * 4 + (block & 1) * 2
        pair = gpu.ldg32_if(w_scales + gpu.u64((group * span * padded_out + output) * 2), here)
        low, high = gpu.as_float(gpu.u32(pair << 16)), gpu.as_float(gpu.u32(pair & 0xFFFF0000))
        by_token = gpu.ldg32_if(a_scales + gpu.u64((group * span * 16 + (lane & 15)) * 4), here)
        gpu.sts32_if(place + ((lane & 15) * stride + stride - 4) * 4, by_token, gpu.u32(lane < 16))
        for side in range(2):
            c = product(words, b, at, side, (gpu.s32(0), gpu.s32(0), gpu.s32(0), gpu.s32(0)))
            if two_groups:
                c = product(words, b, at + 8, side + 2, c)
            for token in range(2):
                target = place + ((side * 8 + member * 2 + token) * stride + row * 2) * 4
                gpu.sts64(target, scaled(c[token], low), scaled(c[2 + token], high))

    return read, multiply
