"""Stage `low_rank`: fit the branch that makes up for the main quantizer's error.

The size of the branch is the stage's own option, the same for every strategy: a `rank`, or a `budget` in stored bytes,
from which the rank of each layer follows (loraq/budget.py).
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from loraq.budget import budget_bytes
from loraq.contracts import AbstractLowRank, AbstractStage
from loraq.errors import InputError
from loraq.pipeline import LayerRecipe


@attrs.frozen(kw_only=True)
class LowRankStage(AbstractStage):
    """Sets the low-rank fit and the size of its branch: exactly one of `rank` and `budget`."""

    kind: ClassVar[str] = "low_rank"
    repeatable: ClassVar[bool] = False
    alternatives: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"rank", "budget"}),)

    strategy: AbstractLowRank
    name: str = "low_rank"
    rank: int | None = None
    """Rank of the branch; layers with a smaller side take that side."""
    budget: int | str | None = None
    """Bound on the branch's stored bytes: a number, or "rank32@16" for as many as a rank-32 branch of 16 bits takes."""

    share_down: bool = False
    """Fit layers that read the same input (q, k, v) as one, with one stored `down`: more rank at the same bytes."""

    def __attrs_post_init__(self) -> None:
        if not self.strategy.has_branch:
            if self.share_down:
                raise InputError(f"'{self.name}' makes no branch, so there is no 'share_down'; leave it out")
            if self.rank is not None or self.budget is not None:
                raise InputError(
                    f"'{self.name}' makes no branch, so it takes neither 'rank' nor 'budget'; leave it out"
                )
            return
        if (self.rank is None) == (self.budget is None):
            found = "neither" if self.rank is None else "both"
            raise InputError(f"'{self.name}' needs either 'rank' or 'budget', got {found}")
        if self.rank is not None and self.rank < 1:
            raise InputError(
                f"'{self.name}.rank' must be at least 1, got {self.rank}; for no branch use strategy 'none'"
            )
        if self.budget is not None:
            budget_bytes(self.budget, out=1, inn=1)  # refuses a malformed budget here rather than at the first layer

    def bind(self, recipe: LayerRecipe) -> LayerRecipe:
        return attrs.evolve(
            recipe, low_rank=self.strategy, rank=self.rank, budget=self.budget, share_down=self.share_down
        )
