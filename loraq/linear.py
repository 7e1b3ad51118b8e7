"""PackedLinear: the module that takes a linear layer's place and computes from packed codes.

Its buffers are the stored tensors themselves, under the names that the checkpoint uses, so that state dicts, devices
and safetensors work as for any module, and nothing is ever unpacked for longer than a forward pass:

    to_q.main.codes, to_q.main.scales, to_q.down.codes, ..., to_q.transform.0.scales, to_q.bias

A 1x1 convolution is the same product with the channels in front: `convolution=True` moves them to the back and again to
the front. All stored tensors are integers, which no `.to(dtype)` touches; the bias alone follows the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraq import ops
from loraq.layout import Layout


class Parts(nn.Module):
    """A holder of buffers, so that stored names have dots."""


def counted(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that counts how often it is written to, which those of inference_mode do not: a
    kernel that keeps a form of its own would have to look at every byte in each call.

    Writes through the given tensor are not counted: for one that nobody else holds. What cannot be so seen is returned
    as it is.
    """
    plain = tensor.dim() > 0 and tensor.numel() > 0 and tensor.is_contiguous()
    if not tensor.is_inference() or tensor.device.type != "cpu" or not plain:
        return tensor
    with torch.inference_mode(False):
        return torch.from_numpy(tensor.view(torch.uint8).numpy()).view(tensor.dtype)


class PackedLinear(nn.Module):
    """A packed layer: `input (..., inn) -> (..., out)`, or (batch, inn, height, width) for a 1x1 convolution.

    `tensors` maps the names of `layout.stored()` to the stored tensors; None makes empty ones on `device` for a loader
    to fill. `bias` (out,) is kept in its own dtype.
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Mapping[str, Tensor] | None = None,
        bias: Tensor | None = None,
        *,
        convolution: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.convolution = convolution
        self.down_from: str | None = None
        self._key = ops.layout_key(layout.whole)
        self._names = tuple(layout.stored())
        for name, stored in layout.stored().items():
            dtype = getattr(torch, stored.dtype)
            tensor = torch.empty(stored.shape, dtype=dtype, device=device) if tensors is None else tensors[name]
            if tuple(tensor.shape) != stored.shape or tensor.dtype != dtype:
                raise ValueError(
                    f"PackedLinear: '{name}' must be {stored.dtype}{list(stored.shape)}, "
                    f"got {tensor.dtype}{list(tensor.shape)}."
                )
            owner, leaf = self._owner(name, create=True)
            owner.register_buffer(leaf, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        # Looking a dotted name up takes longer than a small layer with one token; the owners never change.
        self._owners: tuple[tuple[nn.Module, str], ...] = ()
        if layout.stores_down:
            self._owners = tuple(self._owner(name) for name in self._names)

    def share_down(self, leader: PackedLinear, name: str) -> None:
        """Read `down` from `leader`, the layer called `name`, which reads the same input and stores it for both."""
        if leader.layout.down != self.layout.down or leader.layout.rank != self.layout.rank:
            raise ValueError(f"PackedLinear: the `down` of '{name}' is not of this layer's format and rank.")
        self.down_from = name
        own = set(self._names)
        # Kept in a tuple: as a submodule it would be saved, moved and counted twice.
        self._owners = tuple(
            self._owner(each) if each in own else leader._owner(each) for each in self.layout.whole.stored()
        )

    def count_writes(self) -> None:
        """Make every buffer `counted`: for one who made them and has given them to nobody else."""
        for module in self.modules():
            for name, tensor in module._buffers.items():
                module._buffers[name] = None if tensor is None else counted(tensor)

    def _owner(self, name: str, *, create: bool = False) -> tuple[nn.Module, str]:
        """The submodule that holds a stored tensor, and the buffer's own name."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for step in path:
            if create and step not in owner._modules:
                owner.add_module(step, Parts())
            owner = owner.get_submodule(step)
        return owner, leaf

    @property
    def in_features(self) -> int:
        """Width of the input, as nn.Linear has it."""
        return self.layout.inn

    @property
    def out_features(self) -> int:
        """Width of the output, as nn.Linear has it."""
        return self.layout.out

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name; a shared `down` among them."""
        return dict(zip(self.layout.whole.stored(), self._tensors(), strict=True))

    def _tensors(self) -> list[Any]:
        if not self._owners:
            raise RuntimeError("PackedLinear: its `down` is stored by another layer; call `link_shared` on the model.")
        return [owner._buffers[leaf] for owner, leaf in self._owners]

    def dequantized_weight(self) -> Tensor:
        """`main + up @ down`, (out, inn) float32, of the transformed weight."""
        tensors = self.stored()
        weight = self.layout.coded("main", tensors).decode()
        if self.layout.rank:
            weight = weight + self.layout.coded("up", tensors).decode() @ self.layout.coded("down", tensors).decode()
        return weight

    def dequantized(self) -> nn.Linear | nn.Conv2d:
        """A plain layer with the weight that this one stands for, transforms undone, in the bias's dtype or float32."""
        tensors = self.stored()
        weight = self.dequantized_weight()
        # x̃ = x T for some matrix T, which the identity shows; so y = x T Ŵᵀ and the weight is Ŵ Tᵀ.
        transform = self.layout.transformed(
            torch.eye(self.layout.inn, dtype=torch.float32, device=weight.device), tensors
        )
        weight = weight @ transform.T
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        inn, out, has_bias = self.layout.inn, self.layout.out, self.bias is not None
        plain: nn.Linear | nn.Conv2d
        if self.convolution:
            plain = nn.Conv2d(inn, out, 1, bias=has_bias, device=weight.device, dtype=dtype)
        else:
            plain = nn.Linear(inn, out, bias=has_bias, device=weight.device, dtype=dtype)
        plain.weight = nn.Parameter(weight.to(dtype).reshape(plain.weight.shape), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain

    def forward(self, input: Tensor) -> Tensor:
        if self.convolution:
            input = input.movedim(1, -1)
        output = ops.linear(input, self._tensors(), self.bias, self._key)
        return output.movedim(-1, 1) if self.convolution else output

    def extra_repr(self) -> str:
        layout = self.layout
        branch = "no branch"
        if layout.down is not None:
            branch = f"rank {layout.rank} {layout.down.format.name} x {layout.branch_activation}"
            if not layout.stores_down:
                branch += f", down of {self.down_from}"
        kind = ", 1x1 convolution" if self.convolution else ""
        return f"{layout.inn} -> {layout.out}, {layout.main.format.name} x {layout.activation}, {branch}{kind}"


def link_shared(module: nn.Module, shared: Mapping[str, str]) -> None:
    """Tie the packed layers of `module` that store no `down` to those that store it: `shared` maps name to name."""
    for name, leader in shared.items():
        layer, owner = module.get_submodule(name), module.get_submodule(leader)
        if not isinstance(layer, PackedLinear) or not isinstance(owner, PackedLinear):
            raise ValueError(f"'{name}' takes its `down` from '{leader}', and both must be packed layers.")
        layer.share_down(owner, leader)
