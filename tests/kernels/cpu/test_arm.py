"""Products and decoders compiled for 64-bit Arm, executed in an emulated processor (Unicorn), wherever this runs.

LLVM compiles for Arm everywhere, so that the code is the one a Mac or an Arm server would run; the emulator is handed
its bytes and constants. The references are the formulas of the modules' documentation, in numpy.
"""

from __future__ import annotations

import functools
import itertools
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import unicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir
from loraq.kernels.cpu import decode, memory, tile
from loraq.kernels.cpu.code_values import CodeValues, Integers, Loads, Loads4, TableBytes
from loraq.kernels.cpu.machines import DOTPROD, PORTABLE, Machine
from unicorn import arm64_const as arm

from loraq import ops

CODE, STACK, DATA, SIZE = 0x1_0000, 0x20_0000, 0x40_0000, 0x10_0000
STOP = CODE + SIZE - 4096
SECTION = struct.Struct("<IIQQQQIIQQ")
EXECUTABLE, MERGED, RELOCATIONS = 4, 16, 4
MOVES = {264: 0, 266: 16, 268: 32, 269: 48}
"""Relocations of movz and movk: which 16 bits of an address they take."""


class Section(NamedTuple):
    """What an ELF file says of one of its sections."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry: int


def arm_target(processor: str) -> Any:
    """LLVM's compiler for an Arm processor."""
    try:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
        target = binding.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError as error:
        pytest.skip(f"this llvmlite does not compile for Arm: {error}")
    return target.create_target_machine(cpu=processor, opt=3)


def compiled(
    names: tuple[str, ...], write: Callable[[Any, dict[str, Any]], None], processor: str = "generic"
) -> tuple[bytes, str]:
    """The bytes of what `write` writes, a function of the address of the values called `names`, and its assembly.

    `generic` is the oldest 64-bit Arm: what a machine needs beyond that, its functions must say themselves.
    """
    module = ir.Module()
    module.triple = "aarch64-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), "panel")
    builder = ir.IRBuilder(function.append_basic_block())
    write(builder, memory.values_at(builder, function.args[0], names))
    builder.ret_void()
    target = arm_target(processor)
    parsed = binding.parse_assembly(str(module))
    passes = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return linked(target.emit_object(parsed)), target.emit_assembly(parsed)


@functools.cache
def product(machine: Machine, bits: int, processor: str = "generic") -> tuple[bytes, str]:
    """The product of one panel."""
    return compiled(tile.ARGUMENTS, lambda builder, values: tile.write_panel(builder, machine, bits, values), processor)


@functools.cache
def decoder(kind: type[CodeValues]) -> bytes:
    """The decoder of one panel."""
    return compiled(decode.ARGUMENTS, lambda builder, values: decode.write_decoder(builder, kind, values))[0]


def linked(elf: bytes) -> bytes:
    """The code of an object file, its constants behind it, as they lie in memory from CODE on."""
    (headers,), (count,) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<H", elf, 60)
    sections = [Section(*SECTION.unpack_from(elf, headers + SECTION.size * index)) for index in range(count)]
    image, places = bytearray(), {}
    code = next(index for index, section in enumerate(sections) if section.flags & EXECUTABLE and section.size)
    constants = [index for index, section in enumerate(sections) if section.kind == 1 and section.flags & MERGED]
    for index in (code, *constants):
        image += bytes(-len(image) % 64)
        places[index] = CODE + len(image)
        image += elf[sections[index].offset :][: sections[index].size]
    for table in (section for section in sections if section.kind == RELOCATIONS and section.info == code):
        symbols = sections[table.link].offset
        for at in range(table.offset, table.offset + table.size, 24):
            place, kind, symbol, addend = struct.unpack_from("<QIIq", elf, at)
            (section,), (value,) = (
                struct.unpack_from(form, elf, symbols + 24 * symbol + offset) for form, offset in (("<H", 6), ("<Q", 8))
            )
            (word,) = struct.unpack_from("<I", image, place)
            word |= (places[section] + value + addend >> MOVES[kind] & 0xFFFF) << 5
            struct.pack_into("<I", image, place, word)
    return bytes(image)


