"""The product of 4-bit weights by Hopper's own tensor-core instruction, wgmma (sm_90a).

`mma.sync` is said to reach some 60 % of Hopper's rate; wgmma takes one operand from shared memory by itself. Here
outputs are its rows and tokens its columns: a warpgroup makes 64 outputs x 128 tokens, a block of two 128 x 128.
Weights go from global memory to registers, are unpacked and multiplied with their group's integer there, once for 128
tokens:

    (q + 8) · m for four codes in one multiplication, since no byte exceeds 15 · 15; then 8 · m off every byte

so that with int4x2 and one scale a token the products of a whole row add up in int32, in the accumulators, with no
other work in the loop. Else a group's sums begin anew and are scaled into floats, as in matmul.py. Codes of the
activations come through a ring of shared memory in the order that wgmma's descriptor tells of: 8 tokens x 16 bytes are
a core matrix of 128 bytes, the four of 64 columns side by side, 8 tokens further 512 bytes on.

The branch goes first, scaled group by group into floats that are added to the main sums at the end. Results are turned
in shared memory, so that rows are written 16 bytes at a time.
Layouts and arguments: matmul.py's, with 4-bit weights in natural order of columns (layouts.py). Descriptor and
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
_STAGE = TILE_TOKENS * 64
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
    stages, stage_bytes, branch = program.stages, _STAGE, program.branch
    copy_wait, registers = getattr(gpu, f"copy_wait_{stages - 2}"), gpu.registers
    read_nibbles, unpack = _nibbles(gpu, program.integers)
    read_bytes, add_scaled = _read_bytes(gpu), _add_scaled(gpu)
    integers = program.integers
    multiply, finish = _multiply(gpu), _finish(gpu, program)

    @gpu.device
    def fetch(place, codes, group, where):
        """Start the copies of a group's codes: a warp takes 8 tokens, 8 lanes a core matrix."""
        token, tokens, thread = where
        for part in range(2):
            piece = part * 256 + thread
            row, chunk = (piece >> 5) * 8 + (piece & 7), (piece >> 3) & 3
            source = codes + gpu.u64((group * tokens + token + row) * 64 + chunk * 16)
            gpu.copy16_if(place + piece * 16, source, 1)

    @gpu.device
    def fetch_any(place, a, thin, index, groups, branch_groups, where):
        if branch and index < branch_groups:
            fetch(place, thin, index, where)
        elif index < branch_groups + groups:
            fetch(place, a, index - branch_groups, where)

    @gpu.device
    def step(ring, slot, a, thin, index, groups, branch_groups, where):
        """Wait for a stage, see to it that the tensor core sees it, and start the copies of a later one."""
        copy_wait()
        gpu.fence_async()
        gpu.barrier()
        target = ring + (slot + stages - 1) % stages * stage_bytes
        fetch_any(target, a, thin, index + stages - 1, groups, branch_groups, where)
        gpu.copy_commit()

    def kernel(
        a, a_scales, w, w_scales, thin, thin_scales, up, up_scales, bias, y, row_scales,
        tokens, padded_tokens, out, padded_out, groups, branch_groups
    ):  # fmt: skip
        thread, ring = gpu.thread(), gpu.shared()
        token, first_output = gpu.block_x() * 128, gpu.block_y() * 128
        warp_output = first_output + (thread >> 5) * 16
        where = (token, padded_tokens, thread)
        words, ahead, codes = registers(6, gpu.u32), registers(6, gpu.u32), registers(8, gpu.u32)
        apart = registers(64, gpu.f32)
        for place in range(64):
            apart[place] = gpu.f32(0)
        for index in range(stages - 1):
            fetch_any(ring + index * stage_bytes, a, thin, index, groups, branch_groups, where)
            gpu.copy_commit()
        slot = 0
        if branch:
            for index in range(branch_groups):
                read_bytes(up, index, warp_output, padded_out, thread, codes)
                step(ring, slot, a, thin, index, groups, branch_groups, where)
                found = multiply(codes, ring + slot * stage_bytes, gpu.magic_zeros())
                add_scaled(found, apart, thin_scales, up_scales, index, warp_output, padded_out, where)
                slot = (slot + 1) % stages
        totals, sums = gpu.zeros(), registers(64, gpu.f32)
        for place in range(64):
            sums[place] = gpu.f32(0)
        read_nibbles(w, w_scales, 0, groups, warp_output, padded_out, thread, words)
        for index in range(groups):
            read_nibbles(w, w_scales, index + 1, groups, warp_output, padded_out, thread, ahead)
            step(ring, slot, a, thin, branch_groups + index, groups, branch_groups, where)
            unpack(words, codes)
            if integers:
                totals = multiply(codes, ring + slot * stage_bytes, totals)
            else:
                found = multiply(codes, ring + slot * stage_bytes, gpu.magic_zeros())
                add_scaled(found, sums, a_scales, w_scales, index, warp_output, padded_out, where)
            slot = (slot + 1) % stages
            for place in range(6):
                words[place] = ahead[place]
        finish(
            totals,
            sums,
            apart,
            a_scales,
            row_scales,
            bias,
            y,
            ring,
            thread,
            token,
            tokens,
            first_output,
            out,
            padded_out,
        )

    return kernel


