"""Peers' codes kept exactly: against what each library itself dequantizes, under the contracts, and through a run.

The libraries and the distribution in peers/ are installed by whoever compares; without them the tests are skipped.
"""

# ruff: noqa: E402  # what is imported may not be there

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contracts
import models
from command import done, loraq, refused
from loraq import registry
from matrices import context, seeded, trained

PEERS = Path(__file__).parent.parent / "peers"
if importlib.util.find_spec("loraq_peers") is None:
    pytest.skip("peers/ is not installed (pip install -e ./peers)", allow_module_level=True)

from loraq_peers import compare
from loraq_peers.formats import UINT4_OFFSET, UINT4_OFFSET32, UINT4_ZERO
from loraq_peers.groups import dividing
from loraq_peers.hqq_package import HqqPackage
from loraq_peers.quanto import Quanto
from loraq_peers.sdnq_branch import SdnqSvd
from loraq_peers.sdnq_codes import Sdnq
from loraq_peers.sdnq_rotation import SdnqHadamard
from loraq_peers.torchao_codes import Torchao

SHAPES = ((16, 64), (64, 200), (48, 256), (3, 5))


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


QUANTIZERS = [
    pytest.param(strategy, marks=needs(module), id=f"{module}-{number}")
    for number, (module, strategy) in enumerate(
        (
            ("sdnq", Sdnq()),
            ("sdnq", Sdnq(weight="uint4", group=128)),
            ("sdnq", Sdnq(weight="uint4", scales="float32")),
            ("hqq", HqqPackage()),
            ("torchao", Torchao()),
            ("torchao", Torchao(zero_point=True)),
            ("optimum", Quanto()),
        )
    )
]


