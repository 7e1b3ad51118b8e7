"""Means with intervals: the bootstrap over prompts (Efron 1979), seeded.

What was drawn is a sample of the prompts that could have been asked for. Drawing as many prompts from it with
replacement, ten thousand times, and taking the mean each time, gives a distribution whose middle 95 % is the interval
(the percentile method). Pictures of one prompt are drawn together, as they are not independent of each other. For
two models the interval is that of the *difference a picture*: what the prompts and the noise do to both cancels, so it
is narrower than the two intervals suggest.

With few prompts the interval is too narrow (the percentile method covers about 90 % at ten), with one there is none.

A share, of pictures that are right, has Wilson's interval (1927) instead: near 0 and 1 the bootstrap's is too narrow,
and at 0 and 1 it is a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
_CHUNK = 2_000_000
"""Prompts drawn at a time: some 30 MB."""

_Array = NDArray[Any]


@attrs.frozen
class Interval:
    """A mean over pictures and its 95 % interval; `low` and `high` are None for one prompt, or a figure of a set."""

    mean: float
    low: float | None
    high: float | None
    pictures: int
    prompts: int


def interval(values: Sequence[float], prompts: Sequence[str], *, seed: int = 0) -> Interval:
    """The mean of `values`, a figure a picture, and its interval; `prompts` says which prompt each picture shows.

    The same arguments give the same answer. Raises ValueError for no values, or not as many as prompts.
    """
    if not values or len(values) != len(prompts):
        raise ValueError(f"there must be a prompt for each of one or more values, got {len(values)} and {len(prompts)}")
    _, which = numpy.unique(numpy.array(prompts), return_inverse=True)
    sums = numpy.bincount(which, weights=numpy.asarray(values, dtype=float)).astype(float)
    counts = numpy.bincount(which)
    mean, number = float(sums.sum() / counts.sum()), len(sums)
    if number == 1:
        return Interval(mean, None, None, len(values), 1)
    generator = numpy.random.default_rng(seed)
    rows = max(1, _CHUNK // number)
    means = numpy.concatenate(
        [
            _resampled(sums, counts, generator.integers(number, size=(min(rows, RESAMPLES - start), number)))
            for start in range(0, RESAMPLES, rows)
        ]
    )
    low, high = numpy.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Equal values: the resampled sums may round to the other side of the mean.
    return Interval(mean, min(float(low), mean), max(float(high), mean), len(values), number)


def share_interval(values: Sequence[float], prompts: Sequence[str]) -> Interval:
    """The share of `values`, 1 or 0 a picture, and its interval by Wilson.

    Pictures of one prompt are not independent: the interval is that of as many draws as there are prompts. Raises
    ValueError for no values, or not as many as prompts.
    """
    if not values or len(values) != len(prompts):
        raise ValueError(f"there must be a prompt for each of one or more values, got {len(values)} and {len(prompts)}")
    number = len(set(prompts))
    share, low, high = wilson(sum(values) / len(values) * number, number)
    return Interval(share, low, high, len(values), number)


def wilson(right: float, total: int) -> tuple[float, float, float]:
    """The share `right` of `total` and its 95 % interval, which is sound near 0 and 1."""
    share, z = right / total, 1.959964
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _resampled(sums: _Array, counts: _Array, chosen: _Array) -> _Array:
    """The mean over pictures for each row of `chosen` (resamples, prompts)."""
    means: _Array = sums[chosen].sum(1) / counts[chosen].sum(1)
    return means
