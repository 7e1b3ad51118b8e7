"""Figures as people read them: how many digits, which unit, what stands beneath; and the number, to sort by."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

from loraq.bootstrap import Interval

MINUS = "\u2212"
_MOST_DECIMALS = 5


@attrs.frozen(kw_only=True)
class Figure:
    """What a place in the table shows: `text`, `note` in small beneath it, and `value` by which rows are sorted.

    `mark` is "", or "better", "worse" or "unclear" of a difference, "met" or "missed" of gates. `best` says that no row
    of its setting and seed is better.
    """

    value: float | None = None
    text: str = ""
    note: str = ""
    mark: str = ""
    best: bool = False


def signed(text: str) -> str:
    """A formatted number with a true minus sign."""
    return text.replace("-", MINUS)


def fixed(value: float, decimals: int, *, sign: bool = False) -> str:
    """`value` with so many decimals; a plus sign where asked for; never minus zero."""
    rounded = round(value, decimals) + 0.0
    return signed(f"{rounded:{'+' if sign and rounded else ''}.{decimals}f}")


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, without an exponent where it is of ordinary size."""
    if value == 0 or not math.isfinite(value):
        return signed(f"{value:g}")
    power = math.floor(math.log10(abs(value)))
    if power < -5 or power > 6:
        return signed(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - power)
    return signed(f"{value:,.{decimals}f}")


def duration(seconds: float) -> str:
    """Seconds for people: `41 ms`, `8.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.{0 if seconds >= 0.1 else 1}f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def decimals_for(found: Iterable[Interval]) -> int:
    """Decimals in which half an interval is 3 to 30 of the last, by the median; without intervals, four digits."""
    intervals = list(found)
    halves = [
        (each.high - each.low) / 2
        for each in intervals
        if each.low is not None and each.high is not None and each.high > each.low
    ]
    sizes = halves or [abs(each.mean) / 1000 for each in intervals if each.mean]
    if not sizes:
        return 2
    middle = sorted(sizes)[len(sizes) // 2]
    return min(_MOST_DECIMALS, max(0, math.ceil(-math.log10(middle / 3))))


def span(found: Interval, decimals: int, *, sign: bool = False) -> str:
    """`43.6 to 44.7`, or nothing where there is no interval."""
    if found.low is None or found.high is None:
        return ""
    return f"{fixed(found.low, decimals, sign=sign)} to {fixed(found.high, decimals, sign=sign)}"


def verdict(found: Interval, better: str) -> str:
    """Whether a difference is "better" or "worse" than the baseline, "unclear" where its interval holds zero."""
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "unclear"
    return "better" if (found.mean > 0) == (better == "higher") else "worse"
