"""Gates: what must hold of a figure, such as `psnr >= 24`, so that a script learns from an exit code.

`psnr >= 24` looks at the mean, `psnr.low >= 24` at the lower end of its interval. In suites `psnr.difference_low >= 0`
looks at the paired difference to the baseline, and `error_after <= 0.03` at what a cell has beside metrics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import attrs

from loraq.bootstrap import Interval
from loraq.errors import InputError

ENDS = ("mean", "low", "high")
"""What a gate may look at of a metric's interval."""
CELL_ENDS = (*ENDS, "difference", "difference_low", "difference_high")
"""The same in a suite, where cells have differences to a baseline."""
_GATE = re.compile(r"\s*([^\s.<>=]+)(?:\.(\w+))?\s*(>=|<=)\s*(\S+)\s*")


@attrs.frozen(kw_only=True)
class Gate:
    """What must hold of a metric: `psnr >= 24` of the mean, `psnr.low >= 24` of the interval's lower end."""

    metric: str
    end: str = "mean"
    at_least: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.at_least else '<='} {self.bound:g}"

    @property
    def name(self) -> str:
        """What is compared, as the gate writes it."""
        return self.metric if self.end == "mean" else f"{self.metric}.{self.end}"

    @property
    def of_difference(self) -> bool:
        """Whether it looks at the difference to a baseline."""
        return self.end.startswith("difference")

    def value(self, found: Interval) -> float | None:
        """What is compared with the bound; `found` is the difference's interval for a gate on that."""
        end = self.end.removeprefix("difference").removeprefix("_") or "mean"
        values = {"mean": found.mean, "low": found.low, "high": found.high}
        return values[end]

    def holds(self, value: float | None) -> bool:
        """Whether `value` is on the right side; not where there is none."""
        if value is None:
            return False
        return value >= self.bound if self.at_least else value <= self.bound

    def is_met(self, found: Interval) -> bool:
        """Whether it holds; not where there is no interval to look at."""
        return self.holds(self.value(found))


def parse_gate(text: str, where: str = "--require", ends: Sequence[str] = ENDS) -> Gate:
    """The gate that `text` writes. Raises InputError for anything else; `where` it was given."""
    found = _GATE.fullmatch(text)
    try:
        bound = float(found[4]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or math.isnan(bound) or (found[2] or "mean") not in ends:
        raise InputError(f"{where} '{text}': expected METRIC >= NUMBER or METRIC <= NUMBER, such as 'psnr >= 24'.")
    return Gate(metric=found[1], end=found[2] or "mean", at_least=found[3] == ">=", bound=bound)
