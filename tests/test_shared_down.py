"""Layers that read one input and share one `down`: who they are, what they cost, that they load, save and resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from loraq import registry
from loraq.errors import CheckpointError, InputError
from loraq.families import FAMILIES
from loraq.formats import row_local
from loraq.journal import Journal
from loraq.linear import PackedLinear
from loraq.match import grouped, match_layers
from loraq.ops import reference
from loraq.pipeline import Pipeline, bind, make_stage, quantize_group, quantize_layer
from loraq.recipe import load
from loraq.run import run_recipe
from matrices import seeded, trained


def stages(share: bool = True, weight: str = "int4", **low_rank: Any) -> list[Any]:
    size = {"rank": 6} if "budget" not in low_rank else {}
    return [
        make_stage("pre_transform", "smooth"),
        make_stage("main_quantizer", "rtn"),
        make_stage("low_rank", "svd", share_down=share, **size, **low_rank),
        make_stage("branch_quantizer", "rtn", weight=weight),
    ]


def small_models() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A small model of each family, and arguments of its forward pass."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    tokens, text = torch.randn(1, 16, 4), torch.randn(1, 3, 32)
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(3, 3)}
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=8,
        guidance_embeds=False, axes_dims_rope=(4, 6, 6), **heads,
    )  # fmt: skip
    sd3 = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, joint_attention_dim=32, caption_projection_dim=32, out_channels=4,
        pooled_projection_dim=8, dual_attention_layers=(0,), **heads,
    )  # fmt: skip
    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=32, sample_size=8, **heads,
    )  # fmt: skip
    qwen = QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **heads
    )
    pixart = {"encoder_hidden_states": text, "timestep": time, "added_cond_kwargs": {}}
    return {
        "PixArtTransformer2DModel": (models.transformer(1), {"hidden_states": latents, **pixart}),
        "SanaTransformer2DModel": (
            sana,
            {"hidden_states": latents, "encoder_hidden_states": text, "timestep": time},
        ),
        "FluxTransformer2DModel": (
            flux,
            {"hidden_states": tokens, "encoder_hidden_states": text, "pooled_projections": torch.randn(1, 8)}
            | {"timestep": time, **ids},
        ),
        "SD3Transformer2DModel": (
            sd3,
            {"hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": torch.randn(1, 8)}
            | {"timestep": time},
        ),
        "QwenImageTransformer2DModel": (
            qwen,
            {"hidden_states": tokens, "encoder_hidden_states": text, "timestep": time, "img_shapes": [[(1, 4, 4)]]}
            | {"encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.long)},
        ),
    }


@pytest.mark.parametrize("name", list(FAMILIES))
def test_layers_of_a_group_really_read_the_same_tensor(name: str) -> None:
    """As the model's own forward pass has it; and every list of the family is in use."""
    model, arguments = small_models()[name]
    matched, _ = match_layers(model, Pipeline(stages()), FAMILIES[name])
    groups = [[layer.name for layer in group] for group in grouped(matched) if len(group) > 1]
    read: dict[str, Tensor] = {}

    def noted(layer: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read[layer] = inputs[0]

        return hook

    for layer in {each for group in groups for each in group}:
        model.get_submodule(layer).register_forward_pre_hook(noted(layer))
    with torch.no_grad():
        model(**arguments)
    for group in groups:
        assert all(torch.equal(read[layer], read[group[0]]) for layer in group), group
    for suffixes in FAMILIES[name].same_input:
        assert any(layer.endswith(suffixes[0]) for group in groups for layer in group), suffixes


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from((7, 64, 130)),
    st.sampled_from(("int8", "int4", "mxfp6_e2m3", "nvfp4")),
    st.integers(0, 100),
)
def test_a_group_is_the_fit_of_its_weights_as_one(outs: list[int], inn: int, width: str, seed: int) -> None:
    """Cut into layers that compute what the one would, from one stored `down`, at the bytes that were announced."""
    weights = {f"layer{place}": trained(out, inn, seed=seed + place) for place, out in enumerate(outs)}
    recipe = bind(stages(weight=width))
    found = quantize_group(weights, recipe, seed=0)
    whole = quantize_layer("layer0", torch.cat(list(weights.values())), recipe, seed=0)
    input = seeded(5, inn, seed=seed)
    down = {name: tensor for name, tensor in found["layer0"].tensors.items() if name.startswith("down.")}
    outputs = []
    for layer in found.values():
        assert {name: tuple(tensor.shape) for name, tensor in layer.tensors.items()} == {
            name: stored.shape for name, stored in layer.layout.stored().items()
        }
        outputs.append(reference(input, {**down, **layer.tensors}, None, layer.layout.whole))
    expected = reference(input, whole.tensors, None, whole.layout)
    assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-5 * float(expected.abs().max()))
    assert sum(name.startswith("down.") for layer in found.values() for name in layer.tensors) == len(down)


def test_the_budget_of_a_group_is_that_of_its_layers_and_buys_more_rank() -> None:
    recipe = bind(stages(budget="rank8@16"))
    alone = recipe.layout(256, 256)
    together = recipe.layouts([256] * 3, 256)
    without = 256 * 256 // 2 + 256 * 4 * 2 + 256 * 2  # main codes, their scales, the smoothing
    assert 0.97 * 3 * 8 * 2 * 512 <= sum(each.stored_bytes - without for each in together) <= 3 * 8 * 2 * 512
    assert together[0].rank > 1.3 * alone.rank


