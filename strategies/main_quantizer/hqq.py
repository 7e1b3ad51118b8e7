"""HQQ: scales or zero points fitted, without data, to an error norm that lets a few weights be far off.

    minimise over a group's scale or offset    Σ |w - ŵ|^p,    p < 1

by half-quadratic splitting: with e the errors of the present rounding, in steps of the grid, and S the shrinkage
S(e) = sign(e) max(0, |e| - |e|^(p-1) / β), what S takes out is taken for outliers, and the rest is fitted by least
squares in closed form, with the codes held:

    codes with an offset      offset = mean(w - s·S(e) - s·code)
    codes with a zero point   zero = round(mean(code - (w - s·S(e)) / s))
    all others                s = Σ level (w - s·S(e)) / Σ level²

then the weight is rounded anew; β grows. Each group keeps the step of least error norm, the first of which is the
rounding with searched scales.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023
(https://mobiusml.github.io/hqq_blog), which fits the zero point alone and has β in the weight's own units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq import formats, integer_formats, rounding
from loraq.activation import Activation, group_validator
from loraq.activation import activation as as_activation
from loraq.contracts import AbstractFormat, AbstractPlainRounding, AbstractQuantizer
from loraq.layer import Coded, LayerContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_GROWTH = 1.01
"""What β is multiplied by in each step."""
_FITTED = {"codes", "scales", "zeros", "offsets"}


def _fits_alone(instance: object, attribute: attrs.Attribute[Any], value: AbstractFormat) -> None:
    """Only groups whose scale is a free 16-bit number can be fitted one by one."""
    del instance
    parts = value.parts(1, 1, 1)
    if "scales" not in parts or parts["scales"].dtype != "bfloat16" or not set(parts) <= _FITTED:
        raise ValueError(
            f"'{attribute.name}' must be a format whose groups have a 16-bit scale of their own, which hqq can fit; "
            f"got '{value.name}'; 'int4' or 'int4_offset' would do, or the strategy rtn"
        )


@attrs.frozen(kw_only=True)
class Hqq(AbstractQuantizer, AbstractPlainRounding):
    """Fits each group's scale, zero point or offset, without data, so that a few weights may be far off."""

    weight: AbstractFormat = attrs.field(
        default=integer_formats.INT4_OFFSET, converter=formats.named, validator=_fits_alone
    )
    """Format of the weight's codes; those with an offset gain most."""
    activation: Activation = attrs.field(default=Activation(formats.INT4), converter=as_activation)
    """How the layer's input is rounded at run time: a format's name, {format, group} or "none"."""
    group: int | Literal["row"] = attrs.field(default=64, validator=group_validator("row"))
    """How many neighbouring columns share a scale; "row" gives each row one."""
    norm: float = attrs.field(default=0.7, validator=[attrs.validators.gt(0), attrs.validators.le(2)])
    """The exponent p of the error norm."""
    strength: float = attrs.field(default=10.0, validator=attrs.validators.gt(0))
    """β at the start: larger takes more of each error for an outlier's, and fits less of it."""
    steps: int = attrs.field(default=20, validator=attrs.validators.ge(1))
    """How often codes and scales are fitted to one another."""

    @property
    def format(self) -> AbstractFormat:
        return self.weight

    @property
    def scale(self) -> Literal["search"]:
        return "search"

    def group_for(self, columns: int) -> int:
        return formats.group_within(self.weight, self.group, columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        del context  # data-free
        if formats.row_wise(self.weight):
            return formats.coded_by_rows(self._searched, weight)
        return self._searched(weight)

    def _searched(self, weight: Tensor) -> Coded:
        """The weight's codes with the fitted scales or offsets of least error norm."""
        coded = self.round(weight)
        best = {name: tensor for name, tensor in coded.parts.items() if name != "codes"}
        least, strength = self._norm(weight, coded), self.strength
        for _ in range(self.steps):
            coded = formats.recoded(weight, self._fitted(weight, coded, strength))
            strength *= _GROWTH
            error = self._norm(weight, coded)
            best = {name: torch.where(error < least, coded.parts[name], tensor) for name, tensor in best.items()}
            least = torch.minimum(error, least)
        return formats.recoded(weight, attrs.evolve(coded, parts={**coded.parts, **best}))

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        return rounding.rounded(weight, self.weight, self.group_for(weight.shape[1]), "search", guess)

    def _norm(self, weight: Tensor, coded: Coded) -> Tensor:
        """Each group's Σ |w - ŵ|^p, (rows, groups)."""
        errors = formats.grouped(weight - coded.decode(), coded.group).abs()
        unit = errors.amax(dim=(1, 2), keepdim=True)  # so that no power underflows
        return (errors / torch.where(unit > 0, unit, 1.0)).pow(self.norm).sum(dim=-1) * unit.squeeze(-1).pow(self.norm)

    def _fitted(self, weight: Tensor, coded: Coded, strength: float) -> Coded:
        """`coded` with the scales or offsets that fit its codes best, outliers left out."""
        scales = coded.scales.float()
        steps = torch.where(scales > 0, scales, torch.inf).unsqueeze(-1)
        decoded = coded.decode()
        errors = formats.grouped(weight - decoded, coded.group) / steps
        outliers = errors.sign() * (errors.abs() - errors.abs().pow(self.norm - 1) / strength).clamp(min=0)
        # All in steps of the grid, from here: the target of each element, and what its code stands for.
        wanted = formats.grouped(weight, coded.group) / steps - outliers
        present = formats.grouped(torch.ones_like(weight), coded.group)
        moved: dict[str, Tensor] = {}
        if "offsets" in coded.parts:
            shift = ((errors - outliers) * present).sum(dim=-1) / present.sum(dim=-1)
            moved["offsets"] = coded.parts["offsets"].float() + shift * scales
        elif "zeros" in coded.parts:
            shift = ((errors - outliers) * present).sum(dim=-1) / present.sum(dim=-1)
            top = 2**self.weight.bits - 1
            moved["zeros"] = (coded.parts["zeros"].float() - shift).round().clamp(0, top)
        else:
            levels = formats.grouped(decoded, coded.group) / steps
            squares = levels.square().sum(dim=-1)
            share = (levels * wanted).sum(dim=-1) / torch.where(squares > 0, squares, 1.0)
            moved["scales"] = torch.where((squares > 0) & (share > 0), share, 1.0) * scales
        parts = {name: tensor.to(coded.parts[name].dtype) for name, tensor in moved.items()}
        return attrs.evolve(coded, parts={**coded.parts, **parts})
