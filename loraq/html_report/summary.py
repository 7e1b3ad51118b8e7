"""The summary table of one model: columns that have something to show, a row a cell, the best of each column marked.

Cells of one setting and seed are compared with each other, as their baseline is: "best" is meant among them. Sizes
that differ by less than a fiftieth count as equal, and then none is best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import attrs

from loraq.bootstrap import Interval
from loraq.html_report.figures import Figure, decimals_for, duration, fixed, significant, span, verdict
from loraq.report import size
from loraq.results import Cell, Metric, SuiteResult

Better = Literal["higher", "lower"]
_EQUAL = 0.02


@attrs.frozen(kw_only=True)
class Column:
    """A column: what it is called, how a cell's figure is shown, which end is better, and where it is plotted.

    `axis` is "x" for sizes, "y" for errors and metrics, "" for neither; `tells` is a sentence on what it is.
    """

    key: str
    group: str
    title: str
    tells: str
    figure: Callable[[Cell], Figure]
    better: Better | None = "lower"
    axis: Literal["x", "y", ""] = ""
    axis_title: str = ""
    interval: Callable[[Cell], Interval | None] = lambda _: None


@attrs.frozen(kw_only=True)
class Row:
    """A cell and its figures, one a column. `name` is its label without what other columns say."""

    cell: Cell
    name: str
    figures: tuple[Figure, ...]
    gates: Figure


@attrs.frozen(kw_only=True)
class Summary:
    """The table of one model. `groups` has each run of columns of one group, with its length; `begins` their places.

    `winners`, `compared` and `larger` say which signs there are: best figures, differences, bytes over a baseline's.
    """

    columns: tuple[Column, ...]
    groups: tuple[tuple[str, int], ...]
    begins: frozenset[int]
    rows: tuple[Row, ...]
    reference: tuple[Figure, ...]
    winners: bool
    compared: bool
    larger: bool
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    gated: bool


def summary(result: SuiteResult, model: str) -> Summary:
    """The table of `model`."""
    cells = cells_of(result, model)
    columns = tuple(each for each in _columns(result, cells) if any(each.figure(cell).text for cell in cells))
    best = {column.key: _best(column, cells) for column in columns}
    rows = tuple(
        Row(
            cell=cell,
            name=_name(cell, cells),
            figures=tuple(attrs.evolve(each.figure(cell), best=cell.label in best[each.key]) for each in columns),
            gates=_gates(cell),
        )
        for cell in cells
    )
    groups: list[tuple[str, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    return Summary(
        columns=columns,
        groups=tuple(groups),
        begins=frozenset(sum(length for _, length in groups[:place]) for place in range(len(groups))),
        rows=rows,
        reference=_reference(result, model, cells, columns),
        winners=any(figure.best for row in rows for figure in row.figures),
        compared=any(cell.differences for cell in cells),
        larger=any((cell.bytes_above or 0) > 0 for cell in cells),
        settings=tuple(dict.fromkeys(cell.setting for cell in cells)),
        seeds=tuple(dict.fromkeys(cell.seed for cell in cells)),
        gated=any(cell.gates for cell in cells),
    )


def cells_of(result: SuiteResult, model: str) -> list[Cell]:
    """The cells of `model`, those that are compared with each other together, else in the suite's order."""
    cells = [cell for cell in result.cells if cell.model == model]
    order = list(dict.fromkeys((cell.setting, cell.seed) for cell in cells))
    return sorted(cells, key=lambda cell: order.index((cell.setting, cell.seed)))


def _name(cell: Cell, cells: Sequence[Cell]) -> str:
    """The label less what the section's heading and other columns say: its parts stand between commas."""
    said = {cell.model}
    if len({each.setting for each in cells}) > 1:
        said.add(cell.setting)
    if len({each.seed for each in cells}) > 1:
        said.add(f"seed {cell.seed}")
    return ", ".join(part for part in cell.label.split(", ") if part not in said) or cell.label


def baseline_of(result: SuiteResult, cell: Cell) -> str | None:
    """The label of the cell that `cell` is compared with, None for a baseline."""
    label = cell.baseline or result.baselines.get(cell.model)
    return None if label == cell.label else label


