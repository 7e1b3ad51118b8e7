"""The product of a packed layer for at most 16 tokens: every weight is read once, the sooner the better.

A block of 8 warps makes 16 outputs of all tokens. Each warp takes two groups of 64 columns a round, reading weights and
codes straight into registers, the next round's before it computes this one's. Float sums must be added in the order of
the groups, which are spread over the warps: so scaled sums go to shared memory, and after each round every thread adds
up 16 groups, in order, for its one output of one token. Two halves of the memory take turns: one barrier a round. The
branch is a round more, whose sum is kept apart.

Layouts and arguments are those of matmul.py, with 16 rows of activations. Outputs of a block: 4 of every 8 among 32.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import attrs

from . import rows
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
    read_main, multiply_main = _group(gpu, program.weight_bits, program.native)
    read_branch, multiply_branch = _group(gpu, 8, False)
    put = rows.single_store(gpu, program.output)
    stride, round_bytes = _STRIDE, _ROUND

    @gpu.device
    def term(memory, thread, slot):
        """A group's scaled sum for this thread's output."""
        return gpu.as_float(gpu.lds32(memory + ((slot * 16 + (thread >> 4)) * stride + (thread & 15)) * 4))

    def kernel(
        a,
        a_scales,
        w,
        w_scales,
        thin,
        thin_scales,
        up,
        up_scales,
        bias,
        y,
        tokens,
        padded_tokens,
        out,
        padded_out,
        groups,
        branch_groups,
    ):
        thread = gpu.thread()
        lane, warp = thread & 31, thread >> 5
        memory, block = gpu.shared(), gpu.block_x()
        b, following = registers(16, gpu.u32), registers(16, gpu.u32)
        for half in range(2):
            read_main(w, warp * 2 + half, groups, block, padded_out, lane, b, half * 8)
        total, turn = gpu.f32(0), 0
        for base in range(0, groups, 16):
            for half in range(2):
                read_main(w, base + 16 + warp * 2 + half, groups, block, padded_out, lane, following, half * 8)
            for half in range(2):
                slot = warp * 2 + half
                place = memory + turn * round_bytes + slot * (16 * stride * 4)
                multiply_main(a, a_scales, w_scales, base + slot, groups, block, padded_out, lane, b, half * 8, place)
            gpu.barrier()
            for slot in range(min(16, groups - base)):
                total = gpu.fadd(total, term(memory + turn * round_bytes, thread, slot))
            for place in range(16):
                b[place] = following[place]
            turn = 1 - turn
        if branch:
            apart = gpu.f32(0)
            for half in range(2):
                read_branch(up, warp * 2 + half, branch_groups, block, padded_out, lane, b, half * 8)
                slot = warp * 2 + half
                place = memory + turn * round_bytes + slot * (16 * stride * 4)
                multiply_branch(
                    thin, thin_scales, up_scales, slot, branch_groups, block, padded_out, lane, b, half * 8, place
                )
            gpu.barrier()
            for slot in range(branch_groups):
                apart = gpu.fadd(apart, term(memory + turn * round_bytes, thread, slot))
            total = gpu.fadd(total, apart)
        place = thread & 15
        output = (block >> 1) * 32 + (block & 1) * 4 + (place >> 2) * 8 + (place & 3)
        if has_bias:
            total = gpu.fadd(total, gpu.as_float(gpu.ldg32(bias + gpu.u64(output * 4))))
        put(y, thread >> 4, tokens, output, out, total)

    return kernel


def _group(gpu: Any, weight_bits: int, native: bool) -> tuple[Any, Any]:
    """Functions that read a group's weights of 16 outputs, and that multiply them and leave scaled sums at `place`."""
    nibbles = weight_bits == 4
    shrink = 1.0 / 16 if nibbles and not native else 1.0
    stride, registers = _STRIDE, gpu.registers

    @gpu.device
    def read(w, group, groups, block, padded_out, lane, b, at):
        here = gpu.u32(group < groups)
        if nibbles:
            four = gpu.ldg128_if(w + gpu.u64((group * padded_out + block * 16) * 32 + lane * 16), here)
            for word in range(4):
                b[at + word] = four[word]
        else:
            for tile in range(2):
                line = group * padded_out + block * 16 + tile * 8 + (lane >> 2)
                four = gpu.ldg128_if(w + gpu.u64(line * 64 + (lane & 3) * 16), here)
                for word in range(4):
                    b[at + tile * 4 + word] = four[word]

    @gpu.device
    def read_tokens(a, group, lane, words, here):
        """Two rows' 16 columns: four words a row, or two with two codes a byte."""
        for side in range(2):
            row = group * 16 + (lane >> 2) + side * 8
            if native:
                pair = gpu.ldg64_if(a + gpu.u64(row * 32 + (lane & 3) * 8), here)
                words[side * 4], words[side * 4 + 1] = pair[0], pair[1]
            else:
                four = gpu.ldg128_if(a + gpu.u64(row * 64 + (lane & 3) * 16), here)
                for word in range(4):
                    words[side * 4 + word] = four[word]

    @gpu.device
    def product(words, b, at, tile):
        """The integer sums of 16 tokens and a tile's 8 outputs."""
        if native:
            one, two = b[at + tile * 2], b[at + tile * 2 + 1]
            return gpu.mma_s4(words[0], words[4], words[1], words[5], one, two, 0, 0, 0, 0)
        if nibbles:
            one, two = b[at + tile * 2], b[at + tile * 2 + 1]
            low, high = gpu.u32((one << 4) & 0xF0F0F0F0), gpu.u32(one & 0xF0F0F0F0)
            c = gpu.mma_s8(words[0], words[4], words[1], words[5], low, high, 0, 0, 0, 0)
            low, high = gpu.u32((two << 4) & 0xF0F0F0F0), gpu.u32(two & 0xF0F0F0F0)
            return gpu.mma_s8(words[2], words[6], words[3], words[7], low, high, c[0], c[1], c[2], c[3])
        place = at + tile * 4
        c = gpu.mma_s8(words[0], words[4], words[1], words[5], b[place], b[place + 1], 0, 0, 0, 0)
        return gpu.mma_s8(words[2], words[6], words[3], words[7], b[place + 2], b[place + 3], c[0], c[1], c[2], c[3])

    @gpu.device
    def scaled(sum, by_token, by_output):
        return gpu.bits(gpu.fmul(gpu.fmul(gpu.to_float(sum), by_token), by_output))

    @gpu.device
    def multiply(a, a_scales, w_scales, group, groups, block, padded_out, lane, b, at, place):
        here = gpu.u32(group < groups)
        row, member = lane >> 2, lane & 3
        words = registers(8, gpu.u32)
        read_tokens(a, group, lane, words, here)
        output = (block >> 1) * 32 + (block & 1) * 4 + member * 8
        pairs = gpu.ldg64_if(w_scales + gpu.u64((group * padded_out + output) * 2), here)
        by_token = registers(2, gpu.f32)
        for side in range(2):
            word = gpu.ldg32_if(a_scales + gpu.u64((group * 16 + row + side * 8) * 4), here)
            by_token[side] = gpu.fmul(gpu.as_float(word), gpu.f32(shrink))
        for tile in range(2):
            c = product(words, b, at, tile)
            low, high = gpu.as_float(gpu.u32(pairs[tile] << 16)), gpu.as_float(gpu.u32(pairs[tile] & 0xFFFF0000))
            for side in range(2):
                target = place + ((row + side * 8) * stride + member * 4 + tile * 2) * 4
                first = scaled(c[side * 2], by_token[side], low)
                gpu.sts64(target, first, scaled(c[side * 2 + 1], by_token[side], high))

    return read, multiply
