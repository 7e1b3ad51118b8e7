"""Launching without a GPU: the arguments that a stand-in for the driver is given, and what goes wrong in words."""

from __future__ import annotations

import ctypes
import enum
import gc
import itertools
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from loraq.kernels.cuda import backend, cache, driver, first_use, prepared, runner, toolchain
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
    with pytest.warns(UserWarning, match="there is no such cubin; meanwhile packed layers run in plain torch"):
        output = CudaKernel(device_of(api)).linear(input, tensors, None, layout)
    assert torch.equal(output, ops.reference(input, tensors, None, layout))


def test_a_thread_without_a_context_gets_torch_s(api: StandIn) -> None:
    device_of(api).launch(Plain(8, 8), [])
    assert api.context == 1100


def test_every_new_thread_gets_the_context(api: StandIn) -> None:
    """Even one with the number of a thread that has ended, whose launches are there."""
    layout = layout_of(40, 64)
    kernel, tensors, input = CudaKernel(device_of(api)), tensors_of(layout), inputs_of(3, 64)
    for _ in range(3):
        api.context = 0
        thread = threading.Thread(target=kernel.linear, args=(input, tensors, None, layout))
        thread.start()
        thread.join()
        assert api.context == 1100
    assert len(api.launches) == 6
    (ready,) = (entry.ready for entry in backend._ENTRIES.values() if entry.layout is layout)
    gc.collect()
    assert not ready.runners, "launches of threads that have ended are gone"


def test_a_cubin_that_the_driver_does_not_read_leaves_the_layer_to_the_reference(api: StandIn) -> None:
    backend._warn_once.cache_clear()
    api.fails.add("cuLibraryLoadData")
    layout = layout_of(40, 64)
    tensors, input = tensors_of(layout), inputs_of(3, 64)
    kernel = CudaKernel(device_of(api))
    with pytest.warns(UserWarning, match="could not be loaded: CUDA_ERROR_INVALID_VALUE; meanwhile packed layers run"):
        output = kernel.linear(input, tensors, None, layout)
    assert torch.equal(output, ops.reference(input, tensors, None, layout))
    api.fails.clear()  # it is not tried in every call
    assert torch.equal(kernel.linear(input, tensors, None, layout), output)
    assert not api.launches


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
        ((8, 7), None),
        ((8, 9), "89"),
        ((9, 0), "90"),
        ((10, 3), "100"),
        ((12, 1), "120"),
        ((7, 5), None),
    ],
)
def test_which_code_a_gpu_runs(capability: tuple[int, int], wanted: str | None) -> None:
    assert driver.code_architecture(*capability) == wanted


def test_the_toolchain_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "found", lambda module: module != "numba_cuda")
    assert toolchain.missing() == (
        "the CUDA kernels need the package numba-cuda to be compiled; pip install 'loraq[cuda]' brings it"
    )


class TestMissing:
    """Without the packages the reference runs, and one sentence says what to install."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
        monkeypatch.setattr(toolchain, "found", lambda module: True)
        monkeypatch.setattr(toolchain, "missing", lambda: None)
        monkeypatch.setattr(toolchain, "major", lambda: 13)
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
        assert reason == "the CUDA kernels are for compute capability 8.0, 8.6, 8.9, 9.0, 10 and 12; this GPU has 7.5"

    @pytest.mark.parametrize(
        ("compiler", "version", "said"),
        [
            (13, 12080, "CUDA 13 (580 or newer), and this one is of CUDA 12.8; pip install 'loraq[cuda12]' brings a "),
            (13, 11080, "CUDA 13 (580 or newer), and this one is of CUDA 11.8"),
            (12, 11080, "CUDA 12 (525 or newer), and this one is of CUDA 11.8"),
            (13, 13020, None),
            (12, 12040, None),
            (12, 13000, None),
        ],
    )
    def test_an_old_driver(
        self, monkeypatch: pytest.MonkeyPatch, compiler: int, version: int, said: str | None
    ) -> None:
        monkeypatch.setattr(toolchain, "major", lambda: compiler)
        monkeypatch.setattr(driver, "_driver_version", lambda: version)
        reason = driver.refusal()
        assert reason is None if said is None else said in str(reason)

    def test_prebuilt_cubins_may_be_of_any_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAQ_CUDA_PREBUILT", "cubins")
        monkeypatch.setattr(toolchain, "missing", lambda: "nothing is installed")
        monkeypatch.setattr(driver, "_driver_version", lambda: 12080)
        assert driver.refusal() is None

    @pytest.mark.parametrize(("cuda", "extra"), [("13.0", "cuda"), ("12.8", "cuda12"), (None, "cuda")])
    def test_the_compiler_is_of_torch_s_cuda(
        self, monkeypatch: pytest.MonkeyPatch, cuda: str | None, extra: str
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert toolchain.install() == f"pip install 'loraq[{extra}]'"

    def test_another_maker_s_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.2", raising=False)
        assert CudaKernel().refusal(layout_of(8, 64)) == "torch finds no CUDA GPU"

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sentence = "the CUDA kernels need the package numba-cuda to be compiled; pip install 'loraq[cuda]' brings it"
        monkeypatch.setattr(toolchain, "missing", lambda: sentence)
        with pytest.warns(UserWarning, match=r"loraq\[cuda\].*meanwhile packed layers run in plain torch"):
            assert CudaKernel().refusal(layout_of(8, 64)) == sentence

    def test_no_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "found", lambda module: False)
        with pytest.warns(UserWarning, match="need the package cuda-bindings"):
            assert "cuda-bindings" in str(CudaKernel().refusal(layout_of(8, 64)))


class Answering(StandIn):
    """A stand-in for the driver whose products write `answer`, or nothing where that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: torch.Tensor | None = None

    def cuLaunchKernel(self, function: int, *rest: Any) -> tuple[Status]:
        status = super().cuLaunchKernel(function, *rest)
        if self.answer is not None and self.launches[-1]["block"] == (256, 1, 1):  # no quantizer, no thin rows
            ctypes.memmove(self.argument(-1, 9), self.answer.data_ptr(), self.answer.nbytes)
        return status


