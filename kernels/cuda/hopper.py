"""The product of 4-bit weights by Hopper's own tensor-core instruction, wgmma (sm_90a).

`mma.sync` is said to reach some 60 % of Hopper's rate; wgmma takes one operand from shared memory by itself. Outputs
are its rows and tokens its columns: a warpgroup makes 64 outputs x 128 tokens, a block of two 128 x 128. Weights go
from global memory to registers, one group ahead, and are unpacked there, once for 128 tokens.

With `integers` (int4x2 and one scale a token) each weight is multiplied with its group's integer m, four codes at a
time, since (q + 8) · m + 128 - 8 · m is a number from 8 to 233: no byte reaches into the next, and its upper bit turned
over it is q · m. So the products of a whole row add up in int32, in the accumulators, and the loop does little else.
Else codes count 16 times, as in matmul.py; a group's sums begin at matmul.py's number and are scaled and added there.

Codes of the activations come through a ring of shared memory in the order that wgmma's descriptor tells of: 8 tokens x
16 bytes are a core matrix of 128 bytes, the four of 64 columns side by side, 8 tokens further 512 bytes on. Column
8h + 2m + e of every 16 is token 4m + 2h + e, so that a lane's sums are of 4 neighbouring tokens, whose scales, which
lie behind the codes in natural order, it reads at once.

Sums of the branch are added to those of the main product, group by group. Results are turned in shared memory, so that
rows are written 16 bytes at a time.
Layouts and arguments: matmul.py's, with natural order of columns in the weights (layouts.py). Descriptor and
fragments: PTX ISA 9.0, section 9.7.15.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs

from . import rows
from .instructions import MAGIC_FLOAT
from .program import AbstractProgram

TILE_TOKENS, TILE_OUTPUTS = 128, 128
_CODES = TILE_TOKENS * 64
_STAGE = _CODES + TILE_TOKENS * 4
"""Bytes of a stage: codes, and scales of the tokens."""
_STRIDE = TILE_OUTPUTS + 4
"""Floats from a token to the next while results are turned; 4 more than there are, against bank conflicts."""
# Bytes from a core matrix to the next along columns and along tokens, as the descriptor holds them: in 16s.
_DESCRIPTOR = (128 // 16) << 16 | (512 // 16) << 32


@attrs.frozen
class Hopper(AbstractProgram):
    """Configuration: as Matmul's, and whether sums stay integers or are scaled group by group."""

    integers: bool
    branch: bool
    bias: bool
    output: rows.Kind
    aligned: bool
    stages: int = 4

    @property
    def operands(self) -> str:
        return "UUUUUUUUUUUssssss"

    @property
    def threads(self) -> int:
        return 256

    @property
    def resident(self) -> int:
        return 1 if self.branch or not self.integers else 2

    @property
    def shared_bytes(self) -> int:
        return max(self.stages * _STAGE, 64 * _STRIDE * 4)

    def make(self, gpu: ModuleType) -> Callable[..., None]:
        return _make(gpu, self)


