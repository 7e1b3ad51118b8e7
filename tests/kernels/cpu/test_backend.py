"""The backend in its place: what it refuses, what it keeps, threads, torch.compile, and the code on disk."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from loraq.kernels.cpu import backend as backend_module
from loraq.kernels.cpu import machines, threads
from loraq.kernels.cpu.backend import CpuKernel
from random_layers import inputs_of, layout_of, same, tensors_of

from loraq import formats, ops, registry
from loraq.layout import Layout, Storage
from loraq.linear import PackedLinear, counted


def module_of(layout: Layout, seed: int = 0) -> PackedLinear:
    return PackedLinear(layout, tensors_of(layout, seed), torch.randn(layout.out))


def agrees(module: PackedLinear, input: torch.Tensor) -> bool:
    return same(module(input), ops.reference(input, module.stored(), module.bias, module.layout))


class TestRefusal:
    def test_integer_layers_are_taken(self) -> None:
        assert CpuKernel().refusal(layout_of(8, 8, 2)) is None

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"main": Storage(formats.BFLOAT16, 64)}, "the main matrix is bfloat16"),
            ({"main": Storage(formats.named("int8_asymmetric"), 64)}, "the main matrix is int8_asymmetric"),
            ({"main": Storage(formats.named("int2_binary"), 64)}, "the main matrix is int2_binary"),
        ],
        ids=str,
    )
    def test_other_layers_are_refused_with_a_reason(self, change: dict[str, object], reason: str) -> None:
        refusal = CpuKernel().refusal(attrs.evolve(layout_of(8, 8, 2), **change))  # type: ignore[arg-type]
        assert refusal is not None
        assert reason in refusal

    def test_the_reference_runs_what_is_refused(self, chosen: CpuKernel) -> None:
        layout = attrs.evolve(layout_of(8, 8), main=Storage(formats.named("int2_binary"), 64))
        assert module_of(layout)(torch.ones(3, 8)).shape == (3, 8)


class TestKept:
    """The repacked form never outlives or misrepresents the stored tensors."""

    layout = layout_of(40, 130, 9, transforms=("smooth",))

    def test_repacked_once(self, chosen: CpuKernel, monkeypatch: pytest.MonkeyPatch) -> None:
        module = module_of(self.layout)
        module(inputs_of(3, 130))
        monkeypatch.setattr(backend_module, "Prepared", None)  # made again it would fail
        module(inputs_of(4, 130))
        with torch.inference_mode():
            module(inputs_of(5, 130))
        assert agrees(module, inputs_of(6, 130))

    @pytest.mark.parametrize("name", ["main.codes", "main.scales", "down.codes", "up.scales", "transform.0.scales"])
    def test_written_in_place(self, chosen: CpuKernel, name: str) -> None:
        module = module_of(self.layout)
        before = module(inputs_of(3, 130))
        module.get_buffer(name).copy_(tensors_of(self.layout, seed=1)[name])
        assert agrees(module, inputs_of(3, 130))
        assert not torch.equal(module(inputs_of(3, 130)), before)

    @pytest.mark.parametrize("assign", [False, True])
    def test_new_weights_loaded(self, chosen: CpuKernel, assign: bool) -> None:
        module = module_of(self.layout)
        module(inputs_of(3, 130))
        module.load_state_dict(module_of(self.layout, seed=1).state_dict(), assign=assign)
        assert agrees(module, inputs_of(3, 130))

    def test_moved_and_copied(self, chosen: CpuKernel) -> None:
        module = module_of(self.layout)
        module(inputs_of(3, 130))
        other = copy.deepcopy(module)
        other.get_buffer("main.codes").add_(1)
        assert agrees(other, inputs_of(3, 130))
        assert agrees(module.to("meta").to_empty(device="cpu"), inputs_of(3, 130))

    def test_written_inference_tensors(self, chosen: CpuKernel) -> None:
        with torch.inference_mode():
            module = module_of(self.layout)
            module(inputs_of(3, 130))
            module.get_buffer("main.codes").copy_(tensors_of(self.layout, seed=1)["main.codes"])
            assert agrees(module, inputs_of(3, 130))

    @pytest.mark.parametrize("assign", [False, True])
    def test_inference_tensors_put_in_place(self, chosen: CpuKernel, assign: bool) -> None:
        """They count no writes: their bytes are looked at."""
        with torch.inference_mode():
            module = module_of(self.layout)
            module(inputs_of(3, 130))
            module.load_state_dict(tensors_of(self.layout, seed=1), assign=assign, strict=False)
            assert agrees(module, inputs_of(3, 130))
            assert module.get_buffer("main.codes").is_inference()
            module.get_buffer("main.codes").copy_(tensors_of(self.layout, seed=2)["main.codes"])
            assert agrees(module, inputs_of(3, 130))

    def test_inference_tensors_that_another_writes_to(self, chosen: CpuKernel) -> None:
        with torch.inference_mode():
            tensors = tensors_of(self.layout)
            module = PackedLinear(self.layout, tensors)
            module(inputs_of(3, 130))
            tensors["main.codes"].copy_(tensors_of(self.layout, seed=1)["main.codes"])
            assert agrees(module, inputs_of(3, 130))

    def test_inference_tensors_made_to_count(self, chosen: CpuKernel) -> None:
        with torch.inference_mode():
            tensors = tensors_of(self.layout)
            module = PackedLinear(self.layout, tensors)
            module.count_writes()
            assert not any(buffer.is_inference() for buffer in module.buffers())
            assert module.get_buffer("main.codes").data_ptr() == tensors["main.codes"].data_ptr()
            module(inputs_of(3, 130))
            module.get_buffer("main.codes").copy_(tensors_of(self.layout, seed=1)["main.codes"])
            assert agrees(module, inputs_of(3, 130))

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
    def test_odd_inference_tensors_stay(self, shape: tuple[int, ...]) -> None:
        with torch.inference_mode():
            tensor, turned = torch.zeros(shape, dtype=torch.int16), torch.zeros(3, 4).T
            assert counted(tensor) is tensor
            assert counted(turned) is turned

    def test_another_bias(self, chosen: CpuKernel) -> None:
        module = module_of(self.layout)
        module(inputs_of(3, 130))
        assert module.bias is not None
        module.bias.data += 1
        assert agrees(module, inputs_of(3, 130))

    def test_dropped_with_the_module(self, chosen: CpuKernel) -> None:
        gc.collect()
        before = len(backend_module._ENTRIES)
        modules = [module_of(self.layout) for _ in range(3)]
        for module in modules:
            module(inputs_of(3, 130))
        assert len(backend_module._ENTRIES) == before + 3
        del modules, module
        gc.collect()
        assert len(backend_module._ENTRIES) == before

    def test_bytes_beside_the_checkpoint_s(self, chosen: CpuKernel) -> None:
        layout = layout_of(64, 128, 32)
        module = module_of(layout)
        prepared = chosen._prepared(module.stored(), layout)
        assert prepared.bytes <= 1.1 * layout.stored_bytes


class TestThreads:
    def test_several_python_threads(self, chosen: CpuKernel, two_threads: None) -> None:
        modules = [module_of(layout_of(200, 320, 16), seed) for seed in range(3)]
        inputs = [inputs_of(tokens, 320) for tokens in (1, 40, 300)]
        pairs = [(module, input) for module in modules for input in inputs] * 4
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda pair: agrees(*pair), pairs))

    def test_without_openmp(self, chosen: CpuKernel, monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
        monkeypatch.setattr(threads, "start", lambda: threads._python_threads)
        module = module_of(layout_of(200, 320, 16))
        assert all(agrees(module, inputs_of(tokens, 320)) for tokens in (50, 300))


class TestTorch:
    layout = layout_of(40, 70, 9, transforms=("hadamard",))

    @pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
    def test_compiles_as_one_graph(self, chosen: CpuKernel, engine: str) -> None:
        module = module_of(self.layout)
        compiled = torch.compile(module, fullgraph=True, backend=engine)
        for tokens in (3, 5):
            assert torch.equal(compiled(inputs_of(tokens, 70)), module(inputs_of(tokens, 70)))

    def test_exports(self, chosen: CpuKernel) -> None:
        module = module_of(self.layout)
        program = torch.export.export(module, (inputs_of(3, 70),))
        assert torch.equal(program.module()(inputs_of(3, 70)), module(inputs_of(3, 70)))

    def test_torch_checks_the_operation(self, chosen: CpuKernel) -> None:
        tensors = tensors_of(self.layout)
        arguments = (inputs_of(3, 70), list(tensors.values()), torch.randn(40), ops.layout_key(self.layout))
        torch.library.opcheck(torch.ops.loraq.linear.default, arguments)

    def test_found_through_the_entry_point(self) -> None:
        assert "cpu" in registry.names("loraq.kernel")
        assert isinstance(ops.kernel_for(self.layout, "cpu"), CpuKernel)


_ANOTHER_PROCESSOR = """
import sys; sys.path[:0] = {places!r}
import torch
from loraq import ops
from loraq.kernels.cpu import machines
from loraq.kernels.cpu.backend import CpuKernel
from random_layers import *
assert machines.machine().name == {machine!r}, machines.machine()
layout = layout_of(40, 130, 9, transforms=("hadamard",))
tensors, input = tensors_of(layout), inputs_of(7, 130)
assert same(CpuKernel().linear(input, tensors, None, layout), ops.reference(input, tensors, None, layout))
"""


def _on_another_processor(machine: str, cache: Path, **settings: str) -> str:
    """What a process says on stderr whose Numba compiles for another processor, and whose layer is the reference's."""
    code = _ANOTHER_PROCESSOR.format(places=[path for path in sys.path if "tests" in path], machine=machine)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)} | settings
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_processor_without_vectors_of_note(tmp_path: Path) -> None:
    """The portable machine, compiled for the oldest processor; said on stderr once, then taken from the disk."""
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert "loraq: compiling the CPU kernels" in _on_another_processor("portable", tmp_path, **settings)
    assert "loraq: compiling" not in _on_another_processor("portable", tmp_path, **settings)


@pytest.mark.slow
def test_numba_without_avx(tmp_path: Path) -> None:
    """Numba leaves AVX out where it is told to, or where the system does not support it."""
    expected = "neon-dotprod" if machines.runs(machines.DOTPROD) else "portable"
    _on_another_processor(expected, tmp_path, NUMBA_ENABLE_AVX="0")


def test_a_machine_that_the_processor_lacks_is_refused() -> None:
    lacking = next(each for each in machines.MACHINES if not machines.runs(each))
    with pytest.raises(ValueError, match=rf"no machine '{lacking.name}', but .*portable"):
        CpuKernel(lacking.name).linear(inputs_of(1, 8), tensors_of(layout_of(8, 8)), None, layout_of(8, 8))


@pytest.mark.slow
@pytest.mark.skipif(not machines.runs(machines.AVX2), reason="this processor has no AVX2")
def test_a_processor_with_avx2_and_no_more(tmp_path: Path) -> None:
    features = "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+f16c"
    _on_another_processor("avx2", tmp_path, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features)
