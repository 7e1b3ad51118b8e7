"""Calibration at work: hooks that collect statistics of layers' inputs, and the passes over the prompts.

    Collector     forward pre-hooks on some layers, for as long as a `with` lasts
    Calibrator    runs the prompts for what the cache lacks, and gives a layer's statistics, its parts added up

What a layer's input is does not depend on which layers are watched, and a statistic is counted up in one order, prompt
by prompt; so neither `memory` nor who collects which part changes a bit. The token sample's keys come from a generator
that is seeded by (seed, prompt, layer). After each pass what it found is kept (loraq/statistics_cache.py): a killed
calibration loses one pass at most. The processes of a team (loraq/team.py) draw passes from one queue.
"""

from __future__ import annotations

import functools
import gc
import inspect
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from loraq.calibration import Calibration, Prompts, digest_of, passes, takes_argument, told
from loraq.contracts import AbstractStatistic
from loraq.errors import InputError, LoraqError, ModelError
from loraq.input_statistics import InputStatistics
from loraq.match import MatchedLayer
from loraq.pipeline import layer_generator
from loraq.progress import Progress
from loraq.source import Source
from loraq.statistics_cache import Cache, Kind, Layer
from loraq.team import POLL, Queue, Team

Pass = tuple[int, Mapping[Layer, Sequence[Kind]]]
"""A part, and what a pass over its prompts collects."""


class Collector:
    """The statistics of some layers' inputs, while `with` lasts: `found[layer][kind]` of `tokens[layer]` tokens.

    `modules` gives each layer's linear layer or 1x1 convolution, `wanted` the kinds to collect of it. Statistics lie on
    the device of the layer's weight. Raises ModelError in the layer's call for an input that is not finite.
    """

    def __init__(
        self, modules: Mapping[Layer, nn.Module], wanted: Mapping[Layer, Iterable[Kind]], *, sample: int, seed: int
    ) -> None:
        self.found: dict[Layer, dict[Kind, AbstractStatistic]] = {}
        self.tokens = dict.fromkeys(modules, 0)
        self._modules = modules
        self._seed = seed
        self._prompt = 0
        self._generators: dict[tuple[Layer, Kind], torch.Generator] = {}
        self._handles: list[Any] = []
        for layer, module in modules.items():
            device = next(module.parameters()).device
            self.found[layer] = {kind: kind.empty(layer.inn, device, sample=sample) for kind in wanted[layer]}

    def __enter__(self) -> Self:
        for layer, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, prompt: int) -> None:
        """The prompt at this place begins: randomness from here on is that prompt's own."""
        self._prompt = prompt
        self._generators.clear()

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            with torch.no_grad():
                self._observe(layer, tokens_of(module, arguments[0] if arguments else named["input"]))

        return observe

    def _observe(self, layer: Layer, tokens: Tensor) -> None:
        if not bool(torch.isfinite(tokens).all()):
            found = "NaN" if bool(torch.isnan(tokens).any()) else "an infinite value"
            raise ModelError(
                f"{layer}: its input had {found} in calibration; try other prompts or another call, or skip the layer "
                "with model.skip."
            )
        self.tokens[layer] += len(tokens)
        for kind, statistic in self.found[layer].items():
            self.found[layer][kind] = statistic.observed(tokens, self._generator(layer, kind))

    def _generator(self, layer: Layer, kind: Kind) -> torch.Generator:
        """The randomness of a layer's statistic within a prompt, whatever else is collected."""
        if (layer, kind) not in self._generators:
            name = f"{self._prompt}:{layer.component}:{layer.name}:{kind.__qualname__}"
            self._generators[layer, kind] = layer_generator(self._seed, name)
        return self._generators[layer, kind]


def tokens_of(module: nn.Module, input: Tensor) -> Tensor:
    """The tokens (tokens, inn) float32 that a linear layer or 1x1 convolution is given."""
    channels_last = input.movedim(-3, -1) if isinstance(module, nn.Conv2d) else input
    return channels_last.detach().reshape(-1, channels_last.shape[-1]).float()


def inputs_of(layers: Iterable[tuple[str, MatchedLayer]]) -> dict[Layer, frozenset[Kind]]:
    """What is asked of each layer's input, by component and layer; layers of which nothing is asked are left out.

    Of layers that are fitted as one and so read one input, the first is watched. Of a layer that comes more than once,
    with several recipes, all is asked.
    """
    asked: dict[Layer, frozenset[Kind]] = {}
    for component, layer in layers:
        if layer.recipe.statistics and layer.down_from is None:
            key = Layer(component, layer.name, layer.inn)
            asked[key] = asked.get(key, frozenset()) | layer.recipe.statistics
    return asked


def sizes_of(wanted: Mapping[Layer, Iterable[Kind]], sample: int) -> dict[Layer, int]:
    """Bytes of each layer's statistics."""
    return {layer: sum(kind.bytes(layer.inn, sample=sample) for kind in kinds) for layer, kinds in wanted.items()}