def _make(gpu: Any, program: Hopper) -> Callable[..., None]:
    stages, stage_bytes, branch, integers = program.stages, _STAGE, program.branch, program.integers
    copy_wait, registers, last = getattr(gpu, f"copy_wait_{stages - 2}"), gpu.registers, (stages - 1) * _STAGE
    place_in_memory, point, copy = _copies(gpu)
    read_nibbles, unpack = _nibbles(gpu, integers)
    read_bytes, add_scaled, scale_rows = _read_bytes(gpu), _add_scaled(gpu), _scale_rows(gpu)
    multiply, finish = _multiply(gpu), _finish(gpu, program)

    @gpu.device
    def fetch(place, index, groups, branch_groups, at, steps, side, where):
        """Start the copies of stage `index`. Addresses in the main matrix run along; the branch's few are computed."""
        if index < groups:
            copy(place, at, where)
            at[0], at[1] = at[0] + steps[0], at[1] + steps[1]
        elif branch and index < gpu.number(groups + branch_groups):
            here, ahead = registers(2, gpu.u64), registers(2, gpu.u64)
            point(here, ahead, side, where)
            for part in range(2):
                here[part] = here[part] + ahead[part] * gpu.u64(index - groups)
            copy(place, here, where)
        gpu.copy_commit()

    @gpu.device
    def step(place, index, groups, branch_groups, at, steps, side, where):
        """Wait for a stage, see to it that the tensor core sees it, and start the copies of a later one to `place`."""
        copy_wait()
        gpu.fence_async()
        gpu.barrier()
        fetch(place, gpu.number(index + stages - 1), groups, branch_groups, at, steps, side, where)

    def kernel(
        a, a_scales, w, w_scales, thin, thin_scales, up, up_scales, bias, y, row_scales,
        tokens, padded_tokens, out, padded_out, groups, branch_groups
    ):  # fmt: skip
        thread, ring = gpu.thread(), gpu.shared()
        token, first_output = gpu.block_x() * 128, gpu.block_y() * 128
        warp_output = first_output + (thread >> 5) * 16
        here_at_all = gpu.u32(warp_output < padded_out)
        side, where = (thin, thin_scales), (token, padded_tokens, thread, place_in_memory(thread))
        words, ahead, codes = registers(5, gpu.u32), registers(5, gpu.u32), registers(8, gpu.u32)
        at, steps = registers(2, gpu.u64), registers(2, gpu.u64)
        point(at, steps, (a, a_scales), where)
        for index in range(stages - 1):
            fetch(ring + index * stage_bytes, index, groups, branch_groups, at, steps, side, where)
        totals, sums = gpu.zeros(), registers(64, gpu.f32)
        for place in range(64):
            sums[place] = gpu.f32(0)
        read_nibbles(w, w_scales, 0, padded_out, warp_output, thread, here_at_all, words)
        here, free = gpu.number(0), gpu.number(last)
        for index in range(groups):
            step(ring + free, index, groups, branch_groups, at, steps, side, where)
            # Behind the fence, which waits for what was read before it.
            wanted = gpu.u32(here_at_all & (gpu.number(index + 1) < groups))
            read_nibbles(w, w_scales, index + 1, padded_out, warp_output, thread, wanted, ahead)
            unpack(words, codes)
            if integers:
                totals = multiply(codes, ring + here, totals)
            else:
                found = multiply(codes, ring + here, gpu.magic_zeros())
                add_scaled(found, sums, ring + here, words[4], thread)
            free = here
            here = gpu.number(0) if here == last else gpu.number(here + stage_bytes)
            for place in range(5):
                words[place] = ahead[place]
        if integers:
            scale_rows(totals, sums, a_scales, row_scales, token, warp_output, thread, here_at_all)
        if branch:
            for index in range(branch_groups):
                pair = read_bytes(up, up_scales, index, padded_out, warp_output, thread, here_at_all, codes)
                step(ring + free, gpu.number(groups + index), groups, branch_groups, at, steps, side, where)
                found = multiply(codes, ring + here, gpu.magic_zeros())
                add_scaled(found, sums, ring + here, pair, thread)
                free = here
                here = gpu.number(0) if here == last else gpu.number(here + stage_bytes)
        finish(sums, bias, y, ring, thread, token, tokens, first_output, out, padded_out)

    return kernel


def _copies(gpu: Any) -> tuple[Any, Any, Any]:
    """Functions for the copies of a stage: where a thread's pieces go, where they begin, and that starts them.

    A thread takes 16 bytes of codes of two tokens 64 apart, a warp 8 tokens, and the first warp the tokens' scales.
    """
    codes_bytes = _CODES

    @gpu.device
    def place_in_memory(thread):
        return (thread >> 5) * 512 + (thread & 31) * 16

    @gpu.device
    def point(at, steps, matrices, where):
        codes, scales = matrices
        token, tokens, thread, _ = where
        column = (thread >> 5) * 8 + (thread & 7)
        mine = (column & -16) + ((column >> 1) & 3) * 4 + ((column >> 3) & 1) * 2 + (column & 1)
        at[0], steps[0] = codes + gpu.u64((token + mine) * 64 + ((thread >> 3) & 3) * 16), gpu.u64(tokens * 64)
        at[1], steps[1] = scales + gpu.u64(token * 4 + (thread & 31) * 16), gpu.u64(tokens * 4)

    @gpu.device
    def copy(place, at, where):
        thread, inside = where[2], where[3]
        gpu.copy16_if(place + inside, at[0], 1)
        gpu.copy16_if(place + inside + 4096, at[0] + gpu.u64(4096), 1)
        gpu.copy16_if(place + codes_bytes + (thread & 31) * 16, at[1], gpu.u32(thread < 32))

    return place_in_memory, point, copy


def _lower_output(gpu: Any) -> Any:
    """A function that gives the output of a lane's lower row; the upper row's is the next (layouts.py)."""

    @gpu.device
    def lower_output(warp_output, thread):
        return (warp_output & -32) + (warp_output & 16) // 8 + ((thread & 31) >> 2) * 4

    return lower_output


