"""The page: what a suite found, made ready for the template, and the template filled.

All text from outside (labels, prompts, reasons, recipes) passes through Jinja's escaping or its `tojson`; scripts only
ever set it as text. The page's own policy allows its one style sheet and its one script, by digest, and pictures within
the file: nothing is loaded, and nothing that was written into a label can run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import attrs
from jinja2 import Environment, PackageLoader, StrictUndefined

from loraq.bootstrap import LEVEL, RESAMPLES
from loraq.evaluation import FEW_PROMPTS
from loraq.html_report.embedding import FACTOR, Gallery, gallery
from loraq.html_report.figures import significant
from loraq.html_report.strip import strip
from loraq.html_report.summary import Column, Row, Summary, baseline_of, cells_of, is_baseline, summary
from loraq.report import size
from loraq.results import Cell, SuiteResult

_STYLES = ("page.css", "table.css", "figures.css", "rest.css")
_SCRIPTS = ("base.js", "table.js", "scale.js", "plot.js", "strip.js", "pictures.js", "start.js")


@attrs.frozen(kw_only=True)
class Section:
    """One model, as the template shows it."""

    name: str
    anchor: str
    summary: Summary
    baselines: frozenset[str]
    lede: tuple[str, ...]
    has_plot: bool
    layers: Mapping[str, Any] | None
    gallery: Gallery | None
    skipped: tuple[tuple[str, int, int], ...]
    """Why layers stay in 16 bits in the first cell that has layers: reason, layers, weights."""

    def identifier(self, cell: Cell) -> str:
        """What joins a cell's row, point, strip and recipe."""
        return f"{self.anchor}-{[row.cell.label for row in self.summary.rows].index(cell.label)}"


