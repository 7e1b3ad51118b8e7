"""The recipe: a TOML file as attrs classes, judged whole before anything is loaded.

    [model] what to quantize     [run] where to, seed, device     [[stage]] the pipeline, in order
    [[layers]] options for some layers     [samples] pictures to draw at the end
    [calibration] prompts to run, for the strategies that read their layers' inputs
    [allocate] choices for every layer, under one budget for all

`load` reads a file, applies `--set` overrides, and either returns a Recipe or raises one RecipeError with all faults:
file, TOML path, what was found, what would do. Indices count from 0, as in `stage[0]`.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import attrs

from loraq import registry
from loraq.adapters import Lora
from loraq.allocation import Allocate
from loraq.calibration import NEEDED, Calibration, reader
from loraq.contracts import AbstractStage
from loraq.errors import InputError, LoraqError, RecipeError, did_you_mean
from loraq.pipeline import Pipeline, bind
from loraq.settings import laid_over, with_settings
from loraq.structure import keys_of, plain, read_toml, structure, unknown_key

_SECTIONS = ("model", "run", "samples", "calibration", "allocate")


def _path(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    del instance
    if not value or "\0" in value:
        raise ValueError(f"'{attribute.name}' must be a folder's path, got {value!r}")


def _some(instance: object, attribute: attrs.Attribute[Any], value: str | tuple[str, ...]) -> None:
    del instance
    if value == ():
        raise ValueError(f"'{attribute.name}' must name a device, such as 'auto', got []")


def _devices(value: str | Sequence[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


@attrs.frozen(kw_only=True)
class ModelSource:
    """What to quantize: a diffusers folder (or a hub repository), and which components of it."""

    folder: str | None = attrs.field(default=None, validator=attrs.validators.optional(_path))
    """A pipeline's or a component's folder; relative to the recipe."""
    hub: str | None = None
    """A hub repository, "owner/name"; fetched unless it is in the local cache."""
    revision: str | None = None
    """The repository's branch, tag or commit."""
    file: str | None = attrs.field(default=None, validator=attrs.validators.optional(_path))
    """A single safetensors file with the component's weights, in diffusers' layout or the model's original one, instead
    of the folder's or repository's own; relative to the recipe."""
    lora: tuple[Lora, ...] = ()
    """Adapters to merge into the weights first: ["path", weight], or an array of such; relative to the recipe."""
    component: tuple[str, ...] = ("transformer",)
    """Which of the pipeline's components to quantize; the others are copied."""
    skip: tuple[str, ...] = ()
    """Patterns (fnmatch over the full dotted name) of layers to leave in 16 bits."""
    keep: tuple[str, ...] = ()
    """Patterns of layers to quantize although the model family leaves them in 16 bits."""

    def __attrs_post_init__(self) -> None:
        if (self.folder is None) == (self.hub is None):
            beside = "" if self.file is None else ", of the model that 'file' goes with: it has the configuration"
            found = "neither" if self.folder is None else "both"
            raise InputError(f"give either 'folder' or 'hub'{beside}, got {found}")
        if self.revision is not None and self.hub is None:
            raise InputError("'revision' goes with 'hub', a folder has none; leave it out")
        if self.file is not None and len(self.component) > 1:
            raise InputError(f"'file' holds the weights of one component, got {list(self.component)} in 'component'")
        if not self.component or len(set(self.component)) < len(self.component):
            raise InputError(f"'component' must name one or more components, each once, got {list(self.component)}")

    def beside(self, recipe: Path) -> ModelSource:
        """With its paths made relative to the recipe's file."""

        def placed(path: str) -> str:
            return str(recipe.parent / os.path.expanduser(path))

        return attrs.evolve(
            self,
            folder=None if self.folder is None else placed(self.folder),
            file=None if self.file is None else placed(self.file),
            lora=tuple(attrs.evolve(each, path=placed(each.path)) for each in self.lora),
        )


@attrs.frozen(kw_only=True)
class RunOptions:
    """Where the result goes, and how it is made."""

    output: str = attrs.field(validator=_path)
    """The folder of the result; relative to where the command runs."""
    seed: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """Seeds every layer's randomness, together with the layer's name."""
    device: str | tuple[str, ...] = attrs.field(default="auto", converter=_devices, validator=_some)
    """"auto" (all GPUs of the first one's model, or the CPU), "cpu", "cuda:0" or an array such as ["cuda:0", "cuda:1"]
    that layers are spread over."""
    threads: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    """Threads of one fit."""
    workers: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """How many layers are fitted at once by a process; 0 takes one a core, and one a device at least."""


