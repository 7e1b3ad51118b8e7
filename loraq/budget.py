"""Ranks from budgets: how large a branch may be at equal stored bytes.

`budget = "rank32@16"` bounds the branch's stored bytes by those of a rank-32 branch in 16 bits, `2 * 32 * (out + inn)`;
codes, scales and row padding count. The rank is the largest integer that fits. `budget = 65536` is a bound in bytes.
"""

from __future__ import annotations

import re

from loraq.contracts import AbstractPacking, AbstractQuantizer
from loraq.errors import InputError
from loraq.layout import Storage

_LIKENESS = re.compile(r"rank([1-9][0-9]{0,8})@([1-9][0-9]{0,8})")


def budget_bytes(budget: int | str, out: int, inn: int) -> int:
    """The bytes that `budget` allows the branch of an (out, inn) layer. Raises InputError for a malformed budget."""
    if isinstance(budget, str):
        match = _LIKENESS.fullmatch(budget)
        if match is None:
            raise InputError(f"'budget' is a number of bytes or like 'rank32@16' (rank and bits), got {budget!r}")
        rank, bits = int(match[1]), int(match[2])
        return rank * bits * (out + inn) // 8
    if isinstance(budget, bool) or budget < 0:
        raise InputError(f"'budget' is a number of bytes or like 'rank32@16' (rank and bits), got {budget!r}")
    return budget


def branch_storage(branch: AbstractQuantizer, rank: int, inn: int) -> tuple[Storage, Storage]:
    """How `branch` stores `down` (rank, inn) and `up` (out, rank): (down, up)."""
    down = Storage(branch.format, branch.group_for(inn))
    return down, Storage(branch.format, branch.group_for(max(1, rank)))


def branch_bytes(branch: AbstractQuantizer, packing: AbstractPacking, rank: int, out: int, inn: int) -> int:
    """Stored bytes of a branch of this rank."""
    down, up = branch_storage(branch, rank, inn)
    return down.stored_bytes(rank, inn, packing) + up.stored_bytes(out, rank, packing)


def rank_within(budget: int, branch: AbstractQuantizer, packing: AbstractPacking, out: int, inn: int) -> int:
    """The largest rank, up to min(out, inn), whose branch takes at most `budget` bytes; 0 where none fits."""
    low, high = 0, min(out, inn)
    while low < high:  # bytes grow with the rank
        middle = (low + high + 1) // 2
        if branch_bytes(branch, packing, middle, out, inn) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