@pytest.mark.parametrize("format", [UINT4_OFFSET, UINT4_OFFSET32, UINT4_ZERO], ids=lambda each: each.name)
def test_formats_keep_their_contract(format: Any) -> None:
    contracts.number_format(format)
    assert registry.load("loraq.format", format.name) is format


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**32), st.floats(-50, 50))
def test_a_range_of_sixteen_points_halves_the_error_at_most(
    rows: int, columns: int, group: int, seed: int, middle: float
) -> None:
    """Codes over a group's own range err by half a step; 16-bit scales and offsets by their rounding besides."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + middle
    coded = UINT4_OFFSET32.encode(values, group)
    step = coded.scales.repeat_interleave(min(group, columns), dim=1)[:, :columns]
    assert ((values - coded.decode()).abs() <= step * 0.501 + 1e-5 * values.abs().max()).all()


def test_numbers_that_the_format_cannot_hold_are_refused() -> None:
    codes, scales = torch.tensor([[1, 15]]), torch.tensor([[0.5]])
    assert UINT4_OFFSET.made(codes, scales, scales, 2).decode().tolist() == [[1.0, 8.0]]
    assert UINT4_ZERO.made(codes, scales, scales, 2).decode().tolist() == [[0.25, 7.25]]
    with pytest.raises(ValueError, match="no bfloat16"):
        UINT4_OFFSET.made(codes, torch.tensor([[0.1]]), scales, 2)
    with pytest.raises(ValueError, match="outside of 0 to 15"):
        UINT4_OFFSET.made(codes + 1, scales, scales, 2)


@given(st.integers(1, 500), st.integers(1, 300))
def test_groups_fill_a_row(columns: int, group: int) -> None:
    found = dividing(columns, group)
    assert columns % found == 0
    assert found <= group
    assert not any(columns % other == 0 for other in range(found + 1, min(group, columns) + 1))


@pytest.mark.parametrize("strategy", QUANTIZERS)
def test_quantizers_keep_their_contract(strategy: Any) -> None:
    contracts.is_options_class(type(strategy))
    contracts.quantizer(strategy)


@needs("sdnq")
@pytest.mark.parametrize("strategy", [Sdnq(), Sdnq(weight="uint4"), Sdnq(weight="uint4", scales="float32")])
def test_sdnqs_codes_decode_to_what_sdnq_decodes(strategy: Sdnq) -> None:
    for rows, columns in SHAPES:
        weight = trained(rows, columns, seed=rows)
        dequantizer, tensors = strategy.made(weight)
        expected = dequantizer(**tensors, skip_compile=True, dtype=torch.float32).float()[:rows]
        found = strategy.encode(weight, context()).decode()
        # The library multiplies in the scales' own type.
        allowed = 2.0**-8 if strategy.scales == "bfloat16" else 1e-6
        assert torch.allclose(found, expected, rtol=allowed, atol=allowed * float(weight.abs().max()))


@needs("sdnq")
@pytest.mark.parametrize("strategy", [Sdnq(), Sdnq(weight="uint4", group=128)])
def test_sdnqs_pieces_make_what_its_one_call_makes(strategy: Sdnq) -> None:
    """SVD, Hadamard and codes, as three strategies, are `sdnq_quantize_layer_weight` with both switches on."""
    from sdnq.quantizer import sdnq_quantize_layer_weight

    rows, columns, rank = 96, 256, 8
    weight, rotation, branch = trained(rows, columns, seed=1), SdnqHadamard(), SdnqSvd()
    turned = rotation.weight(weight, {})
    fit = branch.fit(turned, strategy, registry.load("loraq.branch_quantizer", "none")(), rank, context())
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=context().generator)))
    dequantizer, tensors = sdnq_quantize_layer_weight(
        weight,
        layer_class_name="Linear",
        weights_dtype=strategy.weight,
        group_size=strategy.group,
        use_svd=True,
        svd_rank=rank,
        use_hadamard=True,
        torch_dtype=torch.bfloat16,
        dequantize_fp32=False,
    )
    assert fit.up is not None
    assert fit.down is not None
    assert torch.equal(fit.up.decode(), tensors["svd_up"].float())
    assert torch.equal(fit.down.decode(), tensors["svd_down"].float())
    assert torch.equal(fit.main.scales.flatten(), tensors["scale"].flatten())
    packed = dequantizer(**tensors, skip_compile=True, non_svd=True, non_hadamard=True, dtype=torch.float32)
    assert torch.allclose(fit.main.decode(), packed.float(), atol=2.0**-8 * float(weight.abs().max()))
    whole = dequantizer(**tensors, skip_compile=True).float()
    mine = rotation.weight(fit.decode(), {})  # its own inverse
    assert float((mine - whole).norm() / whole.norm()) < 2.0**-7, "the library adds up in bfloat16"


@needs("sdnq")
def test_sdnqs_branch_and_rotation_keep_their_contracts() -> None:
    for name in ("none", "rtn"):
        contracts.low_rank(SdnqSvd(), Sdnq(), registry.load("loraq.branch_quantizer", name)())
    contracts.pre_transform(SdnqHadamard())


@needs("hqq")
def test_hqqs_codes_decode_to_what_hqq_decodes() -> None:
    from hqq.core.quantize import Quantizer

    for rows, columns in SHAPES:
        weight = trained(rows, columns, seed=rows)
        codes, meta = HqqPackage().made(weight)
        expected = Quantizer.dequantize(
            codes, meta | {"packing": None, "compute_dtype": torch.float32, "shape": weight.shape}
        )
        found = HqqPackage().encode(weight, context()).decode()
        assert torch.allclose(found, expected, atol=2.0**-7 * float(expected.abs().max())), "scales lose 8 bits"


@needs("torchao")
@pytest.mark.parametrize("strategy", [Torchao(), Torchao(zero_point=True)])
def test_torchaos_codes_decode_to_what_torchao_decodes(strategy: Torchao) -> None:
    for rows, columns in SHAPES:
        weight = trained(rows, columns, seed=rows)
        made = strategy.made(weight)
        found = strategy.encode(weight, context()).decode()
        exact = (made.qdata.float() - made.zero_point.float().repeat_interleave(columns // made.scale.shape[1], 1)) * (
            made.scale.float().repeat_interleave(columns // made.scale.shape[1], 1)
        )
        assert torch.equal(found, exact)
        assert torch.allclose(found, made.dequantize().float(), rtol=2.0**-8)


@needs("optimum")
def test_quantos_codes_decode_to_what_quanto_decodes() -> None:
    for rows, columns in SHAPES:
        weight = trained(rows, columns, seed=rows)
        found, expected = Quanto().encode(weight, context()).decode(), Quanto().made(weight).dequantize().float()
        assert torch.allclose(found, expected, atol=2.0**-7 * float(weight.abs().max()))


@needs("sdnq")
def test_a_run_packs_loads_and_draws(tmp_path: Path) -> None:
    """The same layers and bytes as a recipe of LoRaQ's own, and a pipeline that draws."""
    models.saved_pipeline(tmp_path / "model")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
