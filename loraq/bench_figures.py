"""What a suite measured, kept on disk under keys: a figure is taken anew only where what it depends on changed.

One JSON file a cell, `{name: {"key": ..., "value": ...}}`. The key of a metric's figures holds what the pictures say of
themselves (model, prompt, seed, call, batch, versions), the metric's options and the version that offers it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq import registry
from loraq.checkpoint import write_text
from loraq.contracts import AbstractMetric, AnyMetric
from loraq.errors import InputError, LoraqError
from loraq.picture_set import PictureSet
from loraq.pictures import opened
from loraq.progress import Progress
from loraq.structure import plain


class Kept:
    """One cell's file: `get` what is there under its key, `put` what was measured. A damaged file holds nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self._found: dict[str, Any] = found if isinstance(found, dict) else {}

    def get(self, name: str, key: str) -> Any:
        """The value called `name`, None where there is none of this key."""
        entry = self._found.get(name)
        return entry.get("value") if isinstance(entry, dict) and entry.get("key") == key else None

    def put(self, name: str, key: str, value: object) -> None:
        """Keep a value, whole or not at all."""
        self._found[name] = {"key": key, "value": value}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(self._found) + "\n")


def key_of(*what: object) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def figures_of(
    metrics: Mapping[str, AnyMetric], pictures: PictureSet, told: Sequence[str], beside: Sequence[str], kept: Kept
) -> dict[str, list[float]]:
    """Each metric's figures of `pictures`, one a picture or one alone for a metric of whole sets; kept ones are taken.

    `told` and `beside` are what these pictures and the originals say of themselves. Raises InputError for pictures of
    different sizes, LoraqError for a figure that is no number.
    """
    figures = {}
    for name, metric in metrics.items():
        offer = registry.offer(f"{registry.PREFIX}metric", name)
        references = [str(path) for path in pictures.references]
        key = key_of(told, beside, plain(metric), offer.distribution, offer.version, references)
        found = kept.get(name, key)
        if found is None:
            found = _figures(name, metric, pictures)
            kept.put(name, key, found)
        figures[name] = [float(value) for value in found]
    return figures


def _figures(name: str, metric: AnyMetric, pictures: PictureSet) -> list[float]:
    if not isinstance(metric, AbstractMetric):
        return [_finite(name, metric.measure(pictures), pictures.drawn[0].parent)]
    values = []
    with Progress(f"measuring {name}", len(pictures.drawn)) as progress:
        for path, original, prompt in zip(pictures.drawn, pictures.originals, pictures.prompts, strict=True):
            ours, theirs = opened(path), opened(original)
            if ours.size != theirs.size:
                raise InputError(
                    f"{path} is {ours.width} x {ours.height} and {original} {theirs.width} x {theirs.height}, which "
                    "cannot be compared; give height and width in pictures.call."
                )
            values.append(_finite(name, metric.measure(ours, theirs, prompt), path))
            progress.advance(1, prompt)
    return values


def _finite(name: str, value: float, path: Path) -> float:
    if not math.isfinite(value):
        raise LoraqError(f"metric '{name}' gave {value} for {path}; leave the metric out.")
    return value
