"""The backend: which layers the CUDA kernels take, and one call of a layer.

Three ways, by what a layer's layout is:

- the tensor-core kernels: one launch rounds the input and computes the branch's thin rows (quantizer.py), a second one
  multiplies (matmul.py, or skinny.py for few tokens). Transforms or a branch that they do not do run in torch beside;
- other integers: rounding in torch, products by the plain kernel (plain.py);
- anything else is refused, and the torch reference runs on the GPU.

A layer's repacked form belongs to its stored tensors and their versions, as in the CPU backend: it is made anew when
they are replaced or written in place, and goes when the first of them goes. Where they were written in place it is made
anew in the same memory, because a CUDA graph may hold its addresses. Inference tensors have no versions: writing into
those in place is not noticed.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import torch

from loraq import ops
from loraq.contracts import AbstractKernel

from . import cache, driver, fallback, plan, runner
from .device import AbstractDevice
from .prepared import Prepared
from .runner import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.layout import Layout

_LOCK = threading.Lock()


@attrs.define(eq=False)
class _Entry:
    """A layer made ready, the state of the tensors it was made from, and its bias as the kernels read it."""

    layout: Layout
    architecture: str
    ready: Prepared | fallback.PlainLayer
    tensors: tuple[weakref.ref[Tensor], ...]
    states: tuple[tuple[int, int], ...]
    bias: tuple[weakref.ref[Tensor], tuple[int, int], Tensor] | None = None

    def fits(self, layout: Layout, tensors: Mapping[str, Tensor], architecture: str) -> bool:
        """Whether `tensors` are still those, unchanged, and mean the same."""
        if not self.like(layout, architecture):
            return False
        for reference, state, tensor in zip(self.tensors, self.states, tensors.values(), strict=True):
            if reference() is not tensor or state != _state(tensor):
                return False
        return True

    def like(self, layout: Layout, architecture: str) -> bool:
        """Whether it is of this layout and for this architecture."""
        return (self.layout is layout or self.layout == layout) and self.architecture == architecture

    def padded_bias(self, bias: Tensor, ready: Prepared) -> Tensor:
        """The bias for the kernels, kept while it is unchanged."""
        kept = self.bias
        if kept is None or kept[0]() is not bias or kept[1] != _state(bias):
            same = None if kept is None or kept[0]() is not bias else kept[2]
            kept = self.bias = (weakref.ref(bias), _state(bias), ready.bias(bias, same))
            _settle(bias)
        return kept[2]


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to, or made to share other memory."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def _settle(tensor: Tensor) -> None:
    """Wait until what was just made of `tensor` is there: later calls may be on other streams. Once a layer."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


class _Thread:
    """A Python thread while it lives. A new one has no CUDA context yet, which making its launches sees to."""


_ENTRIES: dict[int, _Entry] = {}
_LOCAL = threading.local()


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"loraq: {reason}.", stacklevel=2)