def _nibbles(gpu: Any, integers: bool) -> tuple[Any, Any]:
    """Functions that read a lane's 32 weights of a group, four words, with its outputs' two scales, and that unpack.

    The scales are integers where sums are.
    """
    lower_output, registers = _lower_output(gpu), gpu.registers

    @gpu.device
    def read(w, scales, group, padded_out, warp_output, thread, here, words):
        line = group * padded_out
        four = gpu.ldg128_if(w + gpu.u64((line + warp_output) * 32 + (thread & 31) * 16), here)
        for word in range(4):
            words[word] = four[word]
        words[4] = gpu.ldg32_if(scales + gpu.u64((line + lower_output(warp_output, thread)) * 2), here)

    @gpu.device
    def multiplied(nibbles, multiplier, addend):
        """(q in the low half of each byte) to q · multiplier in each byte."""
        unsigned = gpu.u32((nibbles & 0x0F0F0F0F) ^ 0x08080808)
        return gpu.u32(gpu.u32(unsigned * multiplier + addend) ^ 0x80808080)

    @gpu.device
    def unpack(words, codes):
        multipliers, addends = registers(2, gpu.u32), registers(2, gpu.u32)
        multipliers[0], multipliers[1] = gpu.u32(words[4] & 0xFFFF), gpu.u32(words[4] >> 16)
        for side in range(2):
            addends[side] = gpu.u32(0x80808080 - gpu.u32(multipliers[side] * 0x08080808))
        for side in range(2):
            for part in range(2):
                word = words[side * 2 + part]
                if integers:
                    codes[part * 4 + side] = multiplied(word, multipliers[side], addends[side])
                    codes[part * 4 + 2 + side] = multiplied(gpu.u32(word >> 4), multipliers[side], addends[side])
                else:
                    codes[part * 4 + side] = gpu.u32((word << 4) & 0xF0F0F0F0)
                    codes[part * 4 + 2 + side] = gpu.u32(word & 0xF0F0F0F0)

    return read, unpack


def _multiply(gpu: Any) -> Any:
    """A function that adds to a warpgroup's sums the product of its weights with a stage's codes, 64 columns."""
    descriptor = _DESCRIPTOR

    @gpu.device
    def multiply(codes, place, totals):
        first = gpu.u64(descriptor) + gpu.u64(place >> 4)
        second = gpu.u64(descriptor + 16) + gpu.u64(place >> 4)
        return gpu.wgmma_s8(
            codes[0], codes[1], codes[2], codes[3], codes[4], codes[5], codes[6], codes[7], first, second, *totals
        )  # fmt: skip

    return multiply


def _read_bytes(gpu: Any) -> Any:
    """A function that reads a lane's 32 codes of a group of `up`, and gives its outputs' two scales."""
    lower_output = _lower_output(gpu)

    @gpu.device
    def read(up, scales, group, padded_out, warp_output, thread, here, codes):
        line = group * padded_out
        for part in range(2):
            place = up + gpu.u64((line + warp_output) * 64 + (thread & 31) * 32 + part * 16)
            four = gpu.ldg128_if(place, here)
            for register in range(4):
                codes[part * 4 + register] = four[register]
        return gpu.ldg32_if(scales + gpu.u64((line + lower_output(warp_output, thread)) * 2), here)

    return read


def _add_scaled(gpu: Any) -> Any:
    """A function that adds a group's sums, scaled by output, then by token; they began at `magic_zeros` (matmul.py).

    A lane's sums are [16 tokens j][half h][output s][token e]: output s of two, token 16j + 4m + 2h + e.
    """
    less, codes_bytes = -MAGIC_FLOAT, _CODES

    @gpu.device
    def twice_16(found, sums, place, first, lower, upper, lower_less, upper_less):
        for sixteen in range(first, first + 2):
            by_token = gpu.lds128(place + sixteen * 64)
            for token in range(4):
                scale, at = gpu.as_float(by_token[token]), sixteen * 8 + token // 2 * 4 + token % 2
                value = gpu.fma(gpu.as_float(gpu.as_unsigned(found[at])), lower, lower_less)
                sums[at] = gpu.fma(value, scale, sums[at])
                value = gpu.fma(gpu.as_float(gpu.as_unsigned(found[at + 2])), upper, upper_less)
                sums[at + 2] = gpu.fma(value, scale, sums[at + 2])

    @gpu.device
    def add(found, sums, stage, pair, thread):
        lower, upper = gpu.as_float(gpu.u32(pair << 16)), gpu.as_float(gpu.u32(pair & 0xFFFF0000))
        lower_less, upper_less = gpu.fmul(lower, gpu.f32(less)), gpu.fmul(upper, gpu.f32(less))
        place = stage + codes_bytes + (thread & 3) * 16
        # Not in one loop: it would not be unrolled, and then the sums would lie in memory.
        twice_16(found, sums, place, 0, lower, upper, lower_less, upper_less)
        twice_16(found, sums, place, 2, lower, upper, lower_less, upper_less)
        twice_16(found, sums, place, 4, lower, upper, lower_less, upper_less)
        twice_16(found, sums, place, 6, lower, upper, lower_less, upper_less)

    return add


