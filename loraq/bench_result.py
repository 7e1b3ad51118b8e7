"""From what a suite's cells gave to its result: means with intervals, differences to the baseline, gates.

Nothing here draws, loads or measures: the same figures give the same result, whether they were taken now or earlier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from loraq.bootstrap import Interval, interval, share_interval
from loraq.contracts import AbstractMetric, AbstractShare, AnyMetric
from loraq.gates import Gate
from loraq.layer import LayerRecord
from loraq.pictures import Drawing
from loraq.report import Report, geometric_mean
from loraq.results import Cell, GateResult, Metric, Picture
from loraq.side_by_side import Beside
from loraq.suite import OWN_FIGURES, Suite, SuiteCell

Figures = Mapping[str, Sequence[float]]
"""By metric: a number a picture, or one alone for a metric of whole sets."""


@attrs.frozen(kw_only=True)
class Judged:
    """A cell that is whole: what its run reported, and what was measured. `places` are the pictures to show."""

    report: Report
    recipe_text: str
    folder: str
    figures: Figures = attrs.field(factory=dict)
    beside: Beside = attrs.field(factory=Beside)
    drawing: Drawing | None = None
    pictures: tuple[Path, ...] = ()


def told_metric(name: str, metric: AnyMetric) -> Metric:
    """How a metric is to be read."""
    what = (type(metric).__doc__ or "").strip().split("\n")[0]
    return Metric(name=name, unit=metric.unit, better=metric.better, what=what)


def summary(metric: AnyMetric, values: Sequence[float], drawing: Drawing) -> Interval:
    """The mean of a metric's figures and its interval; a figure of a whole set has none."""
    prompts = drawing.prompts
    if not isinstance(metric, AbstractMetric):
        return Interval(values[0], None, None, len(prompts), len(set(prompts)))
    if isinstance(metric, AbstractShare):
        return share_interval(values, prompts)
    return interval(values, prompts, seed=drawing.seed)


def difference(metric: AnyMetric, ours: Sequence[float], theirs: Sequence[float], drawing: Drawing) -> Interval:
    """`ours` less `theirs`, picture by picture, or of two figures of whole sets."""
    values = [one - other for one, other in zip(ours, theirs, strict=True)]
    if not isinstance(metric, AbstractMetric):
        return summary(metric, values, drawing)
    return interval(values, drawing.prompts, seed=drawing.seed)


def shown(pictures: Sequence[Path], drawing: Drawing | None, count: int) -> tuple[Picture, ...]:
    """The first `count` pictures, as the report shows them."""
    if drawing is None:
        return ()
    return tuple(
        Picture(prompt=drawing.prompts[place], seed=drawing.seed_of(place), path=path)
        for place, path in enumerate(pictures[:count])
    )


def failed(cell: SuiteCell, reason: str) -> Cell:
    """The cell as the result has it, without figures."""
    return attrs.evolve(_place(cell), state="failed", reason=reason)


def _place(cell: SuiteCell) -> Cell:
    return Cell(
        label=cell.label,
        model=cell.model,
        recipe=cell.recipe_name,
        overrides=cell.overrides,
        setting=cell.setting,
        seed=cell.seed,
    )


def done(
    suite: Suite, cell: SuiteCell, judged: Judged, baseline: tuple[str, Judged] | None, metrics: Mapping[str, AnyMetric]
) -> Cell:
    """The cell as the result has it; `baseline` is the label and find of the one that it is compared with, if any."""
    report, beside, drawing = judged.report, judged.beside, judged.drawing
    figures, differences = {}, {}
    if drawing is not None:
        figures = {name: summary(metrics[name], values, drawing) for name, values in judged.figures.items()}
        theirs = {} if baseline is None else baseline[1].figures
        differences = {
            name: difference(metrics[name], values, theirs[name], drawing)
            for name, values in judged.figures.items()
            if name in theirs and len(theirs[name]) == len(values)
        }
    found = attrs.evolve(
        _place(cell),
        baseline=None if baseline is None else baseline[0],
        effective_bits=report.effective_bits,
        stored_bytes=report.stored_bytes,
        bytes_above=None if baseline is None else report.stored_bytes - baseline[1].report.stored_bytes,
        written_bytes=report.written_bytes,
        source_bytes=report.source_bytes,
        error_before=report.error_before,
        error_after=report.error_after,
        output_error_after=_mean(beside.output_errors),
        run_error_after=_mean(beside.run_errors),
        quantize_seconds=sum(layer.seconds for layer in report.layers),
        step_seconds=beside.step_seconds,
        original_step_seconds=beside.original_step_seconds,
        figures=figures,
        differences=differences,
        layers=tuple(_with_output_error(layer, beside) for layer in report.layers),
        run_errors=dict(beside.run_errors),
        main_run_errors=dict(beside.main_run_errors),
        skipped=report.skipped,
        pictures=shown(judged.pictures, drawing, 0 if suite.pictures is None else suite.pictures.shown),
        recipe_text=judged.recipe_text,
        folder=judged.folder,
    )
    return attrs.evolve(found, gates=_gates(suite, cell, found))


def _mean(errors: Mapping[str, float]) -> float | None:
    return geometric_mean(errors.values()) if errors else None


def _with_output_error(layer: LayerRecord, beside: Beside) -> LayerRecord:
    """The record with the error on the suite's own tokens, so that cells compare: calibration's were others."""
    if layer.name not in beside.output_errors:
        return layer
    return attrs.evolve(layer, output_error_before=None, output_error_after=beside.output_errors[layer.name])


def _gates(suite: Suite, cell: SuiteCell, found: Cell) -> tuple[GateResult, ...]:
    """What each gate finds; those on differences, and that on bytes, do not concern the baseline."""
    gates = [
        _gate(gate, found) for gate in cell.gates if not (gate.of_difference and cell.recipe_name == suite.baseline)
    ]
    if suite.equal_bytes and found.bytes_above is not None:
        gates.append(GateResult(gate="bytes_above <= 0", met=found.bytes_above <= 0, found=float(found.bytes_above)))
    return tuple(gates)


def _gate(gate: Gate, cell: Cell) -> GateResult:
    value: float | None
    if gate.metric in OWN_FIGURES:
        value = getattr(cell, gate.metric)
    else:
        interval_ = (cell.differences if gate.of_difference else cell.figures).get(gate.metric)
        value = None if interval_ is None else gate.value(interval_)
    return GateResult(gate=str(gate), met=gate.holds(value), found=value)


def unmet(cells: Sequence[Cell]) -> list[str]:
    """A clause for each cell that failed, and for each gate that a cell does not meet."""
    clauses: list[str] = []
    for cell in cells:
        if cell.state == "failed":
            clauses.append(f"{cell.label} failed")
        for gate in cell.gates:
            if not gate.met:
                found = "there is no such figure" if gate.found is None else f"found is {gate.found:.4g}"
                clauses.append(f"{cell.label}: '{gate.gate}' is required, and {found}")
    return clauses


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A resolved recipe as TOML, every option spelt out; it may be run as it is."""
    lines: list[str] = []
    for name, section in recipe.items():
        for table in section if isinstance(section, list) else [section]:
            heading = f"[[{name}]]" if isinstance(section, list) else f"[{name}]"
            lines += ["", heading, *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines[1:]) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml(value: Any) -> str:
    """A value in TOML; text, numbers and truth are written as in JSON."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(each)}" for key, each in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False)