def page(result: SuiteResult, folder: Path) -> str:
    """The whole HTML text; pictures are read below `folder`."""
    models = list(dict.fromkeys(cell.model for cell in result.cells))
    sections = [_section(result, name, f"m{place}", folder) for place, name in enumerate(models)]
    environment = Environment(
        loader=PackageLoader("loraq.html_report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style, script = ("".join(_asset(name) for name in names) for names in (_STYLES, _SCRIPTS))
    values = {
        "result": result,
        "sections": sections,
        "style": style,
        "script": script,
        "policy": _policy(style, script),
        "data": {"factor": FACTOR, "models": [_data(result, section) for section in sections]},
        "factor": FACTOR,
        "level": f"{LEVEL:.0%}",
        "resamples": f"{RESAMPLES:,}",
        "pictures": max((each.pictures for cell in result.cells for each in cell.figures.values()), default=0),
        "output_errors": any(cell.output_error_after is not None for cell in result.cells),
        "run_errors": any(cell.run_error_after is not None for cell in result.cells),
        "few": FEW_PROMPTS,
        "failed": sum(cell.state == "failed" for cell in result.cells),
    }
    template = environment.get_template("report.html.j2")
    return template.render(**values, size=size(len(template.render(**values, size="00.0 MB").encode())))


def _asset(name: str) -> str:
    """A file of this package, as text."""
    return resources.files("loraq.html_report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """The content security policy: this style, this script, pictures within the file, and nothing else."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"


def _section(result: SuiteResult, name: str, anchor: str, folder: Path) -> Section:
    cells = cells_of(result, name)
    table = summary(result, name)
    axes = {column.axis for column in table.columns}
    done = sum(cell.state == "done" for cell in cells)
    return Section(
        name=name,
        anchor=anchor,
        summary=table,
        baselines=frozenset(cell.label for cell in cells if is_baseline(result, cell)),
        lede=tuple(_lede(result, table)),
        has_plot=done > 1 and {"x", "y"} <= axes,
        layers=strip(cells),
        gallery=gallery(
            result.originals.get(name, ()), {cell.label: cell.pictures for cell in cells if cell.pictures}, folder
        ),
        skipped=_skipped(cells),
    )


def _skipped(cells: list[Cell]) -> tuple[tuple[str, int, int], ...]:
    first = next((cell for cell in cells if cell.layers or cell.skipped), None)
    reasons: dict[str, list[int]] = {}
    for each in first.skipped if first else ():
        reasons.setdefault(each.reason, []).append(each.weights)
    return tuple((reason, len(weights), sum(weights)) for reason, weights in reasons.items())


def _lede(result: SuiteResult, table: Summary) -> list[str]:
    """A sentence for each setting: what is best by the first metric and by weight error, and how clearly."""
    metrics = [column for column in table.columns if column.key.startswith("mean.")][:1]
    errors = [column for column in table.columns if column.key == "after"]
    sentences = []
    for setting in table.settings:
        rows = [row for row in table.rows if row.cell.setting == setting and row.cell.state == "done"]
        found = [told for column in metrics + errors if (told := _winner(result, table, column, rows))]
        if found:
            sentences.append(f"{setting + ': ' if setting else ''}{'; '.join(found)}.")
    return sentences


def _winner(result: SuiteResult, table: Summary, column: Column, rows: list[Row]) -> str | None:
    """`highest psnr 46.1 dB by LoRaQ (+5.7 to +6.9 against SVDQuant)`, or None where there is nothing to compare."""
    place = table.columns.index(column)
    known = [row for row in rows if row.figures[place].value is not None]
    if len(known) < 2:
        return None
    higher = column.better == "higher"
    first = (max if higher else min)(known, key=lambda row: row.figures[place].value or 0.0)
    name = column.group if column.key.startswith("mean.") else "weight error"
    unit = next((f" {each.unit}" for each in result.metrics if column.group == each.name and each.unit), "")
    told = f"{'highest' if higher else 'lowest'} {name} {first.figures[place].text}{unit} by {first.cell.label}"
    baseline = baseline_of(result, first.cell)
    if baseline is None:
        return f"{told}, the baseline itself"
    differences = [each.key for each in table.columns]
    key = f"difference.{column.group}"
    if key in differences and (note := first.figures[differences.index(key)].note):
        return f"{told} ({note} against {baseline})"
    other = next((row for row in rows if row.cell.label == baseline), None)
    if other is not None and (value := other.figures[place].value):
        return f"{told} ({significant((first.figures[place].value or 0.0) / value)} times {baseline}’s)"
    return told


def _data(result: SuiteResult, section: Section) -> dict[str, Any]:
    """What the scripts draw from."""
    columns = [column for column in section.summary.columns if column.axis]
    found = section.gallery
    return {
        "anchor": section.anchor,
        "name": section.name,
        "settings": list(section.summary.settings),
        "axes": [
            {"key": each.key, "axis": each.axis, "title": each.axis_title, "better": each.better} for each in columns
        ],
        "cells": [_cell_data(result, section, row, columns) for row in section.summary.rows],
        "strip": section.layers,
        "pictures": None if found is None else _gallery_data(section, found),
        "first": _first_two(section.summary, section.baselines),
    }


def _cell_data(result: SuiteResult, section: Section, row: Row, columns: list[Column]) -> dict[str, Any]:
    shown = dict(zip((column.key for column in section.summary.columns), row.figures, strict=True))
    points = {}
    for column in columns:
        figure, found = shown[column.key], column.interval(row.cell)
        if figure.value is not None:
            ends = [None, None] if found is None else [found.low, found.high]
            points[column.key] = [figure.value, *ends, f"{figure.text} ({figure.note})" if ends[0] else figure.text]
    return {
        "id": section.identifier(row.cell),
        "label": row.cell.label,
        "setting": row.cell.setting,
        "seed": row.cell.seed,
        "baseline": row.cell.label in section.baselines,
        "against": baseline_of(result, row.cell),
        "points": points,
    }


def _gallery_data(section: Section, found: Gallery) -> dict[str, Any]:
    """Pictures by cell and scene."""
    labels = [row.cell.label for row in section.summary.rows if row.cell.label in found.cells]
    return {
        "scenes": [{"prompt": prompt, "seed": seed} for prompt, seed in found.scenes],
        "originals": [None if shot is None else shot.picture for shot in found.originals],
        "labels": labels,
        "shots": [[None if shot is None else attrs.astuple(shot) for shot in found.cells[label]] for label in labels],
        "pixelated": found.pixelated,
    }


def _first_two(table: Summary, baselines: frozenset[str]) -> list[str]:
    """The cells that are looked at first: the baseline, and the best other one by the first metric, else by error."""
    labels = [row.cell.label for row in table.rows if row.cell.state == "done"]
    if not labels:
        return ["", ""]
    keys = [column.key for column in table.columns]
    judged = [key for key in keys if key.startswith("mean.")] + [key for key in keys if key == "after"]
    best = [row.cell.label for key in judged for row in table.rows if row.figures[keys.index(key)].best]
    first = next((label for label in labels if label in baselines), labels[0])
    return [first, next((label for label in [*best, *labels] if label != first), first)]
