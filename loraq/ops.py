"""The packed operations: one torch operation a layer, its plain reference, and the choice of a faster backend.

`loraq::linear(x, tensors, bias, layout)` computes a packed layer from its stored tensors. `reference` below is what it
means, in plain torch, slow and easy to read; a backend of the group `loraq.kernel` (loraq/contracts.py, AbstractKernel)
that accepts the device and the layout computes the same faster. To add an operation's backend: write the class in a
module of its own, name it in your distribution's entry points, and run tests/contracts.py against it.

What a layer computes, for x (tokens, inn), all sums in float32:

    x̃ = transforms(x)
    y = q(x̃) · mainᵀ  +  q'( q'(x̃) · downᵀ ) · upᵀ  +  bias

q and q' round to the main and the branch quantizer's activation. Both operands of a product being integers, each pair
of groups is multiplied in integers, exactly, and scaled afterwards:

    y[t, o] += scale_x[t, segment] · (scale_w[o, segment] · Σ_k codes_x[t, k] · codes_w[o, k])

A segment is a run of columns within one group of either side. Segments are added up in order of their columns, the
branch's behind the main product's, in one sum. The inner product is rounded to float32, the outer one and its addition
together, once: that is the fused multiply-add that processors have, and two operations a segment are what scaling must
cost (docs/notes/cuda-kernels.md). So a backend can give the same bits on any machine.
Where one side has no integer codes (a table format, an activation "none") it is decoded, the product runs in float32,
and its sum is added as a whole.

The layout travels through torch.compile and torch.export as a string (its key), tensors as tensors.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraq import registry
from loraq.activation import Activation
from loraq.contracts import AbstractKernel
from loraq.eager import unwatched
from loraq.errors import RegistryError
from loraq.layer import Coded
from loraq.layout import Layout

_EXACT_FLOAT32 = 2**24
"""Integers up to this are exact in float32, so that a float matmul of integers is exact in any order of sums."""
_AT_ONCE = {"cpu": 2**18}
"""Numbers that `multiply_add` takes at a time, by device; 2^22 elsewhere."""


_LAYOUTS: dict[str, Layout] = {}
"""Layouts by key, so that an operation need not parse the key again."""


def _layout(key: str) -> Layout:
    if key not in _LAYOUTS:  # a key from another process, in an exported program
        _LAYOUTS[key] = Layout.from_plain(json.loads(key))
    return _LAYOUTS[key]


@functools.cache
def _names(key: str) -> tuple[str, ...]:
    """The stored names of a layout, kept because a call with one token may take no longer than making them."""
    return tuple(_layout(key).stored())


def layout_key(layout: Layout) -> str:
    """The string that stands for a layout in an operation's arguments: its JSON.

    A layout of strategies that no entry point names gets its repr, which this process alone understands.
    """
    try:
        key = json.dumps(layout.to_plain(), sort_keys=True)
    except RegistryError:
        key = repr(layout)
    _LAYOUTS.setdefault(key, layout)
    return key


def linear(input: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, key: str) -> Tensor:
    """A packed layer's output (..., out) in the input's dtype, from input (..., inn).

    `tensors` are the stored tensors in the order of `Layout.stored()`, `key` is `layout_key(layout)`. It is the
    operation `loraq::linear` for everything that looks at operations, and its plain function otherwise (eager.py).
    """
    if unwatched(input, bias):
        return _computed(input, tensors, bias, key)
    output: Tensor = torch.ops.loraq.linear(input, list(tensors), bias, key)
    return output


def _computed(input: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, key: str) -> Tensor:
    device = input.device.type
    if torch.is_autocast_enabled(device):  # its 16-bit products are not what a packed layer is
        with torch.autocast(device, enabled=False):
            return _computed(input, tensors, bias, key)
    layout = _layout(key)
    if input.shape[-1:] != (layout.inn,):
        raise ValueError(f"PackedLinear takes inputs (..., {layout.inn}), got {tuple(input.shape)}.")
    if input.numel() == 0:
        return input.new_empty((*input.shape[:-1], layout.out))
    named = dict(zip(_names(key), tensors, strict=True))
    kernel = kernel_for(layout, device)
    rows = input if input.dim() == 2 else input.reshape(-1, layout.inn)
    output = (reference if kernel is None else kernel.linear)(rows, named, bias, layout)
    return output if rows is input else output.reshape(*input.shape[:-1], layout.out)


@torch.library.custom_op("loraq::linear", mutates_args=())
def _linear(input: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    return _computed(input, tensors, bias, layout)


@_linear.register_fake
def _(input: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: str) -> Tensor:
    del tensors, bias
    return input.new_empty((*input.shape[:-1], _layout(layout).out))


@functools.cache
def kernel_for(layout: Layout, device_type: str) -> AbstractKernel | None:
    """The first backend that runs this layout on such a device, None where the reference has to."""
    for name in registry.names("loraq.kernel"):
        backend = registry.load("loraq.kernel", name)
        kernel = backend() if isinstance(backend, type) else backend
        if not isinstance(kernel, AbstractKernel):
            raise registry.broken("loraq.kernel", name, "is not an AbstractKernel")
        if kernel.device_type == device_type and kernel.refusal(layout) is None:
            return kernel
    return None


def reference(input: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, layout: Layout) -> Tensor:
    """The packed layer in plain torch: output (tokens, out) in the dtype of `input` (tokens, inn)."""
    transformed = layout.transformed(input.float(), tensors)
    rounded: dict[Activation, Coded | Tensor] = {}

    def activations(kind: Activation) -> Coded | Tensor:
        if kind not in rounded:  # main and branch often agree: round once
            rounded[kind] = quantize_activation(transformed, kind)
        return rounded[kind]

    output = product(activations(layout.activation), layout.coded("main", tensors))
    if layout.rank:
        output = with_branch(output, activations(layout.branch_activation), tensors, layout)
    if bias is not None:
        output = output + bias.float()
    return output.to(input.dtype)


def quantize_activation(input: Tensor, kind: Activation) -> Coded | Tensor:
    """`input` (tokens, columns) float32 rounded as `kind` says: coded, or itself for "none"."""
    if kind.format is None:
        return input
    return kind.format.encode(input, kind.group_for(input.shape[1]))


def with_branch(output: Tensor, input: Coded | Tensor, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The main product `output` (tokens, out) float32 and the branch of `input`, which is rounded for the branch."""
    thin = product(input, layout.coded("down", tensors))
    thin_rounded = quantize_activation(thin, layout.branch_activation)
    return product(thin_rounded, layout.coded("up", tensors), output)