class TestFirstUse:
    """The first call of a program on a GPU is compared with the reference."""

    @pytest.fixture(autouse=True)
    def set_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "cubin", lambda program, architecture: b"code")
        backend._warn_once.cache_clear()
        self.api = Answering()
        self.uses = first_use.FirstUses()
        self.device = driver.Driver(0, "90", self.api, lambda index: 0, self.uses)
        self.layout = layout_of(40, 128, 20)
        self.tensors = tensors_of(self.layout)

    def call(self, input: torch.Tensor) -> torch.Tensor:
        return CudaKernel(self.device).linear(input, self.tensors, None, self.layout)

    def right(self, input: torch.Tensor) -> torch.Tensor:
        return ops.reference(input, self.tensors, None, self.layout)

    @pytest.mark.parametrize("tokens", [3, 200, 600])
    def test_what_agrees_is_not_looked_at_again(self, tokens: int) -> None:
        input = inputs_of(tokens, 128)
        self.api.answer = self.right(input)
        assert torch.equal(self.call(input), self.api.answer)
        launched = len(self.api.launches)
        assert self.uses.proved == set(self.device.functions)
        self.api.answer = torch.full_like(self.api.answer, 7)
        assert torch.equal(self.call(input), self.api.answer), "what the kernel gave"
        assert len(self.api.launches) == 2 * launched
        assert self.uses.failure is None

    def test_what_differs_is_replaced_and_said_once(self) -> None:
        input = inputs_of(200, 128)
        self.api.answer = self.right(input)
        self.api.answer[-1, 3] += 0.01 * torch.linalg.vector_norm(self.api.answer)
        with pytest.warns(UserWarning, match=r"\(matmul-.*off by 0\.01\d* of its norm.*LORAQ_CUDA_CHECK=0"):
            assert torch.equal(self.call(input), self.right(input))
        launched = len(self.api.launches)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(self.call(input), self.right(input))
        assert launched == len(self.api.launches), "no kernel is started any more"
        assert not self.uses.proved

    def test_a_program_that_comes_later_is_looked_at_as_well(self) -> None:
        few, many = inputs_of(3, 128), inputs_of(200, 128)
        self.api.answer = self.right(few)
        self.call(few)
        self.api.answer = torch.zeros(200, 40)
        with pytest.warns(UserWarning, match="200 tokens is off by 1 of its norm"):
            assert torch.equal(self.call(many), self.right(many))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
    def test_nothing_is_learnt_from_numbers_that_say_nothing(self, value: float) -> None:
        input = torch.full((3, 128), value)
        self.api.answer = self.right(input)
        assert torch.equal(self.call(input).isnan(), self.api.answer.isnan())
        assert not self.uses.proved
        assert self.uses.failure is None
        input = inputs_of(3, 128)
        self.api.answer = self.right(input)
        self.call(input)
        assert self.uses.proved

    def test_a_call_that_fails_leaves_nothing_to_prove(self) -> None:
        input = inputs_of(3, 128)
        started = self.api.cuLaunchKernel

        def out_of_memory(function: int, *rest: Any) -> tuple[Status]:
            started(function, *rest)
            if len(self.api.launches) > 1:
                raise RuntimeError("out of memory")
            return (Status.SUCCESS,)

        self.api.cuLaunchKernel = out_of_memory  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="out of memory"):
            self.call(input)
        assert not self.uses.pending()

    @pytest.mark.parametrize(("setting", "checked"), [(None, True), ("1", True), ("0", False)])
    def test_it_can_be_left_out(self, monkeypatch: pytest.MonkeyPatch, setting: str | None, checked: bool) -> None:
        for module in ("cuda", "cuda.bindings", "cuda.bindings.driver"):  # they need not be installed
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        monkeypatch.delenv("LORAQ_CUDA_CHECK", raising=False)
        if setting is not None:
            monkeypatch.setenv("LORAQ_CUDA_CHECK", setting)
        driver.gpu.cache_clear()
        found = driver.gpu(0).first_uses
        driver.gpu.cache_clear()
        assert (found is not None) == checked
