"""A GPU: cubins loaded and kernels launched by the CUDA driver's own functions, through cuda-bindings.

A launch is one call of cuLaunchKernel with a block of arguments that exists beforehand: numbers and addresses lie in
eight bytes each, a second array has their addresses, and a call changes only what is new. It goes to torch's current
stream. Nothing here synchronizes or allocates memory on the GPU, so CUDA graphs may capture it once everything is
loaded. Numba's dispatcher, which takes 25 us to launch, has no part in this; for debugging a kernel can still be run by
it: `numba.cuda.jit(program.make(ptx))[grid, threads, 0, shared_bytes](*addresses_and_numbers)`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from . import cache, toolchain
from .device import AbstractDevice, AbstractLaunch
from .first_use import FirstUses
from .program import AbstractProgram, name

if TYPE_CHECKING:
    from torch import Tensor

    from .device import Argument

_STATIC_SHARED = 48 * 1024
"""What a block may have of shared memory without asking."""
_DRIVERS = {12: "525", 13: "580"}
"""The first driver of each version of CUDA. Cubins of one are not read by drivers of the one before."""
_OTHERS = ((8, 7),)
"""Jetson's: NVIDIA does not promise that code for its generation's cards runs there."""
_LOCK = threading.Lock()


def code_architecture(major: int, minor: int) -> str | None:
    """Which of toolchain.ARCHITECTURES a GPU runs the code of: the last of its generation not beyond it, or None."""
    if (major, minor) in _OTHERS:
        return None
    plain = [each for each in toolchain.ARCHITECTURES if each.isdigit()]
    fitting = [each for each in plain if int(each[:-1]) == major and int(each[-1]) <= minor]
    return fitting[-1] if fitting else None


class _DriverLaunch(AbstractLaunch):
    """A kernel's function and its block of arguments."""

    def __init__(self, device: Driver, function: Any, program: AbstractProgram, arguments: Sequence[Argument]) -> None:
        self._values = (ctypes.c_uint64 * len(arguments))()
        first = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(arguments))(*(first + 8 * place for place in range(len(arguments))))
        self._block = ctypes.addressof(self._pointers)
        self._function = function
        self._threads = program.threads
        self._shared_bytes = program.shared_bytes
        self._device = device
        self._start, self._stream, self._index = device.api.cuLaunchKernel, device.stream, device.index
        self._program = program
        # While it is not None: who is to know that an unproved program was started.
        self._first_uses = device.first_uses
        for place, argument in enumerate(arguments):
            self.set(place, argument)

    def set(self, place: int, argument: Argument, offset: int = 0) -> None:
        # Little-endian, so that a 32-bit number lies where the kernel looks for it.
        self._values[place] = argument if isinstance(argument, int) else argument.data_ptr() + offset

    def set_parts(self, parts: Sequence[tuple[int, int]], memory: Tensor, rows: int) -> None:
        values, first = self._values, memory.data_ptr()
        for place, offset in parts:
            values[place] = first + offset * rows

    def start(self, grid_x: int, grid_y: int) -> None:
        threads, stream = self._threads, self._stream(self._index)
        (status,) = self._start(
            self._function, grid_x, grid_y, 1, threads, 1, 1, self._shared_bytes, stream, self._block, 0
        )
        if status:
            raise RuntimeError(
                f"the CUDA kernel {name(self._program)} could not be started: {_reason(self._device.api, status)}"
            )
        if self._first_uses is not None:
            if self._program in self._first_uses.proved:
                self._first_uses = None
            else:
                self._first_uses.started(self._program)