def product(input: Coded | Tensor, weight: Coded, total: Tensor | None = None) -> Tensor:
    """`total + input (tokens, columns) · weightᵀ` for weight (rows, columns): (tokens, rows) float32.

    In integers where both sides have them, else decoded. `total` (tokens, rows) float32 is left as it is; None is 0.
    """
    if isinstance(input, Coded) and input.format.integer and weight.format.integer:
        return _integer_product(input, weight, total)
    values = input.decode() if isinstance(input, Coded) else input
    found = values @ weight.decode().T
    return found if total is None else total + found


def _integer_product(input: Coded, weight: Coded, total: Tensor | None) -> Tensor:
    codes_x, scales_x, group_x = input.format.integer_view(input)
    codes_w, scales_w, group_w = weight.format.integer_view(weight)
    if total is None:
        total = torch.zeros(input.shape[0], weight.shape[0], dtype=torch.float32, device=codes_w.device)
    largest = _magnitude(codes_x.dtype) * _magnitude(codes_w.dtype)
    for start, end in _segments(weight.shape[1], group_x, group_w):
        # Floating point carries the integers exactly; int8 matmuls exist on few devices.
        carrier = torch.float32 if largest * (end - start) <= _EXACT_FLOAT32 else torch.float64
        sums = codes_x[:, start:end].to(carrier) @ codes_w[:, start:end].to(carrier).T
        scaled = sums.float() * scales_w[:, start // group_w]
        total = multiply_add(scaled, scales_x[:, start // group_x].unsqueeze(1), total)
    return total


def multiply_add(first: Tensor, second: Tensor, total: Tensor) -> Tensor:
    """`first · second + total`, (tokens, rows) float32, rounded once: the fused multiply-add, which torch has not.

    `second` may be (tokens, 1). The product of two float32 is exact in float64. The sum is rounded to odd there, so
    that rounding it again to float32 is as if it had been rounded once (Boldo and Melquiond, "Emulation of a FMA and
    correctly rounded sums: proved algorithms using rounding to odd", 2008). A device without float64 rounds twice.
    """
    if not _has_float64(total.device):
        return total + first * second
    rows = max(1, _AT_ONCE.get(total.device.type, 2**22) // total.shape[1])
    if len(total) > rows:  # the many float64 on the way would not stay in a cache, nor perhaps in memory
        parts = zip(*(torch.split(each, rows) for each in (first, second, total)), strict=True)
        return torch.cat([multiply_add(*each) for each in parts])
    exact, before = first.double() * second.double(), total.double()
    sum = before + exact
    part = sum - before
    error = (before - (sum - part)).add_(exact.sub_(part))  # of the sum, itself exact (Knuth)
    nudged = torch.nextafter(sum, torch.copysign(torch.full_like(sum, torch.inf), error))
    keep = (sum.view(torch.int64) & 1).bool() | ~(error.abs() > 0)
    return torch.where(keep, sum, nudged).float()


@functools.cache
def _has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs and some of Intel's do not."""
    try:
        torch.ones((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def _magnitude(dtype: torch.dtype) -> int:
    """The largest magnitude of integers held in a dtype; int16 holds an 8-bit code less an 8-bit zero point."""
    return 128 if dtype == torch.int8 else 256


def _segments(columns: int, *groups: int) -> list[tuple[int, int]]:
    """Runs (start, end) of columns that lie within one group each of all the groupings."""
    cuts = sorted({0, columns, *(cut for group in groups for cut in range(0, columns, group))})
    return list(itertools.pairwise(cuts))
