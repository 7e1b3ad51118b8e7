"""Judge quantized pipelines by their pictures: drawn beside the original's from the same noise, measured pair by pair.

For each prompt the original and every quantized pipeline draw one picture from one seed. Metrics (entry points of the
group `loraq.metric`) give a figure a picture; reported is the mean over pictures with a 95 % bootstrap interval over
prompts, and, between two quantized pipelines, the mean of the *paired* difference with its own, narrower, interval. A
metric of the whole set (FID) has one figure a pipeline, and none of these. A gate ("psnr >= 24") turns a figure into an
exit code.

A mean over a few pictures says little, so means never come without their interval and the number of different prompts.
"""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from loraq import registry
from loraq.bootstrap import Interval, interval, share_interval
from loraq.checkpoint import write_text
from loraq.contracts import AbstractMetric, AbstractParticular, AbstractSetMetric, AbstractShare, AnyMetric
from loraq.errors import InputError, LoraqError, RecipeError
from loraq.gates import Gate
from loraq.picture_set import PictureSet
from loraq.pictures import Drawing, draw_into, fingerprint, opened, picture_paths
from loraq.progress import Progress
from loraq.settings import toml_value
from loraq.structure import keys_of, structure
from loraq.workers import resolved_device

if TYPE_CHECKING:
    from rich.console import Console

ORIGINAL = "original"
FEW_PROMPTS = 20


def metric_tables(settings: Sequence[str], where: str) -> dict[str, dict[str, Any]]:
    """Tables of options by metric from `METRIC.OPTION=VALUE`. Raises InputError for anything else."""
    tables: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        name, dot, key = path.strip().partition(".")
        if not (equals and dot and name and key):
            raise InputError(f"{where} {setting}: expected METRIC.OPTION=VALUE, such as lpips.net=vgg.")
        tables.setdefault(name, {})[key] = toml_value(text.strip())
    return tables


