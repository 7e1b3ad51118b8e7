"""Calibration's settings: what prompts run, in how many passes and parts, and the fingerprint that its cache goes by.

Only a recipe whose strategies read statistics of their layers' inputs (`AbstractCalibrated`) calibrates. The whole
16-bit pipeline then runs the prompts, through all denoising steps, while hooks collect (loraq/collection.py):

    parts     lots of neighbouring prompts that are collected apart and added up at the end, always in the same way, so
              that several processes can each do some and a killed calibration continues
    passes    a part's prompts run once a pass, each pass for as many layers as `memory` has room for

What is collected is kept under a fingerprint of all that shapes it. Nothing here imports torch: `check` reads this.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from loraq.contracts import AbstractCalibrated
from loraq.errors import InputError, ModelError, RegistryError
from loraq.registry import name_of

if TYPE_CHECKING:
    from loraq.contracts import AbstractStage
    from loraq.pipeline import LayerRecipe
    from loraq.source import Source

Item = TypeVar("Item", bound=Hashable)

_CALLABLE = re.compile(r"(?P<home>[A-Za-z_][\w.]*|.+\.py):(?P<name>[A-Za-z_]\w*)")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_of(memory: int | str) -> int:
    """How many bytes "4 GiB", "500 MB" or a plain number mean. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(memory))
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise InputError(f"'memory' must be a number of bytes, such as \"4 GiB\", got {memory!r}")
    return int(float(found[1]) * unit)