@attrs.frozen(kw_only=True)
class Samples:
    """Pictures to draw at the end, 16-bit beside quantized: same prompts, same seeds."""

    prompts: tuple[str, ...]
    """What to draw, a picture each."""
    seed: int = attrs.field(default=0, validator=[attrs.validators.ge(0), attrs.validators.lt(2**63)])
    """The first picture's seed; each further picture has the next."""
    call: dict[str, Any] = attrs.field(factory=dict)
    """Arguments of the diffusers pipeline's call, such as num_inference_steps."""

    def __attrs_post_init__(self) -> None:
        if not self.prompts:
            raise InputError("'prompts' is empty; say what to draw, or leave [samples] out")


@functools.cache
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    """What matches a name that any of the fnmatch patterns matches: allocation asks each layer of every other."""
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)").match


@attrs.frozen(kw_only=True)
class Override:
    """Options for the layers that match: a table of [[layers]]. Later tables win."""

    match: tuple[str, ...]
    """Patterns (fnmatch) over the full dotted name within the component."""
    skip: bool | None = None
    """True leaves the layers in 16 bits; False takes an earlier table's true back."""
    options: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """Options by a stage's name; one that sets `strategy` drops the stage's other options."""

    def matches(self, name: str) -> bool:
        """Whether the layer called `name` is meant."""
        return _matcher(self.match)(name) is not None


@attrs.frozen(kw_only=True)
class Recipe:
    """A whole recipe, judged."""

    model: ModelSource
    run: RunOptions
    stage: tuple[AbstractStage, ...]
    layers: tuple[Override, ...] = ()
    samples: Samples | None = None
    calibration: Calibration | None = None
    allocate: Allocate | None = None

    def pipeline(self) -> Pipeline:
        """The pipeline that this recipe describes. Raises InputError where [allocate] is to choose first."""
        if self.allocate is not None:
            raise InputError("allocate: its choices are made by a run; use run_recipe, or leave the section out.")
        return Pipeline(
            self.stage,
            overrides=self.layers,
            skip=self.model.skip,
            keep=self.model.keep,
            seed=self.run.seed,
            threads=self.run.threads,
            workers=self.run.workers,
            device=self.run.device,
        )

    def to_plain(self) -> dict[str, Any]:
        """The resolved recipe, every option spelt out, as loraq.json keeps it."""
        optional = {"samples": self.samples, "calibration": self.calibration, "allocate": self.allocate}
        return {
            "model": plain(self.model),
            "run": plain(self.run),
            "stage": [plain_stage(stage) for stage in self.stage],
            "layers": [_plain_override(override) for override in self.layers],
        } | {name: plain(section) for name, section in optional.items() if section is not None}

    @property
    def digest(self) -> str:
        """The digest of all that shapes the result's bytes; calibration's settings have their own."""
        table = self.to_plain()
        judged = {key: table["model"][key] for key in ("component", "skip", "keep")}
        judged |= {"seed": self.run.seed, "threads": self.run.threads}
        judged |= {key: table[key] for key in ("stage", "layers", "allocate") if key in table}
        return hashlib.sha256(json.dumps(judged, sort_keys=True).encode()).hexdigest()


def plain_stage(stage: AbstractStage) -> dict[str, Any]:
    """A stage as a recipe's [[stage]] table, every option spelt out."""
    table: dict[str, Any] = {"kind": stage.kind}
    for key in keys_of(type(stage)):
        value = getattr(stage, key)
        if key == "strategy":
            table["strategy"] = registry.name_of(f"loraq.{stage.kind}", type(value))
            table |= plain(value)
        elif value is not None:
            table[key] = plain(value)
    return table


def _plain_override(override: Override) -> dict[str, Any]:
    """An override as a recipe's [[layers]] table."""
    table = {"match": plain(override.match)} | ({} if override.skip is None else {"skip": override.skip})
    return table | cast("dict[str, Any]", plain(override.options))


def overridden(stages: Sequence[AbstractStage], overrides: Sequence[Override]) -> tuple[AbstractStage, ...]:
    """The stages with the options of `overrides`, in order, laid over. Raises RecipeError for options at fault."""
    merged: list[AbstractStage] = []
    for stage in stages:
        changes = [each.options[stage.name] for each in overrides if stage.name in each.options]
        if changes:
            table = plain_stage(stage)
            for change in changes:
                table = laid_over(table, change, type(stage))
            stage = structure_stage(table, f"stage '{stage.name}' with its [[layers]] options")
        merged.append(stage)
    return tuple(merged)


def structure_stage(table: Mapping[str, Any], path: str) -> AbstractStage:
    """A stage from a recipe's table. Raises RecipeError with all its faults, each below `path`."""
    faults: list[str] = []
    stage = _stage(table, path, faults)
    if stage is None:
        raise RecipeError(faults)
    return stage


