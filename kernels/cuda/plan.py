"""Which layers the kernels take, and what their programs must know of a layer: all that follows from its layout.

The tensor cores multiply integers of at most 8 bits, whatever their format, 64 or 128 columns of one scale at a time: a
span of one or two groups of 64. So of each product one side has such groups and the other the same, multiples of them,
or one scale a row; a product of at most 128 columns may have any larger group. Where both sides have one scale a row,
or the weight is int4x2 and the input has one scale a token, sums stay integers. A branch that does not fit runs in
torch beside the main product, and so do transforms other than one smoothing followed by one Hadamard rotation of blocks
up to 128. Layers of integers that do not fit at all are multiplied by the plain kernel (plain.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq.composite_formats import MixedWidthFormat
from loraq.errors import RegistryError
from loraq.formats import IntegerFormat
from loraq.integer_formats import AsymmetricFormat, TernaryFormat, TwoLevelIntegerFormat
from loraq.layout import strategy_to_plain

from .device import native_int4
from .layouts import GROUP, padded

if TYPE_CHECKING:
    from loraq.activation import Activation
    from loraq.contracts import AbstractFormat, AbstractPreTransform
    from loraq.layout import Layout, Storage

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
        if code_bits(storage.format) is None:
            return f"the tensor-core kernels multiply 8-bit integers, and the {name} matrix is {storage.format.name}"
        if not isinstance(activation.format, IntegerFormat) or activation.format.bits > 8:
            return (
                f"the tensor-core kernels multiply 8-bit integers, and the input of {name} is rounded to {activation}"
            )
        group = _scale_group(storage, columns)
        if span_of(activation.group_for(columns), group, columns) is None:
            return (
                f"the tensor-core kernels scale 64 or 128 columns at a time, and {name} has groups of {group} "
                f"with inputs in groups of {activation.group_for(columns)}"
            )
        if columns > _LARGEST_INN:
            return f"the tensor-core kernels take at most {_LARGEST_INN} columns, and {name} has {columns}"
    return None


def code_bits(format: AbstractFormat) -> Literal[4, 8] | None:
    """In how many bits the kernels hold a format's integers (its `integer_view`); None where 8 are too few."""
    if isinstance(format, IntegerFormat):
        return 4 if format.bits <= 4 else 8 if format.bits <= 8 else None
    if isinstance(format, TernaryFormat):
        return 4
    fits = isinstance(format, MixedWidthFormat | TwoLevelIntegerFormat)
    return 8 if fits or (isinstance(format, AsymmetricFormat) and format.bits < 8) else None


def _scale_group(storage: Storage, columns: int) -> int:
    """Columns with one scale in a format's `integer_view`."""
    return columns if isinstance(storage.format, TwoLevelIntegerFormat) else storage.group


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


Span = Literal[1, 2]
"""Groups of 64 columns that have one scale on either side."""


def span_of(input_group: int, weight_group: int, columns: int) -> Span | None:
    """How many 64s a segment of the product has, where all have as many and the quantizer has such input groups."""
    if columns <= GROUP:
        return 1 if min(input_group, weight_group) >= columns else None
    whole_input, whole_weight = input_group >= columns, weight_group >= columns
    if whole_input and whole_weight:
        return 2 if columns <= 2 * GROUP else None
    if not (whole_input or input_group in (GROUP, 2 * GROUP)) or not (whole_weight or weight_group % GROUP == 0):
        return None
    if GROUP in (input_group, weight_group):
        return 1
    fits = 2 * GROUP in (input_group, weight_group) and (whole_weight or weight_group % (2 * GROUP) == 0)
    return 2 if fits else None


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
    first; `rank_groups` 0 means no branch in the kernels. Spans: of the groups of the main activation, the branch's and
    the thin rows', and of the segments of the products with the main weight, `down` and `up`.
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
    input_span: Span = 1
    branch_input_span: Span = 1
    thin_span: Span = 1
    span: Span = 1
    down_span: Span = 1
    up_span: Span = 1

    @property
    def groups(self) -> int:
        """Groups of 64 columns, filled up to whole spans."""
        return padded(self.inn, GROUP * max(self.span, self.down_span)) // GROUP

    @property
    def rank_groups(self) -> int:
        """Groups of 64 thin columns, filled up to whole spans."""
        return padded(self.rank, GROUP * max(self.up_span, self.thin_span)) // GROUP

    @property
    def padded_out(self) -> int:
        """Outputs, filled up."""
        return padded(self.out, ROWS)

    def for_hopper(self, architecture: str) -> bool:
        """Whether Hopper's own product takes the layer: with integer sums always, else where "90a" asks for it."""
        if self.weight_bits != 4 or self.span != 1 or self.up_span != 1:
            return False
        return architecture == "90a" or (self.integers and architecture == "90")

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
            weight_bits=4 if integers_fit(layout) and layout.main.format.bits <= 4 else _code_bits(layout),
            integers=integers_fit(layout),
            fused=chain is not None,
            factors=_factors(chain or []),
            block=_block(layout, chain or []),
            top=_top(main),
            whole=_whole(main, layout.inn),
            branch_top=_top(thin) if branch else _top(main),
            branch_whole=_whole(thin, layout.inn) if branch else _whole(main, layout.inn),
            thin_whole=branch and _whole(thin, layout.rank),
            input_span=_input_span(main, layout.inn),
            branch_input_span=_input_span(thin if branch else main, layout.inn),
            thin_span=_input_span(thin, layout.rank) if branch else 1,
            span=1 if integers_fit(layout) else _span(layout, "main"),
            down_span=_span(layout, "down") if branch else 1,
            up_span=_span(layout, "up") if branch else 1,
        )


def _top(activation: Activation) -> int:
    """The largest code of an activation that fits."""
    assert isinstance(activation.format, IntegerFormat)
    return activation.format.limit


def _whole(activation: Activation, columns: int) -> bool:
    """Whether an activation has one scale a token, and this takes more than a group's largest magnitude."""
    return columns > GROUP and activation.group_for(columns) >= columns


def _code_bits(layout: Layout) -> Literal[4, 8]:
    found = code_bits(layout.main.format)
    assert found is not None, "it fits"
    return found


def _input_span(activation: Activation, columns: int) -> Span:
    """How many 64s a group of an activation that fits has, where it is not all columns."""
    return 2 if GROUP < activation.group_for(columns) < columns else 1


def _span(layout: Layout, matrix: str) -> Span:
    """The span of a product that fits."""
    storage, columns = next((each[1], each[3]) for each in layout.matrices() if each[0] == matrix)
    activation = layout.activation if matrix == "main" else layout.branch_activation
    found = span_of(activation.group_for(columns), _scale_group(storage, columns), columns)
    assert found is not None, "it fits"
    return found


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