def executed(code: bytes, parts: dict[str, Any], result: str) -> numpy.ndarray:
    """What the array called `result` is after the code has run on `parts`, with arrays in place of addresses."""
    processor = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    processor.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    for start in (CODE, STACK, DATA):
        processor.mem_map(start, SIZE)
    processor.mem_write(CODE, code)
    free, given = DATA + 4096, {}
    for name, part in parts.items():
        given[name] = part
        if not isinstance(part, int):
            processor.mem_write(free, part.tobytes())
            given[name] = free
            free += -(-part.nbytes // 64) * 64 + 64
    assert free < DATA + SIZE
    processor.mem_write(DATA, struct.pack(f"<{len(given)}q", *given.values()))
    processor.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors are allowed
    for register, value in ((arm.UC_ARM64_REG_X0, DATA), (arm.UC_ARM64_REG_SP, STACK + SIZE // 2)):
        processor.reg_write(register, value)
    processor.reg_write(arm.UC_ARM64_REG_X30, STOP)
    processor.emu_start(CODE, STOP)
    written = bytes(processor.mem_read(given[result], parts[result].nbytes))
    return numpy.frombuffer(written, parts[result].dtype).reshape(parts[result].shape)


def packed(codes: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Unsigned codes [segment][slot][32] as tile.py lays them out."""
    segments, slot, outputs = codes.shape
    fours = codes.reshape(segments, slot // 4, 4, outputs).swapaxes(2, 3)
    if bits == 8:
        return numpy.ascontiguousarray(fours)
    low, high = fours[:, 0::2], fours[:, 1::2]
    return numpy.ascontiguousarray(low | high << 4)


def reference(parts: dict[str, Any], codes: numpy.ndarray, bits: int, before: numpy.ndarray) -> numpy.ndarray:
    """The panel in numpy: integers exactly, then float32 in the order that tile.py gives."""
    totals = before if parts["accumulate"] else numpy.zeros_like(before)
    weight_scales = (parts["weight_scales"].astype(numpy.uint32) << 16).view(numpy.float32)
    for segment in range(codes.shape[0]):
        weights = codes[segment].astype(numpy.int64) - 2 ** (bits - 1)
        sums = parts["activations"][:, segment].astype(numpy.int64) @ weights
        factors = sums.astype(numpy.float32) * weight_scales[segment], parts["scales"][:, segment, None], totals
        totals = ops.multiply_add(*map(torch.from_numpy, factors)).numpy()
    return totals + parts["bias"]


@pytest.mark.parametrize(("machine", "bits"), itertools.product((DOTPROD, PORTABLE), (4, 8)), ids=str)
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 7),
    segments=st.integers(1, 3),
    turns=st.integers(1, 5),
    accumulate=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products(
    machine: Machine, bits: int, tokens: int, segments: int, turns: int, accumulate: bool, extreme: bool, seed: int
) -> None:
    random, slot = numpy.random.default_rng(seed), tile.STEP * turns
    activations = random.integers(-128, 128, (tokens, segments, slot), numpy.int8)
    codes = random.integers(0, 2**bits, (segments, slot, tile.OUTPUTS), numpy.uint8)
    if extreme:
        activations[:], codes[..., ::2], codes[..., 1::2] = random.choice([-128, 127]), 0, 2**bits - 1
    before = random.normal(size=(tokens, tile.OUTPUTS)).astype(numpy.float32)
    parts: dict[str, Any] = {
        "activations": activations,
        "scales": random.uniform(0.01, 2, (tokens, segments)).astype(numpy.float32),
        "offsets": (-(2 ** (bits - 1)) * activations.sum(2, numpy.int64)).astype(numpy.int32),
        "segments": segments,
        "slot": slot,
        "weights": packed(codes, bits),
        "weight_scales": random.integers(0x3C00, 0x4080, (segments, tile.OUTPUTS), numpy.uint16),
        "bias": random.normal(size=tile.OUTPUTS).astype(numpy.float32),
        "output": before if accumulate else before * numpy.float32("nan"),
        "output_stride": tile.OUTPUTS * 4,
        "accumulate": int(accumulate),
        "tokens": tokens,
        "ahead": codes.nbytes * bits // 8,
    }
    assert tuple(parts) == tile.ARGUMENTS
    result = executed(product(machine, bits)[0], parts, "output")
    assert result.tobytes() == reference(parts, codes, bits, before).tobytes()


@pytest.mark.parametrize("kind", [TableBytes, Loads4, Loads, Integers])
@settings(max_examples=25)
@given(
    pairs=st.integers(1, 20),
    group=st.sampled_from([2, 6, 16]),
    before=st.integers(0, 2),
    offsets=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_decoders(kind: type[CodeValues], pairs: int, group: int, before: int, offsets: bool, seed: int) -> None:
    random, columns = numpy.random.default_rng(seed), 2 * pairs
    first = before * group
    groups = before + -(-columns // group)
    codes = random.integers(0, 2**kind.bits, (first + columns, tile.OUTPUTS), numpy.uint8)
    values = random.normal(size=2**kind.bits).astype(numpy.float32)
    table = numpy.arange(256).astype(numpy.int8).astype(numpy.float32) if kind is Integers else values
    scales, shifts = (random.normal(size=(groups, tile.OUTPUTS)).astype(numpy.float32) for _ in range(2))
    parts: dict[str, Any] = {
        "codes": codes if kind.bits == 8 else codes[::2] | codes[1::2] << 4,
        "values": values,
        "scales": scales,
        "offsets": shifts if offsets else 0,
        "result": numpy.full((columns, tile.OUTPUTS), numpy.nan, numpy.float32),
        "first": first,
        "columns": columns,
        "group": group,
    }
    assert tuple(parts) == decode.ARGUMENTS
    group_of = (first + numpy.arange(columns)) // group
    expected = table[codes[first:]] * scales[group_of]
    if offsets:
        expected = expected + shifts[group_of]
    assert executed(decoder(kind), parts, "result").tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("processor", ["apple-m1", "apple-m4", "neoverse-n1", "neoverse-v2", "cortex-a76"])
def test_sums_stay_in_registers(processor: str, bits: int) -> None:
    """The inner loop of three tokens is loads of weights, and products with one lane of the activations."""
    code = product(DOTPROD, bits, processor)[1]
    inner = next(each for each in re.findall(r"\n\.LBB\w+:((?:\n\t.*)+?)\n\tb\.lt", code) if "sdot" in each)
    assert inner.count("sdot") == 3 * 8 * 4  # tokens, vectors, four columns at a time
    assert len(re.findall(r"sdot\t.*\.4b\[[0-3]\]", inner)) == inner.count("sdot")
    assert "sp" not in inner
    assert not re.search(r"\tst", inner)
