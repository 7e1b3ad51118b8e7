"""Every recipe that ships: judged, planned on the model it names or a tiny stand-in of its class, and a few run."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from diffusers import FluxTransformer2DModel, ModelMixin, SanaTransformer2DModel

import models
from loraq import recipe as recipes
from loraq.cli import shipped_recipes
from loraq.plan import make_plan
from loraq.recipe import Recipe
from loraq.run import run_recipe, try_layers
from loraq.source import open_source

LOCAL = sorted(name for name in shipped_recipes() if not name.endswith("-w4a4") or name.startswith("tiny"))
HUB = sorted(set(shipped_recipes()) - set(LOCAL))


def stand_in(name: str) -> ModelMixin:
    """A tiny model of the class that a hub recipe's repository has."""
    if name.startswith("pixart"):
        return models.transformer(layers=1)
    if name.startswith("sana"):
        sana = {"num_attention_heads": 2, "attention_head_dim": 32, "num_cross_attention_heads": 2}
        sana |= {"cross_attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 1, "caption_channels": 32}
        return SanaTransformer2DModel(**sana, in_channels=4, out_channels=4, sample_size=8)
    flux = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2}
    flux |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}
    return FluxTransformer2DModel(**flux, in_channels=16)


def test_the_quickstart_and_every_hub_recipe_are_there() -> None:
    assert "quickstart" in LOCAL
    assert HUB == ["flux-dev-w4a4", "pixart-sigma-w4a4", "sana-w4a4"]


@pytest.mark.parametrize("name", LOCAL)
def test_local_recipes_quantize_a_layer_of_the_shipped_model(name: str) -> None:
    recipe = recipes.load(shipped_recipes()[name])
    plan = make_plan(open_source(recipe.model), recipe.pipeline(), recipe.calibration)
    assert len(list(plan.layers)) == 60
    report = try_layers(recipe, "transformer_blocks.3.attn1.to_q")
    assert report.layers[0].error_after < report.layers[0].error_before


@pytest.mark.parametrize("name", HUB)
def test_hub_recipes_run_on_a_stand_in(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(shipped_recipes()[name])
    stand_in(name).save_pretrained(tmp_path / "model")
    model = attrs.evolve(recipe.model, hub=None, folder=str(tmp_path / "model"))
    run = attrs.evolve(recipe.run, output=str(tmp_path / "out"))
    report = run_recipe(Recipe(model=model, run=run, stage=recipe.stage, layers=recipe.layers))
    assert report.layers
    assert report.error_after < report.error_before
