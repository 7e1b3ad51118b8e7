"""sdnq's codes: rounding to nearest with scales from each group's range, by the library itself.

int4 is symmetric (scale = largest magnitude / 7), uint4 runs from the group's least to its largest value; with scales
of 16 bits, or of 32, which is the library's default for uint4. Source: the package sdnq (GPL-3.0), which is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq import formats
from loraq.activation import Activation
from loraq.activation import activation as as_activation
from loraq.contracts import AbstractFormat, AbstractQuantizer
from loraq.layer import Coded, LayerContext

from .formats import UINT4_OFFSET, UINT4_OFFSET32, UnsignedFormat
from .groups import imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_FORMATS: dict[tuple[str, str], AbstractFormat] = {
    ("int4", "bfloat16"): formats.INT4,
    ("uint4", "bfloat16"): UINT4_OFFSET,
    ("uint4", "float32"): UINT4_OFFSET32,
}


def _known(instance: Any, attribute: object, value: str) -> None:
    del attribute
    if (instance.weight, value) not in _FORMATS:
        raise ValueError(f"'scales' must be 'bfloat16' for {instance.weight}, got '{value}'")


@attrs.frozen(kw_only=True)
class Sdnq(AbstractQuantizer):
    """sdnq's rounding, by the package."""

    weight: Literal["int4", "uint4"] = "int4"
    """The package's `weights_dtype`."""
    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time: a format's name, {format, group} or "none"."""
    group: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    """The package's `group_size`; its own choice is 64, and 128 beside an SVD."""
    scales: Literal["bfloat16", "float32"] = attrs.field(default="bfloat16", validator=_known)
    """What scales and zero points are stored in."""

    @property
    def format(self) -> AbstractFormat:
        return _FORMATS[self.weight, self.scales]

    def group_for(self, columns: int) -> int:
        """The package's rule: `group` where it fills a row, else the largest that does in fewer groups."""
        if columns % self.group == 0:
            return self.group
        fewer = range(columns // self.group - 1, 1, -1)
        return columns // next((number for number in fewer if columns % number == 0), 1)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context  # rounding to nearest looks at nothing but the weight
        return self.round(weight)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        del guess  # no search begins from it
        return self._unpacked(*self.made(weight), *weight.shape)

    def made(self, weight: Tensor) -> tuple[Any, dict[str, Tensor | None]]:
        """What the package makes of `weight` (out, inn): (its dequantizer, its tensors).

        It packs codes in pairs: an odd number of weights gets another row, of zeros.
        """
        if weight.numel() % 2:
            weight = torch.cat([weight, torch.zeros_like(weight[:1])])
        found: tuple[Any, dict[str, Tensor | None]] = imported("sdnq.quantizer", "sdnq").sdnq_quantize_layer_weight(
            weight,
            layer_class_name="Linear",
            weights_dtype=self.weight,
            group_size=self.group,
            torch_dtype=torch.bfloat16,
            dequantize_fp32=self.scales == "float32",
        )
        return found

    def _unpacked(self, dequantizer: Any, tensors: dict[str, Tensor | None], rows: int, columns: int) -> Coded:
        codes = imported("sdnq.dequantizer", "sdnq").unpack_weights(
            tensors["weight"], self.weight, quantized_weight_shape=dequantizer.quantized_weight_shape, dtype=torch.int32
        )
        group, form = self.group_for(columns), self.format
        codes = codes.reshape(-1, columns)[:rows]
        scales, zeros = (
            None if each is None else each.reshape(-1, columns // group)[:rows]
            for each in (tensors["scale"], tensors["zero_point"])
        )
        assert scales is not None
        if isinstance(form, UnsignedFormat):
            assert zeros is not None
            return form.made(codes, scales, zeros, group)
        parts = {"codes": codes.to(torch.int8).contiguous(), "scales": scales.contiguous()}
        return Coded(form, (rows, columns), group, parts)
