"""A suite: a TOML file that says which models, recipes, overrides and seeds `loraq bench` runs, and how it judges them.

    title, seeds, baseline, require, equal_bytes
    [[model]] what is quantized, else each recipe's own     [[recipe]] a name, a recipe and settings over it
    [[override]] settings over every recipe that it matches  [pictures] what is drawn and measured
    [measure] output errors of layers and the time of a denoising step

Every combination is a cell, and every cell a whole recipe, judged before anything runs: `load` returns a Suite or
raises one RecipeError with all faults, each with file and TOML path. Indices count from 0, as in `recipe[0]`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from loraq import registry
from loraq.errors import InputError, RecipeError, did_you_mean
from loraq.gates import CELL_ENDS, Gate, parse_gate
from loraq.prompts import is_prompt_set
from loraq.recipe import ModelSource, Recipe, RunOptions
from loraq.recipe import load as load_recipe
from loraq.settings import with_settings
from loraq.shipped import shipped_recipes
from loraq.structure import keys_of, read_toml, structure, unknown_key

OWN_FIGURES = (
    "effective_bits",
    "stored_bytes",
    "written_bytes",
    "error_before",
    "error_after",
    "output_error_after",
    "run_error_after",
    "quantize_seconds",
    "step_seconds",
)
"""What a gate may look at beside metrics: figures of loraq/results.py's Cell."""
_SECTIONS = ("pictures", "measure")


