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
class GateResult:
    """A gate ("psnr >= 24") and whether a cell meets it; `found` is what was compared, None where there was nothing."""

    gate: str
    met: bool
    found: float | None = None


@attrs.frozen(kw_only=True)
class Cell:
    """One model quantized one way.

    `label` names it in tables, unique in its suite. `state` is "done", or "failed" with the sentence why in `reason`
    (then every figure is None or empty). Bytes are those of the packed layers (`stored_bytes`) and of all files
    (`written_bytes`, `source_bytes`); errors are geometric means over layers (see Report). `quantize_seconds` are those
    of all layers' fits added up, calibration left out; `step_seconds` those of one denoising step, and the 16-bit
    model's, measured beside it. `figures` are the means of each metric over the pictures, `differences` the paired
    means less the baseline's, empty for the baseline itself.

    `setting` names the suite's table of overrides that the cell has, and `baseline` the cell of the same model, setting
    and seed that it is compared with, None for that one itself. Output errors are `||y - ŷ|| / ||y||` over tokens of
    the suite's own, the same for all cells of a model: `output_error_after` from the weights alone (each layer's is in
    its record), `run_error_after` as the packed layer computes, activations rounded (each layer's in `run_errors`; in
    `main_run_errors` the branch's inputs are not).
    """

    label: str
    model: str
    recipe: str
    overrides: tuple[str, ...] = ()
    setting: str = ""
    seed: int = 0
    baseline: str | None = None
    state: Literal["done", "failed"] = "done"
    reason: str | None = None
    effective_bits: float | None = None
    stored_bytes: int | None = None
    written_bytes: int | None = None
    source_bytes: int | None = None
    error_before: float | None = None
    error_after: float | None = None
    output_error_after: float | None = None
    run_error_after: float | None = None
    quantize_seconds: float | None = None
    step_seconds: float | None = None
    original_step_seconds: float | None = None
    figures: Mapping[str, Interval] = attrs.field(factory=dict)
    differences: Mapping[str, Interval] = attrs.field(factory=dict)
    gates: tuple[GateResult, ...] = ()
    layers: tuple[LayerRecord, ...] = attrs.field(factory=tuple, repr=False)
    run_errors: Mapping[str, float] = attrs.field(factory=dict, repr=False)
    main_run_errors: Mapping[str, float] = attrs.field(factory=dict, repr=False)
    skipped: tuple[Skipped, ...] = attrs.field(factory=tuple, repr=False)
    pictures: tuple[Picture, ...] = attrs.field(factory=tuple, repr=False)
    recipe_text: str = attrs.field(default="", repr=False)
    """The resolved recipe, as TOML or JSON, for people."""
    folder: str = ""
    """Where the quantized model lies, below the suite's folder."""
    bytes_above: int | None = None
    """Stored bytes above the baseline's, negative where it takes fewer; None for the baseline or where one failed."""


@attrs.frozen(kw_only=True)
class SuiteResult:
    """Everything that a suite found.

    `baselines` names, by model, the first cell that `differences` are taken from; with several settings or seeds there
    is one each, which each cell's `baseline` names. `originals` has the 16-bit models'
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
