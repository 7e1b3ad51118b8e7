"""The multiple-choice knapsack: one option for each unit, least total error within a number of bytes.

    minimise  Σ error(unit, pick)   subject to  Σ bytes(unit, pick) <= budget,   one pick a unit

- Options that another one beats in both bytes and error are dropped; the lower convex hull of the others, unit by unit,
  gives steps of falling gain per byte. Taking the steps of all units in that order until one does not fit solves the
  linear relaxation, whose value no selection can undercut (Sinha & Zoltners 1979; Dyer 1984; Kellerer, Pferschy &
  Pisinger, Knapsack Problems, chapter 11).
- Going on with the steps that still fit, then exchanging single options while that helps, gives a good selection.
- Dynamic programming over the units' undominated (bytes, error) pairs finds the best one: a pair is followed only while
  the relaxation of the units to come says that it may still beat the selection at hand.

Where more than `_STATES` pairs survive, only the most promising ones are followed; the answer is then within
`error - bound` of the optimum.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STATES = 20_000
"""Pairs that are followed at once."""
_SLACK = 1e-12
"""Gains below this share are taken for rounding noise."""


@attrs.frozen
class Selection:
    """An option's index for each unit, what they take and leave in total, and what no selection can undercut."""

    picks: tuple[int, ...]
    bytes: int
    error: float
    bound: float


@attrs.frozen
class _Step:
    """From one option on a unit's hull to the next: what it costs and gains."""

    unit: int
    option: int
    bytes: int
    gain: float


def least_bytes(units: Sequence[Sequence[tuple[int, float]]]) -> int:
    """What the cheapest options take together."""
    return sum(min(bytes for bytes, _ in options) for options in units)


def select(units: Sequence[Sequence[tuple[int, float]]], budget: int) -> Selection:
    """The selection of least total error within `budget` bytes; `units[i][j]` is (bytes, error >= 0) of an option.

    Of options that are equal in both, the first one is taken. Raises ValueError where nothing fits.
    """
    if least_bytes(units) > budget:
        raise ValueError(f"the cheapest options take {least_bytes(units)} bytes, more than {budget}")
    frontiers = [_frontier(options) for options in units]
    steps = [step for unit, options in enumerate(units) for step in _hull_steps(unit, options, frontiers[unit])]
    steps.sort(key=lambda step: (-step.gain / step.bytes, step.unit, step.option))
    picks, bound = _greedy(units, frontiers, steps, budget)
    picks = _exchanged(units, frontiers, picks, budget)
    better, exact = _searched(units, frontiers, steps, budget, _error(units, picks))
    picks = better or picks
    error = _error(units, picks)
    taken = sum(units[unit][pick][0] for unit, pick in enumerate(picks))
    return Selection(tuple(picks), taken, error, error if exact else min(bound, error))


def _error(units: Sequence[Sequence[tuple[int, float]]], picks: Sequence[int]) -> float:
    return sum(units[unit][pick][1] for unit, pick in enumerate(picks))


def _frontier(options: Sequence[tuple[int, float]]) -> list[int]:
    """The options that no other beats, by rising bytes and so by falling error."""
    found: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (*options[index], index)):
        if not found or options[index][1] < options[found[-1]][1]:
            found.append(index)
    return found


def _hull_steps(unit: int, options: Sequence[tuple[int, float]], frontier: Sequence[int]) -> list[_Step]:
    """The steps along the lower convex hull of a unit's frontier: their gains per byte fall."""
    hull: list[int] = []
    for index in frontier:
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) <= _slope(options, hull[-1], index):
            hull.pop()
        hull.append(index)
    return [
        _Step(unit, after, options[after][0] - options[before][0], options[before][1] - options[after][1])
        for before, after in itertools.pairwise(hull)
    ]


def _slope(options: Sequence[tuple[int, float]], before: int, after: int) -> float:
    """Gain per byte between two options."""
    return (options[before][1] - options[after][1]) / (options[after][0] - options[before][0])