def _stage(table: Mapping[str, Any], path: str, faults: list[str]) -> AbstractStage | None:
    """The stage that `table` describes: its own keys go to the stage's class, all others to its strategy's."""
    if not isinstance(table, Mapping):
        faults.append(f"{path}: expected a table, got {table!r}")
        return None
    kind = table.get("kind")
    if not isinstance(kind, str):
        faults.append(f"{path}.kind: " + ("is missing" if kind is None else f"expected a string, got {kind!r}"))
        return None
    stage_class = _loaded("loraq.stage", kind, f"{path}.kind", AbstractStage, faults)
    if stage_class is None:
        return None
    own = {key: value for key, value in table.items() if key in keys_of(stage_class)}
    options = {key: value for key, value in table.items() if key not in own and key != "kind"}
    own.setdefault("name", kind)
    before = len(faults)
    if "strategy" in keys_of(stage_class):
        own["strategy"] = _strategy(kind, own.get("strategy"), options, keys_of(stage_class), path, faults)
    else:
        known = [key for key in keys_of(stage_class) if key != "name"]
        faults.extend(f"{path}.{key}: {unknown_key(key, known, f'stage {kind}')}" for key in options)
    if own.get("strategy", ...) is None:  # its faults are told; judge the stage's own options all the same
        own.pop("strategy")
        found: list[str] = []
        structure(own, stage_class, path, found)
        faults.extend(sentence for sentence in found if not sentence.startswith(f"{path}.strategy"))
        return None
    stage = structure(own, stage_class, path, faults)
    return cast("AbstractStage", stage) if len(faults) == before else None


def _strategy(
    kind: str, name: object, options: Mapping[str, Any], stage_keys: Sequence[str], path: str, faults: list[str]
) -> object | None:
    """The strategy called `name` with these options, or None and its faults."""
    if not isinstance(name, str):
        offered = ", ".join(registry.names(f"loraq.{kind}"))
        found = "is missing" if name is None else f"expected a string, got {name!r}"
        faults.append(f"{path}.strategy: {found}; on offer: {offered}")
        return None
    strategy_class = _loaded(f"loraq.{kind}", name, f"{path}.strategy", object, faults)
    if strategy_class is None:
        return None
    known = keys_of(strategy_class)
    unknown = [key for key in options if key not in known]
    listed = [*known, *(key for key in stage_keys if key not in ("strategy", "name"))]
    faults.extend(f"{path}.{key}: {unknown_key(key, listed, f'{kind} {name}')}" for key in unknown)
    strategy = structure({key: options[key] for key in options if key in known}, strategy_class, path, faults)
    return None if unknown else strategy


def _loaded(group: str, name: str, path: str, contract: type, faults: list[str]) -> type | None:
    """The attrs class called `name` in `group`, or None and its fault."""
    try:
        found = registry.load(group, name)
    except LoraqError as error:
        faults.append(f"{path}: {error}")
        return None
    if not isinstance(found, type) or not issubclass(found, contract) or not attrs.has(found):
        faults.append(f"{path}: {registry.broken(group, name, 'is not an attrs class of the right contract')}")
        return None
    return found