@attrs.frozen
class CudaKernel(AbstractKernel):
    """Packed linears of integer formats on CUDA GPUs. `device` None is the GPU that a layer's tensors are on."""

    device: AbstractDevice | None = None

    @property
    def device_type(self) -> str:
        return "cuda"

    def refusal(self, layout: Layout) -> str | None:
        reason = plan.misfit(layout, "main")
        if reason is not None:
            reason = fallback.misfit(layout)
        if reason is None and self.device is None:
            reason = driver.refusal()
            if reason is not None and "pip install" in reason:
                _warn_once(f"{reason}; meanwhile packed layers run in plain torch on the GPU")
        return reason

    def linear(self, input: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, layout: Layout) -> Tensor:
        try:
            if self.device is None and input.get_device() != torch.cuda.current_device():
                with torch.cuda.device(input.device):
                    return self._checked(input, tensors, bias, layout)
            return self._checked(input, tensors, bias, layout)
        except cache.NoCubinError as error:
            _warn_once(f"{error}; meanwhile packed layers run in plain torch on the GPU")
            return ops.reference(input, tensors, bias, layout)

    def _checked(self, input: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, layout: Layout) -> Tensor:
        """The kernels' output; the reference's where a program turned out wrong on this GPU."""
        device = self.device or driver.gpu(input.get_device())
        uses = device.first_uses
        if uses is None:
            return self._linear(device, input, tensors, bias, layout)
        if uses.failure is None:
            try:
                output = self._linear(device, input, tensors, bias, layout)
            finally:
                programs = uses.pending()
            failure = uses.judged(output, programs, input, tensors, bias, layout) if programs else None
            if failure is None:
                return output
            _warn_once(failure)
        return ops.reference(input, tensors, bias, layout)

    def _linear(
        self,
        device: AbstractDevice,
        input: Tensor,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        entry = _entry(tensors, layout, device.architecture)
        ready = entry.ready
        if isinstance(ready, fallback.PlainLayer):
            return ready(input, bias, device)
        if layout.rank and not ready.plan.rank:
            return _with_branch_in_torch(ready, device, input, tensors, bias)
        kind = input.dtype if input.dtype in KINDS else torch.float32
        rows = input
        if not ready.plan.fused:
            rows = layout.transformed(input.float(), tensors)
        elif kind != input.dtype:
            rows = input.float()
        padded = None if bias is None else entry.padded_bias(bias, ready)
        output = _run(ready, device, _aligned(rows), kind, padded)
        return output if kind == input.dtype else output.to(input.dtype)


def _entry(tensors: Mapping[str, Tensor], layout: Layout, architecture: str) -> _Entry:
    first = tensors["main.codes"]
    entry = _ENTRIES.get(id(first))
    if entry is not None and entry.fits(layout, tensors, architecture):
        return entry
    with _LOCK:
        entry = _ENTRIES.get(id(first))
        if entry is not None and entry.fits(layout, tensors, architecture):
            return entry
        states = tuple(_state(tensor) for tensor in tensors.values())
        ready, bias = _made(layout, tensors, architecture), None
        if entry is not None and isinstance(ready, Prepared) and entry.like(layout, architecture):
            assert isinstance(entry.ready, Prepared), "of the same layout"
            entry.ready.take(ready)
            ready, bias = entry.ready, entry.bias
        weakref.finalize(first, _ENTRIES.pop, id(first), None).atexit = False
        _settle(first)
        references = tuple(weakref.ref(tensor) for tensor in tensors.values())
        entry = _Entry(layout, architecture, ready, references, states, bias)
        _ENTRIES[id(first)] = entry
    return entry


def _made(layout: Layout, tensors: Mapping[str, Tensor], architecture: str) -> Prepared | fallback.PlainLayer:
    if plan.misfit(layout, "main") is None:
        return Prepared.of(layout, tensors, architecture)
    return fallback.PlainLayer.of(layout, tensors)


def _aligned(rows: Tensor) -> Tensor:
    """`rows` contiguous and beginning at a multiple of 16 bytes, as the kernels read them."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _run(ready: Prepared, device: AbstractDevice, input: Tensor, output: torch.dtype, bias: Tensor | None) -> Tensor:
    """The kernels' output in dtype `output`, by this thread's launches: their arguments are written at every call."""
    tokens = input.shape[0]
    # Kept with the layer, for as long as it lives. The sizes of a call decide its way.
    size = runner.size_of(ready.plan, tokens)
    key = (size, input.dtype, output, bias is None, id(device))
    thread = _thread()
    runners = ready.runners.get(thread)
    if runners is None:
        runners = ready.runners[thread] = {}
    found = runners.get(key)
    if found is None:
        way = runner.Way.of(ready.plan, size, device.architecture)
        found = runners[key] = runner.Runner(ready, way, device, input.dtype, output, bias is not None)
    return found(input, bias)


def _thread() -> _Thread:
    """What stands for this thread: not its number, which Python gives to the next one when it has ended."""
    found: _Thread | None = getattr(_LOCAL, "thread", None)
    if found is None:
        found = _LOCAL.thread = _Thread()
    return found


def _with_branch_in_torch(
    ready: Prepared, device: AbstractDevice, input: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    """The main product here and the branch as the reference has it, for a branch that the kernels do not take."""
    layout = ready.layout
    transformed = layout.transformed(input.float(), tensors)
    output = _run(ready, device, _aligned(transformed), torch.float32, None)
    rounded = ops.quantize_activation(transformed, layout.branch_activation)
    output = ops.with_branch(output, rounded, tensors, layout)
    if bias is not None:
        output = output + bias.float()
    return output.to(input.dtype)
