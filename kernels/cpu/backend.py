"""The backend: which layers the compiled kernels take, and one call of a layer.

`CpuKernel.linear` looks up the layer's repacked form (`Prepared`, made at the first call and kept as long as the stored
tensors live), cuts the work, and runs the compiled worker. Output memory and dtypes are torch's; float32 and bfloat16
are read and written by the kernel, other types converted before and after.

The repacked form belongs to the identity of the stored tensors and their versions: other tensors (`.to()`, a module
built anew, `load_state_dict(assign=True)`) have no entry, tensors written in place (`copy_`, `load_state_dict`) have a
new version, and an entry goes when its first tensor goes. Inference tensors have no versions: a checksum of them is
taken at every call, which costs speed; what LoRaQ quantizes or loads itself is made to have them (loraq/linear.py).
Writing through `.data` or `.numpy()` is seen by nobody, torch's own checks included.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import torch

from loraq import ops
from loraq.contracts import AbstractKernel
from loraq.layer import Coded

from . import machines, threads
from .pages import expect, give_back
from .prepared import Prepared, refusal
from .records import Call

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.activation import Activation
    from loraq.layout import Layout

_SERIAL_PRODUCTS = 1_000_000
"""Below so many products of codes a second thread costs more than it brings."""
_LEAST_TOKENS = 16
"""Blocks of tokens are not cut smaller than this for the sake of more threads: each block reads all the weights."""


@attrs.frozen(eq=False)
class _Entry:
    """A prepared layer and the state of the tensors that it was made from."""

    prepared: Prepared
    tensors: tuple[weakref.ref[Tensor], ...]
    states: tuple[tuple[int, int], ...]
    """What each was written to, and where it lies."""

    def fits(self, layout: Layout, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors` are still those, unchanged, and mean the same."""
        if self.prepared.layout is not layout and self.prepared.layout != layout:
            return False
        for reference, (written, address), tensor in zip(self.tensors, self.states, tensors.values(), strict=True):
            if reference() is not tensor or address != tensor.data_ptr() or written != _written(tensor):
                return False
        return True


def _written(tensor: Tensor) -> int:
    """What changes when a tensor is written to."""
    if tensor.is_inference():
        return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
    return tensor._version


_ENTRIES: dict[tuple[int, str], _Entry] = {}
_LOCK = threading.Lock()
_local = threading.local()


@attrs.frozen
class CpuKernel(AbstractKernel):
    """Packed linears of integer formats on the CPU. `machine` names one of machines.MACHINES, None the fastest."""

    machine: str | None = None

    @property
    def device_type(self) -> str:
        return "cpu"

    def refusal(self, layout: Layout) -> str | None:
        return refusal(layout)

    def linear(self, input: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, layout: Layout) -> Tensor:
        prepared = self._prepared(tensors, layout)
        if layout.rank and not prepared.branch:
            return _with_branch_in_torch(prepared, input, tensors, bias)
        rows = input
        if not prepared.fused:
            rows = layout.transformed(input.float(), tensors)
            if prepared.rounded_before:
                rows = _rounded(rows, layout.activation)
        elif input.dtype not in (torch.float32, torch.bfloat16):
            rows = input.float()
        half = input.dtype == torch.bfloat16
        output = torch.empty((rows.shape[0], layout.out), dtype=torch.bfloat16 if half else torch.float32)
        expect(output)
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        _run(prepared, rows.contiguous(), output, None if bias is None else bias.contiguous())
        return output if output.dtype == input.dtype else output.to(input.dtype)

    def _prepared(self, tensors: Mapping[str, Tensor], layout: Layout) -> Prepared:
        machine = machines.machine(self.machine)
        first = tensors["main.codes"]
        key = (id(first), machine.name)
        entry = _ENTRIES.get(key)
        if entry is not None and entry.fits(layout, tensors):
            return entry.prepared
        with _LOCK:
            entry = _ENTRIES.get(key)
            if entry is not None and entry.fits(layout, tensors):
                return entry.prepared
            states = tuple((_written(tensor), tensor.data_ptr()) for tensor in tensors.values())
            prepared = Prepared.of(layout, tensors, machine)
            give_back(tensors.values())
            weakref.finalize(first, _ENTRIES.pop, key, None).atexit = False
            _ENTRIES[key] = _Entry(prepared, tuple(weakref.ref(tensor) for tensor in tensors.values()), states)
        return prepared


def _with_branch_in_torch(
    prepared: Prepared, input: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    """The main product here and the branch as the reference has it, for a branch that is not in integers."""
    layout = prepared.layout
    transformed = layout.transformed(input.float(), tensors).contiguous()
    output = torch.empty((input.shape[0], layout.out), dtype=torch.float32)
    rows = _rounded(transformed, layout.activation) if prepared.rounded_before else transformed
    _run(prepared, rows, output, None)
    rounded = ops.quantize_activation(transformed, layout.branch_activation)
    output = ops.with_branch(output, rounded, tensors, layout)
    if bias is not None:
        output += bias.float()
    return output.to(input.dtype)


def _rounded(rows: Tensor, kind: Activation) -> Tensor:
    """The values that `rows` (tokens, columns) are rounded to, float32."""
    coded = ops.quantize_activation(rows, kind)
    return coded.decode() if isinstance(coded, Coded) else coded


def _run(prepared: Prepared, input: Tensor, output: Tensor, bias: Tensor | None) -> None:
    """One call of the compiled layer."""
    tokens, workers = input.shape[0], torch.get_num_threads()
    if workers > 1 and tokens * prepared.products < _SERIAL_PRODUCTS:
        workers = 1
    block, parts = _cut(tokens, workers, prepared)
    memory, stride = _memory(prepared.memory_bytes, workers)
    call = Call(
        layer=prepared.address,
        input=input.data_ptr(),
        output=output.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        bfloat16_in=input.dtype == torch.bfloat16,
        bfloat16_out=output.dtype == torch.bfloat16,
        tokens=tokens,
        token_block=block,
        token_blocks=-(-tokens // block),
        output_parts=parts,
        memory=memory,
        memory_stride=stride,
    )
    address = ctypes.addressof(call)
    if workers == 1:
        prepared.worker(address)
    else:
        threads.start()(prepared.run, address, workers)


def _cut(tokens: int, workers: int, prepared: Prepared) -> tuple[int, int]:
    """(tokens a block, parts of the outputs): as many tasks as workers or a multiple, each block within the cache."""
    blocks = -(-tokens // prepared.token_block)
    blocks = max(blocks, min(workers, -(-tokens // _LEAST_TOKENS)))
    if blocks > workers:
        blocks = -(-blocks // workers) * workers
    block = min(prepared.token_block, -(-tokens // blocks) + 7 & ~7)
    blocks = -(-tokens // block)
    return block, min(prepared.panels, -(-workers // blocks)) if blocks < workers else 1


def _memory(size: int, workers: int) -> tuple[int, int]:
    """(address, bytes a worker) of this Python thread's scratch memory, kept from call to call."""
    held: Tensor | None = getattr(_local, "memory", None)
    if held is None or held.numel() < size * workers + 64:
        held = _local.memory = torch.empty(size * workers + 64, dtype=torch.uint8)
    return held.data_ptr() + 63 & ~63, size
