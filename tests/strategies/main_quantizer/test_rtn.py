"""Rounding to nearest, the options of the main and of the branch quantizer."""

import pytest
import torch
from loraq.strategies.branch_quantizer.none import SixteenBit
from loraq.strategies.branch_quantizer.rtn import Rtn as BranchRtn
from loraq.strategies.main_quantizer.rtn import Rtn

from loraq import formats, rounding
from loraq.layer import LayerContext

WEIGHT = torch.randn(65, 130, generator=torch.Generator().manual_seed(0))
CONTEXT = LayerContext("layer", torch.Generator())


def test_defaults() -> None:
    """Main is W4A4, the branch W8A8, both in groups of 64 with searched scales."""
    assert (Rtn().format, str(Rtn().activation), Rtn().group, Rtn().scale) == (formats.INT4, "int4", 64, "search")
    branch = BranchRtn()
    assert (branch.format, str(branch.activation), branch.group, branch.scale) == (formats.INT8, "int8", 64, "search")


def test_options_name_formats() -> None:
    """A recipe's words become formats."""
    quantizer = Rtn(weight="int6", activation={"format": "int8", "group": "token"}, group="row", scale="amax")
    assert quantizer.format is formats.INT6
    assert quantizer.activation.group_for(100) == 100
    assert quantizer.group_for(130) == 130


@pytest.mark.parametrize("options", [{"group": 0}, {"group": "all"}, {"group": True}, {"scale": "best"}], ids=str)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    """Options are checked when the strategy is made."""
    with pytest.raises(ValueError, match=next(iter(options))):
        Rtn(**options)


@pytest.mark.parametrize("make", [Rtn, BranchRtn], ids=["main", "branch"])
def test_encode_is_the_full_search(make: type[Rtn]) -> None:
    """Final codes are those of rounding without a guess."""
    coded = make().encode(WEIGHT, CONTEXT)
    assert torch.equal(coded.codes, rounding.searched(WEIGHT, make().format, 64).codes)
    assert (coded.shape, coded.group) == ((65, 130), 64)


def test_amax_never_uses_the_lowest_code() -> None:
    """Without a search the grid is symmetric."""
    coded = Rtn(scale="amax").encode(WEIGHT, CONTEXT)
    assert int(coded.codes.min()) == -7
    assert int(coded.codes.max()) == 7


def test_a_row_as_one_group() -> None:
    """group = "row" stores one scale a row."""
    assert Rtn(group="row").encode(WEIGHT, CONTEXT).scales.shape == (65, 1)


def test_sixteen_bit_branch_is_bfloat16() -> None:
    """The branch quantizer `none` rounds to bfloat16 and leaves inputs alone."""
    quantizer = SixteenBit()
    assert quantizer.activation.format is None
    assert torch.equal(quantizer.encode(WEIGHT, CONTEXT).decode(), WEIGHT.bfloat16().float())
    assert torch.equal(quantizer.round(WEIGHT).decode(), WEIGHT.bfloat16().float())