def _greedy(
    units: Sequence[Sequence[tuple[int, float]]],
    frontiers: Sequence[Sequence[int]],
    steps: Sequence[_Step],
    budget: int,
) -> tuple[list[int], float]:
    """The steps that fit, best gain per byte first, as picks; and the linear relaxation's value."""
    picks = [frontier[0] for frontier in frontiers]
    room = budget - sum(units[unit][pick][0] for unit, pick in enumerate(picks))
    relaxed = _error(units, picks)
    whole = True  # until the first step that does not fit, the relaxation takes the same ones
    stopped: set[int] = set()
    for step in steps:
        if step.unit in stopped:
            continue
        if step.bytes > room:
            if whole:
                relaxed -= step.gain * room / step.bytes
                whole = False
            stopped.add(step.unit)
            continue
        picks[step.unit] = step.option
        room -= step.bytes
        if whole:
            relaxed -= step.gain
    return picks, relaxed


def _exchanged(
    units: Sequence[Sequence[tuple[int, float]]], frontiers: Sequence[Sequence[int]], picks: Sequence[int], budget: int
) -> list[int]:
    """The picks, with the single exchange that gains most made again and again while one fits."""
    found = list(picks)
    room = budget - sum(units[unit][pick][0] for unit, pick in enumerate(found))
    while True:
        gains = [
            (units[unit][found[unit]][1] - units[unit][option][1], unit, option)
            for unit, frontier in enumerate(frontiers)
            for option in frontier
            if units[unit][option][0] - units[unit][found[unit]][0] <= room
        ]
        gain, unit, option = max(gains, key=lambda each: (each[0], -each[1], -each[2]))
        if gain <= 0:
            return found
        room -= units[unit][option][0] - units[unit][found[unit]][0]
        found[unit] = option


def _searched(
    units: Sequence[Sequence[tuple[int, float]]],
    frontiers: Sequence[Sequence[int]],
    steps: Sequence[_Step],
    budget: int,
    incumbent: float,
) -> tuple[list[int] | None, bool]:
    """A selection of less error than `incumbent`, None where none was found; and whether nothing was left out."""
    import numpy

    step_units = numpy.array([step.unit for step in steps], dtype=numpy.int64)
    step_bytes = numpy.array([step.bytes for step in steps], dtype=numpy.float64)
    step_gains = numpy.array([step.gain for step in steps], dtype=numpy.float64)
    rest_bytes = least_bytes(units)
    rest_error = sum(units[unit][frontier[0]][1] for unit, frontier in enumerate(frontiers))
    bytes, errors = numpy.zeros(1, dtype=numpy.int64), numpy.zeros(1)
    trail: list[tuple[NDArray[Any], NDArray[Any]]] = []
    exact = True
    for unit, frontier in enumerate(frontiers):
        options = numpy.array(frontier)
        costs = numpy.array([units[unit][option][0] for option in frontier], dtype=numpy.int64)
        lefts = numpy.array([units[unit][option][1] for option in frontier])
        rest_bytes -= int(costs[0])
        rest_error -= float(lefts[0])
        parents = numpy.tile(numpy.arange(len(bytes)), len(frontier))
        chosen = numpy.repeat(options, len(bytes))
        errors = (errors + lefts[:, None]).reshape(-1)
        bytes = (bytes + costs[:, None]).reshape(-1)
        # What the relaxation of the units to come would leave: a concave gain in the room that there is.
        later = step_units > unit
        room = budget - rest_bytes - bytes
        cumulated = numpy.concatenate([[0.0], numpy.cumsum(step_bytes[later])])
        gained = numpy.concatenate([[0.0], numpy.cumsum(step_gains[later])])
        hopes = errors + rest_error - numpy.interp(room, cumulated, gained)
        kept = numpy.flatnonzero((room >= 0) & (hopes < incumbent * (1 - _SLACK)))
        kept = kept[numpy.lexsort((errors[kept], bytes[kept]))]
        best = numpy.minimum.accumulate(errors[kept])
        undominated = numpy.ones(len(kept), dtype=bool)
        undominated[1:] = errors[kept][1:] < best[:-1]
        kept = kept[undominated]
        if len(kept) > _STATES:
            exact = False
            kept = numpy.sort(kept[numpy.argsort(hopes[kept], kind="stable")[:_STATES]])
        if len(kept) == 0:
            return None, exact
        bytes, errors = bytes[kept], errors[kept]
        trail.append((parents[kept].astype(numpy.int32), chosen[kept].astype(numpy.int16)))
    at = int(numpy.argmin(errors))
    picks: list[int] = []
    for parents, chosen in reversed(trail):
        picks.append(int(chosen[at]))
        at = int(parents[at])
    return picks[::-1], exact
