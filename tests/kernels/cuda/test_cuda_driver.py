"""Launching without a GPU: the arguments that a stand-in for the driver is given, and what goes wrong in words."""

from __future__ import annotations

import ctypes
import enum
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loraq.kernels.cuda import backend, cache, driver, prepared, runner, toolchain
from loraq.kernels.cuda.backend import CudaKernel
from loraq.kernels.cuda.plain import Plain
from random_layers import inputs_of, layout_of, tensors_of

from loraq import ops

MANY = runner.Way(split=False, skinny=False)


class Status(enum.IntEnum):
    """As CUresult, false where all went well."""

    SUCCESS = 0
    INVALID = 1


class StandIn:
    """The functions of cuda.bindings.driver that driver.py calls; `launches` holds what kernels would be given."""

    CUfunction = int
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.shared: dict[int, int] = {}
        self.context = 0
        self.fails: set[str] = set()

    def _status(self, name: str) -> Status:
        return Status.INVALID if name in self.fails else Status.SUCCESS

    def cuCtxGetCurrent(self) -> tuple[Status, int]:
        return Status.SUCCESS, self.context

    def cuDeviceGet(self, index: int) -> tuple[Status, int]:
        return Status.SUCCESS, index + 100

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Status, int]:
        return Status.SUCCESS, device + 1000

    def cuCtxSetCurrent(self, context: int) -> tuple[Status]:
        self.context = context
        return (Status.SUCCESS,)

    def cuLibraryLoadData(self, code: bytes, *options: Any) -> tuple[Status, int]:
        assert code == b"code"
        return self._status("cuLibraryLoadData"), 7

    def cuLibraryGetKernel(self, library: int, entry: bytes) -> tuple[Status, int]:
        assert library == 7
        return self._status("cuLibraryGetKernel"), 1000 + len(self.shared)

    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: int, device: int) -> tuple[Status]:
        assert attribute == 8
        self.shared[kernel] = value
        return (Status.SUCCESS,)

    def cuGetErrorName(self, status: int) -> tuple[Status, bytes]:
        return Status.SUCCESS, b"CUDA_ERROR_INVALID_VALUE"

    def cuLaunchKernel(self, function: int, *rest: Any) -> tuple[Status]:
        *dimensions, shared, stream, block, extra = rest
        pointers = ctypes.cast(block, ctypes.POINTER(ctypes.c_uint64))
        self.launches.append(
            {"grid": tuple(dimensions[:3]), "block": tuple(dimensions[3:]), "shared": shared, "stream": stream}
            | {"pointers": pointers, "extra": extra}
        )
        return (self._status("cuLaunchKernel"),)

    def argument(self, launch: int, place: int) -> int:
        return int(ctypes.c_uint64.from_address(self.launches[launch]["pointers"][place]).value)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(cache, "cubin", lambda program, architecture: b"code")
    return StandIn()


def device_of(api: StandIn) -> driver.Driver:
    return driver.Driver(0, "90", api, lambda index: 4242 + index)


def test_a_layer_s_two_launches(api: StandIn) -> None:
    layout = layout_of(130, 200, 70)
    made = prepared.Prepared.of(layout, tensors_of(layout), "90")
    call = runner.Runner(made, MANY, device_of(api), torch.bfloat16, torch.bfloat16, True)
    input, bias = inputs_of(150, 200).bfloat16(), torch.zeros(192)
    output = call(input, bias)
    assert output.shape == (150, 130)
    assert output.dtype == torch.bfloat16
    quantizer, matmul = api.launches
    assert (quantizer["grid"], quantizer["block"], quantizer["stream"]) == ((16, 1, 1), (128, 1, 1), 4242)
    assert (matmul["grid"], matmul["block"]) == ((2, 3, 1), (256, 1, 1))
    assert matmul["shared"] in api.shared.values()
    assert matmul["shared"] > 48 * 1024
    assert api.argument(0, 0) == input.data_ptr()
    assert [api.argument(0, place) for place in range(8, 13)] == [150, 256, 200, 4, 128]
    assert api.argument(1, 0) == api.argument(0, 2)  # the codes that the one writes and the other reads
    assert api.argument(1, 1) == api.argument(0, 3)
    assert api.argument(1, 4) == api.argument(0, 6)
    assert api.argument(1, 5) == api.argument(0, 7)
    assert api.argument(1, 2) == made.main.codes.data_ptr()
    assert (api.argument(1, 8), api.argument(1, 9)) == (bias.data_ptr(), output.data_ptr())
    assert [api.argument(1, place) for place in range(11, 17)] == [150, 256, 130, 192, 4, 2]


