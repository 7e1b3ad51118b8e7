"""A layer made ready for the tensor-core kernels: its matrices in their order (layouts.py), on their device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import attrs
import torch

from loraq.integer_formats import TwoLevelIntegerFormat

from . import layouts
from .layouts import GROUP
from .plan import ROWS, SMOOTHINGS, Plan, transform_chain

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.layout import Layout

    from .runner import Runner


@attrs.frozen(eq=False)
class Weight:
    """A matrix's codes in the kernels' order, and its scales as bfloat16 bits.

    Scales are a sixteenth where the kernels' codes count 16 times, in the upper half of a byte. Where sums stay
    integers, `scales` are integers, too, and `row_scales` (padded out,) are bfloat16 bits.
    """

    codes: Tensor
    scales: Tensor
    row_scales: Tensor | None = None

    def take(self, other: Weight) -> None:
        """Become `other`, in the same memory."""
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)
        if self.row_scales is not None and other.row_scales is not None:
            self.row_scales.copy_(other.row_scales)


@attrs.frozen(eq=False)
class Prepared:
    """A layer's plan and tensors; `factors` (padded columns,) float32 is what divides or multiplies the input."""

    layout: Layout
    plan: Plan
    main: Weight
    down: Weight | None
    up: Weight | None
    factors: Tensor | None
    runners: WeakKeyDictionary[object, dict[Hashable, Runner]] = attrs.field(factory=WeakKeyDictionary, repr=False)
    """The launches of this layer (runner.py), by thread, then by type and size of call."""

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, Tensor], architecture: str) -> Prepared:
        """The layer of these stored tensors for a GPU of this architecture; its layout must fit."""
        plan = Plan.of(layout)
        natural = plan.for_hopper(architecture)
        return cls(
            layout=layout,
            plan=plan,
            main=_integer_weight(layout, tensors, plan, natural)
            if plan.integers
            else _main(layout, tensors, plan, natural, shifted=not plan.native(architecture)),
            down=_down(layout, tensors, plan) if plan.rank else None,
            up=_up(layout, tensors, plan, natural) if plan.rank else None,
            factors=_factors(layout, plan, tensors),
        )

    def take(self, other: Prepared) -> None:
        """Become `other`, of the same layout, in the same memory: a CUDA graph may hold its addresses."""
        for mine, new in ((self.main, other.main), (self.down, other.down), (self.up, other.up)):
            if mine is not None and new is not None:
                mine.take(new)
        if self.factors is not None and other.factors is not None:
            self.factors.copy_(other.factors)

    @property
    def bytes(self) -> int:
        """What the repacked matrices take beside the checkpoint's tensors."""
        weights = [each for each in (self.main, self.down, self.up) if each is not None]
        return sum(part.numel() * part.element_size() for each in weights for part in (each.codes, each.scales))

    def bias(self, bias: Tensor, padded: Tensor | None = None) -> Tensor:
        """`bias` (out,) as the kernels read it, (padded out,) float32; in the memory of `padded` if given."""
        if padded is not None:
            padded[: self.plan.out] = bias.detach()
            return padded
        # New memory: `bias` may begin anywhere.
        padded = torch.zeros(self.plan.padded_out, dtype=torch.float32, device=bias.device)
        padded[: self.plan.out] = bias.detach()
        return padded


def _main(layout: Layout, tensors: Mapping[str, Tensor], plan: Plan, natural: bool, shifted: bool) -> Weight:
    """The main matrix; `shifted` where the kernels shift its 4-bit codes."""
    codes, scales, group = _integers(layout, "main", tensors)
    nibbles = plan.weight_bits == 4
    if nibbles and shifted:
        scales = scales / 16  # exact above 2^-122
    scales = layouts.group_scales(scales, group, codes.shape[1], ROWS, plan.groups)
    return Weight(_ordered(codes, plan.groups, nibbles, natural), scales)


def _up(layout: Layout, tensors: Mapping[str, Tensor], plan: Plan, natural: bool) -> Weight:
    """The branch's `up`, which is small: its codes take bytes whatever they are."""
    codes, scales, group = _integers(layout, "up", tensors)
    scales = layouts.group_scales(scales, group, codes.shape[1], ROWS, plan.rank_groups)
    return Weight(_ordered(codes, plan.rank_groups, False, natural), scales)


def _down(layout: Layout, tensors: Mapping[str, Tensor], plan: Plan) -> Weight:
    """The branch's `down` as the quantizer takes it."""
    codes, scales, group = _integers(layout, "down", tensors)
    rows = GROUP * plan.rank_groups
    scales = layouts.group_scales(scales, group, codes.shape[1], rows, plan.groups)
    return Weight(layouts.thin_bytes(codes, rows, plan.groups), scales)


def _integers(layout: Layout, matrix: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """A matrix's integers (rows, columns) int8, their scales, and the columns that share one."""
    coded = layout.coded(matrix, tensors)
    return coded.format.integer_view(coded)


def _integer_weight(layout: Layout, tensors: Mapping[str, Tensor], plan: Plan, natural: bool) -> Weight:
    """The main matrix as codes, an integer a group, and a scale a row; `natural` is the order of columns for wgmma."""
    coded = layout.coded("main", tensors)
    codes, columns = coded.codes, layout.inn
    if isinstance(coded.format, TwoLevelIntegerFormat):
        multipliers, row_scales = coded.parts["multipliers"], coded.parts["row_scales"]
    else:
        multipliers, row_scales = torch.ones_like(coded.scales), coded.scales
    spread = layouts.group_values(multipliers.to(torch.int16), coded.group, columns, ROWS, plan.groups)
    by_row = layouts.group_values(row_scales.to(torch.bfloat16).view(torch.int16), columns, GROUP, ROWS)
    return Weight(_ordered(codes, plan.groups, coded.format.bits <= 4, natural), spread, by_row.reshape(-1))


def _ordered(codes: Tensor, groups: int, nibbles: bool, natural: bool) -> Tensor:
    """Codes in the product's order, of 4 bits or of 8; `natural` is the order of columns for wgmma."""
    if nibbles:
        ordered = layouts.natural_nibbles if natural else layouts.output_nibbles
    else:
        ordered = layouts.natural_bytes if natural else layouts.output_bytes
    return ordered(codes, ROWS, groups)


def _factors(layout: Layout, plan: Plan, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The factors of the input's columns, filled up with ones to whole rounds of the quantizer."""
    if plan.factors == "none":
        return None
    chain = transform_chain(layout) or []
    found: Tensor | None = None
    if chain[0]["strategy"] in SMOOTHINGS:
        found = _online(layout, tensors, 0, "scales").float()
    if chain[-1].get("signs"):  # dividing by a negative number is dividing, then changing the sign
        signs = 1 - 2 * _online(layout, tensors, len(chain) - 1, "signs").float()
        found = signs if found is None else found * signs
    assert found is not None, "the plan has factors"
    return torch.nn.functional.pad(found, (0, layouts.padded(layout.inn, 8 * GROUP) - layout.inn), value=1.0)


def _online(layout: Layout, tensors: Mapping[str, Tensor], index: int, name: str) -> Tensor:
    part = layout.transforms[index].parts(layout.inn)[name]
    return layout.packing.unpack(tensors[f"transform.{index}.{name}"], part)