@pytest.mark.parametrize("name", registry.names("loraq.format"))
def test_formats_whose_rows_do_not_stand_alone_are_refused(name: str) -> None:
    format = registry.load("loraq.format", name)
    chosen = [make_stage("main_quantizer", "rtn", weight=name), make_stage("low_rank", "svd", rank=2, share_down=True)]
    assert row_local(format) == ("mixed" not in name)
    if "mixed" in name:
        with pytest.raises(InputError, match=f"share_down.*{name}"):
            bind(chosen)
    elif name != "bfloat16":
        bind(chosen)


def test_no_branch_has_nothing_to_share() -> None:
    with pytest.raises(InputError, match="no branch"):
        make_stage("low_rank", "none", share_down=True)


def test_an_override_sets_a_layer_apart() -> None:
    from loraq.recipe import Override

    override = Override(match=("*attn1.to_k",), options={"low_rank": {"rank": 3}})
    matched, _ = match_layers(
        models.transformer(1), Pipeline(stages(), overrides=[override]), FAMILIES["PixArtTransformer2DModel"]
    )
    leaders = {layer.name.split("blocks.0.")[1]: layer.down_from for layer in matched}
    assert leaders["attn1.to_k"] is None
    assert leaders["attn1.to_v"] == "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small pipeline, a recipe whose layers share `down`, and what it made."""
    root = tmp_path_factory.mktemp("shared")
    model = models.saved_pipeline(root / "model", layers=1)
    recipe = models.write_recipe(root / "recipe.toml", model, root / "out")
    recipe.write_text(recipe.read_text().replace("rank = 4", 'budget = "rank4@16"\nshare_down = true'))
    run_recipe(load(recipe))
    return {"model": model, "recipe": recipe, "out": root / "out"}


def output_of(model: nn.Module) -> Tensor:
    _, arguments = small_models()["PixArtTransformer2DModel"]
    with torch.no_grad():
        return model(**arguments).sample


def test_it_loads_computes_saves_and_copies(folders: dict[str, Path], tmp_path: Path) -> None:
    stored = folders["out"] / "transformer"
    loaded = PixArtTransformer2DModel.from_pretrained(stored)
    in_memory = PixArtTransformer2DModel.from_pretrained(folders["model"] / "transformer")
    report = load(folders["recipe"]).pipeline().quantize(in_memory)
    expected = output_of(loaded)
    assert torch.equal(output_of(in_memory), expected)
    assert torch.equal(output_of(copy.deepcopy(loaded)), expected)
    assert not any("attn1.to_k.down" in name for name in loaded.state_dict())
    config = json.loads((stored / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert config["shared_down"]["transformer_blocks.0.attn2.to_v"] == "transformer_blocks.0.attn2.to_k"
    loaded.save_pretrained(tmp_path / "loaded")
    in_memory.save_pretrained(tmp_path / "in memory")  # in float32 but for the codes: other bytes, the same layers
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "loaded" / name).read_bytes() == (stored / name).read_bytes()
    assert torch.equal(output_of(PixArtTransformer2DModel.from_pretrained(tmp_path / "in memory")), expected)
    assert torch.allclose(output_of(loaded.dequantize()), expected, atol=0.2 * float(expected.abs().max()))
    queries = {record.name: record for record in report.layers}
    first, second = (queries[f"transformer_blocks.0.attn1.{leaf}"] for leaf in ("to_q", "to_k"))
    assert first.rank == second.rank
    assert first.stored_bytes > second.stored_bytes


def test_a_packed_layer_without_its_leader_says_so(folders: dict[str, Path]) -> None:
    loaded = PixArtTransformer2DModel.from_pretrained(folders["out"] / "transformer")
    layer = loaded.get_submodule("transformer_blocks.0.attn1.to_k")
    assert isinstance(layer, PackedLinear)
    alone = PackedLinear(layer.layout, {name: layer.get_buffer(name) for name in layer.layout.stored()})
    with pytest.raises(RuntimeError, match="link_shared"):
        alone(torch.zeros(1, layer.in_features))


@pytest.mark.parametrize("leader", ["transformer_blocks.0.attn1.to_nothing", "transformer_blocks.0.ff.net.2"])
def test_a_config_that_names_a_wrong_leader_is_refused(folders: dict[str, Path], tmp_path: Path, leader: str) -> None:
    spoilt = models.copy_of(folders["out"] / "transformer", tmp_path / "spoilt")
    config = json.loads((spoilt / "config.json").read_text())
    config["quantization_config"]["shared_down"]["transformer_blocks.0.attn1.to_k"] = leader
    (spoilt / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="shared_down"):
        PixArtTransformer2DModel.from_pretrained(spoilt)


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_cut_off_in_a_group_it_is_fitted_again_whole(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    class StoppedError(Exception):
        pass

    add = Journal.add

    def counted(self: Journal, unit: str, digest: str, record: Any) -> None:
        if len(self.entries) == after:
            raise StoppedError
        add(self, unit, digest, record)

    recipe = load(folders["recipe"], [f"run.output={tmp_path / 'out'}", "run.workers=1"])
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(StoppedError):
            run_recipe(recipe)
    run_recipe(recipe)
    assert models.tensor_files(tmp_path / "out") == models.tensor_files(folders["out"])
