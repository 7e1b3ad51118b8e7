"""Which layers the kernels take, and what their programs must know of a layer: all that follows from its layout.

The tensor cores multiply integers of at most 8 bits, 64 columns of one scale at a time. So of each product one side has
groups of 64 and the other such groups, multiples of 64, or one scale a row; a product of at most 64 columns may have
any larger group. Where both sides have one scale a row, or the weight is int4x2 and the input has one scale a token,
sums stay integers. A branch that does not fit runs in torch beside the main product, and so do transforms other than
one smoothing followed by one Hadamard rotation of blocks up to 128. Layers of integers that do not fit at all are
multiplied by the plain kernel (plain.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq.errors import RegistryError
from loraq.formats import IntegerFormat
from loraq.integer_formats import TwoLevelIntegerFormat
from loraq.layout import strategy_to_plain

from .device import native_int4
from .layouts import GROUP, padded

if TYPE_CHECKING:
    from loraq.activation import Activation
    from loraq.contracts import AbstractPreTransform
    from loraq.layout import Layout

SMOOTHINGS = ("smooth", "smooth_calibrated", "smooth_closed_form")
"""Transforms whose online part is `scales`, which the input is divided by."""
LARGEST_BLOCK = 128
KEPT_RANK_GROUPS = 2
"""Groups of 64 thin columns that the quantizer keeps in registers; more are added up by a kernel of their own."""
LARGEST_RANK_GROUPS = 6
ROWS = 64
"""Outputs are filled up to a multiple of this."""
_LARGEST_INTEGERS = 2**16
"""Sums of so many products of 8-bit codes fit 32 bits."""
_LARGEST_INN = 2**17
"""Beyond so many columns addresses within a group's tile would not fit the kernels' 32-bit numbers."""


def misfit(layout: Layout, matrix: str) -> str | None:
    """Why the tensor-core kernels cannot compute the product with this matrix, None where they can."""
    for name, storage, _, columns in layout.matrices():
        if name != matrix:
            continue
        activation = layout.activation if name == "main" else layout.branch_activation
        if name == "main" and integers_fit(layout):
            return None
        if not isinstance(storage.format, IntegerFormat) or storage.format.bits > 8:
            return f"the tensor-core kernels multiply 8-bit integers, and the {name} matrix is {storage.format.name}"
        if not isinstance(activation.format, IntegerFormat) or activation.format.bits > 8:
            return (
                f"the tensor-core kernels multiply 8-bit integers, and the input of {name} is rounded to {activation}"
            )
        if not groups_fit(activation.group_for(columns), storage.group, columns):
            return (
                f"the tensor-core kernels scale 64 columns at a time, and {name} has groups of {storage.group} "
                f"with inputs in groups of {activation.group_for(columns)}"
            )
        if columns > _LARGEST_INN:
            return f"the tensor-core kernels take at most {_LARGEST_INN} columns, and {name} has {columns}"
    return None


def integers_fit(layout: Layout) -> bool:
    """Whether the main product's sums can stay integers over all columns: one scale a token and one an output."""
    storage, activation, columns = layout.main, layout.activation, layout.inn
    if not isinstance(activation.format, IntegerFormat) or activation.format.bits > 8 or columns > _LARGEST_INTEGERS:
        return False
    if columns > GROUP and activation.group_for(columns) < columns:
        return False
    if isinstance(storage.format, TwoLevelIntegerFormat):
        return (storage.group % GROUP == 0 or storage.group >= columns) and activation.group_for(columns) >= columns
    return isinstance(storage.format, IntegerFormat) and storage.format.bits <= 8 and storage.group >= columns > GROUP


def groups_fit(input_group: int, weight_group: int, columns: int) -> bool:
    """Whether every run of 64 columns is one segment of the product, and the quantizer has such input groups."""
    if columns <= GROUP:
        return min(input_group, weight_group) >= columns
    whole_input, whole_weight = input_group >= columns, weight_group >= columns
    if not (whole_input or input_group == GROUP) or not (whole_weight or weight_group % GROUP == 0):
        return False
    return GROUP in (input_group, weight_group)