def refuse_unseen(layer: Layer, tokens: float) -> None:
    """Raise ModelError where a layer never ran."""
    if tokens == 0:
        raise ModelError(
            f"{layer} never ran in calibration, so nothing is known of its input: give prompts or a call "
            "that reach it, skip it with model.skip, or give it a strategy that needs no data in [[layers]]."
        )


def collect_in_memory(
    module: nn.Module,
    layers: Sequence[MatchedLayer],
    calibrate: Callable[..., Any],
    *,
    sample: int,
    seed: int,
) -> dict[str, InputStatistics]:
    """The statistics that `layers` of `module` ask for while `calibrate` runs, all held at once, by the layer's name.

    `calibrate` is called with `module` if it takes an argument, and not at all where no layer asks for anything.
    """
    wanted = inputs_of(("", layer) for layer in layers)
    if not wanted:
        return {}
    modules = {layer: module.get_submodule(layer.name) for layer in wanted}
    with Collector(modules, wanted, sample=sample, seed=seed) as collector:
        for _ in _steps(calibrate, module, collector):
            pass
    for layer, tokens in collector.tokens.items():
        refuse_unseen(layer, tokens)
    return {layer.name: InputStatistics(found) for layer, found in collector.found.items()}


def _steps(calibrate: Callable[..., Any], subject: object, collector: Collector) -> Iterator[int]:
    """Run the user's callable, with `subject` if it takes an argument; each step of a generator is a prompt."""
    collector.begin(0)
    running = calibrate(subject) if takes_argument(calibrate) else calibrate()
    yield 0
    if isinstance(running, Iterator):
        for step, _ in enumerate(running, start=1):
            collector.begin(step)
            yield step


@attrs.frozen
class Collected:
    """What a calibration did: layers asked for, passes that it took (0 where all was there), and where it is kept."""

    layers: int
    passes: int
    bytes: int
    folder: str


