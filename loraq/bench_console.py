"""A suite for the terminal: which cells there are, and what they gave, in tables that fit into 80 columns.

One table of sizes, errors and times, then one for each metric, with intervals. Cells of one model and setting, which
share a baseline, stand together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING

from loraq.bootstrap import Interval
from loraq.report import size
from loraq.results import Cell, Metric, SuiteResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FEW_PROMPTS = 20


def print_result(result: SuiteResult, console: Console) -> None:
    """All tables, and what must be known to read them."""
    from rich.markup import escape

    console.print(f"[bold]{escape(result.title)}[/bold]", highlight=False)
    groups = _groups(result)
    if any(cell.state == "done" for cell in result.cells):
        console.print(_sizes(groups, _baselines(result)))
        for line in _about_sizes(result):
            console.print(line, style="dim", highlight=False, markup=False)
    for metric in result.metrics:
        if any(metric.name in cell.figures for cell in result.cells):
            unit = f"{metric.unit}, " if metric.unit else ""
            console.print(
                f"\n[bold]{escape(metric.name)}[/bold]  {escape(f'{unit}{metric.better} is better. {metric.what}')}",
                highlight=False,
            )
            console.print(_of_metric(metric, groups, result))
    for line in _notes(result):
        console.print(line, highlight=False, markup=False)


def _groups(result: SuiteResult) -> dict[str, list[tuple[str, Cell]]]:
    """The cells by heading, which is the model where there are several and the setting, each with its short name."""
    models = {cell.model for cell in result.cells}
    seeds = {cell.seed for cell in result.cells}
    groups: dict[str, list[tuple[str, Cell]]] = {}
    for cell in result.cells:
        heading = ", ".join(each for each in (cell.model if len(models) > 1 else "", cell.setting) if each)
        name = f"{cell.recipe}, seed {cell.seed}" if len(seeds) > 1 else cell.recipe
        groups.setdefault(heading, []).append((name, cell))
    return groups


def _table(
    columns: Sequence[str],
    groups: Mapping[str, Sequence[tuple[str, Cell]]],
    row: Callable[[Cell], Sequence[str]],
    before: Callable[[str], Sequence[Sequence[str]]] = lambda heading: [],
) -> Table:
    """A row a cell that is done, under its group's heading; `before` gives rows that come first in a group."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for heading, cells in groups.items():
        rows = [[escape(name), *row(cell)] for name, cell in cells if cell.state == "done"]
        if not rows:
            continue
        if heading:
            table.add_row(f"[bold]{escape(heading)}[/bold]")
        for each in (*before(heading), *rows):
            table.add_row(*each)
        table.add_section()
    return table


def _baselines(result: SuiteResult) -> set[str]:
    """The cells that others are compared with."""
    return {*result.baselines.values(), *(cell.baseline for cell in result.cells if cell.baseline is not None)}


def _sizes(groups: Mapping[str, Sequence[tuple[str, Cell]]], baselines: Container[str]) -> Table:
    columns = ("bits", "bytes", "to base", "weight\nerror", "output\nerror", "as run", "step", "fit")

    def row(cell: Cell) -> list[str]:
        step = cell.step_seconds
        relative = step / cell.original_step_seconds if step and cell.original_step_seconds else None
        return [
            _number(cell.effective_bits, ".2f"),
            "-" if cell.stored_bytes is None else size(cell.stored_bytes),
            "base" if cell.label in baselines else _to_baseline(cell),
            _number(cell.error_after, ".4f"),
            _number(cell.output_error_after, ".4f"),
            _number(cell.run_error_after, ".4f"),
            "-" if relative is None else f"{relative:.2f}x",
            "-" if cell.quantize_seconds is None else f"{cell.quantize_seconds:.1f} s",
        ]

    return _table(columns, groups, row)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _to_baseline(cell: Cell) -> str:
    """How many bytes more or fewer than the baseline, in percent; more is marked."""
    if cell.bytes_above is None or cell.stored_bytes is None:
        return "-"
    share = cell.bytes_above / (cell.stored_bytes - cell.bytes_above)
    return f"[bold red]{share:+.2%}[/bold red]" if cell.bytes_above > 0 else f"{share:+.2%}"


def _about_sizes(result: SuiteResult) -> list[str]:
    lines = ["Errors are geometric means over layers; fit is all layers' seconds added up, calibration left out."]
    if any(cell.run_error_after is not None for cell in result.cells):
        lines.append("Output errors: on inputs of the 16-bit model; as run: activations rounded as well.")
    steps = [cell.original_step_seconds for cell in result.cells if cell.original_step_seconds]
    if steps:
        lines.append(f"Step: time of one denoising step relative to the 16-bit model's ({min(steps):.3g} s), by turns.")
    above = [cell.label for cell in result.cells if cell.bytes_above is not None and cell.bytes_above > 0]
    compared = [cell for cell in result.cells if cell.bytes_above is not None]
    if above:
        lines.append(f"More bytes than the baseline: {', '.join(above)}.")
    elif compared:
        lines.append("No cell takes more bytes than the baseline it is compared with.")
    return lines


def _of_metric(metric: Metric, groups: Mapping[str, Sequence[tuple[str, Cell]]], result: SuiteResult) -> Table:
    name = metric.name
    every = [found for cell in result.cells for found in (cell.figures.get(name), cell.differences.get(name)) if found]
    digits, baselines = min(filter(None, map(_digits, every)), default=2), _baselines(result)

    def row(cell: Cell) -> list[str]:
        difference = "baseline" if cell.label in baselines else "-"
        if name in cell.differences:
            difference = _span(cell.differences[name], f"+.{digits}f")
        return [_span(cell.figures.get(name), f".{digits}f"), difference]

    def original(heading: str) -> list[list[str]]:
        found = result.original_figures.get(groups[heading][0][1].model, {}).get(name)
        return [] if found is None else [["16-bit model", _span(found, f".{digits}f"), ""]]

    return _table(("mean [95 % interval]", "less the baseline [95 %]"), groups, row, original)


def _digits(found: Interval) -> int:
    """Decimals that show the interval's width in two digits, or four digits of a figure without one; 0 for none."""
    if found.low is None or found.high is None:
        return _decimals(found.mean, 4)
    return _decimals(found.high - found.low, 2)


def _decimals(value: float, digits: int) -> int:
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value else 0


def _span(found: Interval | None, form: str) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return format(found.mean, form)
    return f"{found.mean:{form}} \\[{found.low:{form}}, {found.high:{form}}]"


def _notes(result: SuiteResult) -> list[str]:
    lines = [f"{name} is left out: {reason}" for name, reason in result.left_out.items()]
    lines += [f"{cell.label} failed: {cell.reason}" for cell in result.cells if cell.state == "failed"]
    if 0 < result.prompts < FEW_PROMPTS:
        lines.append(
            f"Only {result.prompts} different prompts: the intervals are too narrow; give {FEW_PROMPTS} or more."
        )
    return lines


def print_cells(states: Mapping[str, str], console: Console) -> None:
    """Which cells there are, and how far each is."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("cell", overflow="fold")
    table.add_column("state", no_wrap=True)
    for label, state in states.items():
        table.add_row(escape(label), state)
    console.print(table)
