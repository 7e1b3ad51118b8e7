"""The backend in its place: the contract, what it keeps of a layer, threads, torch.compile."""

from __future__ import annotations

import concurrent.futures
import copy
import gc

import pytest
import torch
from loraq.kernels.cuda import backend
from loraq.kernels.cuda.backend import CudaKernel
from loraq.kernels.cuda.emulated import EmulatedDevice
from random_layers import inputs_of, layout_of, same, tensors_of

import contracts
from loraq import ops, registry
from loraq.linear import PackedLinear


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> CudaKernel:
    """The backend on an emulated GPU, taken by every layer on the CPU that it does not refuse."""
    made = CudaKernel(EmulatedDevice())
    monkeypatch.setattr(ops, "kernel_for", lambda layout, device: made if made.refusal(layout) is None else None)
    return made


LAYOUT = layout_of(40, 130, 9, transforms=("smooth",))


def module_of(seed: int = 0) -> PackedLinear:
    return PackedLinear(LAYOUT, tensors_of(LAYOUT, seed), torch.randn(LAYOUT.out))


def agrees(module: PackedLinear, input: torch.Tensor) -> bool:
    return same(module(input), ops.reference(input, module.stored(), module.bias, module.layout))


def test_it_is_found() -> None:
    assert "cuda" in registry.names("loraq.kernel")
    assert registry.load("loraq.kernel", "cuda") is CudaKernel
    assert CudaKernel().device_type == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"inn": 12, "group": 5}], ids=["tensor cores", "plain"])
def test_it_keeps_the_contract(changes: dict[str, int]) -> None:
    layout = layout_of(**({"out": 24, "inn": 64, "rank": 4} | changes))  # type: ignore[arg-type]
    contracts.kernel(CudaKernel(EmulatedDevice()), tensors_of(layout), layout)


class TestKept:
    """The repacked form never outlives or misrepresents the stored tensors."""

    def test_repacked_once(self, kernel: CudaKernel, monkeypatch: pytest.MonkeyPatch) -> None:
        module = module_of()
        module(inputs_of(3, 130))
        monkeypatch.setattr(backend, "_made", None)  # made again it would fail
        module(inputs_of(4, 130))
        with torch.inference_mode():
            module(inputs_of(5, 130))
        assert agrees(module, inputs_of(6, 130))

    @pytest.mark.parametrize("name", ["main.codes", "down.codes", "up.scales", "transform.0.scales"])
    def test_written_in_place(self, kernel: CudaKernel, name: str) -> None:
        module = module_of()
        before = module(inputs_of(3, 130))
        module.get_buffer(name).copy_(tensors_of(LAYOUT, seed=1)[name])
        assert agrees(module, inputs_of(3, 130))
        assert not torch.equal(module(inputs_of(3, 130)), before)

    def test_another_bias(self, kernel: CudaKernel) -> None:
        module = module_of()
        module(inputs_of(3, 130))
        with torch.no_grad():
            module.bias.mul_(2)  # type: ignore[union-attr]
        assert agrees(module, inputs_of(3, 130))
        module.bias = None
        assert agrees(module, inputs_of(3, 130))

    def test_written_in_place_it_stays_where_it_is(self, kernel: CudaKernel) -> None:
        """A CUDA graph holds the addresses."""
        module = module_of()
        module(inputs_of(3, 130))
        entry = backend._ENTRIES[id(module.get_buffer("main.codes"))]
        before = (entry.ready, entry.ready.main.codes.data_ptr(), entry.bias[2].data_ptr())
        for name, tensor in tensors_of(LAYOUT, seed=1).items():
            module.get_buffer(name).copy_(tensor)
        with torch.no_grad():
            module.bias.mul_(2)  # type: ignore[union-attr]
        assert agrees(module, inputs_of(3, 130))
        entry = backend._ENTRIES[id(module.get_buffer("main.codes"))]
        assert (entry.ready, entry.ready.main.codes.data_ptr(), entry.bias[2].data_ptr()) == before

    def test_any_default_dtype(self, kernel: CudaKernel) -> None:
        module, input = module_of(), inputs_of(3, 130)
        torch.set_default_dtype(torch.bfloat16)
        try:
            output = module(input)
        finally:
            torch.set_default_dtype(torch.float32)
        assert agrees(module, input)
        assert same(output, module(input))

    def test_copies_are_layers_of_their_own(self, kernel: CudaKernel) -> None:
        module = module_of()
        module(inputs_of(3, 130))
        other = copy.deepcopy(module)
        other.get_buffer("main.codes").zero_()
        assert agrees(other, inputs_of(3, 130))
        assert agrees(module, inputs_of(3, 130))

    def test_gone_with_the_layer(self, kernel: CudaKernel) -> None:
        module = module_of()
        module(inputs_of(3, 130))
        key = id(module.get_buffer("main.codes"))
        assert key in backend._ENTRIES
        del module
        gc.collect()
        assert key not in backend._ENTRIES


def test_threads_do_not_share_arguments(kernel: CudaKernel) -> None:
    module = module_of()
    inputs = [inputs_of(3, 130, seed=seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(module, inputs))
    for input, output in zip(inputs, outputs, strict=True):
        assert same(output, ops.reference(input, module.stored(), module.bias, LAYOUT))


def test_compiled_by_torch(kernel: CudaKernel) -> None:
    module = module_of()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for tokens in (3, 5):
        assert torch.equal(compiled(inputs_of(tokens, 130)), module(inputs_of(tokens, 130)))


def test_inputs_that_begin_anywhere(kernel: CudaKernel) -> None:
    layout = layout_of(40, 128)
    module = PackedLinear(layout, tensors_of(layout))
    loose = inputs_of(4, 128).flatten()[1 : 1 + 3 * 128].view(3, 128)
    assert loose.is_contiguous()
    assert same(module(loose), ops.reference(loose, module.stored(), None, layout))


def test_one_layer_on_two_generations_of_gpus() -> None:
    layout = layout_of(40, 128, weight="int4x2", activation={"format": "int8", "group": "token"})
    tensors, input = tensors_of(layout), inputs_of(3, 128)
    for architecture in ("90", "86", "90"):
        output = CudaKernel(EmulatedDevice(architecture)).linear(input, tensors, None, layout)
        assert same(output, ops.reference(input, tensors, None, layout))


def test_inputs_that_are_not_contiguous(kernel: CudaKernel) -> None:
    module = module_of()
    wide = inputs_of(6, 260)
    assert agrees(module, wide[::2, ::2])