def _prompts(value: str | Sequence[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


@attrs.frozen(kw_only=True)
class Calibration:
    """What the 16-bit pipeline runs for the strategies that read their layers' inputs: a recipe's [calibration]."""

    prompts: str | tuple[str, ...] = attrs.field(converter=_prompts)
    """A text file, a prompt a line, relative to the recipe; or an array of prompts; or "package.module:callable" (or
    "file.py:callable"), which gives prompts or, if it takes an argument, runs the pipeline that it is given."""
    count: int = attrs.field(default=32, validator=attrs.validators.ge(1))
    """How many prompts are taken at most, the first ones."""
    seed: int = attrs.field(default=0, validator=[attrs.validators.ge(0), attrs.validators.lt(2**62)])
    """The first prompt's seed; each further prompt has the next."""
    sample: int = attrs.field(default=512, validator=attrs.validators.ge(1))
    """Tokens kept of each layer's input, where a strategy reads tokens."""
    memory: int | str = "4 GiB"
    """Statistics held at once, in bytes, on the device; the prompts run again until all layers had their turn."""
    parts: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    """Lots of prompts that are collected apart and added up; several processes may each do some."""
    threads: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """Threads of the model on a CPU; 0 takes one a core. Sums round differently with another number: to continue on
    another machine, say how many."""
    call: dict[str, Any] = attrs.field(factory=dict)
    """Arguments of the diffusers pipeline's call, such as num_inference_steps."""
    cache: bool | str = True
    """Where statistics are kept: true takes the user's cache folder, text names a folder (relative to where the command
    runs), false keeps them until the run is finished."""

    def __attrs_post_init__(self) -> None:
        bytes_of(self.memory)
        try:
            json.dumps(self.call)
        except (TypeError, ValueError):
            raise InputError(
                f"'call' must hold text, numbers, true or false, arrays and tables, got {self.call}"
            ) from None
        if not self.prompts:
            raise InputError("'prompts' is empty; name a text file, or give prompts in an array")
        if self.cache == "":
            raise InputError("'cache' must be a folder's path, true or false, got ''")
        if self.parts > self.most:
            raise InputError(f"'parts' is {self.parts} for at most {self.most} prompts; a part has a prompt at least")

    @property
    def limit(self) -> int:
        """`memory` in bytes."""
        return bytes_of(self.memory)

    @property
    def most(self) -> int:
        """How many prompts there are at most, without looking for them."""
        return self.count if isinstance(self.prompts, str) else min(self.count, len(self.prompts))

    def beside(self, recipe: Path) -> Calibration:
        """With the path of `prompts`, if it is one, made relative to the recipe's file."""
        if not isinstance(self.prompts, str):
            return self
        named = _CALLABLE.fullmatch(self.prompts)
        if named is not None and not named["home"].endswith(".py"):
            return self
        return attrs.evolve(self, prompts=str(recipe.parent / Path(self.prompts).expanduser()))


@attrs.frozen
class Prompts:
    """What runs: `texts`, or nothing but `runner`, which runs a pipeline itself. `digest` says which they are."""

    texts: tuple[str, ...]
    runner: Callable[[Any], Any] | None
    digest: str

    def part(self, number: int, parts: int) -> range:
        """The places of the prompts of part `number`, counted from 0; all is one part where `runner` runs."""
        total = 1 if self.runner is not None else len(self.texts)
        return range(number * total // parts, (number + 1) * total // parts)


def open_prompts(calibration: Calibration) -> Prompts:
    """The prompts that `calibration` names. Raises InputError where there are none."""
    found: Iterable[Any] = calibration.prompts
    if isinstance(calibration.prompts, str):
        named = _CALLABLE.fullmatch(calibration.prompts)
        if named is None:
            found = _lines(Path(calibration.prompts))
        else:
            target, home = _imported(named["home"], named["name"], calibration.prompts)
            if takes_argument(target):
                return Prompts((), target, _runner_digest(calibration, home))
            found = _called(target, calibration.prompts, calibration.count)
    texts = tuple(found)[: calibration.count]
    odd = [each for each in texts if not isinstance(each, str)]
    if odd:
        raise InputError(f"calibration.prompts: {calibration.prompts} gave {odd[0]!r}, which is no text.")
    if len(texts) < calibration.parts:
        raise InputError(
            f"calibration.prompts: {len(texts)} prompts make no {calibration.parts} parts; give more prompts, or set "
            "calibration.parts lower."
        )
    return Prompts(texts, None, hashlib.sha256(json.dumps(texts).encode()).hexdigest())


def _lines(path: Path) -> list[str]:
    """A file's lines without the blank ones."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"calibration.prompts: {path} cannot be read: {error}.") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"calibration.prompts: {path} is empty; write a prompt a line.")
    return lines


def _imported(home: str, name: str, named: str) -> tuple[Callable[..., Any], ModuleType]:
    """The callable `name` of a module or of a file.py, and its module."""
    try:
        if home.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(home).stem, home)
            if spec is None or spec.loader is None:
                raise ImportError(f"{home} cannot be loaded")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(home)
    except Exception as error:  # the user's module may fail in any way
        raise InputError(f"calibration.prompts: {named} cannot be imported: {told(error)}.") from error
    target = getattr(module, name, None)
    if not callable(target):
        raise InputError(f"calibration.prompts: {home} has no callable '{name}'.")
    return target, module


def _called(target: Callable[[], Iterable[Any]], named: str, count: int) -> list[Any]:
    """The first prompts that the user's callable gives."""
    try:
        return [prompt for _, prompt in zip(range(count), target(), strict=False)]
    except Exception as error:  # as above
        raise InputError(f"calibration.prompts: {named} failed: {told(error)}.") from error


def told(error: Exception) -> str:
    """What a user's code raised, in a few words."""
    return f"{type(error).__name__}: {error}".split("\n")[0].rstrip(".")


def _runner_digest(calibration: Calibration, home: ModuleType) -> str:
    """Who runs the pipeline: its name and its file's bytes, which is all that can be known of code."""
    if calibration.parts > 1:
        raise InputError(
            f"calibration.parts: {calibration.prompts} runs the pipeline itself and cannot be split; leave parts out."
        )
    digest = hashlib.sha256(str(calibration.prompts).rpartition(":")[2].encode())
    file = getattr(home, "__file__", None)
    if file is not None:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def takes_argument(function: Callable[..., Any]) -> bool:
    """Whether a callable wants an argument: the pipeline or the module."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins do not say
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(each.kind in positional and each.default is inspect.Parameter.empty for each in parameters)


def passes(sizes: Mapping[Item, int], limit: int) -> list[list[Item]]:
    """The items in as few lots of at most `limit` bytes as first fit, largest first, finds.

    Raises InputError where one item alone is larger.
    """
    lots: list[list[Item]] = []
    room: list[int] = []
    for item, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        if size > limit:
            raise InputError(
                f"calibration.memory: {limit:,} bytes are too few, the statistics of {item} alone take {size:,}; set "
                f"it to {-(-size // 2**20)} MiB or more."
            )
        place = next((place for place, left in enumerate(room) if size <= left), len(lots))
        if place == len(lots):
            lots.append([])
            room.append(limit)
        lots[place].append(item)
        room[place] -= size
    return lots


def reader(stages: Sequence[AbstractStage], recipe: LayerRecipe) -> str | None:
    """Who reads statistics, and which, in a bound `recipe` of `stages`; None where nobody does."""
    if not recipe.statistics:
        return None
    named = {id(stage.strategy): stage.kind for stage in stages if hasattr(stage, "strategy")}
    for strategy in recipe.strategies:
        asked = strategy.statistics if isinstance(strategy, AbstractCalibrated) else ()
        if asked:
            kinds = ", ".join(sorted(kind.__name__ for kind in asked))
            return f"{_name(named.get(id(strategy)), strategy)} reads {kinds} of each layer's input"
    return None


def _name(kind: str | None, strategy: object) -> str:
    """A strategy as a recipe calls it, or its class's name where no stage of the recipe names it."""
    try:
        return type(strategy).__name__ if kind is None else f"{kind} {name_of(f'loraq.{kind}', type(strategy))}"
    except RegistryError:
        return type(strategy).__name__


NEEDED = "add a section [calibration] with prompts, or choose a strategy that needs no data"
"""What would do where a strategy reads statistics and there is no calibration."""


def refuse_lone_component(source: Source) -> None:
    """Raise ModelError for a source that cannot run prompts."""
    if not source.is_pipeline:
        raise ModelError(
            f"{source.root} is a lone component, but [calibration] runs prompts, which takes a whole pipeline: give "
            "that one's folder, or quantize in Python with `Pipeline.quantize(module, calibrate=...)`."
        )


_READ = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""What a component is loaded from; pickles and pictures may lie beside it."""


def _pipeline_files(root: Path) -> list[Path]:
    """The files that a whole pipeline is loaded from."""
    from loraq.source import read_json

    index = root / "model_index.json"
    components = [name for name, value in read_json(index).items() if isinstance(value, list)]
    below = [path for name in components for path in (root / name).rglob("*") if path.suffix in _READ]
    return [index, *sorted(path for path in below if path.is_file())]


def pipeline_digests(source: Source, known: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of all files that the source's pipeline is loaded from, by path below its root; `known` has some."""
    digests = dict(known)  # an adapter's and a single file's among them
    for path in _pipeline_files(source.root):
        name = str(path.relative_to(source.root))
        if name in known:
            continue
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def fingerprint(
    calibration: Calibration, prompts: Prompts, digests: Mapping[str, str], device: str, threads: int
) -> dict[str, Any]:
    """What the statistics depend on; `digests` are those of the pipeline's files."""
    return {
        "model": dict(digests),
        "prompts": prompts.digest,
        "settings": {
            "seed": calibration.seed,
            "sample": calibration.sample,
            "parts": calibration.parts,
            "count": calibration.count if prompts.runner is not None else len(prompts.texts),
            "call": calibration.call,
        },
        "versions": {
            name: importlib.metadata.version(name) for name in ("loraq", "torch", "diffusers", "transformers")
        },
        "device": device,
        "threads": threads,
    }


def digest_of(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint in one word: the cache's folder."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
