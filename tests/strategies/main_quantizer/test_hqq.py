"""HQQ: each group's scale, zero point or offset against a plain per-group loop, and what it is good for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraq.strategies.main_quantizer.hqq import Hqq
from loraq.strategies.main_quantizer.rtn import Rtn
from torch import Tensor

from loraq import registry
from loraq.layer import Coded
from matrices import context, seeded, trained, weights_OI

FITTED = ["int2", "int4", "int4_asymmetric", "int3_offset", "int4_offset", "ternary", "fp8_e4m3"]


def norms(weight: Tensor, coded: Coded, norm: float) -> Tensor:
    """Each group's sum of errors to the power `norm`, (rows, groups) float64."""
    errors = (weight - coded.decode()).double().abs() / weight.abs().max().clamp(min=1e-30).double()
    return torch.stack([part.pow(norm).sum(dim=1) for part in errors.split(coded.group, dim=1)], dim=1)


@given(weight=weights_OI(), name=st.sampled_from(FITTED), norm=st.sampled_from([0.5, 0.7, 1.0, 2.0]))
def test_no_group_is_worse_than_with_searched_scales(weight: Tensor, name: str, norm: float) -> None:
    quantizer = Hqq(weight=name, norm=norm, steps=3)
    found = norms(weight, quantizer.encode(weight, context()), norm)
    searched = norms(weight, quantizer.round(weight), norm)
    assert (found <= searched * (1 + 1e-4) + 1e-9).all()


def by_hand(values: list[float], scale: float, offset: float, norm: float, strength: float, steps: int) -> float:
    """The offset of least error norm for one group of int4_offset codes, in plain numbers."""

    def stored(value: float) -> float:
        return float(torch.tensor(value).bfloat16())

    def codes(at: float) -> list[int]:
        return [min(7, max(-8, round((value - at) / scale))) for value in values]

    def error(at: float) -> float:
        return sum(abs(value - code * scale - at) ** norm for value, code in zip(values, codes(at), strict=True))

    best = offset
    for step in range(steps):
        beta = strength * 1.01**step
        kept = []
        for value, code in zip(values, codes(offset), strict=True):
            off = (value - code * scale - offset) / scale
            shrunk = max(0.0, abs(off) - (abs(off) ** (norm - 1) if off else float("inf")) / beta)
            kept.append(off - (shrunk if off > 0 else -shrunk))
        offset = stored(offset + scale * sum(kept) / len(kept))
        best = offset if error(offset) < error(best) else best
    return best


@pytest.mark.parametrize("seed", range(8))
def test_offsets_are_those_of_a_plain_loop(seed: int) -> None:
    weight = seeded(1, 40, seed=seed) + 0.3
    quantizer = Hqq(norm=0.7, strength=4, steps=6)
    start, found = quantizer.round(weight), quantizer.encode(weight, context())
    expected = by_hand(weight[0].tolist(), float(start.scales), float(start.parts["offsets"]), 0.7, 4, 6)
    assert float(found.parts["offsets"]) == pytest.approx(expected, abs=0.02 * float(start.scales))
    assert torch.equal(found.scales, start.scales)


def test_an_offset_fits_better_than_a_searched_one() -> None:
    weight = trained(32, 256, seed=2)
    searched = (weight - Rtn(weight="int3_offset").round(weight).decode()).norm()
    assert (weight - Hqq(weight="int3_offset").encode(weight, context()).decode()).norm() < 0.99 * searched


def test_a_few_outliers_do_not_move_the_rest() -> None:
    """Most weights lie on a grid of step 1; a few are off it by 0.4, which least squares would share among all."""
    weight = torch.arange(64).remainder(8).float().repeat(4, 1) - 3.5
    weight[:, [9, 18, 27, 36, 45]] += 0.4
    low = Hqq(weight="int3_offset", norm=0.5, strength=4).encode(weight, context())
    square = Hqq(weight="int3_offset", norm=2.0, strength=1e-3).encode(weight, context())
    exact = [int(((weight - each.decode()).abs() < 0.02).sum()) for each in (low, square)]
    assert exact[0] > exact[1]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4x2", "bfloat16", "int3_binary", "int4_mixed"])
def test_formats_whose_scales_are_not_free_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'weight' must be a format .* got '{name}'; 'int4' or"):
        Hqq(weight=name)


@pytest.mark.parametrize("options", [{"norm": 0}, {"norm": 3}, {"strength": 0}, {"steps": 0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Hqq(**options)  # type: ignore[arg-type]


def test_inside_a_fit_it_rounds_as_rtn_does() -> None:
    weight = trained(16, 100, seed=1)
    for name in FITTED:
        found, expected = Hqq(weight=name).round(weight), Rtn(weight=name).round(weight)
        assert all(torch.equal(found.parts[part], tensor) for part, tensor in expected.parts.items())
    assert set(FITTED) <= set(registry.names("loraq.format"))
