"""The product of a packed layer for many tokens, on the tensor cores: main weight, branch and bias in one pass.

    y[t, o] = Σ_g a_scales[g, t] · (w_scales[g, o] · Σ_k a[g, t, k] · w[g, o, k])  +  the same of the branch  +  bias[o]

A block of 8 warps makes 128 tokens x 64 outputs, each warp 32 x 32, or one of 4 wide warps 64 x 32 each. Codes and
scales stream through a ring of shared memory, 64 columns a stage or a span of 128, by asynchronous copies. Each stage
has one scale: its integer sums are exact, and are then scaled and added to float32 sums stage by stage, as loraq/ops.py
says. The branch's `up` is `branch_groups` more stages of the same ring, with 8-bit codes on both sides.

Outputs are the rows of the tensor core's product and tokens its columns. How codes lie, so that each lane loads 16
bytes of shared memory at a time, without bank conflicts, into the very registers that an instruction takes:

- activations: (groups, rows, 64) bytes. A lane takes 16 neighbouring columns of a row, and calls them whatever columns
  the fragment says: within a group the order is free, if both sides agree;
- weights: as fragments, see layouts.py. Of 4 bits, shifting and masking a word gives 8 codes times 16, as int8, and the
  scales in memory are a sixteenth (prepared.py);
- rows are in such an order that a lane ends up with 4 neighbouring outputs, of 8 tokens.

No integer is ever converted: the sums start at 0x4B400000, so that their bits are the float 1.5·2^23 + sum, and
fma(float, scale, -1.5·2^23 · scale) is sum · scale rounded once. That holds for |sum| < 2^22. Another fma multiplies by
the token's scale and adds: two operations an output and group. What is spent beside them decides the speed where tensor
cores are fast, so fragments are loaded as they are wanted, and addresses run along instead of being computed.

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
from .plan import Span
from .program import AbstractProgram

TILE_TOKENS, TILE_OUTPUTS, GROUP = 128, 64, 64
WIDE_ARCHITECTURES = ("80", "90", "90a", "100")
"""Where scaling takes longer than the tensor cores take, and shared memory has room for three blocks: wide warps."""


@attrs.frozen
class Matmul(AbstractProgram):
    """Configuration of the product: `weight_bits` 4 or 8 of the main weight, how the rest is, and the output's type.

    `aligned` says that rows of the output are whole runs of 8.
    """

    weight_bits: Literal[4, 8]
    native: bool
    branch: bool
    bias: bool
    output: rows.Kind
    aligned: bool
    integers: bool = False
    """Whether sums over all columns stay integers: one scale a token and an output, and an integer a group (int4x2)."""
    stages: int = 4
    """Of the ring in shared memory; the shortest has 3."""
    wide: bool = False
    """Whether a warp makes 64 tokens, for which weights are unpacked once, and a block has 4 of them."""
    span: Span = 1
    """Groups of 64 columns that have one scale: a stage. The same of `up`'s."""
    up_span: Span = 1

    @property
    def operands(self) -> str:
        return "UUUUUUUUUUUssssss"

    @property
    def threads(self) -> int:
        return 128 if self.wide else 256

    @property
    def resident(self) -> int:
        if self.span * self.up_span > 1:  # some 150 registers
            return 1
        return 3 if self.wide else 2

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def stage_bytes(self) -> int:
        """Bytes of one stage: activations, weights, scales of either. A branch has 8 bits on both sides."""
        main = _stage(GROUP // 2 if self.native else GROUP, GROUP * self.weight_bits // 8, self.span)
        return max(main, _stage(GROUP, GROUP, self.up_span)) if self.branch else main

    def make(self, gpu: ModuleType) -> Callable[..., None]:
        return _make(gpu, self)

    def fitted(self, architecture: str) -> Matmul:
        """The same with as many stages as leave room for the blocks that its registers leave room for."""
        if blocks_by_shared(architecture, self.shared_bytes) >= self.resident:
            return self
        return attrs.evolve(self, stages=3)


def _stage(a_row: int, w_row: int, span: Span) -> int:
    """Bytes of a stage with rows of so many bytes: activations, weights, scales of tokens, scales of outputs."""
    return TILE_TOKENS * (a_row * span + 4) + TILE_OUTPUTS * (w_row * span + 2)


def _make(gpu: Any, program: Matmul) -> Callable[..., None]:
    stages, stage_bytes, branch = program.stages, program.stage_bytes, program.branch
    a_row = GROUP // 2 if program.native else GROUP
    w_row = GROUP * program.weight_bits // 8
    copy_wait = getattr(gpu, f"copy_wait_{stages - 2}")
    places_main, multiply_main = _group(gpu, program, program.weight_bits, program.span)
    plain = attrs.evolve(program, native=False, integers=False)
    places_branch, multiply_branch = _group(gpu, plain, 8, program.up_span)
    point_main, copy_main = _copies(gpu, a_row, w_row, program.threads, program.span)
    point_branch, copy_branch = _copies(gpu, GROUP, GROUP, program.threads, program.up_span)
    scale_rows, store, count = _scale_rows(gpu, program.wide), _store(gpu, program), 64 if program.wide else 32
    integers, registers, last = program.integers, gpu.registers, (stages - 1) * stage_bytes

    @gpu.device
    def multiply_main_into(place, places, sums, totals):
        if integers:
            multiply_main(place, places, totals)
        else:
            multiply_main(place, places, sums)

    @gpu.device
    def fetch_branch(place, index, branch_groups, side, where):
        """Start the copies of stage `index` of the branch: its few addresses are computed."""
        if index < branch_groups:
            here, ahead = registers(3, gpu.u64), registers(3, gpu.u32)
            point_branch(here, ahead, side, where)
            for part in range(3):
                here[part] = here[part] + gpu.u64(ahead[part]) * gpu.u64(index)
            copy_branch(place, here, where)

    @gpu.device
    def fetch(place, index, groups, branch_groups, at, steps, side, where):
        """Start the copies of stage `index`. Addresses in the main matrix run along."""
        if index < groups:
            copy_main(place, at, where)
            for part in range(3):
                at[part] = at[part] + gpu.u64(steps[part])
        elif branch:
            fetch_branch(place, gpu.number(index - groups), branch_groups, side, where)
        gpu.copy_commit()

    def kernel(
        a, a_scales, w, w_scales, thin, thin_scales, up, up_scales, bias, y, row_scales,
        tokens, padded_tokens, out, padded_out, groups, branch_groups
    ):  # fmt: skip
        thread, ring = gpu.thread(), gpu.shared()
        token, output = gpu.block_x() * 128, gpu.block_y() * 64
        side = (thin, thin_scales, up, up_scales)
        where = (token, padded_tokens, output, padded_out, thread)
        sums, totals = registers(count, gpu.f32), registers(count, gpu.s32)
        places = registers(4, gpu.s32)
        at, steps = registers(3, gpu.u64), registers(3, gpu.u32)
        for place in range(count):
            sums[place], totals[place] = gpu.f32(0), gpu.s32(0)
        point_main(at, steps, (a, a_scales, w, w_scales), where)
        for index in range(stages - 1):
            fetch(ring + index * stage_bytes, index, groups, branch_groups, at, steps, side, where)
        here, free = gpu.number(0), gpu.number(last)
        places_main(places, thread)
        for index in range(groups):
            copy_wait()
            gpu.barrier()
            fetch(ring + free, gpu.number(index + stages - 1), groups, branch_groups, at, steps, side, where)
            multiply_main_into(ring + here, places, sums, totals)
            free = here
            here = gpu.number(0) if here == last else gpu.number(here + stage_bytes)
        if integers:
            scale_rows(totals, sums, a_scales, row_scales, token, output, thread)
        if branch:
            places_branch(places, thread)
            for index in range(branch_groups):
                copy_wait()
                gpu.barrier()
                fetch_branch(ring + free, gpu.number(index + stages - 1), branch_groups, side, where)
                gpu.copy_commit()
                multiply_branch(ring + here, places, sums)
                free = here
                here = gpu.number(0) if here == last else gpu.number(here + stage_bytes)
        store(sums, bias, y, thread, token, tokens, output, out)

    return kernel


def _copies(gpu: Any, a_row: int, w_row: int, threads: int, span: Span) -> tuple[Any, Any]:
    """Functions that point each thread at its pieces of the first stage, and that start a stage's copies.

    A stage is pieces of 16 bytes, piece p by thread p % threads: activations and weights, each one group after the
    other, scales of tokens (32 pieces) and of outputs (8). The first two are whole rounds of all threads, but weights
    of 4 bits may be half a round, behind which the scales follow in the same one.
    """
    a_rounds, w_pieces = TILE_TOKENS * a_row // 16 // threads, TILE_OUTPUTS * w_row // 16
    w_rounds, rest = divmod(w_pieces * span, threads)
    step = threads * 16

    @gpu.device
    def point(at, steps, matrices, where):
        a, a_scales, w, w_scales = matrices
        token, tokens, output, outputs, thread = where
        at[0], steps[0] = a + gpu.u64(token * a_row + thread * 16), gpu.u32(tokens * (a_row * span))
        piece = output * w_row + thread % w_pieces * 16 + thread // w_pieces * (outputs * w_row)
        at[1], steps[1] = w + gpu.u64(piece), gpu.u32(outputs * (w_row * span))
        is_weight, is_token = gpu.u32(thread < rest), gpu.u32((thread >= rest) & (thread < rest + 32))
        is_output = gpu.u32(thread >= rest + 32)
        of_tokens = a_scales + gpu.u64(token * 4 + ((thread - rest) & 31) * 16)
        of_outputs = w_scales + gpu.u64(output * 2 + ((thread - rest) & 7) * 16)
        at[2] = at[1] * gpu.u64(is_weight) + of_tokens * gpu.u64(is_token) + of_outputs * gpu.u64(is_output)
        scale_step = gpu.u32(tokens * (4 * span)) * is_token + gpu.u32(outputs * (2 * span)) * is_output
        steps[2] = gpu.u32(steps[1] * is_weight + scale_step)

    @gpu.device
    def copy(place, at, where):
        _, tokens, _, outputs, thread = where
        mine = place + thread * 16
        for group in range(span):
            for part in range(a_rounds):
                source = at[0] + gpu.u64(part * step)
                if group > 0:
                    source = source + gpu.u64(tokens * a_row)
                gpu.copy16_if(mine + (group * a_rounds + part) * step, source, 1)
        for part in range(w_rounds):
            source = at[1] + gpu.u64(part * threads % w_pieces * 16)
            if part * threads >= w_pieces:
                source = source + gpu.u64(outputs * w_row)
            gpu.copy16_if(mine + (span * a_rounds + part) * step, source, 1)
        gpu.copy16_if(mine + (span * a_rounds + w_rounds) * step, at[2], gpu.u32(thread < rest + 40))

    return point, copy


def _group(gpu: Any, program: Matmul, weight_bits: int, span: Span) -> tuple[Any, Any]:
    """Functions that tell a lane its places in a stage, and that add a stage's span to a warp's sums.

    Sums are scaled; with `integers` they are integers, and what scales them by output are integers, too. A lane's sums
    are [8 tokens t][16 outputs i][output h][token e]: output 4r + 2i + h of 32, token 8t + 2m + e of 32 or 64.
    """
    native, integers, wide, nibbles = program.native, program.integers, program.wide, weight_bits == 4
    less, start, registers = -MAGIC_FLOAT, 0 if integers else MAGIC, gpu.registers
    shift = 4 if nibbles and not native else 0  # a code in the upper half of a byte counts 16 times
    a_row, w_row = 32 if native else 64, 64 * weight_bits // 8
    a_group, w_group = TILE_TOKENS * a_row, TILE_OUTPUTS * w_row
    weights_at = a_group * span
    scales_at, two_groups = weights_at + w_group * span, span == 2
    lane_place = _lane_place(gpu, wide)

    @gpu.device
    def find(places, thread):
        """Where a lane's activations, weights, scales of tokens and of outputs lie in a stage."""
        lane = thread & 31
        token, output = lane_place(thread)
        places[0] = gpu.s32((token + (lane >> 2)) * a_row + (lane & 3) * (a_row // 4))
        places[1] = gpu.s32(weights_at + output * w_row + lane * 16)
        places[2] = gpu.s32(scales_at + (token + (lane & 3) * 2) * 4)
        places[3] = gpu.s32(scales_at + TILE_TOKENS * 4 + (output + (lane >> 2) * 4) * 2)

    @gpu.device
    def add(sums, at, sum, by_output, less, by_token):
        value = gpu.fma(gpu.as_float(gpu.as_unsigned(sum)), by_output, less)
        sums[at] = gpu.fma(value, by_token, sums[at])

    @gpu.device
    def add_integer(totals, at, sum, by_output):
        totals[at] = gpu.s32(totals[at] + (sum >> shift) * by_output)

    @gpu.device
    def load_tokens(place, b, tile):
        """The fragments of 8 tokens, `b` (groups, 2 products, 2), or one product's: 16 columns of a token."""
        for group in range(span):
            if native:
                pair = gpu.lds64(place + group * a_group + tile * (8 * a_row))
                b[group * 4], b[group * 4 + 1] = pair[0], pair[1]
            else:
                four = gpu.lds128(place + group * a_group + tile * (8 * a_row))
                for word in range(4):
                    b[group * 4 + word] = four[word]

    @gpu.device
    def load_outputs(place, a, at, half):
        """The fragments of 16 outputs, `a[at:]` (2 products, 4), or one product's where it is native."""
        if nibbles:
            four = gpu.lds128(place + half * 512)
            for word in range(4):
                if native:
                    a[at + word] = four[word]
                else:
                    low, high = gpu.u32((four[word] << 4) & 0xF0F0F0F0), gpu.u32(four[word] & 0xF0F0F0F0)
                    a[at + word // 2 * 4 + word % 2], a[at + word // 2 * 4 + word % 2 + 2] = low, high
        else:
            for step in range(2):
                four = gpu.lds128(place + half * 1024 + step * 512)
                for word in range(4):
                    a[at + step * 4 + word] = four[word]

    @gpu.device
    def product(a, at, b, first, c):
        """The integer sums of 16 outputs and 8 tokens over a group, four a lane, on top of the sums `c`."""
        if native:
            return gpu.mma_s4(a[at], a[at + 1], a[at + 2], a[at + 3], b[first], b[first + 1], c[0], c[1], c[2], c[3])
        c = gpu.mma_s8(a[at], a[at + 1], a[at + 2], a[at + 3], b[first], b[first + 1], c[0], c[1], c[2], c[3])
        last = a[at + 4], a[at + 5], a[at + 6], a[at + 7]
        return gpu.mma_s8(*last, b[first + 2], b[first + 3], c[0], c[1], c[2], c[3])

    @gpu.device
    def add_tile(sums, tile, half, c, pair, factors, less_factors, integer_factors):
        """Add the sums of 16 outputs and 8 tokens."""
        for side in range(2):
            by_output = half * 2 + side
            for token in range(2):
                here, sum = tile * 8 + half * 4 + side * 2 + token, c[side * 2 + token]
                if integers:
                    add_integer(sums, here, sum, integer_factors[by_output])
                else:
                    add(sums, here, sum, factors[by_output], less_factors[by_output], gpu.as_float(pair[token]))

    @gpu.device
    def multiply_32(first, place, places, sums, a, factors, less_factors, integer_factors):
        """32 tokens, whose first 8 are the warp's `first`, over a group."""
        b, s = registers(4, gpu.u32), gpu.s32(start)
        for tile in range(first, first + 4):
            load_tokens(place + places[0], b, tile)
            pair = gpu.lds64(place + places[2] + tile * 32)
            for half in range(2):
                c = product(a, half * 8, b, 0, (s, s, s, s))
                add_tile(sums, tile, half, c, pair, factors, less_factors, integer_factors)

    @gpu.device
    def multiply_both(half, place, places, sums, a, factors, less_factors, integer_factors):
        """16 outputs over two groups."""
        b, s = registers(8, gpu.u32), gpu.s32(start)
        for tile in range(4):
            load_tokens(place + places[0], b, tile)
            pair = gpu.lds64(place + places[2] + tile * 32)
            c = product(a, 8, b, 4, product(a, 0, b, 0, (s, s, s, s)))
            add_tile(sums, tile, half, c, pair, factors, less_factors, integer_factors)

    @gpu.device
    def multiply(place, places, sums):
        a, factors, less_factors = registers(16, gpu.u32), registers(4, gpu.f32), registers(4, gpu.f32)
        integer_factors = registers(4, gpu.s32)
        two = gpu.lds64(place + places[3])
        for half in range(2):
            factors[half * 2] = gpu.as_float(gpu.u32(two[half] << 16))
            factors[half * 2 + 1] = gpu.as_float(gpu.u32(two[half] & 0xFFFF0000))
            integer_factors[half * 2] = gpu.s32(two[half] & 0xFFFF)
            integer_factors[half * 2 + 1] = gpu.s32(two[half] >> 16)
        for side in range(4):
            less_factors[side] = gpu.fmul(factors[side], gpu.f32(less))
        weights = place + places[1]
        # Not in loops: with so much in them they are not unrolled, and then the sums would lie in memory.
        if two_groups:
            load_outputs(weights, a, 0, 0)
            load_outputs(weights + w_group, a, 8, 0)
            multiply_both(0, place, places, sums, a, factors, less_factors, integer_factors)
            load_outputs(weights, a, 0, 1)
            load_outputs(weights + w_group, a, 8, 1)
            multiply_both(1, place, places, sums, a, factors, less_factors, integer_factors)
        else:
            load_outputs(weights, a, 0, 0)
            load_outputs(weights, a, 8, 1)
            multiply_32(0, place, places, sums, a, factors, less_factors, integer_factors)
            if wide:
                multiply_32(4, place, places, sums, a, factors, less_factors, integer_factors)

    return find, multiply


def _lane_place(gpu: Any, wide: bool) -> Any:
    """A function that gives the first token and the first output of a thread's warp, in its block."""

    @gpu.device
    def lane_place(thread):
        warp = thread >> 5
        if wide:
            return (warp & 1) * 64, (warp >> 1) * 32
        return (warp & 3) * 32, (warp >> 2) * 32

    return lane_place


def _scale_rows(gpu: Any, wide: bool) -> Any:
    """A function that scales integer sums over all columns: by output, then by token."""
    lane_place = _lane_place(gpu, wide)

    @gpu.device
    def scale_32(first, totals, sums, a_scales, of_outputs, row):
        for tile in range(first, first + 4):
            of_tokens = gpu.ldg64(a_scales + gpu.u64((row + tile * 8) * 4))
            for half in range(2):
                two = of_outputs[half]
                low, high = gpu.as_float(gpu.u32(two << 16)), gpu.as_float(gpu.u32(two & 0xFFFF0000))
                for place in range(4):
                    at = tile * 8 + half * 4 + place
                    scaled = gpu.fmul(gpu.to_float(totals[at]), high if place // 2 else low)
                    sums[at] = gpu.fmul(scaled, gpu.as_float(of_tokens[place % 2]))

    @gpu.device
    def scale_rows(totals, sums, a_scales, row_scales, token, output, thread):
        inside = lane_place(thread)
        row, column = token + inside[0] + (thread & 3) * 2, output + inside[1] + ((thread & 31) >> 2) * 4
        of_outputs = gpu.ldg64(row_scales + gpu.u64(column * 2))
        scale_32(0, totals, sums, a_scales, of_outputs, row)
        if wide:
            scale_32(4, totals, sums, a_scales, of_outputs, row)

    return scale_rows


def _store(gpu: Any, program: Matmul) -> Any:
    """A function that adds the bias to a warp's sums and writes them: 4 neighbouring outputs of a token at a time."""
    has_bias, aligned, wide = program.bias, program.aligned, program.wide
    put = rows.aligned_store(gpu, program.output, 4) if aligned else rows.single_stores(gpu, program.output, 4)
    registers, lane_place = gpu.registers, _lane_place(gpu, program.wide)

    @gpu.device
    def store_32(first, sums, added, y, row, tokens, column, out):
        values = registers(4, gpu.f32)
        for tile in range(first, first + 4):
            for token in range(2):
                for place in range(4):
                    value = sums[tile * 8 + place * 2 + token]
                    values[place] = gpu.fadd(value, added[place]) if has_bias else value
                put(y, row + tile * 8 + token, tokens, column, out, values)

    @gpu.device
    def store(sums, bias, y, thread, token, tokens, output, out):
        inside, added = lane_place(thread), registers(4, gpu.f32)
        row, column = token + inside[0] + (thread & 3) * 2, output + inside[1] + ((thread & 31) >> 2) * 4
        if has_bias:
            four = gpu.ldg128(bias + gpu.u64(column * 4))
            for place in range(4):
                added[place] = gpu.as_float(four[place])
        store_32(0, sums, added, y, row, tokens, column, out)
        if wide:
            store_32(4, sums, added, y, row, tokens, column, out)

    return store
