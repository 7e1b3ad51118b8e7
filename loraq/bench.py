"""Run a suite: every cell quantized, drawn, measured; what is there already is taken up; one result of all.

    FOLDER/models/CELL      an ordinary `loraq run` folder: its fingerprint decides whether it is made anew
    FOLDER/pictures/CELL    pictures that say what they are (loraq/pictures.py); originals/MODEL the 16-bit models'
    FOLDER/measured/CELL    figures of the pictures, errors of layers, times: each under a key of all that it depends on
    FOLDER/*.csv, *.jsonl, suite.json, report.html

Nothing else is state, so a suite that was killed, or that got another cell, does only what is missing. A cell that
fails says why and the rest goes on.
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from loraq import evaluation
from loraq.bench_figures import Kept, figures_of, key_of
from loraq.bench_result import Judged, done, failed, recipe_text, shown, summary, told_metric
from loraq.bootstrap import Interval
from loraq.contracts import AnyMetric
from loraq.errors import CheckpointError, LoraqError
from loraq.picture_set import PictureSet
from loraq.pictures import (
    Drawing,
    chosen_prompts,
    draw_into,
    fingerprint,
    fitting_batch,
    picture_paths,
    prompts_in,
    told_of,
)
from loraq.prompts import PromptSet, is_prompt_set, prompt_set, published_call
from loraq.report import Report
from loraq.results import Cell, SuiteResult
from loraq.run import run_recipe
from loraq.side_by_side import Beside, Original
from loraq.source import Source, open_source
from loraq.suite import OWN_FIGURES, MeasureOptions, PictureOptions, Suite, SuiteCell
from loraq.workers import resolved_device


@attrs.frozen(kw_only=True)
class Drawn:
    """A 16-bit model and what it drew: `told` is what the pictures say of themselves."""

    source: Source
    drawing: Drawing
    pictures: tuple[Path, ...]
    references: tuple[Path, ...]
    told: tuple[str, ...]
    metrics: Mapping[str, AnyMetric]
    made: str
    """The model's fingerprint."""


