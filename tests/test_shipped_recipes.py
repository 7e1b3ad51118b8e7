"""Every recipe that ships: judged, planned on the model it names or a tiny stand-in of its class, and run."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import attrs
import pytest
from diffusers import DiffusionPipeline
from loraq.strategies.low_rank.loraq_fast import LoraqFast
from loraq.strategies.pre_transform.hadamard import Hadamard
from loraq.strategies.pre_transform.none import NoTransform
from loraq.strategies.pre_transform.smooth_calibrated import SmoothCalibrated

import models
from loraq import recipe as recipes
from loraq import registry, shapes
from loraq.calibration import open_prompts
from loraq.contracts import AbstractCalibrated
from loraq.plan import make_plan
from loraq.recipe import Recipe, plain_stage
from loraq.report import Report
from loraq.run import run_recipe, try_layers
from loraq.shipped import shipped_recipes
from loraq.source import open_source

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
MODELS = ("flux-dev", "pixart-sigma", "sana", "tiny")
SHIPPED = {name: path for name, path in shipped_recipes().items() if not name.endswith("-allocated")}
"""All but those whose layers' options a run chooses; they have tests of their own."""
LOCAL = sorted(name for name in SHIPPED if name == "quickstart" or name.startswith("tiny-"))
HUB = sorted(set(SHIPPED) - set(LOCAL))
METHODS = {
    "alternating-w4a4",
    "gptq-w4a4",
    "hqq-w4a4",
    "hsvdquant-w4a4",
    "l2qer-w4a4",
    "loraq-gptq-w4a4",
    "loraq-grid-w4a4",
    "loraq-w4a4-branch-w6a6",
    "loraq-w4a4-branch-w8a8",
    "lqer-w4a4",
    "qera-w4a4",
    "rtn-w4a4",
    "svd-w4a4",
    "svdquant-w4a4",
}
FEW = {"num_inference_steps": 2, "use_resolution_binning": False, "max_sequence_length": 16}
"""A calibration's call, made quick."""


def quick(recipe: Recipe, cache: str, **size: int) -> Recipe:
    """The recipe with a short calibration, if it has one, whose statistics lie in `cache`."""
    if recipe.calibration is None:
        return recipe
    call = recipe.calibration.call | FEW | size
    return attrs.evolve(
        recipe, calibration=attrs.evolve(recipe.calibration, count=2, threads=1, call=call, cache=cache)
    )


def loaded(name: str, *settings: str) -> Recipe:
    return recipes.load(SHIPPED[name], settings)