@attrs.frozen(eq=False)
class Calibrator:
    """Statistics of a source's layers, collected by running prompts through its pipeline, or taken from the cache.

    `source` is the pipeline, `fingerprint` what the statistics depend on (loraq/calibration.py), `home` the
    folder below which they are kept, `threads` those of the model on a CPU.
    """

    source: Source
    calibration: Calibration
    prompts: Prompts
    fingerprint: Mapping[str, Any]
    device: torch.device
    threads: int
    home: Path
    cache: Cache = attrs.field(init=False)

    @cache.default
    def _cache(self) -> Cache:
        return Cache(self.home / digest_of(self.fingerprint), self.calibration.parts)

    def collect(
        self, layers: Iterable[tuple[str, MatchedLayer]], only: int | None = None, *, team: Team | None = None
    ) -> Collected:
        """See to it that the statistics of `layers` are in the cache, of all parts or of the part `only`, from 0 on.

        The pipeline is loaded only where some are missing. The processes of a team share the passes out and must see
        one cache. Raises ModelError for a layer that never ran.
        """
        team = team or Team()
        wanted = inputs_of(layers)
        parts = range(self.calibration.parts) if only is None else [only]
        work = self._work(wanted, parts, team)
        if work:
            if team.first:
                self.cache.drop_leftovers()
                self._check_room(work)
            team.see_alike(self.cache.folder, "calibration.cache")
            self._run(work, team)
            gc.collect()  # the pipeline is in circles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if only is None and team.first:  # which reads all; once is enough
            for layer, kinds in wanted.items():
                for kind in kinds:
                    refuse_unseen(layer, sum(self.cache.tokens(part, layer, kind) or 0 for part in parts))
        total = len(parts) * sum(sizes_of(wanted, self.calibration.sample).values())
        return Collected(len(wanted), len(work), total, str(self.cache.folder))

    def _work(self, wanted: Mapping[Layer, Iterable[Kind]], parts: Iterable[int], team: Team) -> list[Pass]:
        """The passes that are missing as the first process finds the cache, the same for all."""
        layers = list(wanted)
        places = {layer: place for place, layer in enumerate(layers)}
        kinds = {_name_of(kind): kind for each in wanted.values() for kind in each}

        def found() -> list[Any]:
            return [
                [part, [[places[layer], [_name_of(kind) for kind in missing]] for layer, missing in lot.items()]]
                for part in parts
                for lot in self._lots(part, wanted)
            ]

        return [
            (part, {layers[place]: [kinds[name] for name in names] for place, names in lot})
            for part, lot in team.share(found)
        ]

    def _lots(self, part: int, wanted: Mapping[Layer, Iterable[Kind]]) -> list[dict[Layer, list[Kind]]]:
        """What is missing of a part, a pass each."""
        missing: dict[Layer, list[Kind]] = {}
        for layer, kinds in wanted.items():
            gone = [kind for kind in kinds if self.cache.tokens(part, layer, kind) is None]
            if gone:
                missing[layer] = gone
        sizes = sizes_of(missing, self.calibration.sample)
        return [{layer: missing[layer] for layer in lot} for lot in passes(sizes, self.calibration.limit)]

    def _run(self, work: Sequence[Pass], team: Team) -> None:
        """Run all passes, each by the process that draws it; a process that draws one loads the pipeline."""
        queue = team.queue()
        sizes = [len(self.prompts.part(part, self.calibration.parts)) for part, _ in work]
        left = set(range(len(work)))
        with Progress("calibrating", sum(sizes), shown=team.first) as progress:

            def of_others() -> None:
                for place, _ in queue.posted():
                    left.remove(place)
                    progress.advance(sizes[place], "")

            def advance(title: str) -> None:
                progress.advance(1, title)
                of_others()

            for place in self._passes(work, queue, advance):
                left.remove(place)
            while left:
                time.sleep(POLL)
                of_others()

    def _passes(self, work: Sequence[Pass], queue: Queue, advance: Callable[[str], None]) -> Iterator[int]:
        """Run the passes that fall to this process, and tell of each when it is kept."""
        place = queue.draw()
        if place >= len(work):
            return
        from loraq.samples import check_call, load_source

        pipeline = load_source(self.source, self.device)
        check_call(pipeline, self.calibration.call, "calibration.call")
        outside = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            while place < len(work):
                part, wanted = work[place]
                title = f"pass {place + 1} of {len(work)}, {len(wanted)} layers"
                self._pass(pipeline, part, wanted, functools.partial(advance, title))
                queue.post(place, None)
                yield place
                place = queue.draw()
        except torch.OutOfMemoryError as error:
            raise LoraqError(
                f"calibration.memory: {self.device} ran out of memory beside statistics of {self.calibration.memory}; "
                "set it lower, or give the call smaller pictures."
            ) from error
        finally:
            torch.set_num_threads(outside)

    def _pass(
        self, pipeline: Any, part: int, wanted: Mapping[Layer, Sequence[Kind]], advance: Callable[[], None]
    ) -> None:
        """A part's prompts once through the pipeline, and what `wanted` asks for of them into the cache."""
        modules = {layer: getattr(pipeline, layer.component).get_submodule(layer.name) for layer in wanted}
        collector = Collector(modules, wanted, sample=self.calibration.sample, seed=self.calibration.seed)
        with collector:
            for _ in self._prompts_of(part, pipeline, collector):
                advance()
        for layer, found in collector.found.items():
            for statistic in found.values():
                self.cache.write(part, layer, statistic, collector.tokens[layer])

    def _prompts_of(self, part: int, pipeline: Any, collector: Collector) -> Iterator[None]:
        """A part's prompts once through the pipeline, one at a time."""
        call = _undecoded(pipeline) | self.calibration.call
        devices = [self.device] if self.device.type == "cuda" else []
        if self.prompts.runner is not None:
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(self.calibration.seed)
                try:
                    for step in _steps(self.prompts.runner, pipeline, collector):
                        if step == self.calibration.count:
                            break
                except (LoraqError, torch.OutOfMemoryError):
                    raise
                except Exception as error:  # the user's callable may fail in any way
                    raise InputError(
                        f"calibration.prompts: {self.calibration.prompts} failed: {told(error)}."
                    ) from error
            yield
            return
        for place in self.prompts.part(part, self.calibration.parts):
            seed = self.calibration.seed + place
            collector.begin(place)
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)  # for a pipeline that draws beside its generator
                try:
                    pipeline(self.prompts.texts[place], generator=torch.Generator().manual_seed(seed), **call)
                except torch.OutOfMemoryError:
                    raise
                except (TypeError, ValueError, RuntimeError) as error:
                    raise InputError(
                        f"calibration.call: {type(pipeline).__name__} does not take it: {error}"
                    ) from error
            yield

    def _check_room(self, work: Sequence[Pass]) -> None:
        """Raise InputError where the disk has no room for what will be collected."""
        needed = sum(sum(sizes_of(wanted, self.calibration.sample).values()) for _, wanted in work)
        try:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.cache.folder).free
        except OSError as error:
            raise InputError(
                f"calibration.cache: {self.cache.folder} cannot be written ({error.strerror}); name another folder."
            ) from error
        if needed > free:
            raise InputError(
                f"calibration.cache: {self.cache.folder} needs {needed:,} bytes for statistics, but its disk has "
                f"{free:,}; free some, or set calibration.cache to a folder on another disk."
            )

    def statistics(self, component: str, layer: MatchedLayer, device: torch.device) -> InputStatistics:
        """What was collected of a layer's input, on `device`."""
        kinds = layer.recipe.statistics
        key = Layer(component, layer.name, layer.inn)
        return InputStatistics({kind: self.cache.read(key, kind, device) for kind in kinds})


def _name_of(kind: Kind) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _undecoded(pipeline: Any) -> dict[str, Any]:
    """The argument that spares drawing the picture, where the pipeline has it."""
    known = inspect.signature(type(pipeline).__call__).parameters
    return {"output_type": "latent"} if "output_type" in known else {}
