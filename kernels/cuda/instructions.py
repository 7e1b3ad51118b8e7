"""The machine that the kernels are written for: its instructions, as data.

A kernel's source is a Python function that calls these by name as `gpu.NAME(...)`. Two modules give them a meaning:
ptx.py makes inline PTX of them for Numba, emulator.py runs them with numpy, a whole block at a time. A kernel is made
for one or the other by the module that is passed to its factory as `gpu`.

The rules of a kernel's source, so that both can run it:

- Memory is reached through these instructions alone, by address: 64-bit in global, 32-bit in shared memory.
- Control flow is the same for the whole block: loops and conditions over arguments, block numbers and constants. What
  differs by thread is a flag, an unsigned 0 or 1, that a load, store or `select` takes.
- Floating point operations that must round as the reference does are instructions as well: a compiler may fuse
  `a * b + c`, but not these.

- Index arithmetic is signed (Numba makes floats of signed and unsigned 64-bit integers together), words of codes are
  unsigned, and any integer does as an operand: it is cut to the operand's width.

Letters of operands: u an unsigned 32-bit register, s signed, f float32, U unsigned 64-bit.
Source of texts and fragment layouts: PTX ISA 9.0, sections 9.7.8 to 9.7.16.
"""

from __future__ import annotations

import attrs

MAGIC, MAGIC_FLOAT = 0x4B400000, 12582912.0
"""The bits of the float 1.5 · 2^23, and the float: an integer below 2^22 added to the one is the other plus it."""


@attrs.frozen
class Instruction:
    """One instruction: `outs` and `ins` are operand letters, `text` its PTX with $0, $1, ... outs first.

    `effect` is set where it must not be moved or dropped, `memory` where it also orders memory accesses.
    """

    name: str
    outs: str
    ins: str
    text: str
    effect: bool = False
    memory: bool = False
    tied: bool = False
    """Whether the last operands are what the outputs hold before: the instruction adds to them."""