model.folder = "{tmp_path / "model"}"
run.output = "{tmp_path / "out"}"
stage = [
    {{ kind = "pre_transform", strategy = "sdnq_hadamard" }},
    {{ kind = "main_quantizer", strategy = "sdnq", weight = "uint4" }},
    {{ kind = "low_rank", strategy = "sdnq_svd", rank = 4 }},
    {{ kind = "branch_quantizer", strategy = "none" }},
]
"""
    )
    done(loraq("run", recipe))
    call = [part for name, value in models.CALL.items() for part in ("--call", f"{name}={str(value).lower()}")]
    arguments = ("evaluate", tmp_path / "out", "--against", tmp_path / "model", "--prompt", "a red ring")
    assert "psnr" in done(loraq(*arguments, "--count", 1, "--metric", "psnr", *call))


def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    models.saved_pipeline(tmp_path / "model")
    recipe = models.write_recipe(tmp_path / "recipe.toml", tmp_path / "model", tmp_path / "out", low_rank="none")
    found = loraq("run", recipe, "--set", "main_quantizer.strategy=quanto")
    assert "pip install 'optimum-quanto'" in refused(found)


def test_recipes_are_fine_and_store_the_same_bytes() -> None:
    suite = tomllib.loads(compare.SUITE.read_text())
    for each in suite["recipe"]:
        if each["recipe"].endswith(".toml"):
            assert "fine" in done(loraq("check", (compare.SUITE.parent / each["recipe"]).resolve()))
    assert {each.stem for each in (compare.SUITE.parent.parent / "recipes").glob("*.toml")} == {
        Path(each["recipe"]).stem for each in suite["recipe"] if each["recipe"].endswith(".toml")
    }


def test_the_command_says_where_the_suite_is_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["loraq-peers", "--suite"])
    compare.main()
    assert Path(capsys.readouterr().out.strip()) == compare.SUITE
    monkeypatch.setattr(sys, "argv", ["loraq-peers", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert capsys.readouterr().err.startswith("error: ")


def test_the_comparison_measures_layers_on_the_same_tokens() -> None:
    """LoRaQ's own rounding in the table is the error worked out by hand."""
    model = models.transformer(layers=1)
    layer = "transformer_blocks.0.ff.net.2"
    tokens = {layer: seeded(32, model.get_submodule(layer).in_features, seed=2)}
    method = compare.METHODS["LoRaQ's rtn"]
    found = compare.measured(method, model, tokens)
    weight = model.get_submodule(layer).weight.detach()
    coded = registry.load("loraq.main_quantizer", "rtn")().encode(weight, context()).decode()
    expected = (tokens[layer] @ (coded - weight).T).norm() / (tokens[layer] @ weight.T).norm()
    assert found.output["W4A16"] == pytest.approx(float(expected), rel=1e-3)
    assert found.output["W4A16"] < found.output["W4A4"]
    assert found.bits == pytest.approx(4.25, abs=0.01)
    assert "LoRaQ's rtn" in "\n".join(compare.lines({"LoRaQ's rtn": found}))
