"""The emulator against plain loops over the PTX manual's formulas, and against kernels with planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.kernels.cuda import emulator, instructions, matmul
from loraq.kernels.cuda.emulated_memory import Block, EmulatedError, Memory

WARP = 32


def run_block(kernel: Callable[..., None], arrays: list[Any], threads: int = WARP, shared_bytes: int = 4096) -> None:
    """One block of a kernel with these numpy arrays, the last of which is the output."""
    memories = [Memory.of(each, written=each is not arrays[-1]) for each in arrays]
    emulator.run(kernel, (1, 1), threads, shared_bytes, [each.start for each in memories], memories)


def test_every_instruction_is_emulated() -> None:
    names = [each.name for each in instructions.INSTRUCTIONS] + list(instructions.SPECIAL)
    assert [name for name in names if not hasattr(emulator, name)] == []


def packed(codes: list[int], bits: int) -> int:
    return sum((code & ((1 << bits) - 1)) << (bits * place) for place, code in enumerate(codes))


@pytest.mark.parametrize(("bits", "depth", "name"), [(8, 32, "mma_s8"), (4, 64, "mma_s4")])
def test_the_tensor_core_product_is_the_manual_s(bits: int, depth: int, name: str) -> None:
    generator = numpy.random.default_rng(0)
    edge = 1 << (bits - 1)
    a = generator.integers(-edge, edge, (16, depth))
    b = generator.integers(-edge, edge, (depth, 8))
    c = generator.integers(-1000, 1000, (16, 8))
    codes, words = 32 // bits, numpy.zeros((6, WARP), numpy.uint32)
    start = numpy.zeros((4, WARP), numpy.int32)
    for lane in range(WARP):  # PTX ISA, "Matrix Fragments for mma.m16n8k32" and "... m16n8k64"
        group, member = lane >> 2, lane % 4
        for register in range(4):
            row = group if register in (0, 2) else group + 8
            first = member * codes + (depth // 2 if register >= 2 else 0)
            words[register, lane] = packed([int(a[row, first + place]) for place in range(codes)], bits)
        for register in range(2):
            first = member * codes + register * (depth // 2)
            words[4 + register, lane] = packed([int(b[first + place, group]) for place in range(codes)], bits)
        for register in range(4):
            row = group if register < 2 else group + 8
            start[register, lane] = c[row, member * 2 + (register & 1)]
    found = numpy.zeros((4, WARP), numpy.int32)

    def kernel(address: Any) -> None:
        product = getattr(emulator, name)(*words, *start)
        for register in range(4):
            at = address + emulator.u64((register * WARP + emulator.thread()) * 4)
            emulator.stg32_if(at, emulator.as_unsigned(product[register]), 1)

    run_block(kernel, [found])
    wanted = a @ b + c
    for lane in range(WARP):
        group, member = lane >> 2, lane % 4
        for register in range(4):
            row = group if register < 2 else group + 8
            assert found[register, lane] == wanted[row, member * 2 + (register & 1)]


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=WARP))
@settings(max_examples=200)
def test_fma_rounds_once(operands: list[tuple[float, float, float]]) -> None:
    from fractions import Fraction

    padded = operands + [(0.0, 0.0, 0.0)] * (WARP - len(operands))
    first, second, third = (numpy.array(each, numpy.float32) for each in zip(*padded, strict=True))
    found = numpy.zeros(WARP, numpy.float32)

    def kernel(address: Any) -> None:
        value = emulator.fma(first, second, third)
        emulator.stg32_if(address + emulator.u64(emulator.thread() * 4), emulator.bits(value), 1)

    run_block(kernel, [found])
    for lane in range(len(operands)):
        exact = Fraction(float(first[lane])) * Fraction(float(second[lane])) + Fraction(float(third[lane]))
        got = found[lane]
        if not numpy.isfinite(got):
            assert abs(exact) > Fraction(float(numpy.finfo(numpy.float32).max))
            continue
        error = abs(Fraction(float(got)) - exact)
        with numpy.errstate(over="ignore"):
            neighbours = numpy.nextafter(got, numpy.float32(-numpy.inf)), numpy.nextafter(got, numpy.float32(numpy.inf))
        for other in neighbours:
            if numpy.isfinite(other):
                assert error <= abs(Fraction(float(other)) - exact)


@given(st.lists(st.floats(width=32), min_size=1, max_size=WARP))
def test_bfloat16_is_torch_s(values: list[float]) -> None:
    import torch

    padded = numpy.array(values + [0.0] * (WARP - len(values)), numpy.float32)
    found = numpy.zeros(WARP, numpy.uint32)

    def kernel(address: Any) -> None:
        word = emulator.pack_bfloat16(padded, padded)
        emulator.stg32_if(address + emulator.u64(emulator.thread() * 4), word, 1)

    run_block(kernel, [found])
    wanted = torch.from_numpy(padded).bfloat16()
    got = torch.from_numpy(found.view(numpy.int16)[::2].copy()).view(torch.bfloat16)
    assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(wanted))
    assert torch.equal(got.isnan(), wanted.isnan())


class TestFaults:
    """Small kernels with one fault each."""

    def exchange(self, *, barrier: bool = True, fill: bool = True, beyond: int = 0, offset: int = 0) -> Any:
        """Each thread writes a word to shared memory and reads its neighbour's."""

        def kernel(x: Any, y: Any) -> None:
            thread = emulator.thread()
            word = emulator.ldg32(x + emulator.u64((thread + beyond) * 4))
            if fill:
                emulator.sts32(thread * 4, word)
            if barrier:
                emulator.barrier()
            found = emulator.lds32((thread ^ 1) * 4 + offset)
            emulator.stg32_if(y + emulator.u64(thread * 4), found, 1)

        return kernel

    def run(self, kernel: Any, shared_bytes: int = 4096) -> numpy.ndarray[Any, Any]:
        x, y = numpy.arange(64, dtype=numpy.int32), numpy.zeros(64, numpy.int32)
        run_block(kernel, [x, y], threads=64, shared_bytes=shared_bytes)
        return y

    def test_without_a_fault_it_runs(self) -> None:
        assert self.run(self.exchange()).tolist() == [each ^ 1 for each in range(64)]

    def test_a_missing_barrier_is_a_race(self) -> None:
        with pytest.raises(EmulatedError, match="race: shared memory read that another thread wrote"):
            self.run(self.exchange(barrier=False))

    def test_reading_what_nothing_wrote(self) -> None:
        with pytest.raises(EmulatedError, match="uninitialised shared memory"):
            self.run(self.exchange(fill=False))

    def test_reading_beyond_a_buffer(self) -> None:
        with pytest.raises(EmulatedError, match="illegal global access"):
            self.run(self.exchange(beyond=1))

    def test_misaligned(self) -> None:
        with pytest.raises(EmulatedError, match="misaligned shared access"):
            self.run(self.exchange(offset=2))

    def test_more_shared_memory_than_there_is(self) -> None:
        with pytest.raises(EmulatedError, match="shared access beyond 128 bytes"):
            self.run(self.exchange(), shared_bytes=128)

    def test_overwriting_what_another_thread_may_still_read(self) -> None:
        def kernel(x: Any, y: Any) -> None:
            thread = emulator.thread()
            emulator.sts32(thread * 4, thread)
            emulator.barrier()
            found = emulator.lds32((thread ^ 1) * 4)
            emulator.sts32(thread * 4, found)
            emulator.stg32_if(y + emulator.u64(thread * 4), found, 1)

        with pytest.raises(EmulatedError, match="race: shared memory to write was used by another thread"):
            self.run(kernel)

    def test_two_threads_writing_one_place(self) -> None:
        def kernel(x: Any, y: Any) -> None:
            emulator.stg32_if(y + emulator.u64((emulator.thread() // 2) * 4), 1, 1)

        with pytest.raises(EmulatedError, match="two threads write one place"):
            self.run(kernel)

    def test_output_read_before_it_is_written(self) -> None:
        def kernel(x: Any, y: Any) -> None:
            emulator.ldg32(y + emulator.u64(emulator.thread() * 4))

        with pytest.raises(EmulatedError, match="uninitialised global memory"):
            self.run(kernel)

    def copying(self, wait: str | None) -> Any:
        def kernel(x: Any, y: Any) -> None:
            thread = emulator.thread()
            emulator.copy16_if(thread * 16, x + emulator.u64(thread * 16), emulator.u32(thread < 16))
            emulator.copy_commit()
            if wait:
                getattr(emulator, wait)()
            emulator.barrier()
            emulator.stg32_if(y + emulator.u64(thread * 4), emulator.lds32(thread * 4), 1)

        return kernel

    def test_a_copy_is_there_after_its_wait(self) -> None:
        assert self.run(self.copying("copy_wait_0")).tolist() == list(range(64))

    @pytest.mark.parametrize("wait", ["copy_wait_1", None])
    def test_a_copy_that_is_not_waited_for(self, wait: str | None) -> None:
        with pytest.raises(EmulatedError, match="uninitialised shared memory"):
            self.run(self.copying(wait))

    def test_a_wait_is_for_the_thread_s_own_copies(self) -> None:
        def kernel(x: Any, y: Any) -> None:
            thread = emulator.thread()
            emulator.copy16_if(thread * 16, x + emulator.u64(thread * 16), emulator.u32(thread < 16))
            emulator.copy_commit()
            emulator.barrier()  # should be behind the wait
            emulator.copy_wait_0()
            emulator.stg32_if(y + emulator.u64(thread * 4), emulator.lds32(thread * 4), 1)

        with pytest.raises(EmulatedError, match="race: shared memory read that another thread wrote"):
            self.run(kernel)

    @pytest.mark.parametrize("order", ["fence, barrier", "barrier, fence", "fence", "barrier"])
    def test_wgmma_wants_a_fence_and_then_a_barrier(self, order: str) -> None:
        block = Block((0, 0), 128, 128 * 32, [])
        for first in (0, 16):
            block.store(block.numbers * 32 + first, numpy.ones((128, 16), numpy.uint8), numpy.ones(128))
        for each in order.split(", "):
            getattr(block, each)()
        if order == "fence, barrier":
            assert block.core_matrices(0, 128, 256).all()
        else:
            with pytest.raises(EmulatedError, match="written after the last fence and barrier"):
                block.core_matrices(0, 128, 256)

    def test_sums_beyond_int32(self) -> None:
        def kernel(x: Any, y: Any) -> None:
            emulator.mma_s8(*[0x01010101] * 6, *[2**31 - 1] * 4)

        with pytest.raises(EmulatedError, match="leaves int32"):
            self.run(kernel)


class Mutant:
    """The emulator with one instruction replaced: the kernels' real source with a fault in it."""

    def __init__(self, **replaced: Any) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(emulator, name)


MUTANTS = {
    "no barrier": ({"barrier": lambda: None}, "race"),
    "waits for too little": ({"copy_wait_1": emulator.copy_wait_2, "copy_wait_2": lambda: None}, "uninitialised"),
    "copies are never waited for": ({"copy_wait_2": lambda: None}, "uninitialised|before its copies"),
    "waits behind the barrier": (
        {"copy_wait_2": lambda: None, "barrier": lambda: (emulator.barrier(), emulator.copy_wait_2())},
        "race",
    ),
    "flags are ignored": ({"stg128_if": lambda *operands: emulator.stg128_if(*operands[:-1], 1)}, "illegal global"),
}


HOPPER_MUTANTS = {
    "no fence": ({"fence_async": lambda: None}, "written after the last fence"),
    "no barrier": ({"barrier": lambda: None}, "race|last fence and barrier"),
    "waits for too little": ({"copy_wait_2": lambda: None}, "uninitialised"),
}


@pytest.mark.parametrize("fault", HOPPER_MUTANTS)
def test_faults_in_hopper_s_product_are_found(fault: str) -> None:
    import torch
    from loraq.kernels.cuda import emulated, prepared, runner
    from random_layers import inputs_of, layout_of, tensors_of

    replaced, message = HOPPER_MUTANTS[fault]
    layout = layout_of(40, 400, weight="int4x2", activation={"format": "int8", "group": "token"})
    ready, way = prepared.Prepared.of(layout, tensors_of(layout), "90"), runner.Way(split=False, skinny=False)
    right, wrong = emulated.EmulatedDevice(), emulated.EmulatedDevice(machine=Mutant(**replaced))
    made = runner.Runner(ready, way, right, torch.float32, torch.float32, False)
    made._product = runner.Runner(ready, way, wrong, torch.float32, torch.float32, False)._product
    made._product._device = right  # the quantizer's output is known there
    with pytest.raises(EmulatedError, match=message):
        made(inputs_of(5, 400), None)


@pytest.mark.parametrize("fault", MUTANTS)
def test_faults_in_the_product_s_own_source_are_found(fault: str) -> None:
    import torch
    from loraq.kernels.cuda import emulated, prepared, runner
    from random_layers import inputs_of, layout_of, tensors_of

    replaced, message = MUTANTS[fault]
    layout = layout_of(40, 400)
    device = emulated.EmulatedDevice(machine=Mutant(**replaced))
    ready, way = prepared.Prepared.of(layout, tensors_of(layout), "90"), runner.Way(split=False, skinny=False)
    made = runner.Runner(ready, way, device, torch.float32, torch.float32, False)
    with pytest.raises(EmulatedError, match=message):
        made(inputs_of(5, 400), None)


def test_a_wrong_mask_gives_wrong_numbers() -> None:
    """That the comparison with the reference would see it: the source with another constant."""
    import torch
    from loraq.kernels.cuda import emulated, prepared, runner
    from random_layers import inputs_of, layout_of, same, tensors_of

    from loraq import ops

    layout = layout_of(40, 128)
    tensors, input = tensors_of(layout), inputs_of(5, 128)
    made = prepared.Prepared.of(layout, tensors, "90")
    outputs = []
    for magic in (matmul.MAGIC, matmul.MAGIC + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matmul, "MAGIC", magic)
            device = emulated.EmulatedDevice()
            way = runner.Way(split=False, skinny=False)
            outputs.append(runner.Runner(made, way, device, torch.float32, torch.float32, False)(input, None))
    wanted = ops.reference(input, tensors, None, layout)
    assert same(outputs[0], wanted)
    assert not same(outputs[1], wanted)