def load_metrics(
    names: Sequence[str],
    required: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    where: str = "metric",
    download: bool = False,
) -> tuple[dict[str, AnyMetric], dict[str, str]]:
    """The metrics of these names that can measure here, and for each of the others the sentence why not.

    No names means all that are installed. `options` has a table for each metric that is not as by default; `where` it
    was given, for errors. `download` lets all of them fetch weights that they lack. Raises InputError where one of
    `required` is among the others, or no metric is left; RegistryError for a name that nobody offers; RecipeError for
    options that a metric does not take.
    """
    group = f"{registry.PREFIX}metric"
    metrics: dict[str, AnyMetric] = {}
    refused: dict[str, str] = {}
    wanted = list(dict.fromkeys([*(names or registry.names(group)), *required]))
    odd = [name for name in options or () if name not in wanted]
    faults = [f"{where} {name}: it is not among the metrics, {', '.join(wanted)}" for name in odd]
    for name in wanted:
        offered = registry.load(group, name)
        table = dict((options or {}).get(name, {}))
        if download and isinstance(offered, type) and "download" in keys_of(offered):
            table = {"download": True} | table
        metric = structure(table, offered, f"{where} {name}", faults) if isinstance(offered, type) else offered
        if metric is None:
            continue
        if not isinstance(metric, AbstractMetric | AbstractSetMetric):
            raise registry.broken(group, name, "is not a metric")
        reason = metric.refusal()
        if reason is None:
            metrics[name] = metric
        else:
            refused[name] = reason
    if faults:
        raise RecipeError(faults)
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
    """What was measured: `figures[metric][pipeline]` has a number a picture; `folders` says where a pipeline lies.

    `set_figures[metric][pipeline]` is the number of a whole set, of metrics that have none a picture.
    """

    folders: Mapping[str, str]
    drawing: Drawing
    metrics: Mapping[str, AnyMetric]
    figures: Mapping[str, Mapping[str, Sequence[float]]]
    refused: Mapping[str, str] = attrs.field(factory=dict)
    set_figures: Mapping[str, Mapping[str, float]] = attrs.field(factory=dict)

    @property
    def quantized(self) -> list[str]:
        """The pipelines that are judged, as they were given."""
        return [label for label in self.folders if label != ORIGINAL]

    def means(self) -> list[Row]:
        """Each pipeline's figures; the original's only where a metric judges a picture by itself."""
        each = [
            Row(pipeline=label, metric=metric, found=self._interval(metric, values))
            for metric, by_pipeline in self.figures.items()
            for label, values in by_pipeline.items()
        ]
        whole = [
            Row(pipeline=label, metric=metric, found=self._plain(value))
            for metric, by_label in self.set_figures.items()
            for label, value in by_label.items()
        ]
        return each + whole

    def differences(self) -> list[Row]:
        """The first pipeline less each other one; for a metric without pairs, each pipeline less the original too."""
        rows = []
        for metric, figures in self.figures.items():
            for left, right in self._compared(figures):
                values = [a - b for a, b in zip(figures[left], figures[right], strict=True)]
                found = interval(values, self.drawing.prompts, seed=self.drawing.seed)
                rows.append(Row(pipeline=left, subtracted=right, metric=metric, found=found))
        for metric, whole in self.set_figures.items():
            for left, right in self._compared(whole):
                found = self._plain(whole[left] - whole[right])
                rows.append(Row(pipeline=left, subtracted=right, metric=metric, found=found))
        return rows

    def _compared(self, figures: Mapping[str, object]) -> list[tuple[str, str]]:
        """Which pipeline's figures are subtracted from which."""
        first, *others = self.quantized
        pairs = [(first, other) for other in others]
        return pairs + [(label, ORIGINAL) for label in self.quantized] if ORIGINAL in figures else pairs

    def _interval(self, metric: str, values: Sequence[float]) -> Interval:
        if isinstance(self.metrics[metric], AbstractShare):
            return share_interval(values, self.drawing.prompts)
        return interval(values, self.drawing.prompts, seed=self.drawing.seed)

    def _plain(self, value: float) -> Interval:
        """A figure of a whole set, which has no interval."""
        return Interval(value, None, None, len(self.drawing.prompts), len(set(self.drawing.prompts)))

    def unmet(self, gates: Iterable[Gate]) -> list[str]:
        """A clause for each gate that a quantized pipeline does not meet."""
        clauses = []
        for gate in gates:
            if gate.metric not in self.figures and gate.metric not in self.set_figures:
                reason = self.refused.get(gate.metric, "nobody asked for it").rstrip(".")
                clauses.append(f"{gate.metric} was not measured ({reason}), and '{gate}' is required")
            for row in self.means():
                if row.metric == gate.metric and row.pipeline != ORIGINAL and not gate.is_met(row.found):
                    value = gate.value(row.found)
                    none = "has no interval" if gate.metric in self.set_figures else "has no interval with one prompt"
                    found = none if value is None else f"is {value:.4g}"
                    clauses.append(f"{self.folders[row.pipeline]}: {gate.name} {found}, and '{gate}' is required")
        return clauses

    def to_plain(self) -> dict[str, Any]:
        """For JSON: settings, means and differences. The single figures are in the files of `--output`."""
        return {
            "folders": dict(self.folders),
            "pictures": len(self.drawing.prompts),
            "prompts": len(set(self.drawing.prompts)),
            "seed": self.drawing.seed,
            **({"seeds": list(self.drawing.seeds)} if self.drawing.seeds else {}),
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
            {"place": place, "prompt": prompt, "seed": self.drawing.seed_of(place), "pipeline": label}
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
            f"{len(self.drawing.prompts)} pictures of {prompts} prompts, "
            f"{'seeds by name' if self.drawing.seeds else f'seeds from {self.drawing.seed}'}, {call}",
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
        for name in self.set_figures:
            metric, number = self.metrics[name], len(self.drawing.prompts)
            if isinstance(metric, AbstractSetMetric) and number < metric.enough:
                console.print(
                    f"{name} of {number} pictures is not that of {metric.enough}: compare it with sets as large only.",
                    highlight=False,
                    markup=False,
                )
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
    metrics: Mapping[str, AnyMetric],
    *,
    refused: Mapping[str, str] | None = None,
    references: Sequence[Path] = (),
    device: str = "auto",
    output: Path | None = None,
) -> Evaluation:
    """Draw `drawing` with each pipeline and measure the pictures. `output` keeps pictures and figures, and continues.

    `references` are real pictures of the prompts' data set, for metrics that compare with such. The models are loaded
    one after the other, so that memory holds one. Raises InputError where they are not comparable or no metric can
    judge what is drawn, ModelError for a folder that holds no pipeline.
    """
    folders = {ORIGINAL: original, **_labelled(quantized)}
    for folder in folders.values():
        fingerprint(folder)  # no drawing begins for a folder that is no pipeline
        if output is not None and output.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--output {output}: it lies in {folder}, which is evaluated; choose another place.")
    with tempfile.TemporaryDirectory(prefix="loraq-") as temporary:
        root = output or Path(temporary)
        sets = {label: _picture_set(root, label, drawing, references) for label in folders}
        fitting, objections = judging(metrics, sets[ORIGINAL])
        found = resolved_device(device)
        paths = {
            label: draw_into(root / label, folder, drawing, found, title=f"drawing with {label}")
            for label, folder in folders.items()
        }
        figures = _measured(paths, drawing.prompts, fitting)
        set_figures = _measured_sets(sets, fitting)
    evaluation = Evaluation(
        folders={label: str(folder) for label, folder in folders.items()},
        drawing=drawing,
        metrics=fitting,
        figures=figures,
        refused={**(refused or {}), **objections},
        set_figures=set_figures,
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


def judging(metrics: Mapping[str, AnyMetric], pictures: PictureSet) -> tuple[dict[str, AnyMetric], dict[str, str]]:
    """The metrics that can judge such pictures, and for each of the others why not. Raises InputError for none."""
    objections = {}
    for name, metric in metrics.items():
        reason = metric.objection(pictures) if isinstance(metric, AbstractParticular) else None
        if reason is not None:
            objections[name] = reason
    if len(objections) == len(metrics):
        raise InputError(f"no metric is left: {' '.join(f'{name}: {reason}' for name, reason in objections.items())}")
    return {name: metric for name, metric in metrics.items() if name not in objections}, objections


def _picture_set(root: Path, label: str, drawing: Drawing, references: Sequence[Path]) -> PictureSet:
    """What is drawn into `root` under that label: the paths are known before anything is drawn."""
    return PictureSet(
        drawn=picture_paths(root / label, drawing),
        originals=picture_paths(root / ORIGINAL, drawing),
        prompts=drawing.prompts,
        references=tuple(references),
    )


def _measured_sets(sets: Mapping[str, PictureSet], metrics: Mapping[str, AnyMetric]) -> dict[str, dict[str, float]]:
    """`figures[metric][pipeline]`, a number a set."""
    whole = {name: metric for name, metric in metrics.items() if isinstance(metric, AbstractSetMetric)}
    figures: dict[str, dict[str, float]] = {name: {} for name in whole}
    with Progress("measuring sets", len(whole) * len(sets)) as progress:
        for name, metric in whole.items():
            for label, pictures in sets.items():
                if label != ORIGINAL or not metric.paired:
                    value = metric.measure(pictures)
                    if not math.isfinite(value):
                        raise LoraqError(f"metric '{name}' gave {value} for {label}'s pictures; leave the metric out.")
                    figures[name][label] = value
                progress.advance(1, name)
    return figures


def _measured(
    paths: Mapping[str, Sequence[Path]], prompts: Sequence[str], every: Mapping[str, AnyMetric]
) -> dict[str, dict[str, list[float]]]:
    """`figures[metric][pipeline]`, a number a picture."""
    metrics = {name: metric for name, metric in every.items() if isinstance(metric, AbstractMetric)}
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
