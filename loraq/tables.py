"""A suite's results as files: a row a cell, a row a layer, a row a picture, each as CSV and as JSON lines.

cells.csv   cells.jsonl     what the suite is run for: errors, bytes, times, every metric with its interval
layers.csv  layers.jsonl    which layer does harm
pairs.csv   pairs.jsonl     every picture's figures
suite.json                  all but the pairs, nested, as `loraq bench --json` prints it (that leaves the layers out)
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from loraq.checkpoint import write_text
from loraq.results import Cell, Picture, SuiteResult

_PLAIN = (
    *("label", "model", "recipe", "setting", "seed", "state", "reason", "baseline"),
    *("effective_bits", "stored_bytes", "bytes_above", "written_bytes", "source_bytes"),
    *("error_before", "error_after", "output_error_after", "run_error_after"),
    *("quantize_seconds", "step_seconds", "original_step_seconds"),
)


def cell_row(cell: Cell, metrics: Iterable[str]) -> dict[str, Any]:
    """A cell as a flat row; what there is none of is None."""
    row: dict[str, Any] = {name: getattr(cell, name) for name in _PLAIN}
    row["overrides"] = " ".join(cell.overrides)
    for name in metrics:
        for what, found in (("", cell.figures.get(name)), ("_difference", cell.differences.get(name))):
            row[f"{name}{what}"] = None if found is None else found.mean
            row[f"{name}{what}_low"] = None if found is None else found.low
            row[f"{name}{what}_high"] = None if found is None else found.high
    row["gates_unmet"] = "; ".join(each.gate for each in cell.gates if not each.met)
    return row


def layer_rows(cell: Cell) -> list[dict[str, Any]]:
    """A cell's layers as flat rows."""
    return [
        {"cell": cell.label, "layer": layer.name, "out": layer.out, "inn": layer.inn, "rank": layer.rank}
        | {"effective_bits": layer.effective_bits, "stored_bytes": layer.stored_bytes, "seconds": layer.seconds}
        | {"error_before": layer.error_before, "error_after": layer.error_after}
        | {"output_error_after": layer.output_error_after}
        | {"main_run_error_after": cell.main_run_errors.get(layer.name)}
        | {"run_error_after": cell.run_errors.get(layer.name)}
        for layer in cell.layers
    ]


def to_plain(result: SuiteResult, folder: Path, *, layers: bool = True) -> dict[str, Any]:
    """The whole result for JSON; pictures' paths are relative to the suite's `folder`."""
    left_out = (
        () if layers else ("layers", "run_errors", "main_run_errors", "skipped", "pictures", "originals", "recipe_text")
    )

    def told(value: Any) -> Any:
        if isinstance(value, Picture):
            path = value.path.relative_to(folder) if value.path.is_relative_to(folder) else value.path
            return {"prompt": value.prompt, "seed": value.seed, "path": str(path)}
        if attrs.has(type(value)):
            shortened = left_out if isinstance(value, Cell | SuiteResult) else ()
            names = [field.name for field in attrs.fields(type(value)) if field.name not in shortened]
            return {name: told(getattr(value, name)) for name in names}
        if isinstance(value, Mapping):
            return {key: told(each) for key, each in value.items()}
        return [told(each) for each in value] if isinstance(value, tuple | list) else value

    plain: dict[str, Any] = told(result)
    return plain


def write_tables(result: SuiteResult, folder: Path, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Write all tables into `folder`; `pairs` are the rows of single pictures."""
    names = [metric.name for metric in result.metrics]
    _write(folder / "cells", [cell_row(cell, names) for cell in result.cells])
    _write(folder / "layers", [row for cell in result.cells for row in layer_rows(cell)])
    _write(folder / "pairs", pairs)
    write_text(folder / "suite.json", json.dumps(to_plain(result, folder), indent=1, ensure_ascii=False) + "\n")


def _write(stem: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(stem.with_suffix(".csv"), text.getvalue())
    lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    write_text(stem.with_suffix(".jsonl"), lines)