def _scale_rows(gpu: Any) -> Any:
    """A function that scales integer sums over all columns: by output, then by token."""
    lower_output = _lower_output(gpu)

    @gpu.device
    def twice_16(totals, sums, scales, first, lower, upper):
        for sixteen in range(first, first + 2):
            by_token = gpu.ldg128(scales + gpu.u64(sixteen * 64))
            for token in range(4):
                scale, at = gpu.as_float(by_token[token]), sixteen * 8 + token // 2 * 4 + token % 2
                sums[at] = gpu.fmul(gpu.fmul(gpu.to_float(totals[at]), lower), scale)
                sums[at + 2] = gpu.fmul(gpu.fmul(gpu.to_float(totals[at + 2]), upper), scale)

    @gpu.device
    def scale_rows(totals, sums, a_scales, row_scales, token, warp_output, thread, here):
        pair = gpu.ldg32_if(row_scales + gpu.u64(lower_output(warp_output, thread) * 2), here)
        lower, upper = gpu.as_float(gpu.u32(pair << 16)), gpu.as_float(gpu.u32(pair & 0xFFFF0000))
        scales = a_scales + gpu.u64((token + (thread & 3) * 4) * 4)
        twice_16(totals, sums, scales, 0, lower, upper)
        twice_16(totals, sums, scales, 2, lower, upper)
        twice_16(totals, sums, scales, 4, lower, upper)
        twice_16(totals, sums, scales, 6, lower, upper)

    return scale_rows


def _finish(gpu: Any, program: Hopper) -> Any:
    """A function that adds the bias, turns the tile in shared memory, and writes it."""
    has_bias, stride, registers = program.bias, _STRIDE, gpu.registers
    put = rows.aligned_store(gpu, program.output) if program.aligned else rows.single_stores(gpu, program.output)
    lower_output = _lower_output(gpu)

    @gpu.device
    def turn(first, sums, lower, upper, ring, thread, output):
        """32 tokens to shared memory."""
        for sixteen in range(first, first + 2):
            for token in range(4):
                at, row = sixteen * 8 + token // 2 * 4 + token % 2, sixteen % 4 * 16 + (thread & 3) * 4 + token
                one, two = sums[at], sums[at + 2]
                if has_bias:
                    one, two = gpu.fadd(one, lower), gpu.fadd(two, upper)
                gpu.sts64(ring + (row * stride + output) * 4, gpu.bits(one), gpu.bits(two))

    @gpu.device
    def write(round, values, y, ring, thread, token, tokens, first_output, out):
        """64 tokens of 128 outputs from shared memory, 8 outputs a thread at a time."""
        for part in range(4):
            row, column = part * 16 + (thread >> 4), (thread & 15) * 8
            for quarter in range(2):
                four = gpu.lds128(ring + (row * stride + column + quarter * 4) * 4)
                for place in range(4):
                    values[quarter * 4 + place] = gpu.as_float(four[place])
            put(y, token + round * 64 + row, tokens, first_output + column, out, values)

    @gpu.device
    def finish(sums, bias, y, ring, thread, token, tokens, first_output, out, outputs):
        output, values = lower_output((thread >> 5) * 16, thread), registers(8, gpu.f32)
        lower, upper = gpu.f32(0), gpu.f32(0)
        if has_bias:
            here = gpu.u32(first_output + output < outputs)
            pair = gpu.ldg64_if(bias + gpu.u64((first_output + output) * 4), here)
            lower, upper = gpu.as_float(pair[0]), gpu.as_float(pair[1])
        gpu.barrier()
        turn(0, sums, lower, upper, ring, thread, output)
        turn(2, sums, lower, upper, ring, thread, output)
        gpu.barrier()
        write(0, values, y, ring, thread, token, tokens, first_output, out)
        gpu.barrier()
        turn(4, sums, lower, upper, ring, thread, output)
        turn(6, sums, lower, upper, ring, thread, output)
        gpu.barrier()
        write(1, values, y, ring, thread, token, tokens, first_output, out)

    return finish
