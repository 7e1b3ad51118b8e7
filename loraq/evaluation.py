"""Judge quantized pipelines by their pictures: drawn beside the original's from the same noise, measured pair by pair.

For each prompt the original and every quantized pipeline draw one picture from one seed. Metrics (entry points of the
group `loraq.metric`) give a figure a picture; reported is the mean over pictures with a 95 % bootstrap interval over
prompts, and, between two quantized pipelines, the mean of the *paired* difference with its own, narrower, interval. A
gate ("psnr >= 24") turns a figure into an exit code.

A mean over a few pictures says little, so means never come without their interval and the number of different prompts.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from loraq import registry
from loraq.bootstrap import Interval, interval
from loraq.checkpoint import write_text
from loraq.contracts import AbstractMetric
from loraq.errors import InputError, LoraqError
from loraq.pictures import Drawing, draw_into, fingerprint, opened
from loraq.progress import Progress
from loraq.quantize import resolved_device

if TYPE_CHECKING:
    from rich.console import Console

ORIGINAL = "original"
FEW_PROMPTS = 20
_ENDS = ("mean", "low", "high")
_GATE = re.compile(r"\s*([^\s.<>=]+)(?:\.(\w+))?\s*(>=|<=)\s*(\S+)\s*")


@attrs.frozen(kw_only=True)
class Gate:
    """What must hold of a metric: `psnr >= 24` of the mean, `psnr.low >= 24` of the interval's lower end."""

    metric: str
    end: str = "mean"
    at_least: bool
    bound: float

    def __str__(self) -> str:
        end = "" if self.end == "mean" else f".{self.end}"
        return f"{self.metric}{end} {'>=' if self.at_least else '<='} {self.bound:g}"

    def value(self, found: Interval) -> float | None:
        """What is compared with the bound."""
        values = {"mean": found.mean, "low": found.low, "high": found.high}
        return values[self.end]

    def is_met(self, found: Interval) -> bool:
        """Whether it holds; not where there is no interval to look at."""
        value = self.value(found)
        if value is None:
            return False
        return value >= self.bound if self.at_least else value <= self.bound


