"""Layers of integers that the tensor-core kernels do not take: all in torch but the products, by the plain kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import torch

from loraq import ops
from loraq.layer import Coded

from .device import AbstractDevice
from .plain import LARGEST_COLUMNS, OUTPUTS, Plain

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.layout import Layout


def misfit(layout: Layout) -> str | None:
    """Why the plain kernel cannot multiply the main matrix, None where it can."""
    if not layout.main.format.integer:
        return f"the CUDA kernels multiply integers, and the main matrix is {layout.main.format.name}"
    if layout.activation.format is None or not layout.activation.format.integer:
        return f"the CUDA kernels multiply integers, and the input of main is rounded to {layout.activation}"
    if layout.inn > LARGEST_COLUMNS:
        return f"the plain CUDA kernel sums at most {LARGEST_COLUMNS} columns, and main has {layout.inn}"
    return None


@attrs.frozen(eq=False)
class PlainWeight:
    """A matrix (rows, columns) by columns, as plain.py reads it; `bits` is what a code takes."""

    bits: int
    rows: int
    columns: int
    group: int
    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, coded: Coded) -> PlainWeight:
        """A coded matrix of an integer format."""
        codes, scales, group = coded.format.integer_view(coded)
        bits = 16 if codes.dtype == torch.int16 else 8
        by_columns = codes.T.contiguous()
        if bits == 8 and codes.numel() and int(codes.min()) >= -8 and int(codes.max()) <= 7:
            bits, filled = 4, torch.nn.functional.pad(by_columns, (0, 0, 0, codes.shape[1] % 2)).view(torch.uint8)
            by_columns = (filled[::2] & 0xF) | (filled[1::2] << 4)
        return cls(bits, *coded.shape, group, by_columns, scales.contiguous())


def product(input: Coded, weight: PlainWeight, device: AbstractDevice, total: Tensor | None = None) -> Tensor:
    """What ops.product gives: (tokens, rows) float32; a `total` is added to in place."""
    codes, scales, group = input.format.integer_view(input)
    codes, scales = codes.contiguous(), scales.contiguous()
    tokens = codes.shape[0]
    output = device.empty((tokens, weight.rows), torch.float32, codes.device) if total is None else total
    program = Plain(16 if codes.dtype == torch.int16 else 8, 4 if weight.bits == 4 else 8 if weight.bits == 8 else 16)
    sizes = [weight.rows, weight.columns, group, weight.group, scales.shape[1], weight.scales.shape[1]]
    launch = device.launch(
        program, [codes, scales, weight.codes, weight.scales, output, *sizes, int(total is not None)]
    )
    launch.start(tokens, -(-weight.rows // OUTPUTS))
    return output


@attrs.frozen(eq=False)
class PlainLayer:
    """A layer whose main product, and branch where it is in integers, run in the plain kernel."""

    layout: Layout
    tensors: Mapping[str, Tensor]
    main: PlainWeight
    down: PlainWeight | None
    up: PlainWeight | None

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, Tensor]) -> PlainLayer:
        """The layer of these stored tensors."""
        kept = {name: tensor.detach() for name, tensor in tensors.items() if name.startswith("transform.")}
        kind = layout.branch_activation.format
        whole = layout.down is not None and layout.up is not None and kind is not None and kind.integer
        fits = whole and layout.down.format.integer and layout.up.format.integer  # type: ignore[union-attr]
        down = PlainWeight.of(layout.coded("down", tensors)) if fits else None
        up = PlainWeight.of(layout.coded("up", tensors)) if fits else None
        if layout.rank and not fits:
            kept = {name: tensor.detach() for name, tensor in tensors.items() if not name.startswith("main.")}
        return cls(layout, kept, PlainWeight.of(layout.coded("main", tensors)), down, up)

    def __call__(self, input: Tensor, bias: Tensor | None, device: AbstractDevice) -> Tensor:
        """The layer's output (tokens, out) in the input's dtype."""
        layout = self.layout
        transformed = layout.transformed(input.float(), self.tensors)
        output = self._product(ops.quantize_activation(transformed, layout.activation), "main", device)
        if layout.rank:
            thin = self._product(ops.quantize_activation(transformed, layout.branch_activation), "down", device)
            output = self._product(ops.quantize_activation(thin, layout.branch_activation), "up", device, output)
        if bias is not None:
            output = output + bias.float()
        return output.to(input.dtype)

    def _product(
        self, input: Coded | Tensor, matrix: str, device: AbstractDevice, total: Tensor | None = None
    ) -> Tensor:
        weight = {"main": self.main, "down": self.down, "up": self.up}[matrix]
        if weight is None or not isinstance(input, Coded):
            return ops.product(input, self.layout.coded(matrix, self.tensors), total)
        return product(input, weight, device, total)