def is_baseline(result: SuiteResult, cell: Cell) -> bool:
    """Whether `cell` is what those of its setting and seed are compared with, be it alone there."""
    cells = [each for each in result.cells if each.model == cell.model]
    first = result.baselines.get(cell.model)
    named = {first} | {each.baseline for each in cells}
    recipes = {each.recipe for each in cells if each.label == first and any(other.baseline for other in cells)}
    return cell.label in named or (cell.baseline is None and cell.state == "done" and cell.recipe in recipes)


def _columns(result: SuiteResult, cells: Sequence[Cell]) -> list[Column]:
    """All columns there may be, those without a figure included."""
    metrics = [column for metric in result.metrics for column in _metric_columns(metric, cells)]
    return [*_SIZES, *_ERRORS, *metrics, *_TIMES]


def _number(value: Callable[[Cell], float | None], text: Callable[[float], str]) -> Callable[[Cell], Figure]:
    """What shows one number of a cell; one that is not finite has no place in an order or a plot."""

    def figure(cell: Cell) -> Figure:
        found = value(cell)
        if found is None:
            return Figure()
        return Figure(value=found if math.isfinite(found) else None, text=text(found))

    return figure


def _stored(cell: Cell) -> Figure:
    if cell.stored_bytes is None:
        return Figure()
    above = cell.bytes_above or 0
    note = f"{size(above)} over" if above > 0 else ""
    return Figure(value=cell.stored_bytes, text=size(cell.stored_bytes), note=note)


def _written(cell: Cell) -> Figure:
    if cell.written_bytes is None:
        return Figure()
    note = f"{cell.written_bytes / cell.source_bytes:.0%} of 16-bit" if cell.source_bytes else ""
    return Figure(value=cell.written_bytes, text=size(cell.written_bytes), note=note)


def _step(cell: Cell) -> Figure:
    if cell.step_seconds is None:
        return Figure()
    original = cell.original_step_seconds
    note = f"{significant(cell.step_seconds / original)} × 16-bit" if original else ""
    return Figure(value=cell.step_seconds, text=duration(cell.step_seconds), note=note)


_SIZES = (
    Column(
        key="bits",
        group="Size",
        title="bits",
        tells="Stored bits a quantized weight: codes, scales, branch and padding.",
        figure=_number(lambda cell: cell.effective_bits, lambda value: fixed(value, 2)),
        axis="x",
        axis_title="bits a weight",
    ),
    Column(
        key="stored",
        group="Size",
        title="packed",
        tells="Bytes of the packed layers but for their biases.",
        figure=_stored,
        axis="x",
        axis_title="packed bytes",
    ),
    Column(
        key="written",
        group="Size",
        title="files",
        tells="Bytes of all weight files, the 16-bit rest included.",
        figure=_written,
        axis="x",
        axis_title="file bytes",
    ),
)
_ERRORS = (
    Column(
        key="before",
        group="Error",
        title="before",
        tells="Relative weight error with the main quantizer alone, mean of layers.",
        better=None,  # the branch is fitted to make up for it
        figure=_number(lambda cell: cell.error_before, significant),
    ),
    Column(
        key="after",
        group="Error",
        title="after",
        tells="Relative weight error with the branch, mean of layers.",
        figure=_number(lambda cell: cell.error_after, significant),
        axis="y",
        axis_title="weight error",
    ),
    Column(
        key="output",
        group="Error",
        title="output",
        tells="Relative error of the layers' outputs, from the weights alone.",
        figure=_number(lambda cell: cell.output_error_after, significant),
        axis="y",
        axis_title="output error",
    ),
    Column(
        key="run",
        group="Error",
        title="as run",
        tells="Relative error of the layers' outputs as they run, activations rounded.",
        figure=_number(lambda cell: cell.run_error_after, significant),
        axis="y",
        axis_title="output error as run",
    ),
)
_TIMES = (
    Column(
        key="quantize",
        group="Time",
        title="quantize",
        tells="Time of quantizing all layers, one after the other.",
        figure=_number(lambda cell: cell.quantize_seconds, duration),
    ),
    Column(
        key="step",
        group="Time",
        title="step",
        tells="Time of one denoising step, beside the 16-bit model's.",
        figure=_step,
    ),
)