def parse_gate(text: str) -> Gate:
    """The gate that `text` writes. Raises InputError for anything else."""
    found = _GATE.fullmatch(text)
    try:
        bound = float(found[4]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or math.isnan(bound) or (found[2] or "mean") not in _ENDS:
        raise InputError(f"--require '{text}': expected METRIC >= NUMBER or METRIC <= NUMBER, such as 'psnr >= 24'.")
    return Gate(metric=found[1], end=found[2] or "mean", at_least=found[3] == ">=", bound=bound)


def load_metrics(
    names: Sequence[str], required: Sequence[str] = ()
) -> tuple[dict[str, AbstractMetric], dict[str, str]]:
    """The metrics of these names that can measure here, and for each of the others the sentence why not.

    No names means all that are installed. Raises InputError where one of `required` is among the others, or no metric
    is left; RegistryError for a name that nobody offers.
    """
    group = f"{registry.PREFIX}metric"
    metrics: dict[str, AbstractMetric] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys([*(names or registry.names(group)), *required]):
        offered = registry.load(group, name)
        metric = offered() if isinstance(offered, type) else offered
        if not isinstance(metric, AbstractMetric):
            raise registry.broken(group, name, "is not a metric")
        reason = metric.refusal()
        if reason is None:
            metrics[name] = metric
        else:
            refused[name] = reason
    for name in required:
        if name in refused:
            raise InputError(f"metric '{name}' is required, and {refused[name]}")
    if not metrics:
        raise InputError(f"no metric is left: {' '.join(f'{name}: {reason}' for name, reason in refused.items())}")
    return metrics, refused


@attrs.frozen(kw_only=True)
class Row:
    """A line of the result: one pipeline's figure, or the paired difference of two (`subtracted` from `pipeline`)."""

    pipeline: str
    subtracted: str | None = None
    metric: str
    found: Interval

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        difference = {} if self.subtracted is None else {"subtracted": self.subtracted}
        return {"pipeline": self.pipeline, **difference, "metric": self.metric, **attrs.asdict(self.found)}


@attrs.frozen(kw_only=True)
class Evaluation:
    """What was measured: `figures[metric][pipeline]` has a number a picture; `folders` says where a pipeline lies."""

    folders: Mapping[str, str]
    drawing: Drawing
    metrics: Mapping[str, AbstractMetric]
    figures: Mapping[str, Mapping[str, Sequence[float]]]
    refused: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def quantized(self) -> list[str]:
        """The pipelines that are judged, as they were given."""
        return [label for label in self.folders if label != ORIGINAL]

    def means(self) -> list[Row]:
        """Each pipeline's figures; the original's only where a metric judges a picture by itself."""
        return [
            Row(pipeline=label, metric=metric, found=self._interval(values))
            for metric, by_pipeline in self.figures.items()
            for label, values in by_pipeline.items()
        ]

    def differences(self) -> list[Row]:
        """The first pipeline less each other one; for a metric without pairs, each pipeline less the original too."""
        first, *others = self.quantized
        rows = []
        for metric, figures in self.figures.items():
            pairs = [(first, other) for other in others]
            if ORIGINAL in figures:
                pairs += [(label, ORIGINAL) for label in self.quantized]
            for left, right in pairs:
                values = [a - b for a, b in zip(figures[left], figures[right], strict=True)]
                rows.append(Row(pipeline=left, subtracted=right, metric=metric, found=self._interval(values)))
        return rows

    def _interval(self, values: Sequence[float]) -> Interval:
        return interval(values, self.drawing.prompts, seed=self.drawing.seed)

    def unmet(self, gates: Iterable[Gate]) -> list[str]:
        """A clause for each gate that a quantized pipeline does not meet."""
        clauses = []
        for gate in gates:
            for row in self.means():
                if row.metric == gate.metric and row.pipeline != ORIGINAL and not gate.is_met(row.found):
                    value = gate.value(row.found)
                    found = "has no interval with one prompt" if value is None else f"is {value:.4g}"
                    name = gate.metric if gate.end == "mean" else f"{gate.metric}.{gate.end}"
                    clauses.append(f"{self.folders[row.pipeline]}: {name} {found}, and '{gate}' is required")
        return clauses

    def to_plain(self) -> dict[str, Any]:
        """For JSON: settings, means and differences. The single figures are in the files of `--output`."""
        return {
            "folders": dict(self.folders),
            "pictures": len(self.drawing.prompts),
            "prompts": len(set(self.drawing.prompts)),
            "seed": self.drawing.seed,
            "call": dict(self.drawing.call),
            "batch": self.drawing.batch,
            "means": [row.to_plain() for row in self.means()],
            "differences": [row.to_plain() for row in self.differences()],
            "left_out": dict(self.refused),
        }

    def pairs(self) -> list[dict[str, Any]]:
        """A row a picture and pipeline: place, prompt, seed, pipeline, and every metric's figure."""
        labels = [label for label in self.folders if any(label in each for each in self.figures.values())]
        return [
            {"place": place, "prompt": prompt, "seed": self.drawing.seed + place, "pipeline": label}
            | {metric: figures[label][place] for metric, figures in self.figures.items() if label in figures}
            for label in labels
            for place, prompt in enumerate(self.drawing.prompts)
        ]

    def print(self, console: Console) -> None:
        """The tables, and what must be known to read them."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        prompts = len(set(self.drawing.prompts))
        call = ", ".join(f"{name}={value}" for name, value in self.drawing.call.items()) or "the pipeline's own call"
        console.print(
            f"{len(self.drawing.prompts)} pictures of {prompts} prompts, seeds from {self.drawing.seed}, {call}",
            highlight=False,
            markup=False,
        )
        for heading, rows in (("pipeline", self.means()), ("paired difference", self.differences())):
            if not rows:
                continue
            table = Table(box=box.SIMPLE_HEAD)
            for column in (heading, "metric", "mean", "95 % interval"):
                table.add_column(column, justify="right" if column in ("mean", "95 % interval") else "left")
            for row in rows:
                metric, found = self.metrics[row.metric], row.found
                name = row.pipeline if row.subtracted is None else f"{row.pipeline} - {row.subtracted}"
                unit = f"{metric.unit}, " if metric.unit else ""
                span = "-" if found.low is None else f"{found.low:.4g} to {found.high:.4g}"
                table.add_row(
                    escape(name), escape(f"{row.metric} ({unit}{metric.better} is better)"), f"{found.mean:.4g}", span
                )
            console.print(table)
        for name, reason in self.refused.items():
            console.print(f"{name} is left out: {reason}", highlight=False, markup=False)
        if prompts < FEW_PROMPTS:
            console.print(
                f"Only {prompts} different prompts: the intervals are too narrow; give {FEW_PROMPTS} or more.",
                highlight=False,
                markup=False,
            )


def evaluate(
    quantized: Sequence[Path],
    original: Path,
    drawing: Drawing,
    metrics: Mapping[str, AbstractMetric],
    *,
    refused: Mapping[str, str] | None = None,
    device: str = "auto",
    output: Path | None = None,
) -> Evaluation:
    """Draw `drawing` with each pipeline and measure the pictures. `output` keeps pictures and figures, and continues.

    The models are loaded one after the other, so that memory holds one. Raises InputError where they are not
    comparable, ModelError for a folder that holds no pipeline.
    """
    folders = {ORIGINAL: original, **_labelled(quantized)}
    for folder in folders.values():
        fingerprint(folder)  # no drawing begins for a folder that is no pipeline
        if output is not None and output.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--output {output}: it lies in {folder}, which is evaluated; choose another place.")
    with tempfile.TemporaryDirectory(prefix="loraq-") as temporary:
        root = output or Path(temporary)
        found = resolved_device(device)
        paths = {
            label: draw_into(root / label, folder, drawing, found, title=f"drawing with {label}")
            for label, folder in folders.items()
        }
        figures = _measured(paths, drawing.prompts, metrics)
    evaluation = Evaluation(
        folders={label: str(folder) for label, folder in folders.items()},
        drawing=drawing,
        metrics=metrics,
        figures=figures,
        refused=refused or {},
    )
    if output is not None:
        _write(output, evaluation)
    return evaluation


def _labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by a short name each: their own, numbered where two have the same."""
    labelled: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name or "root"
        label, number = name, 1
        while label in labelled or label == ORIGINAL:
            number += 1
            label = f"{name}-{number}"
        labelled[label] = folder
    return labelled


def _measured(
    paths: Mapping[str, Sequence[Path]], prompts: Sequence[str], metrics: Mapping[str, AbstractMetric]
) -> dict[str, dict[str, list[float]]]:
    """`figures[metric][pipeline]`, a number a picture."""
    labels = {
        name: [each for each in paths if each != ORIGINAL or not metric.paired] for name, metric in metrics.items()
    }
    figures = {name: {label: list[float]() for label in labels[name]} for name in metrics}
    with Progress("measuring", len(prompts)) as progress:
        for place, prompt in enumerate(prompts):
            pictures = {label: opened(each[place]) for label, each in paths.items()}
            sizes = {label: picture.size for label, picture in pictures.items()}
            if len(set(sizes.values())) > 1:
                told = ", ".join(f"{label} draws {width} x {height}" for label, (width, height) in sizes.items())
                raise InputError(
                    f"pictures of different sizes cannot be compared ({told}); give --call height and width."
                )
            for name, metric in metrics.items():
                for label in labels[name]:
                    value = metric.measure(pictures[label], pictures[ORIGINAL], prompt)
                    if not math.isfinite(value):
                        raise LoraqError(
                            f"metric '{name}' gave {value} for {paths[label][place]}; leave the metric out."
                        )
                    figures[name][label].append(value)
            progress.advance(1, prompt)
    return figures


def _write(output: Path, evaluation: Evaluation) -> None:
    """The figures beside the pictures: every pair as CSV and as JSON lines, and the report."""
    pairs = evaluation.pairs()
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(pairs)
    write_text(output / "pairs.csv", text.getvalue())
    write_text(output / "pairs.jsonl", "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    write_text(output / "report.json", json.dumps(evaluation.to_plain(), indent=2) + "\n")