def load(file: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in `file`, with `settings` ("low_rank.rank=64") laid over. Raises RecipeError with all faults."""
    path = Path(file)
    table = read_toml(path, "give a recipe's path or a shipped recipe's name")
    return from_table(table, file=path, settings=settings)


def from_table(table: Mapping[str, Any], *, file: Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe that a TOML table describes. Raises RecipeError with all faults, each with `file` and TOML path."""
    faults: list[str] = []
    table = with_settings(table, settings, _SECTIONS, faults)
    known = keys_of(Recipe)
    faults.extend(f"{key}: {unknown_key(key, known, 'a recipe')}" for key in table if key not in known)
    model = _section(table, "model", ModelSource, faults)
    run = _section(table, "run", RunOptions, faults)
    samples = _section(table, "samples", Samples, faults) if "samples" in table else None
    calibration = _section(table, "calibration", Calibration, faults) if "calibration" in table else None
    allocate = _section(table, "allocate", Allocate, faults) if "allocate" in table else None
    stages = _stages(table.get("stage"), faults)
    layers = _layers(table.get("layers", []), stages, faults)
    variants = [(each,) for each in layers]
    if allocate is not None:
        wrong = allocate.faults(stages)
        faults.extend(wrong)
        if not wrong:
            variants += [allocate.overrides(index, probing=True) for index in range(len(allocate.choice))]
        allocate = allocate.beside(file)
    if "calibration" not in table and None not in stages:
        faults.extend(_uncalibrated([stage for stage in stages if stage is not None], variants))
    if faults:
        raise RecipeError([f"{file}: {fault}" for fault in faults])
    run = attrs.evolve(run, output=os.path.expanduser(run.output))
    model = model.beside(file)
    if calibration is not None:
        calibration = calibration.beside(file)
    stage = tuple(each for each in stages if each is not None)
    optional = {"samples": samples, "calibration": calibration, "allocate": allocate}
    return Recipe(model=model, run=run, stage=stage, layers=layers, **optional)


def _uncalibrated(stages: Sequence[AbstractStage], variants: Sequence[Sequence[Override]]) -> list[str]:
    """What is wrong with a recipe without [calibration] whose strategies, the overrides' too, read statistics."""
    sets = [stages]
    for overrides in variants:
        try:
            sets.append(overridden(stages, overrides))
        except InputError:
            continue  # told as the override's own fault
    for each in sets:
        try:
            told = reader(each, bind(each))
        except InputError:
            continue
        if told is not None:
            return [f"calibration: is missing, and {told}; {NEEDED}"]
    return []


def _section(table: Mapping[str, Any], key: str, cls: type, faults: list[str]) -> Any:
    if key not in table:
        faults.append(f"{key}: is missing; a recipe needs [{key}]")
        return None
    return structure(table[key], cls, key, faults)


def _stages(tables: object, faults: list[str]) -> list[AbstractStage | None]:
    if tables is None:
        faults.append("stage: is missing; a recipe lists its stages as [[stage]]")
        return [None]
    if not isinstance(tables, list):
        faults.append(f"stage: expected [[stage]] tables, got {tables!r}")
        return [None]
    stages = [_stage(table, f"stage[{index}]", faults) for index, table in enumerate(tables)]
    first: dict[str, int] = {}
    for index, stage in enumerate(stages):
        if stage is None:
            continue
        if stage.name in (*_SECTIONS, "match", "skip", ""):
            faults.append(f"stage[{index}].name: '{stage.name}' means something else in a recipe; choose another")
        before = stages[first.setdefault(stage.name, index)]
        if before is not None and before is not stage and (before.kind != stage.kind or stage.repeatable):
            faults.append(
                f"stage[{index}].name: '{stage.name}' is stage[{first[stage.name]}]'s name too; give one of them "
                "another `name`, so that overrides can tell them apart"
            )
    if None not in stages:
        try:
            bind([stage for stage in stages if stage is not None])
        except InputError as error:
            faults.append(f"stage: {error}")
            return [*stages, None]  # what does not go together is no ground to judge overrides on
    return stages


def _layers(tables: object, stages: Sequence[AbstractStage | None], faults: list[str]) -> tuple[Override, ...]:
    if not isinstance(tables, list):
        faults.append(f"layers: expected [[layers]] tables, got {tables!r}")
        return ()
    overrides = []
    names = [stage.name for stage in stages if stage is not None]
    for index, table in enumerate(tables):
        path = f"layers[{index}]"
        if not isinstance(table, Mapping):
            faults.append(f"{path}: expected a table, got {table!r}")
            continue
        own = {key: value for key, value in table.items() if key in ("match", "skip")}
        options = {key: value for key, value in table.items() if key not in own}
        unknown = [key for key in options if key not in names]
        if unknown and None not in stages:
            faults.extend(
                f"{path}.{key}: no stage of that name; a [[layers]] table has match, skip and the stages' names, "
                f"{', '.join(names)}{did_you_mean(key, names)}"
                for key in unknown
            )
        bad = [key for key, value in options.items() if not isinstance(value, Mapping)]
        faults.extend(f"{path}.{key}: expected a table of options, got {options[key]!r}" for key in bad)
        override = structure(own, Override, path, faults)
        if override is None or unknown or bad:
            continue
        override = attrs.evolve(override, options=options)
        overrides.append(override)
        faults.extend(faults_of_override([override], stages, path))
    return tuple(overrides)


def faults_of_override(overrides: Sequence[Override], stages: Sequence[AbstractStage | None], path: str) -> list[str]:
    """What is wrong with the stages once `overrides`, all of one table at `path`, are laid over them."""
    faults: list[str] = []
    for stage in stages:
        changes = [each.options[stage.name] for each in overrides if stage is not None and stage.name in each.options]
        if stage is None or not changes:
            continue
        fixed = [key for key in ("kind", "name") if any(key in change for change in changes)]
        if fixed:
            what = "[[layers]] table" if path.startswith("layers") else "choice"
            faults.append(f"{path}.{stage.name}.{fixed[0]}: a {what} cannot change a stage's {fixed[0]}")
            continue
        table = plain_stage(stage)
        for change in changes:
            table = laid_over(table, change, type(stage))
        _stage(table, f"{path}.{stage.name}", faults)
    if not faults and None not in stages:
        try:
            bind(overridden([stage for stage in stages if stage is not None], overrides))
        except InputError as error:
            faults.append(f"{path}: {error}")
    return faults
