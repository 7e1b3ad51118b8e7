"""The product of a packed layer for many tokens, on the tensor cores: main weight, branch and bias in one pass.

    y[t, o] = Σ_g (Σ_k a[g, t, k] · w[g, o, k]) · a_scales[g, t] · w_scales[g, o]  +  the same of the branch  +  bias[o]

A block of 8 warps makes 128 tokens x 64 outputs, each warp 32 x 32. Codes stream through a ring of shared memory, 64
columns a stage, by asynchronous copies. Each stage is one group: its integer sums are exact, and are then scaled into
float32 in the reference's order, (sum · a_scale) · w_scale, added group by group. The branch's `up` is `branch_groups`
more stages of the same ring, with 8-bit codes on both sides.

How codes lie, so that each lane loads 16 bytes of shared memory without bank conflicts (layouts.py makes it):

- activations, and weights of 8 bits: (groups, rows, 64) bytes. A lane takes 16 neighbouring columns of a row, and calls
  them whatever columns the tensor core's fragment says: within a group the order is free, if both sides agree;
- weights of 4 bits: 1 KB for 32 outputs, see layouts.py. Shifting and masking a word gives 8 codes times 16, as int8;
- within 32 outputs, rows are in such an order that a lane ends up with 8 neighbouring outputs.

No integer is ever converted: the sums start at 0x4B400000, so that their bits are the float 1.5·2^23 + sum, and
fma(float, scale, -1.5·2^23 · scale) is sum · scale rounded once. That holds for |sum| < 2^22.

With `native`, activations are 4-bit codes as well and the tensor core multiplies them as they are (compute capability
8.x; from 9.0 on this instruction is emulated, and 4-bit activations are kept in bytes).
With `integers`, each group's sum is multiplied by an integer of each output, which takes the scale's place, and added
up in integers over all columns; the token's scale, a_scales[0], and `row_scales` (outputs,) come at the end. So the
two-level format int4x2, and scales that are one a row on both sides, need no floating point in the loop.

Fragments: PTX ISA 9.0, mma.m16n8k32 and mma.m16n8k64. Magic number: the folklore of float conversion, e.g. FBGEMM.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by Numba.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import attrs

from . import rows
from .device import blocks_by_shared
from .instructions import MAGIC, MAGIC_FLOAT
from .program import AbstractProgram

TILE_TOKENS, TILE_OUTPUTS, GROUP = 128, 64, 64


@attrs.frozen
class Matmul(AbstractProgram):
    """Configuration of the product: `weight_bits` 4 or 8 of the main weight, how the rest is, and the output's type.

    `branch` is the number of branch groups, 0, 1, or 2 for more than one; their sum is then kept apart, as the
    reference has it. `aligned` says that rows of the output are whole runs of 8.
    """

    weight_bits: Literal[4, 8]
    native: bool
    branch: Literal[0, 1, 2]
    bias: bool
    output: rows.Kind
    aligned: bool
    integers: bool = False
    """Whether sums over all columns stay integers: one scale a token and an output, and an integer a group (int4x2)."""
    stages: int = 4
    """Of the ring in shared memory; the shortest has 3."""

    @property
    def operands(self) -> str:
        return "UUUUUUUUUUUssssss"

    @property
    def threads(self) -> int:
        return 256

    @property
    def resident(self) -> int:
        return 1 if self.branch == 2 else 2

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def stage_bytes(self) -> int:
        """Bytes of one stage: activations, weights, scales of either."""
        a_bytes = TILE_TOKENS * GROUP
        b_bytes = TILE_OUTPUTS * GROUP
        if not self.branch:
            a_bytes, b_bytes = a_bytes // (2 if self.native else 1), b_bytes * self.weight_bits // 8
        return a_bytes + b_bytes + 4 * TILE_TOKENS + 2 * TILE_OUTPUTS

    def make(self, gpu: ModuleType) -> Callable[..., None]:
        return _make(gpu, self)

    def fitted(self, architecture: str) -> Matmul:
        """The same with as many stages as leave room for the blocks that its registers leave room for."""
        if blocks_by_shared(architecture, self.shared_bytes) >= self.resident:
            return self
        return attrs.evolve(self, stages=3)


def _make(gpu: Any, program: Matmul) -> Callable[..., None]:
    stages, stage_bytes, branch = program.stages, program.stage_bytes, program.branch
    a_row = GROUP // 2 if program.native else GROUP
    w_row = GROUP * program.weight_bits // 8
    scales_at = stage_bytes - 4 * TILE_TOKENS - 2 * TILE_OUTPUTS
    weights_at = scales_at - TILE_OUTPUTS * (GROUP if branch else w_row)
    copy_wait = getattr(gpu, f"copy_wait_{stages - 2}")
    multiply_main = _group(gpu, program.weight_bits, program.native, program.integers, weights_at, scales_at)
    multiply_branch = _group(gpu, 8, False, False, weights_at, scales_at)
    fetch_main = _fetch(gpu, a_row, w_row, weights_at, scales_at)
    fetch_branch = _fetch(gpu, GROUP, GROUP, weights_at, scales_at)
    scale_rows, store = _scale_rows(gpu), _store(gpu, program)
    integers, count, registers = program.integers, 32, gpu.registers

    @gpu.device
    def multiply_main_into(place, sums, totals, thread):
        if integers:
            multiply_main(place, totals, thread)
        else:
            multiply_main(place, sums, thread)

    def kernel(
        a, a_scales, w, w_scales, thin, thin_scales, up, up_scales, bias, y, row_scales,
        tokens, padded_tokens, out, padded_out, groups, branch_groups
    ):  # fmt: skip
        thread, ring = gpu.thread(), gpu.shared()
        token, output = gpu.block_x() * 128, gpu.block_y() * 64
        main, side = (a, a_scales, w, w_scales), (thin, thin_scales, up, up_scales)
        where = (token, padded_tokens, output, padded_out, thread)
        sums, totals = registers(32, gpu.f32), registers(32, gpu.s32)
        for place in range(count):
            sums[place], totals[place] = gpu.f32(0), gpu.s32(0)
        total = groups + branch_groups
        for index in range(stages - 1):
            if index < groups:
                fetch_main(ring + index * stage_bytes, index, main, where)
            elif branch > 0 and index < total:
                fetch_branch(ring + index * stage_bytes, index - groups, side, where)
            gpu.copy_commit()
        slot = 0
        for index in range(groups):
            copy_wait()
            gpu.barrier()
            ahead, target = index + stages - 1, ring + (slot + stages - 1) % stages * stage_bytes
            if ahead < groups:
                fetch_main(target, ahead, main, where)
            elif branch > 0 and ahead < total:
                fetch_branch(target, ahead - groups, side, where)
            gpu.copy_commit()
            multiply_main_into(ring + slot * stage_bytes, sums, totals, thread)
            slot = (slot + 1) % stages
        if integers:
            scale_rows(totals, sums, a_scales, row_scales, token, output, thread)
        if branch == 1:
            copy_wait()
            gpu.barrier()
            multiply_branch(ring + slot * stage_bytes, sums, thread)
        if branch == 2:
            apart = registers(32, gpu.f32)
            for place in range(count):
                apart[place] = gpu.f32(0)
            for index in range(branch_groups):
                copy_wait()
                gpu.barrier()
                ahead, target = index + stages - 1, ring + (slot + stages - 1) % stages * stage_bytes
                if ahead < branch_groups:
                    fetch_branch(target, ahead, side, where)
                gpu.copy_commit()
                multiply_branch(ring + slot * stage_bytes, apart, thread)
                slot = (slot + 1) % stages
            for place in range(count):
                sums[place] = gpu.fadd(sums[place], apart[place])
        store(sums, bias, y, thread, token, tokens, output, out)

    return kernel


def _fetch(gpu: Any, a_row: int, w_row: int, weights_at: int, scales_at: int) -> Any:
    """A function that starts the copies of one group's tile; `a_row` and `w_row` bytes a row."""
    a_pieces, w_pieces = TILE_TOKENS * a_row // 16, TILE_OUTPUTS * w_row // 16

    @gpu.device
    def copy(target, source, pieces, thread):
        """`pieces` of 16 bytes that lie together, 256 at a time."""
        for first in range(0, pieces, 256):
            piece = first + thread
            gpu.copy16_if(target + piece * 16, source + gpu.u64(piece * 16), gpu.u32(piece < pieces))

    @gpu.device
    def copy_scales(target, of_tokens, of_outputs, thread):
        """128 float32 scales of tokens by the first warp, 64 scales of two bytes of outputs by the second."""
        gpu.copy16_if(target + thread * 16, of_tokens + gpu.u64(thread * 16), gpu.u32(thread < 32))
        piece = (thread - 32) & 7
        here = (thread >= 32) & (thread < 40)
        gpu.copy16_if(target + 512 + piece * 16, of_outputs + gpu.u64(piece * 16), gpu.u32(here))

    @gpu.device
    def fetch(place, group, sources, where):
        a, a_scales, w, w_scales = sources
        token, tokens, output, outputs, thread = where
        a_first, w_first = group * tokens + token, group * outputs + output
        copy(place, a + gpu.u64(a_first * a_row), a_pieces, thread)
        copy(place + weights_at, w + gpu.u64(w_first * w_row), w_pieces, thread)
        copy_scales(place + scales_at, a_scales + gpu.u64(a_first * 4), w_scales + gpu.u64(w_first * 2), thread)

    return fetch