def _metric_columns(metric: Metric, cells: Sequence[Cell]) -> list[Column]:
    """A metric's means, and its paired differences to the baseline."""
    unit = f", {metric.unit}" if metric.unit else ""
    better = f"{metric.better.capitalize()} is better."
    means = [cell.figures[metric.name] for cell in cells if metric.name in cell.figures]
    differences = [cell.differences[metric.name] for cell in cells if metric.name in cell.differences]
    digits, steps = decimals_for(means), decimals_for(differences)

    def mean(cell: Cell) -> Figure:
        found = cell.figures.get(metric.name)
        if found is None:
            return Figure()
        return Figure(value=found.mean, text=fixed(found.mean, digits), note=span(found, digits))

    def difference(cell: Cell) -> Figure:
        found = cell.differences.get(metric.name)
        if found is None:
            return Figure()
        text, note = fixed(found.mean, steps, sign=True), span(found, steps, sign=True)
        return Figure(value=found.mean, text=text, note=note, mark=verdict(found, metric.better))

    return [
        Column(
            key=f"mean.{metric.name}", group=metric.name, title=f"mean{unit}", tells=f"{metric.what} {better}",
            better=metric.better, figure=mean, axis="y", axis_title=f"{metric.name}{unit}",
            interval=lambda cell: cell.figures.get(metric.name),
        ),
        Column(
            key=f"difference.{metric.name}", group=metric.name, title="less baseline",
            tells=f"Mean paired difference to the baseline's pictures{unit}. {better}",
            better=metric.better, figure=difference, axis="y", axis_title=f"{metric.name} less the baseline's{unit}",
            interval=lambda cell: cell.differences.get(metric.name),
        ),
    ]  # fmt: skip


def _best(column: Column, cells: Sequence[Cell]) -> set[str]:
    """Labels of the cells that none of their setting and seed surpasses in `column`, if there is something to win."""
    if column.better is None or column.key.startswith("difference."):
        return set()  # the difference's order is the mean's
    found: set[str] = set()
    for key in dict.fromkeys((cell.setting, cell.seed) for cell in cells):
        values = {
            cell.label: value
            for cell in cells
            if (cell.setting, cell.seed) == key and (value := column.figure(cell).value) is not None
        }
        if len(values) < 2:
            continue
        least, most = min(values.values()), max(values.values())
        if least == most or (column.axis == "x" and most - least < _EQUAL * abs(most)):
            continue
        winner = most if column.better == "higher" else least
        found |= {label for label, value in values.items() if value == winner}
    return found


def _gates(cell: Cell) -> Figure:
    """Whether the cell meets what the suite requires, and what it does not."""
    if not cell.gates:
        return Figure()
    missed = [
        f"{each.gate}: {'nothing to compare' if each.found is None else significant(each.found, 4)}"
        for each in cell.gates
        if not each.met
    ]
    text = "met" if not missed else f"{len(missed)} of {len(cell.gates)} missed"
    return Figure(value=float(len(missed)), text=text, note="; ".join(missed), mark="missed" if missed else "met")


def _reference(result: SuiteResult, model: str, cells: Sequence[Cell], columns: Sequence[Column]) -> tuple[Figure, ...]:
    """The 16-bit model's row: its files, and metrics that judge pictures by themselves; () if nothing is known."""
    known: Mapping[str, Interval] = result.original_figures.get(model, {})
    source = next((cell.source_bytes for cell in cells if cell.source_bytes), None)
    figures = []
    for column in columns:
        name = column.key.removeprefix("mean.")
        if column.key == "written" and source:
            figures.append(Figure(value=source, text=size(source)))
        elif column.key.startswith("mean.") and name in known:
            digits = decimals_for(cell.figures[name] for cell in cells if name in cell.figures)
            found = known[name]
            figures.append(Figure(value=found.mean, text=fixed(found.mean, digits), note=span(found, digits)))
        else:
            figures.append(Figure())
    return tuple(figures) if any(figure.text for figure in figures) else ()