def _outputs(gpu: Any) -> Any:
    """A function that gives the output of a lane's lower row; the upper row's is two further (layouts.py)."""

    @gpu.device
    def lower_output(warp_output, thread):
        row = (thread & 31) >> 2
        return (warp_output & -32) + (warp_output & 16) // 4 + (row >> 1) * 8 + (row & 1)

    return lower_output


def _nibbles(gpu: Any, integers: bool) -> tuple[Any, Any]:
    """Functions that read a lane's 32 weights of a group, four words, with two multipliers, and that unpack them.

    The multipliers are 1 where sums do not stay integers.
    """
    lower_output = _outputs(gpu)

    @gpu.device
    def read(w, multipliers, group, groups, warp_output, padded_out, thread, words):
        here = gpu.u32((group < groups) & (warp_output < padded_out))
        line = group * padded_out
        four = gpu.ldg128_if(w + gpu.u64((line + warp_output) * 32 + (thread & 31) * 16), here)
        for word in range(4):
            words[word] = four[word]
        if integers:
            lower = multipliers + gpu.u64((line + lower_output(warp_output, thread)) * 2)
            words[4] = gpu.ldg16_if(lower, here)
            words[5] = gpu.ldg16_if(lower + gpu.u64(4), here)
        else:
            words[4], words[5] = gpu.u32(1), gpu.u32(1)

    @gpu.device
    def bytes_of(nibbles, multiplier):
        """(code + 8 in each byte) to code · multiplier in each byte."""
        product = gpu.u32(nibbles * multiplier)
        lowered = gpu.u32((product | 0x80808080) - gpu.u32(multiplier * 0x08080808))
        return gpu.u32(lowered ^ (gpu.u32(product ^ 0xFFFFFFFF) & 0x80808080))

    @gpu.device
    def unpack(words, codes):
        for side in range(2):
            for part in range(2):
                word = gpu.u32(words[side * 2 + part] ^ 0x88888888)
                codes[part * 4 + side] = bytes_of(gpu.u32(word & 0x0F0F0F0F), words[4 + side])
                codes[part * 4 + 2 + side] = bytes_of(gpu.u32((word >> 4) & 0x0F0F0F0F), words[4 + side])

    return read, unpack


def _multiply(gpu: Any) -> Any:
    """A function that adds to a warpgroup's sums the product of its weights with a stage's codes, 64 columns."""
    descriptor = _DESCRIPTOR

    @gpu.device
    def multiply(codes, place, totals):
        first = gpu.u64(descriptor) | gpu.u64((place >> 4) & 0x3FFF)
        second = gpu.u64(descriptor) | gpu.u64(((place + 256) >> 4) & 0x3FFF)
        return gpu.wgmma_s8(
            codes[0], codes[1], codes[2], codes[3], codes[4], codes[5], codes[6], codes[7], first, second, *totals
        )  # fmt: skip

    return multiply


def _read_bytes(gpu: Any) -> Any:
    """A function that reads a lane's 32 codes of a group of `up`."""

    @gpu.device
    def read(up, group, warp_output, padded_out, thread, codes):
        here = gpu.u32(warp_output < padded_out)
        row, member = (thread & 31) >> 2, thread & 3
        for part in range(2):
            for register in range(4):
                line = group * padded_out + warp_output + row + (register & 1) * 8
                at = up + gpu.u64(line * 64 + part * 32 + (register >> 1) * 16 + member * 4)
                codes[part * 4 + register] = gpu.ldg32_if(at, here)

    return read