def script(path: Path) -> ModuleType:
    """A file's module: scripts that import one another by name are in no package."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check_errors(recipe: Recipe, report: Report) -> None:
    """A branch takes error off: of the output where the input's Gram matrix was known, else of the weight."""
    assert report.layers
    with_branch = recipe.pipeline().layer_recipe("").low_rank.has_branch
    for layer in report.layers:
        before, after = layer.error_before, layer.error_after
        if layer.output_error_before is not None and layer.output_error_after is not None:
            before, after = layer.output_error_before, layer.output_error_after
        assert 0 < after < 0.3
        assert (after < before and layer.rank > 0) if with_branch else (after == before and layer.rank == 0)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small pipelines, or a lone component for FLUX, of the classes that the hub's repositories have, by model."""
    folder = tmp_path_factory.mktemp("stand-ins")
    made: dict[str, DiffusionPipeline] = {"pixart-sigma": models.pipeline(layers=1), "sana": models.sana_pipeline()}
    for model, pipeline in made.items():
        pipeline.save_pretrained(folder / model)
    models.flux_transformer().save_pretrained(folder / "flux-dev")
    return {model: folder / model for model in MODELS if model != "tiny"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where all recipes of one model find what was calibrated for another."""
    return str(tmp_path_factory.mktemp("cache"))


def test_the_quickstart_and_every_method_on_every_model_are_there() -> None:
    assert set(LOCAL) == {"quickstart", *(f"tiny-{method}" for method in METHODS)}
    methods = {f"{model}-{method}" for model in ("pixart-sigma", "sana") for method in METHODS}
    assert set(HUB) == {"flux-dev-w4a4", "pixart-sigma-w4a4", "sana-w4a4"} | methods


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_is_the_same_on_every_model(method: str) -> None:
    stages = [[plain_stage(stage) for stage in loaded(f"{model}-{method}").stage] for model in MODELS[1:]]
    assert stages[0] == stages[1] == stages[2]


def test_what_is_compared_gets_the_same_bytes_and_the_data_free_the_same_transform() -> None:
    """But for the grid's base, whose transform is a setting."""
    for name in SHIPPED:
        recipe = loaded(name)
        bound = recipe.pipeline().layer_recipe("")
        assert bound.budget == ("rank32@16" if bound.low_rank.has_branch else None), name
        if not bound.statistics and not name.endswith("-loraq-grid-w4a4"):
            assert bound.transforms == (Hadamard(signs=True),), name


def test_a_recipe_calibrates_where_it_reads_its_inputs_and_nowhere_else() -> None:
    for name in SHIPPED:
        recipe = loaded(name)
        if name.endswith("-loraq-grid-w4a4"):  # some of whose cells read them
            assert recipe.calibration is not None
            continue
        assert bool(recipe.pipeline().layer_recipe("").statistics) == (recipe.calibration is not None), name
        if recipe.calibration is not None:
            assert len(open_prompts(recipe.calibration).texts) == recipe.calibration.count, name


def test_a_recipe_is_written_to_the_folder_of_its_name() -> None:
    for name in SHIPPED:
        assert loaded(name).run.output == f"out/{name}"


def test_the_small_models_prompts_are_captions_it_was_trained_on_and_no_sample_of_a_recipe() -> None:
    seen, held_out = (
        {shapes.caption(scene, way): scene for scene in half for way in (0, 1)} for half in shapes.split_scenes()
    )
    prompts = (RECIPES / "tiny-prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 32
    assert set(prompts) <= set(seen)
    assert not set(prompts) & set(held_out)
    drawn = {prompt for name in LOCAL for prompt in getattr(loaded(name).samples, "prompts", ())}
    assert drawn
    assert not {seen[prompt] for prompt in prompts} & {seen.get(prompt) for prompt in drawn}
    words = {word for prompt in prompts for word in re.findall(r"\w+", prompt)}
    assert words == set(shapes.vocabulary())


def test_the_other_models_prompts_are_many_and_different() -> None:
    prompts = (RECIPES / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 64
    assert all(10 < len(prompt) < 120 and prompt.isascii() for prompt in prompts)


def test_the_wheel_carries_recipes_and_prompts() -> None:
    carried = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "loraq.recipes"
    ]
    for path in (*RECIPES.glob("*.toml"), *RECIPES.glob("*.txt")):
        assert any(fnmatch.fnmatchcase(path.name, pattern) for pattern in carried), path


def test_readmes_table_lists_every_strategy_and_whether_it_reads_data() -> None:
    listed: dict[tuple[str, str], str] = {}
    stage = ""
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"`\w+`", cells[1]):
            stage = cells[0].strip("`") or stage
            listed[stage, cells[1].strip("`")] = cells[4]
    kinds = ("pre_transform", "main_quantizer", "low_rank", "branch_quantizer", "packing")
    offered = {
        (kind, name): "yes" if issubclass(registry.load(f"loraq.{kind}", name), AbstractCalibrated) else "no"
        for kind in kinds
        for name in registry.names(f"loraq.{kind}")
        if registry.offer(f"loraq.{kind}", name).distribution == "loraq"
    }
    assert listed == offered


def test_readmes_recipes_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    rows = [
        line.split("|")[1]
        for line in text[text.index("## Recipes") : text.index("## More")].splitlines()
        if "`" in line and line.startswith("|")
    ]
    named: set[str] = set()
    for row in rows:
        first, *rest = re.findall(r"`([^`]+)`", row)
        head = re.match(r"MODEL(-loraq-w4a4-branch)?", first)
        named |= {first, *(head[0] + each if each.startswith("-") and head is not None else each for each in rest)}
    spelt = {name.replace("MODEL", model) for name in named for model in ("pixart-sigma", "sana", "tiny")}
    assert set(SHIPPED) <= spelt <= set(shipped_recipes())


def test_the_grids_cells_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cells = script(ROOT / "benchmarks" / "grid.py").cells("rank8@16")
    transforms = {"none": NoTransform(), "smoothing": SmoothCalibrated(), "rotation": Hadamard(signs=True)}
    assert len({(cell.transform, cell.branch) for cell in cells}) == len(cells) == 21
    for model in ("pixart-sigma", "sana", "tiny"):
        for cell in cells:
            bound = loaded(f"{model}-loraq-grid-w4a4", *cell.settings).pipeline().layer_recipe("")
            assert bound.transforms == (transforms[cell.transform],)
            assert (bound.main.format.bits, bound.main.activation.format.bits) == (4, 4)
            if cell.branch == "no branch":
                assert not bound.low_rank.has_branch
                continue
            assert bound.budget == "rank8@16"
            weight, activation = map(int, (re.findall(r"\d+", cell.branch) or (16, 16)))
            found = bound.branch.activation.format
            assert (bound.branch.format.bits, 16 if found is None else found.bits) == (weight, activation)
            assert isinstance(bound.low_rank, LoraqFast) == cell.branch.startswith("W")


@pytest.mark.parametrize("name", LOCAL)
def test_local_recipes_quantize_a_layer_of_the_shipped_model(name: str, cache: str) -> None:
    recipe = loaded(name)
    plan = make_plan(open_source(recipe.model), recipe.pipeline(), recipe.calibration)
    assert len(list(plan.layers)) == 60
    check_errors(recipe, try_layers(quick(recipe, cache), "transformer_blocks.3.attn1.to_q"))


def test_a_calibrated_recipe_runs_from_its_prompts_to_the_finished_folder(tmp_path: Path, cache: str) -> None:
    """One block of six, in fewer steps, no pictures."""
    settings = (f'run.output="{tmp_path}/out"', 'model.skip=["*_blocks.[1-5].*"]', "low_rank.steps=10")
    recipe = quick(attrs.evolve(loaded("tiny-loraq-gptq-w4a4", *settings), samples=None), cache)
    report = run_recipe(recipe)
    assert len(report.layers) == 10
    check_errors(recipe, report)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    picture = pipeline("a small red ring on white", output_type="np", **recipe.calibration.call).images[0]
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 0.01


@pytest.mark.parametrize("name", HUB)
def test_hub_recipes_run_on_a_stand_in(name: str, stand_ins: dict[str, Path], tmp_path: Path, cache: str) -> None:
    recipe = loaded(name)
    folder = next(folder for model, folder in stand_ins.items() if name.startswith(model))
    recipe = attrs.evolve(
        recipe,
        model=attrs.evolve(recipe.model, hub=None, folder=str(folder)),
        run=attrs.evolve(recipe.run, output=str(tmp_path / "out")),
    )
    check_errors(recipe, run_recipe(quick(recipe, cache, height=32, width=32)))