def _group(gpu: Any, weight_bits: int, native: bool, integers: bool, weights_at: int, scales_at: int) -> Any:
    """A function that multiplies one group's tile from shared memory and adds it, scaled, to a warp's 32 x 32 sums.

    With `integers` the sums are integers, and what scales them by output are integers, too.
    """
    nibbles = weight_bits == 4
    # A code in the upper half of a byte counts 16 times.
    shrink = 1.0 / 16 if nibbles and not native else 1.0
    less, start = -MAGIC_FLOAT, 0 if integers else MAGIC
    shift = 4 if nibbles and not native else 0
    registers = gpu.registers

    @gpu.device
    def add(sums, place, sum, by_token, less, by_output):
        value = gpu.fma(gpu.as_float(gpu.as_unsigned(sum)), by_token, less)
        sums[place] = gpu.fadd(sums[place], gpu.fmul(value, by_output))

    @gpu.device
    def add_integers(totals, at, c, low, high):
        for place in range(4):
            by_output = high if place % 2 else low
            totals[at + place] = gpu.s32(totals[at + place] + (c[place] >> shift) * by_output)

    @gpu.device
    def load_tokens(place, words, row, member):
        """The activations' fragments, `words` (2 tiles, 2 rows, 4): 16 columns of 4 rows."""
        for tile in range(2):
            for side in range(2):
                at = tile * 8 + side * 4
                where = row + tile * 16 + side * 8
                if native:
                    pair = gpu.lds64(place + where * 32 + member * 8)
                    words[at], words[at + 1] = pair[0], pair[1]
                else:
                    four = gpu.lds128(place + where * 64 + member * 16)
                    for word in range(4):
                        words[at + word] = four[word]

    @gpu.device
    def product(words, tile, b):
        """The integer sums of 16 tokens and 8 outputs over the group, four a lane."""
        one, two = tile * 8, tile * 8 + 4
        s = gpu.s32(start)
        if native:
            return gpu.mma_s4(words[one], words[two], words[one + 1], words[two + 1], b[0], b[1], s, s, s, s)
        c = gpu.mma_s8(words[one], words[two], words[one + 1], words[two + 1], b[0], b[1], s, s, s, s)
        return gpu.mma_s8(
            words[one + 2], words[two + 2], words[one + 3], words[two + 3], b[2], b[3], c[0], c[1], c[2], c[3]
        )

    @gpu.device
    def load_outputs(place, b, j, row, member, lane):
        """The fragments of 8 outputs' weights, from where this warp's 32 lie."""
        if nibbles:
            pair = gpu.lds64(place + (j // 2) * 512 + lane * 16 + (j % 2) * 8)
            if native:
                b[0], b[1] = pair[0], pair[1]
            else:
                for step in range(2):
                    b[step * 2] = gpu.u32((pair[step] << 4) & 0xF0F0F0F0)
                    b[step * 2 + 1] = gpu.u32(pair[step] & 0xF0F0F0F0)
        else:
            four = gpu.lds128(place + (j * 8 + row) * 64 + member * 16)
            for word in range(4):
                b[word] = four[word]

    @gpu.device
    def multiply(place, sums, thread):
        lane, warp = thread & 31, thread >> 5
        row, member = lane >> 2, lane & 3
        token, output = (warp & 3) * 32, (warp >> 2) * 32
        words, b = registers(16, gpu.u32), registers(4, gpu.u32)
        load_tokens(place + token * (32 if native else 64), words, row, member)
        by_token, minus = registers(4, gpu.f32), registers(4, gpu.f32)
        for side in range(4):
            word = gpu.lds32(place + scales_at + (token + row + side * 8) * 4)
            by_token[side] = gpu.fmul(gpu.as_float(word), gpu.f32(shrink))
            minus[side] = gpu.fmul(by_token[side], gpu.f32(less))
        pairs = gpu.lds128(place + scales_at + 512 + (output + member * 8) * 2)
        for j in range(4):
            load_outputs(place + weights_at + output * (32 if nibbles else 64), b, j, row, member, lane)
            low, high = gpu.as_float(gpu.u32(pairs[j] << 16)), gpu.as_float(gpu.u32(pairs[j] & 0xFFFF0000))
            for tile in range(2):
                c = product(words, tile, b)
                at, side = tile * 16 + j * 4, tile * 2
                if integers:
                    add_integers(sums, at, c, gpu.s32(pairs[j] & 0xFFFF), gpu.s32(pairs[j] >> 16))
                    continue
                add(sums, at, c[0], by_token[side], minus[side], low)
                add(sums, at + 1, c[1], by_token[side], minus[side], high)
                add(sums, at + 2, c[2], by_token[side + 1], minus[side + 1], low)
                add(sums, at + 3, c[3], by_token[side + 1], minus[side + 1], high)

    return multiply


def _scale_rows(gpu: Any) -> Any:
    """A function that scales integer sums over all columns: by token, then by output."""

    @gpu.device
    def scale_rows(totals, sums, a_scales, row_scales, token, output, thread):
        lane, warp = thread & 31, thread >> 5
        row, column = token + (warp & 3) * 32 + (lane >> 2), output + (warp >> 2) * 32 + (lane & 3) * 8
        pairs = gpu.ldg128(row_scales + gpu.u64(column * 2))
        for side in range(4):
            by_token = gpu.as_float(gpu.ldg32(a_scales + gpu.u64((row + side * 8) * 4)))
            for j in range(4):
                low, high = gpu.as_float(gpu.u32(pairs[j] << 16)), gpu.as_float(gpu.u32(pairs[j] & 0xFFFF0000))
                at = (side // 2) * 16 + j * 4 + (side % 2) * 2
                sums[at] = gpu.fmul(gpu.fmul(gpu.to_float(totals[at]), by_token), low)
                sums[at + 1] = gpu.fmul(gpu.fmul(gpu.to_float(totals[at + 1]), by_token), high)

    return scale_rows


def _store(gpu: Any, program: Matmul) -> Any:
    """A function that adds the bias to a warp's sums and writes them: 8 neighbouring outputs of 4 tokens a lane."""
    has_bias, aligned = program.bias, program.aligned
    put = rows.aligned_store(gpu, program.output) if aligned else rows.single_stores(gpu, program.output)
    registers = gpu.registers

    @gpu.device
    def store(sums, bias, y, thread, token, tokens, output, out):
        lane, warp = thread & 31, thread >> 5
        row, column = token + (warp & 3) * 32 + (lane >> 2), output + (warp >> 2) * 32 + (lane & 3) * 8
        added, values = registers(8, gpu.f32), registers(8, gpu.f32)
        if has_bias:
            for half in range(2):
                four = gpu.ldg128(bias + gpu.u64((column + half * 4) * 4))
                for place in range(4):
                    added[half * 4 + place] = gpu.as_float(four[place])
        for side in range(4):
            for place in range(8):
                value = sums[(side // 2) * 16 + (place // 2) * 4 + (side % 2) * 2 + place % 2]
                values[place] = gpu.fadd(value, added[place]) if has_bias else value
            put(y, row + side * 8, tokens, column, out, values)

    return store