def _mma(name: str, shape: str, kind: str) -> Instruction:
    """A tensor-core product of one warp: D (16 x 8) = A (16 x k) · B (k x 8) + C, integers summed in int32."""
    text = (
        f"mma.sync.aligned.{shape}.row.col.s32.{kind}.{kind}.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return Instruction(name, "ssss", "uuuuuussss", text)


def _wgmma() -> Instruction:
    """Two asynchronous products of a warpgroup, begun, carried out and waited for: D (64 x 128) += A (64 x 64) · B.

    A is in registers, four for each 32 columns, B in shared memory, told by a descriptor for each 32 columns.
    """
    sums = ", ".join(f"${place}" for place in range(64))
    steps = [
        f"wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {{{sums}}}, "
        f"{{${64 + 4 * step}, ${65 + 4 * step}, ${66 + 4 * step}, ${67 + 4 * step}}}, ${72 + step}, p;"
        for step in range(2)
    ]
    text = (
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.fence.sync.aligned; "
        + " ".join(steps)
        + " wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"
    )
    return Instruction("wgmma_s8", "s" * 64, "u" * 8 + "UU" + "s" * 64, text, True, True, True)


def _guarded(flag: int, text: str) -> str:
    """`text` carried out where operand `flag` is not 0."""
    return f"{{ .reg .pred p; setp.ne.u32 p, ${flag}, 0; @p {text} }}"


_ZEROS_4 = "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"

INSTRUCTIONS = (
    # Where a thread is.
    Instruction("thread", "s", "", "mov.u32 $0, %tid.x;"),
    Instruction("block_x", "s", "", "mov.u32 $0, %ctaid.x;"),
    Instruction("block_y", "s", "", "mov.u32 $0, %ctaid.y;"),
    # Global memory. `ldg` loads may be cached as constants; with a flag of 0 they give zeros.
    Instruction("ldg32", "u", "U", "ld.global.nc.b32 $0, [$1];"),
    Instruction("ldg64", "uu", "U", "ld.global.nc.v2.b32 {$0, $1}, [$2];"),
    Instruction("ldg128", "uuuu", "U", "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];"),
    Instruction("ldg8_if", "u", "Uu", "mov.u32 $0, 0; " + _guarded(2, "ld.global.nc.u8 $0, [$1];")),
    Instruction("ldg16_if", "u", "Uu", "mov.u32 $0, 0; " + _guarded(2, "ld.global.nc.u16 $0, [$1];")),
    Instruction("ldg32_if", "u", "Uu", "mov.u32 $0, 0; " + _guarded(2, "ld.global.nc.b32 $0, [$1];")),
    Instruction(
        "ldg64_if", "uu", "Uu", "mov.u32 $0, 0; mov.u32 $1, 0; " + _guarded(3, "ld.global.nc.v2.b32 {$0, $1}, [$2];")
    ),
    Instruction("ldg128_if", "uuuu", "Uu", _ZEROS_4 + _guarded(5, "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];")),
    Instruction("stg16_if", "", "Uuu", _guarded(2, "st.global.u16 [$0], $1;"), True, True),
    Instruction("stg32_if", "", "Uuu", _guarded(2, "st.global.b32 [$0], $1;"), True, True),
    Instruction("stg64_if", "", "Uuuu", _guarded(3, "st.global.v2.b32 [$0], {$1, $2};"), True, True),
    Instruction("stg128_if", "", "Uuuuuu", _guarded(5, "st.global.v4.b32 [$0], {$1, $2, $3, $4};"), True, True),
    # Shared memory.
    Instruction("lds32", "u", "u", "ld.shared.b32 $0, [$1];", True, True),
    Instruction("lds64", "uu", "u", "ld.shared.v2.b32 {$0, $1}, [$2];", True, True),
    Instruction("lds128", "uuuu", "u", "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", True, True),
    Instruction("sts32", "", "uu", "st.shared.b32 [$0], $1;", True, True),
    Instruction("sts32_if", "", "uuu", _guarded(2, "st.shared.b32 [$0], $1;"), True, True),
    Instruction("sts64", "", "uuu", "st.shared.v2.b32 [$0], {$1, $2};", True, True),
    Instruction("barrier", "", "", "bar.sync 0;", True, True),
    # Asynchronous copies of 16 bytes from global to shared memory, in groups.
    Instruction("copy16_if", "", "uUu", _guarded(2, "cp.async.cg.shared.global [$0], [$1], 16;"), True, True),
    Instruction("copy_commit", "", "", "cp.async.commit_group;", True, True),
    Instruction("copy_wait_0", "", "", "cp.async.wait_group 0;", True, True),
    Instruction("copy_wait_1", "", "", "cp.async.wait_group 1;", True, True),
    Instruction("copy_wait_2", "", "", "cp.async.wait_group 2;", True, True),
    # Other lanes of the warp: the value of the lane whose number differs by exactly this bit.
    *(
        Instruction(f"lane_xor_{bit}", "u", "u", f"shfl.sync.bfly.b32 $0, $1, {bit}, 0x1f, 0xffffffff;", True)
        for bit in (1, 2, 4, 8, 16)
    ),
    # Tensor cores.
    _mma("mma_s8", "m16n8k32", "s8"),
    _mma("mma_s4", "m16n8k64", "s4"),
    # Hopper's own, in code for sm_90a only. What copies have brought is seen by it after the fence and a barrier.
    _wgmma(),
    Instruction("fence_async", "", "", "fence.proxy.async.shared::cta;", True, True),
    # Arithmetic that rounds once, to nearest, ties to even, and is never fused.
    Instruction("fadd", "f", "ff", "add.rn.f32 $0, $1, $2;"),
    Instruction("fsub", "f", "ff", "sub.rn.f32 $0, $1, $2;"),
    Instruction("fmul", "f", "ff", "mul.rn.f32 $0, $1, $2;"),
    Instruction("fdiv", "f", "ff", "div.rn.f32 $0, $1, $2;"),
    Instruction("reciprocal", "f", "f", "rcp.rn.f32 $0, $1;"),
    Instruction("fma", "f", "fff", "fma.rn.f32 $0, $1, $2, $3;"),
    Instruction("fabs", "f", "f", "abs.f32 $0, $1;"),
    Instruction("fmax", "f", "ff", "max.NaN.f32 $0, $1, $2;"),
    Instruction("to_float", "f", "s", "cvt.rn.f32.s32 $0, $1;"),
    Instruction("select", "u", "uuu", "{ .reg .pred p; setp.ne.u32 p, $3, 0; selp.b32 $0, $1, $2, p; }"),
    # Bits of a float, a float of bits, and pairs of 16-bit floats in one register, first operand in the low half.
    Instruction("bits", "u", "f", "mov.b32 $0, $1;"),
    Instruction("as_float", "f", "u", "mov.b32 $0, $1;"),
    Instruction("as_int", "s", "u", "mov.b32 $0, $1;"),
    Instruction("as_unsigned", "u", "s", "mov.b32 $0, $1;"),
    Instruction("pack_bfloat16", "u", "ff", "cvt.rn.bf16x2.f32 $0, $2, $1;"),
    Instruction("pack_float16", "u", "ff", "cvt.rn.f16x2.f32 $0, $2, $1;"),
    Instruction(
        "unpack_float16",
        "ff",
        "u",
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
    ),
    # The low bytes of four registers, first in the lowest byte.
    Instruction(
        "pack_bytes",
        "u",
        "ssss",
        "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040; prmt.b32 $0, a, b, 0x5410; }",
    ),
)
"""Every instruction but `shared`, `device`, the conversions and arrays, which either module defines by itself."""

SPECIAL = ("shared", "device", "zeros", "magic_zeros", "number", "u32", "u64", "s32", "f32", "registers")
"""What a `gpu` module has beside INSTRUCTIONS: `shared()` the address of the block's shared memory, `device` which
decorates functions that kernels call, conversions, `zeros()` and `magic_zeros()`, tuples of 64 signed zeros or MAGICs,
and `registers(size, type)`, an array that only constants index, so that it lies in registers. `number` converts what
is the same in all threads to 32 bits: Numba would go on with 64."""