def _named(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    del instance
    if not value.strip():
        raise ValueError(f"'{attribute.name}' must be text, got {value!r}")


@attrs.frozen(kw_only=True)
class SuiteModel:
    """A model that takes the place of the recipes' own."""

    name: str = attrs.field(validator=_named)
    """What tables call it."""
    folder: str | None = None
    """A pipeline's folder; relative to the suite."""
    hub: str | None = None
    """A hub repository, "owner/name"."""
    revision: str | None = None
    """The repository's branch, tag or commit."""

    def __attrs_post_init__(self) -> None:
        ModelSource(folder=self.folder, hub=self.hub, revision=self.revision)  # says what does not go together

    def source(self, own: ModelSource) -> ModelSource:
        """The recipe's `own` [model], of this model."""
        return attrs.evolve(own, folder=self.folder, hub=self.hub, revision=self.revision)


@attrs.frozen(kw_only=True)
class SuiteRecipe:
    """A recipe to run, and what tables call it."""

    name: str = attrs.field(validator=_named)
    """What tables call it."""
    recipe: str
    """A shipped recipe's name, or a recipe's path; relative to the suite."""
    set: tuple[str, ...] = ()
    """Settings over the recipe, as --set takes them: "low_rank.rank=64"."""
    require: tuple[str, ...] = ()
    """Gates for this recipe's cells, beside the suite's own."""


@attrs.frozen(kw_only=True)
class SuiteOverride:
    """Settings over every recipe that it matches: each of its cells is there once for each override."""

    name: str = attrs.field(validator=_named)
    """What tables call it."""
    set: tuple[str, ...] = ()
    """Settings over the recipe and its own settings."""
    match: tuple[str, ...] = ("*",)
    """Patterns (fnmatch) over the recipes' names."""
    further: dict[str, Any] = attrs.field(factory=dict)
    """Settings more for single recipes, an array for each name."""

    def settings(self, name: str) -> tuple[str, ...]:
        """What is set over the recipe called `name`."""
        return (*self.set, *self.further.get(name, ()))

    def matches(self, name: str) -> bool:
        """Whether the recipe called `name` is meant."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.match)


@attrs.frozen(kw_only=True)
class PictureOptions:
    """What is drawn with every cell, from the same noise, and what is measured of it."""

    prompts: str | tuple[str, ...]
    """A text file, a prompt a line, from which `seed` chooses; "mjhq:FOLDER" or "sdci:FOLDER", a data set of the field
    with prompts and seeds of its own; paths are relative to the suite. Or an array of prompts."""
    count: int = attrs.field(default=256, validator=attrs.validators.ge(1))
    """How many pictures each model draws."""
    seed: int = attrs.field(default=0, validator=[attrs.validators.ge(0), attrs.validators.lt(2**62)])
    """Seed of the first picture's noise; each further one has the next. A data set has its own."""
    call: dict[str, Any] = attrs.field(factory=dict)
    """Arguments of the pipeline's call, such as num_inference_steps; over the published ones, with a data set."""
    batch: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """How many pictures are drawn at once; 0 decides by their size."""
    metrics: tuple[str, ...] = ()
    """What is measured (`loraq list metric`); all that can, if none is named."""
    options: dict[str, Any] = attrs.field(factory=dict)
    """Options of metrics, a table each: { clip_score = { model = "folder" } }."""
    shown: int = attrs.field(default=8, validator=attrs.validators.ge(0))
    """How many pictures the report shows."""

    def __attrs_post_init__(self) -> None:
        if not self.prompts:
            raise InputError("'prompts' is empty; name a text file or a data set, or give prompts in an array")


@attrs.frozen(kw_only=True)
class MeasureOptions:
    """What is measured beside pictures: on inputs that the 16-bit model's layers have while it draws some prompts."""

    output_error: bool = True
    """Each layer's output error on such inputs."""
    prompts: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    """How many of the pictures' prompts are drawn for it, with seeds of their own."""
    tokens: int = attrs.field(default=256, validator=attrs.validators.ge(1))
    """How many tokens of each layer's input are kept."""
    step_time: bool = True
    """Seconds of one denoising step, beside the 16-bit model's."""
    repeats: int = attrs.field(default=5, validator=attrs.validators.ge(1))
    """How often each model takes the step, by turns; the best counts."""


@attrs.frozen(kw_only=True)
class SuiteCell:
    """A cell to run: its place in the matrix, its recipe, and the folder below the suite's that is its own."""

    label: str
    slug: str
    model: str
    recipe_name: str
    setting: str
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe = attrs.field(repr=False)
    gates: tuple[Gate, ...] = ()

    @property
    def beside(self) -> tuple[str, str, int]:
        """What it shares with the baseline that it is compared with."""
        return (self.model, self.setting, self.seed)


@attrs.frozen(kw_only=True)
class Suite:
    """A whole suite, judged."""

    name: str
    title: str
    cells: tuple[SuiteCell, ...]
    baseline: str | None = None
    equal_bytes: bool = False
    pictures: PictureOptions | None = None
    measure: MeasureOptions = attrs.field(factory=MeasureOptions)

    def requiring(self, gates: Sequence[Gate]) -> Suite:
        """The suite with further gates on every cell."""
        cells = tuple(attrs.evolve(cell, gates=(*cell.gates, *gates)) for cell in self.cells)
        return attrs.evolve(self, cells=cells)

    def matching(self, pattern: str) -> tuple[SuiteCell, ...]:
        """The cells whose label matches `pattern` (fnmatch). Raises InputError where none does."""
        found = tuple(cell for cell in self.cells if fnmatch.fnmatchcase(cell.label, pattern))
        if not found:
            labels = [cell.label for cell in self.cells]
            raise InputError(
                f"--only {pattern}: no cell matches; the first is '{labels[0]}'{did_you_mean(pattern, labels)}"
            )
        return found

    def baseline_of(self, cell: SuiteCell) -> SuiteCell | None:
        """The cell that `cell` is compared with; None for a baseline itself, or where the suite has none."""
        others = (each for each in self.cells if each.recipe_name == self.baseline and each.beside == cell.beside)
        found = next(others, None)
        return None if found is cell else found


DONE = "done"


def state_of(suite: Suite, cell: SuiteCell, folder: Path) -> str:
    """How far a cell is that runs in `folder`: "waiting", "unfinished", "quantized" or "done", from files alone."""
    output = folder / "models" / cell.slug
    try:
        made = json.loads((output / "loraq.json").read_text(encoding="utf-8"))["fingerprint"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished" if output.with_name(f"{output.name}.unfinished").is_dir() else "waiting"
    if made != cell.recipe.digest and cell.recipe.allocate is None:  # an allocated one is recorded with its choices
        return "waiting"
    if suite.pictures is None:
        return DONE
    measured = folder / "measured" / f"{cell.slug}.json"  # "beside" is written last
    try:
        fresh = measured.stat().st_mtime_ns > (output / "loraq.json").stat().st_mtime_ns
        return DONE if fresh and "beside" in json.loads(measured.read_text(encoding="utf-8")) else "quantized"
    except (OSError, ValueError):
        return "quantized"


@attrs.frozen(kw_only=True)
class _Table:
    """A suite's own keys."""

    title: str = ""
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None
    require: tuple[str, ...] = ()
    equal_bytes: bool = False
    model: tuple[SuiteModel, ...] = ()
    recipe: tuple[SuiteRecipe, ...] = ()
    override: tuple[SuiteOverride, ...] = ()


def load(file: Path, settings: Sequence[str] = ()) -> Suite:
    """The suite in `file`, with `settings` ("pictures.count=16") laid over. Raises RecipeError with all faults."""
    table = read_toml(file, "give a suite's path or a shipped suite's name")
    faults: list[str] = []
    suite = _suite(with_settings(table, settings, _SECTIONS, faults), file, faults)
    if faults or suite is None:
        raise RecipeError([f"{file}: {fault}" for fault in faults])
    return suite


def _suite(table: Mapping[str, Any], file: Path, faults: list[str]) -> Suite | None:
    sections = {key: table[key] for key in _SECTIONS if key in table}
    own = {key: value for key, value in table.items() if key not in sections}
    known = [*keys_of(_Table), *_SECTIONS]
    faults.extend(f"{key}: {unknown_key(key, known, 'a suite')}" for key in own if key not in known)
    found: list[str] = []
    axes = structure({key: value for key, value in own.items() if key in known}, _Table, "", found)
    faults.extend(fault.removeprefix(".") for fault in found)
    pictures = structure(sections["pictures"], PictureOptions, "pictures", faults) if "pictures" in sections else None
    measure = structure(sections.get("measure", {}), MeasureOptions, "measure", faults)
    if axes is None:
        return None
    _judge_axes(axes, faults)
    gates = _gates(axes.require, "require", faults)
    legible = not any(".further" in fault for fault in faults)
    cells = _cells(axes, file, gates, faults) if legible else []
    if faults:
        return None
    if pictures is not None and isinstance(pictures.prompts, str):
        kind, colon, folder = pictures.prompts.partition(":") if is_prompt_set(pictures.prompts) else ("", "", "")
        path = _beside(file, folder or pictures.prompts)
        pictures = attrs.evolve(pictures, prompts=f"{kind}{colon}{path}")
    return Suite(
        name=file.stem,
        title=axes.title or file.stem,
        cells=tuple(cells),
        baseline=axes.baseline,
        equal_bytes=axes.equal_bytes,
        pictures=pictures,
        measure=measure,
    )


def _beside(file: Path, path: str) -> str:
    return str(file.parent / os.path.expanduser(path)) if path else path


def _judge_axes(axes: _Table, faults: list[str]) -> None:
    """What is wrong with the axes among themselves."""
    if not axes.recipe:
        faults.append("recipe: is missing; a suite lists its recipes as [[recipe]]")
    if not axes.seeds or len(set(axes.seeds)) < len(axes.seeds) or min(axes.seeds) < 0:
        faults.append(f"seeds: expected one or more numbers from 0 on, each once, got {list(axes.seeds)}")
    for axis in ("model", "recipe", "override"):
        names = [each.name for each in getattr(axes, axis)]
        for index, name in enumerate(names):
            if names.index(name) < index:
                faults.append(f"{axis}[{index}].name: '{name}' is {axis}[{names.index(name)}]'s name too")
    recipes = [each.name for each in axes.recipe]
    if axes.baseline is not None and axes.baseline not in recipes:
        faults.append(
            f"baseline: no recipe is called '{axes.baseline}'; there are {', '.join(recipes) or 'none'}"
            f"{did_you_mean(axes.baseline, recipes)}"
        )
    if axes.equal_bytes and axes.baseline is None:
        faults.append("equal_bytes: compares with the baseline's bytes; name a recipe as 'baseline'")
    for index, override in enumerate(axes.override):
        faults.extend(
            f"override[{index}].match: no recipe's name matches '{pattern}'; there are {', '.join(recipes)}"
            for pattern in override.match
            if not fnmatch.filter(recipes, pattern)
        )
        for name, settings in override.further.items():
            if name not in recipes:
                faults.append(f"override[{index}].further: no recipe is called '{name}'{did_you_mean(name, recipes)}")
            elif not isinstance(settings, list) or not all(isinstance(each, str) for each in settings):
                faults.append(f"override[{index}].further.{name}: expected an array of strings, got {settings!r}")


def _gates(texts: Sequence[str], path: str, faults: list[str]) -> tuple[Gate, ...]:
    gates = []
    for text in texts:
        try:
            gates.append(gate_of(text, path))
        except InputError as error:
            faults.append(str(error))
    return tuple(gates)


def gate_of(text: str, where: str = "--require") -> Gate:
    """The gate on a cell that `text` writes. Raises InputError for anything else; `where` it was given."""
    gate = parse_gate(text, where, CELL_ENDS)
    if gate.metric in OWN_FIGURES:
        if gate.end != "mean":
            raise InputError(f"{where} '{text}': {gate.metric} is one figure; write it without '.{gate.end}'")
        return gate
    known = registry.names(f"{registry.PREFIX}metric")
    if gate.metric not in known:
        raise InputError(
            f"{where} '{text}': there is no metric '{gate.metric}'; there are {', '.join(known)}, and "
            f"{', '.join(OWN_FIGURES)}{did_you_mean(gate.metric, [*known, *OWN_FIGURES])}"
        )
    return gate


def _cells(axes: _Table, file: Path, gates: tuple[Gate, ...], faults: list[str]) -> list[SuiteCell]:
    """Every combination; a recipe that no override matches is there as it is."""
    cells: list[SuiteCell] = []
    for index, chosen in enumerate(axes.recipe):
        path = f"recipe[{index}]"
        own = _gates(chosen.require, f"{path}.require", faults)
        overrides: dict[str, SuiteOverride | None] = {
            f"{path} with override[{number}]": each
            for number, each in enumerate(axes.override)
            if each.matches(chosen.name)
        }
        found: dict[str, list[str]] = {}
        for where, override in (overrides or {path: None}).items():
            recipe = _recipe(chosen, override, file, found.setdefault(where, []))
            if recipe is not None:
                cells += _of_recipe(axes, chosen, override, recipe, file, (*gates, *own))
        always = [fault for fault in next(iter(found.values())) if all(fault in each for each in found.values())]
        faults.extend(f"{path}: {fault}" for fault in always)
        faults.extend(f"{where}: {fault}" for where, each in found.items() for fault in each if fault not in always)
    models: dict[str, list[ModelSource]] = {}
    for cell in cells:
        models.setdefault(cell.model, []).append(_weights_of(cell.recipe.model))
    faults.extend(
        f"recipe: their models called '{name}' are not the same one; tell them apart as [[model]], or with another "
        "folder's name"
        for name, sources in models.items()
        if any(source != sources[0] for source in sources)
    )
    first = {cell.slug: cell.label for cell in reversed(cells)}
    faults.extend(
        f"'{cell.label}' and '{first[cell.slug]}' would share the folder '{cell.slug}'; rename one"
        for cell in cells
        if first[cell.slug] != cell.label
    )
    return cells


def _recipe(chosen: SuiteRecipe, override: SuiteOverride | None, file: Path, faults: list[str]) -> Recipe | None:
    """The recipe with all settings, or None and its faults."""
    shipped = shipped_recipes()
    path = shipped.get(chosen.recipe, file.parent / os.path.expanduser(chosen.recipe))
    if not path.suffix:
        faults.append(
            f"there is no shipped recipe '{chosen.recipe}'; give one of `loraq list recipe`, or a path to a "
            f".toml file{did_you_mean(chosen.recipe, shipped)}"
        )
        return None
    settings = (*chosen.set, *(() if override is None else override.settings(chosen.name)))
    try:
        return load_recipe(path, settings)
    except RecipeError as error:
        faults.extend(error.faults)
        return None


def _of_recipe(
    axes: _Table,
    chosen: SuiteRecipe,
    override: SuiteOverride | None,
    recipe: Recipe,
    file: Path,
    gates: tuple[Gate, ...],
) -> list[SuiteCell]:
    """The cells of a recipe with its settings: one a model and seed."""
    cells = []
    setting = "" if override is None else override.name
    for model in axes.model or (None,):
        source = recipe.model if model is None else model.source(recipe.model)
        if model is not None and model.folder is not None:
            source = attrs.evolve(source, folder=_beside(file, model.folder))
        name = _name_of(source) if model is None else model.name
        for seed in axes.seeds:
            told = [chosen.name, setting if len(axes.override) > 1 else "", name if len(axes.model) > 1 else ""]
            told.append(f"seed {seed}" if len(axes.seeds) > 1 else "")
            label = ", ".join(each for each in told if each)
            cells.append(
                SuiteCell(
                    label=label,
                    slug=re.sub(r"[^A-Za-z0-9._+-]+", "-", label).strip("-.") or "cell",
                    model=name,
                    recipe_name=chosen.name,
                    setting=setting,
                    seed=seed,
                    overrides=(*chosen.set, *(() if override is None else override.settings(chosen.name))),
                    recipe=_to_run(recipe, source, seed),
                    gates=gates,
                )
            )
    return cells


def _weights_of(source: ModelSource) -> ModelSource:
    """The model alone: what of it is quantized aside."""
    return attrs.evolve(source, component=("transformer",), skip=(), keep=())


def _name_of(source: ModelSource) -> str:
    """What tables call a recipe's own model."""
    added = [Path(each.path).stem for each in source.lora] + ([Path(source.file).stem] if source.file else [])
    return " + ".join([Path(source.folder or source.hub or "").name, *added])


def _to_run(recipe: Recipe, source: ModelSource, seed: int) -> Recipe:
    """The recipe of this model and seed; the suite draws its own pictures."""
    run: RunOptions = attrs.evolve(recipe.run, seed=seed)
    return attrs.evolve(recipe, model=source, run=run, samples=None)