def _add_scaled(gpu: Any) -> Any:
    """A function that adds a group's sums, scaled by token, then by output; they began at `magic_zeros` (matmul.py)."""
    lower_output, less = _outputs(gpu), -MAGIC_FLOAT

    @gpu.device
    def four_tiles(found, sums, scales, first, lower, upper):
        for tile in range(first, first + 4):
            pair = gpu.ldg64(scales + gpu.u64(tile * 32))
            for column in range(2):
                scale = gpu.as_float(pair[column])
                minus = gpu.fmul(scale, gpu.f32(less))
                for side in range(2):
                    at = tile * 4 + side * 2 + column
                    value = gpu.fma(gpu.as_float(gpu.as_unsigned(found[at])), scale, minus)
                    sums[at] = gpu.fadd(sums[at], gpu.fmul(value, upper if side == 1 else lower))

    @gpu.device
    def add(found, sums, by_token, by_output, group, warp_output, outputs, where):
        token, tokens, thread = where
        here = gpu.u32(warp_output < outputs)
        at = by_output + gpu.u64((group * outputs + lower_output(warp_output, thread)) * 2)
        lower = gpu.as_float(gpu.u32(gpu.ldg16_if(at, here) << 16))
        upper = gpu.as_float(gpu.u32(gpu.ldg16_if(at + gpu.u64(4), here) << 16))
        # Not in one loop: it would not be unrolled, and then the sums would lie in memory.
        at = by_token + gpu.u64((group * tokens + token + (thread & 3) * 2) * 4)
        four_tiles(found, sums, at, 0, lower, upper)
        four_tiles(found, sums, at, 4, lower, upper)
        four_tiles(found, sums, at, 8, lower, upper)
        four_tiles(found, sums, at, 12, lower, upper)

    return add


def _finish(gpu: Any, program: Hopper) -> Any:
    """A function that scales the sums, adds branch and bias, turns the tile in shared memory, and writes it."""
    has_branch, has_bias, integers = program.branch, program.bias, program.integers
    stride, registers = _STRIDE, gpu.registers
    put = rows.aligned_store(gpu, program.output) if program.aligned else rows.single_stores(gpu, program.output)
    lower_output = _outputs(gpu)

    @gpu.device
    def two_tiles(first, totals, sums, apart, a_scales, scales, added, ring, thread, token, output):
        """16 tokens to shared memory."""
        for tile in range(first, first + 2):
            pair = gpu.ldg64(a_scales + gpu.u64((token + tile * 8 + (thread & 3) * 2) * 4))
            for place in range(4):
                at, side = tile * 4 + place, place // 2
                value = sums[at]
                if integers:
                    value = gpu.fmul(gpu.fmul(gpu.to_float(totals[at]), gpu.as_float(pair[place % 2])), scales[side])
                if has_branch:
                    value = gpu.fadd(value, apart[at])
                if has_bias:
                    value = gpu.fadd(value, added[side])
                row = tile % 8 * 8 + (thread & 3) * 2 + place % 2
                gpu.sts32(ring + (row * stride + output + side * 2) * 4, gpu.bits(value))

    @gpu.device
    def half(first, totals, sums, apart, a_scales, scales, added, ring, thread, token, output):
        """64 tokens to shared memory. Not in a loop: that would not be unrolled, and the sums would lie in memory."""
        two_tiles(first, totals, sums, apart, a_scales, scales, added, ring, thread, token, output)
        two_tiles(first + 2, totals, sums, apart, a_scales, scales, added, ring, thread, token, output)
        two_tiles(first + 4, totals, sums, apart, a_scales, scales, added, ring, thread, token, output)
        two_tiles(first + 6, totals, sums, apart, a_scales, scales, added, ring, thread, token, output)

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
    def finish(
        totals, sums, apart, a_scales, row_scales, bias, y, ring, thread, token, tokens, first_output, out, outputs
    ):
        output = lower_output((thread >> 5) * 16, thread)
        scales, added, values = registers(2, gpu.f32), registers(2, gpu.f32), registers(8, gpu.f32)
        here = gpu.u32(first_output + output < outputs)
        for side in range(2):
            at = first_output + output + side * 2
            if integers:
                scales[side] = gpu.as_float(gpu.u32(gpu.ldg16_if(row_scales + gpu.u64(at * 2), here) << 16))
            if has_bias:
                added[side] = gpu.as_float(gpu.ldg32_if(bias + gpu.u64(at * 4), here))
        gpu.barrier()
        half(0, totals, sums, apart, a_scales, scales, added, ring, thread, token, output)
        gpu.barrier()
        write(0, values, y, ring, thread, token, tokens, first_output, out)
        gpu.barrier()
        half(8, totals, sums, apart, a_scales, scales, added, ring, thread, token, output)
        gpu.barrier()
        write(1, values, y, ring, thread, token, tokens, first_output, out)

    return finish