@attrs.frozen(eq=False)
class Driver(AbstractDevice):
    """The GPU called `index` in torch. `api` is cuda.bindings.driver, `stream` gives torch's current stream there.

    `first_uses` is its record of programs' first use, None to run them unchecked.
    """

    index: int
    architecture: str
    api: Any = attrs.field(repr=False)
    stream: Any = attrs.field(repr=False)
    first_uses: FirstUses | None = None
    functions: dict[AbstractProgram, Any] = attrs.field(factory=dict, repr=False)

    def launch(self, program: AbstractProgram, arguments: Sequence[Argument]) -> AbstractLaunch:
        self._make_current()
        with _LOCK:
            if program not in self.functions:
                try:
                    self.functions[program] = self._load(program)
                except cache.NoCubinError as error:  # not to be tried again in every call
                    self.functions[program] = error
        function = self.functions[program]
        if isinstance(function, cache.NoCubinError):
            raise function.with_traceback(None)
        return _DriverLaunch(self, function, program, arguments)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def _load(self, program: AbstractProgram) -> Any:
        """The program's function; from its code, which is compiled where it is not on disk."""
        api = self.api
        code = cache.cubin(program, cache.code_for(program, self.architecture))
        library = self._checked(api.cuLibraryLoadData(code, [], [], 0, [], [], 0), program)
        kernel = self._checked(api.cuLibraryGetKernel(library, cache.entry(program).encode()), program)
        if program.shared_bytes > _STATIC_SHARED:
            device = self._checked(api.cuDeviceGet(self.index), program)
            attribute = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._checked(api.cuKernelSetAttribute(attribute, program.shared_bytes, kernel, device), program)
        return api.CUfunction(int(kernel))

    def _make_current(self) -> None:
        """See to it that this thread has torch's context: the driver, unlike the runtime, does not do so by itself."""
        api = self.api
        if not int(self._checked(api.cuCtxGetCurrent())):
            device = self._checked(api.cuDeviceGet(self.index))
            self._checked(api.cuCtxSetCurrent(self._checked(api.cuDevicePrimaryCtxRetain(device))))

    def _checked(self, answer: tuple[Any, ...], program: AbstractProgram | None = None) -> Any:
        """What a driver function gave beside its status, which must be 0."""
        status, *found = answer
        if status:
            reason = _reason(self.api, status)
            if program is None:
                raise RuntimeError(f"the GPU's context could not be had: {reason}")
            raise cache.NoCubinError(f"the CUDA kernel {name(program)} could not be loaded: {reason}")
        return found[0] if found else None


def _reason(api: Any, status: Any) -> str:
    """The driver's word for a status."""
    answered, text = api.cuGetErrorName(status)
    return str(status) if answered else text.decode()


@functools.cache
def gpu(index: int) -> Driver:
    """The GPU that torch calls `index`; `refusal` must be None for it.

    LORAQ_CUDA_CHECK=0 leaves out the comparison at first use. On Hopper, LORAQ_CUDA_WGMMA=1 gives all layers with 4-bit
    weights to hopper.py, which waits for its first GPU.
    """
    architecture = code_architecture(*torch.cuda.get_device_capability(index))
    assert architecture is not None, "refusal has looked"
    if architecture == "90" and os.environ.get("LORAQ_CUDA_WGMMA") == "1":
        architecture = "90a"
    api = importlib.import_module("cuda.bindings.driver")
    stream = torch._C._cuda_getCurrentRawStream  # only builds with CUDA have it
    return Driver(index, architecture, api, stream, None if os.environ.get("LORAQ_CUDA_CHECK") == "0" else FirstUses())


def refusal() -> str | None:
    """None where torch's current GPU runs the kernels, else a sentence that says why not."""
    if not torch.cuda.is_available() or getattr(torch.version, "hip", None):
        return "torch finds no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if code_architecture(major, minor) is None:
        return (
            f"the CUDA kernels are for compute capability 8.0, 8.6, 8.9, 9.0, 10 and 12; this GPU has {major}.{minor}"
        )
    if not toolchain.found("cuda.bindings"):
        return f"the CUDA kernels need the package cuda-bindings to be started; {toolchain.install()} brings it"
    reason = cache.usable()
    if reason is not None:
        return reason
    # What prebuilt cubins were made by, their loading shows.
    version, needed = _driver_version(), toolchain.major() if cache.prebuilt() is None else min(_DRIVERS)
    if version // 1000 >= needed:
        return None
    other = "; pip install 'loraq[cuda12]' brings a compiler for it" if version // 1000 in _DRIVERS else ""
    return (
        f"the CUDA kernels need a driver of CUDA {needed} ({_DRIVERS.get(needed, 'its first')} or newer), "
        f"and this one is of CUDA {version // 1000}.{version % 1000 // 10}{other}"
    )


def _driver_version() -> int:
    """The CUDA version that the driver is of: 13000 is 13.0."""
    _, version = importlib.import_module("cuda.bindings.driver").cuDriverGetVersion()
    return int(version)
