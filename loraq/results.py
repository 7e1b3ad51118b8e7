"""What a benchmark found, as data: a cell for each model, recipe, overrides and seed, and the suite that holds them.

`loraq bench` makes it, the tables (CSV, JSON lines) and the report are made from it. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import attrs

from loraq.bootstrap import Interval
from loraq.layer import LayerRecord
from loraq.report import Skipped


@attrs.frozen(kw_only=True)
class Picture:
    """One prompt and noise, as the suite shows it: the file lies below the suite's folder."""

    prompt: str
    seed: int
    path: Path


@attrs.frozen(kw_only=True)
class Metric:
    """How a metric is to be read: `unit` stands behind the figure, `what` is a sentence on it."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    what: str


@attrs.frozen(kw_only=True)
class Cell:
    """One model quantized one way.

    `label` names it in tables, unique in its suite. `state` is "done", or "failed" with the sentence why in `reason`
    (then every figure is None or empty). Bytes are those of the packed layers (`stored_bytes`) and of all files
    (`written_bytes`, `source_bytes`); errors are geometric means over layers (see Report); seconds of the whole
    quantization and of one denoising step, and the step of the 16-bit model measured beside it. `figures` are the means
    of each metric over the pictures, `differences` the paired means less the baseline's, empty for the baseline itself.
    """

    label: str
    model: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seed: int = 0
    state: Literal["done", "failed"] = "done"
    reason: str | None = None
    effective_bits: float | None = None
    stored_bytes: int | None = None
    written_bytes: int | None = None
    source_bytes: int | None = None
    error_before: float | None = None
    error_after: float | None = None
    output_error_after: float | None = None
    quantize_seconds: float | None = None
    step_seconds: float | None = None
    original_step_seconds: float | None = None
    figures: Mapping[str, Interval] = attrs.field(factory=dict)
    differences: Mapping[str, Interval] = attrs.field(factory=dict)
    layers: tuple[LayerRecord, ...] = attrs.field(factory=tuple, repr=False)
    skipped: tuple[Skipped, ...] = attrs.field(factory=tuple, repr=False)
    pictures: tuple[Picture, ...] = attrs.field(factory=tuple, repr=False)
    recipe_text: str = attrs.field(default="", repr=False)
    """The resolved recipe, as TOML or JSON, for people."""


@attrs.frozen(kw_only=True)
class SuiteResult:
    """Everything that a suite found.

    `baselines` names, by model, the cell that `differences` are taken from. `originals` has the 16-bit models'
    pictures, by model, one for each of a cell's; `original_figures` their metrics, where a metric judges pictures by
    themselves. `left_out` has a sentence for each metric that could not measure here.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    metrics: tuple[Metric, ...]
    baselines: Mapping[str, str] = attrs.field(factory=dict)
    originals: Mapping[str, tuple[Picture, ...]] = attrs.field(factory=dict)
    original_figures: Mapping[str, Mapping[str, Interval]] = attrs.field(factory=dict)
    left_out: Mapping[str, str] = attrs.field(factory=dict)
    prompts: int = 0
    versions: Mapping[str, str] = attrs.field(factory=dict)
    machine: Mapping[str, str] = attrs.field(factory=dict)
    finished: str = ""
    """UTC, as 2026-01-31T12:00:00Z."""
