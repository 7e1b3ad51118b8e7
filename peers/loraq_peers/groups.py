"""Which group sizes peers take, and how a missing library is told."""

from __future__ import annotations

import importlib
from typing import Any

from loraq.errors import InputError


def dividing(columns: int, group: int) -> int:
    """The largest divisor of `columns` up to `group`: peers take only groups that fill a row."""
    return next(size for size in range(min(group, max(1, columns)), 0, -1) if columns % size == 0)


def imported(module: str, distribution: str) -> Any:
    """The peer's module. Raises InputError where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{distribution} cannot be imported ({error}); `pip install '{distribution}'` brings it."
        ) from error
