"""What a run will write is known to the byte beforehand, and no budget is ever exceeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
)

import models
from command import done, loraq
from loraq.budget import branch_bytes, budget_bytes
from loraq.checkpoint import index_text, plan_files
from loraq.estimate import estimate
from loraq.pipeline import Pipeline, make_stage
from loraq.plan import Plan, make_plan
from loraq.recipe import ModelSource, Override, load
from loraq.report import Report
from loraq.shipped import recipe_path
from loraq.source import WEIGHTS_NAME, TensorSpec, open_source
from loraq.workers import Workers

SANA: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_cross_attention_heads": 3,
    "cross_attention_head_dim": 10,
    "cross_attention_dim": 30,
    "caption_channels": 12,
    "sample_size": 8,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole pipeline, and a lone component whose feed-forward layers are 1x1 convolutions of odd sizes."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    SanaTransformer2DModel(**SANA).to(torch.float16).save_pretrained(home / "sana")
    return {"pixart": models.saved_pipeline(home / "pixart"), "sana": home / "sana"}


def stages(low_rank: dict[str, Any], branch: dict[str, Any] | None = None, **main: Any) -> list[Any]:
    made = [
        make_stage("pre_transform", "smooth"),
        make_stage("main_quantizer", "rtn", **main),
        make_stage("low_rank", **low_rank),
    ]
    return made if branch is None else [*made, make_stage("branch_quantizer", **branch)]


RECIPES: dict[str, Pipeline] = {
    "none": Pipeline(stages({"strategy": "none"})),
    "rank": Pipeline(stages({"strategy": "svd", "rank": 5}, {"strategy": "rtn", "weight": "int6", "group": 20})),
    "sixteen": Pipeline(stages({"strategy": "svd", "rank": 3}, {"strategy": "none"}, weight="int8")),
    "budget": Pipeline(stages({"strategy": "svd", "budget": "rank4@16"}, {"strategy": "rtn", "weight": "int4"})),
    "bytes": Pipeline(stages({"strategy": "svd", "budget": 700}, {"strategy": "rtn"}, group="row")),
    "tight": Pipeline(stages({"strategy": "svd", "budget": 10}, {"strategy": "rtn"})),
    "overrides": Pipeline(
        stages({"strategy": "svd", "rank": 4}, {"strategy": "rtn"}),
        overrides=[
            Override(match=("*.ff.*",), options={"low_rank": {"strategy": "none"}}),
            Override(
                match=("*.0.attn1.*",), options={"low_rank": {"budget": "rank2@16"}, "main_quantizer": {"group": 9}}
            ),
            Override(match=("*.attn2.to_q",), skip=True),
            Override(match=("*.1.*",), options={"pre_transform": {"strategy": "none"}}),
        ],
        keep=["caption_projection.*", "proj_out"],
    ),
}


def planned_and_run(pipeline: Pipeline, folder: Path, output: Path) -> tuple[Plan, Report]:
    plan = make_plan(open_source(ModelSource(folder=str(folder))), pipeline)
    return plan, pipeline.run(folder, output)


@pytest.mark.parametrize("model", ["pixart", "sana"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_files_have_the_bytes_that_were_foretold(
    recipe: str, model: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plan, report = planned_and_run(RECIPES[recipe], folders[model], tmp_path / "out")
    (component,) = plan.components
    folder = tmp_path / "out" / component.component.name
    on_disk = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert on_disk == {file.name: file.size for file in component.files}
    assert sum(on_disk.values()) == plan.written_bytes == report.written_bytes
    assert plan.to_plain()["components"][0]["files"] == on_disk
    assert (folder / "config.json").read_text() == component.config_text
    assert sum(layer.stored_bytes for layer in report.layers) == plan.packed_bytes
    assert [layer.name for layer in report.layers] == [layer.name for layer in component.layers]
    assert [layer.rank for layer in report.layers] == [layer.layout.rank for layer in component.layers]
    assert report.source_bytes == plan.source_bytes
    assert any(layer.convolution for layer in component.layers) == (model == "sana")
    for layer in component.layers:  # the layer's share of the file is what the report says it takes
        stored = [
            place for file in component.files for name, place in file.places.items() if name.startswith(layer.name)
        ]
        bias = 2 * layer.out if layer.bias else 0
        assert sum(length for _, length in stored) == layer.layout.stored_bytes + bias


@pytest.mark.parametrize("model", ["pixart", "sana"])
@pytest.mark.parametrize(("recipe", "budget"), [("budget", "rank4@16"), ("bytes", 700), ("tight", 10)])
def test_no_budget_is_exceeded_nor_a_rank_left_unused(
    recipe: str, budget: str | int, model: str, folders: dict[str, Path]
) -> None:
    plan = make_plan(open_source(ModelSource(folder=str(folders[model]))), RECIPES[recipe])
    for layer in plan.layers:
        out, inn, bound = layer.out, layer.inn, layer.recipe
        assert bound.branch is not None
        assert bound.packing is not None
        allowed = budget_bytes(budget, out, inn)
        if recipe == "budget":
            assert allowed == 2 * 4 * (out + inn)
        main = layer.layout.main.stored_bytes(out, inn, bound.packing)
        transform = 2 * inn
        assert layer.layout.stored_bytes - main - transform <= allowed
        if layer.layout.rank < min(out, inn):
            assert branch_bytes(bound.branch, bound.packing, layer.layout.rank + 1, out, inn) > allowed
        if recipe == "tight":
            assert layer.layout.rank == 0


def test_overrides_show_in_the_plan(folders: dict[str, Path]) -> None:
    plan = make_plan(open_source(ModelSource(folder=str(folders["pixart"]))), RECIPES["overrides"])
    layouts = {layer.name: layer.layout for layer in plan.layers}
    assert layouts["transformer_blocks.0.ff.net.2"].rank == 0
    assert layouts["transformer_blocks.0.attn1.to_q"].main.group == 9
    assert layouts["transformer_blocks.1.attn1.to_q"].rank == 4
    assert "transformer_blocks.0.attn2.to_q" not in layouts
    assert {"proj_out", "caption_projection.linear_1"} <= set(layouts)
    told = {skip.name: skip.reason for skip in plan.components[0].skipped}
    assert told["transformer_blocks.1.attn2.to_q"] == "[[layers]] says skip"


def test_a_plan_reads_no_weight(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(ModelSource(folder=str(folders["sana"])))
    monkeypatch.setattr(type(source.components[0]), "read", None)
    assert make_plan(source, RECIPES["rank"]).written_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_plan_and_run_say_which_patterns_match_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """In the plan, in the report, in loraq.json; and what a finished run says again."""
    recipe = models.write_recipe(tmp_path / "recipe.toml", folders["pixart"], tmp_path / "out")
    recipe.write_text(recipe.read_text().replace("[run]", 'skip = ["transformer_blocks.0.*", "transformer.*"]\n[run]'))
    sentence = "model.skip has 'transformer.*', which matches no layer"
    assert f"warning: {sentence}" in done(loraq("plan", recipe))
    assert json.loads(done(loraq("plan", recipe, "--json")))["warnings"] == [sentence]
    assert f"warning: {sentence}" in done(loraq("run", recipe, "--only", "*.attn1.to_q"))
    for _ in range(2):
        assert f"warning: {sentence}" in done(loraq("run", recipe))
    assert json.loads((tmp_path / "out/loraq.json").read_text())["report"]["warnings"] == [sentence]


TRUE_SIZES: dict[str, tuple[Any, dict[str, Any], int, float]] = {
    "pixart-sigma": (
        PixArtTransformer2DModel,
        {"num_layers": 28, "sample_size": 128, "in_channels": 4, "out_channels": 8, "caption_channels": 4096},
        280,
        0.5945e9,
    ),
    "sana": (SanaTransformer2DModel, {"num_layers": 20}, 200, 1.5555e9),
    "flux-dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 494, 11.8342e9),
    "qwen-image": (QwenImageTransformer2DModel, {}, 840, 20.3843e9),
}
"""Class, published sizes, layers to quantize, and their weights."""


def headers_only(folder: Path, kind: Any, sizes: dict[str, Any]) -> Path:
    """A model folder of true size whose weights are holes in the files."""
    with init_empty_weights():
        model = kind(**sizes)
    specs = {name: TensorSpec("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    files = plan_files(specs)
    folder.mkdir()
    for file in files:
        with (folder / file.name).open("wb") as target:
            target.write(file.header)
            target.truncate(file.size)
    index = index_text(files)
    if index is not None:
        (folder / f"{WEIGHTS_NAME}.index.json").write_text(index)
    model.save_config(folder)
    return folder


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_models_of_true_size_are_planned_from_their_headers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shipped recipe on the architecture that it is for: nothing is read, and a third or less comes out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kind, sizes, layers, weights = TRUE_SIZES[name]
    folder = headers_only(tmp_path / "model", kind, sizes)
    recipe = load(recipe_path("flux-dev-w4a4" if name == "qwen-image" else f"{name}-w4a4"))
    plan = make_plan(open_source(ModelSource(folder=str(folder))), recipe.pipeline())
    assert (len(list(plan.layers)), plan.warnings) == (layers, ())
    assert plan.weights == pytest.approx(weights, rel=1e-4)
    assert 4.4 < 8 * plan.packed_bytes / plan.weights < 5
    assert plan.written_bytes < 0.34 * plan.source_bytes
    found = estimate(plan, Workers.of("cpu", 1, 1), seed=0, measure=False)
    assert found.worker_bytes == 12 * max(layer.out * layer.inn for layer in plan.layers) + 2**30