def test_scratch_memory_does_not_overlap(api: StandIn) -> None:
    layout = layout_of(130, 200, 70)
    made = prepared.Prepared.of(layout, tensors_of(layout), "90")
    call = runner.Runner(made, MANY, device_of(api), torch.float32, torch.float32, False)
    call(inputs_of(150, 200), None)
    rows, groups, rank_groups = 256, 4, 2
    places = [api.argument(1, place) for place in (0, 4, 1, 5)]
    sizes = [groups * rows * 64, rank_groups * rows * 64, groups * rows * 4]
    assert [after - before for before, after in itertools.pairwise(places)] == sizes


def test_a_kernel_that_is_nowhere_leaves_the_layer_to_the_reference(
    api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(program: object, architecture: str) -> bytes:
        raise cache.NoCubinError("there is no such cubin")

    monkeypatch.setattr(cache, "cubin", nowhere)
    backend._warn_once.cache_clear()
    layout = layout_of(40, 64)
    tensors, input = tensors_of(layout), inputs_of(3, 64)
    with pytest.warns(UserWarning, match="there is no such cubin; until then packed layers run in plain torch"):
        output = CudaKernel(device_of(api)).linear(input, tensors, None, layout)
    assert torch.equal(output, ops.reference(input, tensors, None, layout))


def test_a_thread_without_a_context_gets_torch_s(api: StandIn) -> None:
    device_of(api).launch(Plain(8, 8), [])
    assert api.context == 1100


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cuLibraryLoadData", "the CUDA kernel plain-.* could not be loaded: CUDA_ERROR_INVALID_VALUE"),
        ("cuLibraryGetKernel", "the CUDA kernel plain-.* could not be loaded: CUDA_ERROR_INVALID_VALUE"),
        ("cuLaunchKernel", "the CUDA kernel plain-.* could not be started: CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_what_the_driver_refuses_is_said(api: StandIn, function: str, message: str) -> None:
    api.fails.add(function)
    with pytest.raises(RuntimeError, match=message):
        device_of(api).launch(Plain(8, 8), []).start(1, 1)


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((8, 0), "80"),
        ((8, 7), "86"),
        ((8, 9), "89"),
        ((9, 0), "90"),
        ((10, 3), "100"),
        ((12, 1), "120"),
        ((7, 5), None),
    ],
)
def test_which_code_a_gpu_runs(capability: tuple[int, int], wanted: str | None) -> None:
    assert driver.code_architecture(*capability) == wanted


class TestMissing:
    """Without the packages the reference runs, and one sentence says what to install."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
        monkeypatch.setattr(driver, "_found", lambda module: True)
        monkeypatch.setattr(driver, "_driver_version", lambda: 13000)
        monkeypatch.delenv("LORAQ_CUDA_PREBUILT", raising=False)
        backend._warn_once.cache_clear()
        yield
        backend._warn_once.cache_clear()

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert CudaKernel().refusal(layout_of(8, 64)) == "torch finds no CUDA GPU"

    def test_an_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
        reason = CudaKernel().refusal(layout_of(8, 64))
        assert reason == "the CUDA kernels run from compute capability 8.0 on, and this GPU has 7.5"

    def test_an_old_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "_driver_version", lambda: 12080)
        assert CudaKernel().refusal(layout_of(8, 64)) == (
            "the CUDA kernels need a driver of CUDA 13 (580 or newer), and this one is of CUDA 12.8"
        )

    def test_another_maker_s_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.2", raising=False)
        assert CudaKernel().refusal(layout_of(8, 64)) == "torch finds no CUDA GPU"

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sentence = "the CUDA kernels need the package numba-cuda to be compiled; pip install 'loraq[cuda]' brings it"
        monkeypatch.setattr(toolchain, "missing", lambda: sentence)
        with pytest.warns(UserWarning, match=r"loraq\[cuda\].*until then packed layers run in plain torch"):
            assert CudaKernel().refusal(layout_of(8, 64)) == sentence

    def test_no_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "_found", lambda module: False)
        with pytest.warns(UserWarning, match="need the package cuda-bindings"):
            assert "cuda-bindings" in str(CudaKernel().refusal(layout_of(8, 64)))

    def test_the_toolchain_names_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "found", lambda module: module != "numba_cuda")
        assert toolchain.missing() == (
            "the CUDA kernels need the package numba-cuda to be compiled; pip install 'loraq[cuda]' brings it"
        )