def branch_fits(layout: Layout) -> bool:
    """Whether the kernels take the branch, too."""
    whole = any(_whole(each, layout.inn) for each in (layout.activation, layout.branch_activation))
    if not 0 < layout.rank <= GROUP * (KEPT_RANK_GROUPS if whole else LARGEST_RANK_GROUPS):
        return False
    return misfit(layout, "down") is None and misfit(layout, "up") is None


@attrs.frozen
class Plan:
    """A layer as its programs see it. `factors` says what the input meets before the rotation, `block` is that's size.

    `integers` says that the main product's sums stay integers; `fused` is False where torch has to transform the input
    first; `rank_groups` 0 means no branch in the kernels.
    """

    out: int
    inn: int
    rank: int
    weight_bits: Literal[4, 8]
    integers: bool
    fused: bool
    factors: Literal["none", "divide", "multiply"]
    block: int
    top: int
    whole: bool
    branch_top: int
    branch_whole: bool
    thin_whole: bool

    @property
    def groups(self) -> int:
        """Groups of 64 columns."""
        return padded(self.inn, GROUP) // GROUP

    @property
    def rank_groups(self) -> int:
        """Groups of 64 thin columns."""
        return padded(self.rank, GROUP) // GROUP

    @property
    def padded_out(self) -> int:
        """Outputs, filled up."""
        return padded(self.out, ROWS)

    def for_hopper(self, architecture: str) -> bool:
        """Whether Hopper's own product takes the layer: with integer sums always, else where "90a" asks for it."""
        return self.weight_bits == 4 and (architecture == "90a" or (self.integers and architecture == "90"))

    def native(self, architecture: str) -> bool:
        """Whether the main product runs on 4-bit integers on both sides."""
        return self.weight_bits == 4 and self.top <= 7 and native_int4(architecture)

    @classmethod
    def of(cls, layout: Layout) -> Plan:
        """The plan of a layout whose main product fits."""
        branch = branch_fits(layout)
        # A branch in torch needs the transformed input there.
        chain = transform_chain(layout) if branch or not layout.rank else None
        main, thin = layout.activation, layout.branch_activation
        return cls(
            out=layout.out,
            inn=layout.inn,
            rank=layout.rank if branch else 0,
            weight_bits=4 if layout.main.format.bits <= 4 else 8,
            integers=integers_fit(layout),
            fused=chain is not None,
            factors=_factors(chain or []),
            block=_block(layout, chain or []),
            top=_top(main),
            whole=_whole(main, layout.inn),
            branch_top=_top(thin) if branch else _top(main),
            branch_whole=_whole(thin, layout.inn) if branch else _whole(main, layout.inn),
            thin_whole=branch and _whole(thin, layout.rank),
        )


def _top(activation: Activation) -> int:
    """The largest code of an activation that fits."""
    assert isinstance(activation.format, IntegerFormat)
    return activation.format.limit


def _whole(activation: Activation, columns: int) -> bool:
    """Whether an activation has one scale a token, and this takes more than a group's largest magnitude."""
    return columns > GROUP and activation.group_for(columns) >= columns


def transform_chain(layout: Layout) -> list[dict[str, Any]] | None:
    """The transforms' options where the quantizer can do them: a smoothing or none, then a rotation or none."""
    plain = [_plain(each) for each in layout.transforms]
    names = [each.get("strategy") for each in plain]
    smoothed = names[:1] if names and names[0] in SMOOTHINGS else []
    if names not in (smoothed, [*smoothed, "hadamard"]) or _block(layout, plain) > LARGEST_BLOCK:
        return None
    return plain


def _block(layout: Layout, chain: list[dict[str, Any]]) -> int:
    """The rotation's block, 1 where there is none."""
    if not chain or chain[-1].get("strategy") != "hadamard":
        return 1
    return math.gcd(layout.inn, int(chain[-1]["largest_block"]))


def _factors(chain: list[dict[str, Any]]) -> Literal["none", "divide", "multiply"]:
    if chain and chain[0]["strategy"] in SMOOTHINGS:
        return "divide"
    return "multiply" if chain and chain[-1].get("signs") else "none"


def _plain(transform: AbstractPreTransform) -> dict[str, Any]:
    """The transform's registered name and options; none for one that no entry point names."""
    try:
        return strategy_to_plain("pre_transform", transform)
    except RegistryError:
        return {}