class Bench:
    """Runs cells of `suite` in `folder`; `workers` layers are fitted at once, 0 leaves that to the recipes.

    `told` is called with a sentence as each cell ends.
    """

    def __init__(
        self, suite: Suite, folder: Path, *, device: str = "auto", workers: int = 0, told: Callable[[str], None]
    ) -> None:
        self._suite = suite
        self._folder = folder.resolve()
        self._device_name = device
        self._device = resolved_device(device)
        self._workers = workers
        self._told = told
        self._metrics: dict[str, AnyMetric] = {}
        self._left_out: dict[str, str] = {}
        if suite.pictures is not None:
            gates = {gate.metric for cell in suite.cells for gate in cell.gates}
            required = sorted(gates.difference(OWN_FIGURES))
            self._metrics, self._left_out = evaluation.load_metrics(
                suite.pictures.metrics, required, suite.pictures.options, where="pictures.options"
            )
            self._prompts = _prompts(suite.pictures)
        self._drawn: dict[str, Drawn] = {}
        self._original: tuple[str, Original] | None = None

    def run(self, cells: Sequence[SuiteCell]) -> tuple[SuiteResult, list[dict[str, Any]]]:
        """Do what is missing of `cells`. Returns what was found, and a row for each single picture of a cell."""
        self._folder.mkdir(parents=True, exist_ok=True)
        judged: dict[str, Judged] = {}
        reasons: dict[str, str] = {}
        for number, cell in enumerate(cells, 1):
            started = time.perf_counter()
            try:
                judged[cell.label] = self._judged(cell)
                ended = f"{time.perf_counter() - started:.1f} s"
            except Exception as error:  # a cell may fail in any way, and the rest goes on
                reasons[cell.label] = _sentence(error)
                ended = f"failed: {reasons[cell.label]}"
                gc.collect()
            self._told(f"{number} of {len(cells)}: {cell.label}, {ended}")
        self._original = None
        return self._result(cells, judged, reasons), self._pairs(judged)

    def _judged(self, cell: SuiteCell) -> Judged:
        """A cell, from quantizing to the last figure."""
        place = f"models/{cell.slug}"
        report = self._quantized(cell, self._folder / place)
        found = Judged(report=report, recipe_text=recipe_text(cell.recipe.to_plain()), folder=place)
        if self._suite.pictures is None:
            return found
        original = self._drawn_by(cell, self._suite.pictures)
        kept = Kept(self._folder / "measured" / f"{cell.slug}.json")
        pictures, told = self._draw(self._folder / place, f"pictures/{cell.slug}", original.drawing, cell.label)
        figures = figures_of(original.metrics, self._set(pictures, original), told, original.told, kept)
        return attrs.evolve(
            found,
            drawing=original.drawing,
            pictures=pictures,
            figures=figures,
            beside=self._beside(cell, self._folder / place, original, kept),
        )

    def _quantized(self, cell: SuiteCell, output: Path) -> Report:
        """The cell's model in `output`, made, continued or found there; another recipe's is replaced."""
        run = attrs.evolve(cell.recipe.run, output=str(output))
        if self._workers:
            run = attrs.evolve(run, workers=self._workers)
        if self._device_name != "auto":
            run = attrs.evolve(run, device=self._device_name)
        recipe = attrs.evolve(cell.recipe, run=run)
        try:
            return run_recipe(recipe)
        except CheckpointError:  # of an earlier state of the suite, or damaged: the folder is the suite's own
            return run_recipe(recipe, restart=True)

    def _drawn_by(self, cell: SuiteCell, options: PictureOptions) -> Drawn:
        """What the cell's 16-bit model draws."""
        if cell.model not in self._drawn:
            source = open_source(cell.recipe.model)
            drawing = self._drawing(source.root, options)
            slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", cell.model)
            planned = PictureSet(
                drawn=picture_paths(self._folder / "originals" / slug, drawing),
                originals=picture_paths(self._folder / "originals" / slug, drawing),
                prompts=drawing.prompts,
                references=self._prompts.references,
            )
            metrics, objections = evaluation.judging(self._metrics, planned)
            self._left_out |= objections
            pictures, told = self._draw(source, f"originals/{slug}", drawing, f"{cell.model} in 16 bits")
            self._drawn[cell.model] = Drawn(
                source=source,
                drawing=drawing,
                pictures=pictures,
                references=planned.references,
                told=told,
                metrics=metrics,
                made=fingerprint(source),
            )
        return self._drawn[cell.model]

    def _drawing(self, root: Path, options: PictureOptions) -> Drawing:
        """What is drawn with the model in `root`."""
        published = published_call(root) if self._prompts.seeds else {}
        call = published | options.call
        batch = options.batch or fitting_batch(root, call)
        return Drawing(
            prompts=self._prompts.prompts, seed=options.seed, seeds=self._prompts.seeds, call=call, batch=batch
        )

    def _draw(
        self, model: Path | Source, below: str, drawing: Drawing, title: str
    ) -> tuple[tuple[Path, ...], tuple[str, ...]]:
        """The pictures of `model`, and what they say of themselves."""
        paths = draw_into(self._folder / below, model, drawing, self._device, title=f"drawing, {title}")
        return tuple(paths), tuple(told_of(model, drawing, self._device))

    @staticmethod
    def _set(pictures: tuple[Path, ...], original: Drawn) -> PictureSet:
        return PictureSet(
            drawn=pictures,
            originals=original.pictures,
            prompts=original.drawing.prompts,
            references=original.references,
        )

    def _beside(self, cell: SuiteCell, folder: Path, original: Drawn, kept: Kept) -> Beside:
        """The cell's model measured beside the 16-bit one, now or earlier."""
        options, drawing = self._suite.measure, original.drawing
        components = cell.recipe.model.component
        prompts = drawing.prompts[: options.prompts]
        versions = {name: importlib.metadata.version(name) for name in ("loraq", "diffusers", "torch")}
        key = key_of(
            fingerprint(folder), original.made, attrs.asdict(options), prompts, dict(drawing.call),
            components, self._device.type, versions,
        )  # fmt: skip
        found = kept.get("beside", key)
        if found is None:
            asked = options.output_error or options.step_time
            beside = self._original_of(cell, original, prompts, options).beside(folder) if asked else Beside()
            found = attrs.asdict(beside)
            kept.put("beside", key, found)
        return Beside(**found)

    def _original_of(
        self, cell: SuiteCell, original: Drawn, prompts: Sequence[str], options: MeasureOptions
    ) -> Original:
        """The cell's 16-bit model, loaded once for all cells that follow one another."""
        if self._original is None or self._original[0] != cell.model:
            self._original = None
            gc.collect()
            made = Original(
                original.source,
                cell.recipe.model.component,
                prompts,
                original.drawing.call,
                self._device,
                tokens=options.tokens if options.output_error else None,
                repeats=options.repeats if options.step_time else 0,
            )
            self._original = (cell.model, made)
        return self._original[1]

    def _result(
        self, cells: Sequence[SuiteCell], judged: Mapping[str, Judged], reasons: Mapping[str, str]
    ) -> SuiteResult:
        found: list[Cell] = []
        baselines: dict[str, str] = {}
        for cell in cells:
            if cell.label in reasons:
                found.append(failed(cell, reasons[cell.label]))
                continue
            beside = self._suite.baseline_of(cell)
            compared = beside is not None and beside.label in judged
            baseline = (beside.label, judged[beside.label]) if beside is not None and compared else None
            if cell.recipe_name == self._suite.baseline:
                baselines.setdefault(cell.model, cell.label)
            found.append(done(self._suite, cell, judged[cell.label], baseline, self._metrics))
        options = self._suite.pictures
        return SuiteResult(
            name=self._suite.name,
            title=self._suite.title,
            cells=tuple(found),
            metrics=tuple(
                told_metric(name, metric)
                for name, metric in self._metrics.items()
                if any(name in each.metrics for each in self._drawn.values())
            ),
            baselines=baselines,
            originals={
                name: shown(each.pictures, each.drawing, 0 if options is None else options.shown)
                for name, each in self._drawn.items()
            },
            original_figures={name: self._figures_of_original(name, each) for name, each in self._drawn.items()},
            left_out=self._left_out,
            prompts=max((len(set(each.drawing.prompts)) for each in self._drawn.values()), default=0),
            versions={
                name: importlib.metadata.version(name) for name in ("loraq", "torch", "diffusers", "transformers")
            },
            machine={
                "platform": platform.platform(),
                "processor": platform.machine(),
                "python": platform.python_version(),
                "device": str(self._device),
                "threads": str(torch.get_num_threads()),
            },
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def _figures_of_original(self, model: str, drawn: Drawn) -> dict[str, Interval]:
        """The 16-bit model's own figures, of metrics that judge pictures by themselves."""
        alone = {name: metric for name, metric in drawn.metrics.items() if not metric.paired}
        kept = Kept(self._folder / "measured" / f"original-{drawn.pictures[0].parent.name}.json")
        figures = figures_of(alone, self._set(drawn.pictures, drawn), drawn.told, drawn.told, kept)
        return {name: summary(alone[name], values, drawn.drawing) for name, values in figures.items()}

    def _pairs(self, judged: Mapping[str, Judged]) -> list[dict[str, Any]]:
        """A row a cell and picture: place, prompt, seed, and the figure of every metric that has one."""
        return [
            {"cell": label, "place": place, "prompt": prompt, "seed": each.drawing.seed_of(place)}
            | {name: values[place] for name, values in each.figures.items() if len(values) == len(each.pictures)}
            for label, each in judged.items()
            if each.drawing is not None
            for place, prompt in enumerate(each.drawing.prompts)
        ]


def _prompts(options: PictureOptions) -> PromptSet:
    """What the suite draws; seeds are empty where the pictures' are counted from the first one's."""
    where = "pictures.prompts:"
    if isinstance(options.prompts, str) and is_prompt_set(options.prompts):
        return prompt_set(options.prompts, options.count, where)
    if isinstance(options.prompts, str):
        asked = prompts_in(Path(options.prompts), where)
        prompts = chosen_prompts(asked, options.count, options.seed)  # a file may be sorted: choose at random
    else:
        prompts = chosen_prompts(options.prompts, options.count)
    return PromptSet(names=(), prompts=prompts, seeds=(), references=())


def _sentence(error: Exception) -> str:
    """Why a cell failed, in a line; a suite draws by its own [pictures], not by a recipe's [samples]."""
    told = " ".join(str(error).split()).replace("samples.call:", "pictures.call:", 1)
    return told if isinstance(error, LoraqError) else f"{type(error).__name__}: {told}"
