"""Allocation: which of several choices each layer gets, under one budget for the whole model. Settings and the result.

    [allocate]
    budget = "4.5 bits"
    [[allocate.choice]]
    main_quantizer.weight = "int3"
    low_rank.budget = "rank16@16"
    [[allocate.choice]]
    low_rank.budget = "rank64@16"

A choice is what a [[layers]] table is, options by a stage's name; the result of an allocation is nothing but one such
table a choice, which come before the recipe's own. All that follows, the plan, the fingerprint and the fits, meets a
recipe without [allocate]. loraq/probing.py finds the errors, loraq/knapsack.py the best choices. Nothing here imports
torch: `check` reads this.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from loraq.budget import budget_bytes
from loraq.errors import CheckpointError, InputError, did_you_mean
from loraq.layout import Layout

if TYPE_CHECKING:
    from loraq.contracts import AbstractStage
    from loraq.match import MatchedLayer
    from loraq.recipe import Override, Recipe

_BITS = re.compile(r"(\d+(?:\.\d*)?)\s*bits?")
_BUDGET = "'budget' is a number of bytes, or like '4.5 bits' a weight, or like 'rank32@16' (rank and bits)"


@attrs.frozen(kw_only=True)
class Allocate:
    """Choices for every layer and what all may take together: a recipe's [allocate]."""

    choice: tuple[dict[str, Any], ...]
    """[[allocate.choice]] tables: options by a stage's name, as in [[layers]], whose own tables come after them."""
    budget: int | str | None = None
    """What the packed layers may take in all: bytes, or "4.5 bits" a quantized weight, or "rank32@16" for as many bytes
    as the recipe's own main codes with a rank-32 branch of 16 bits."""
    compare: Literal["absolute", "relative"] = "absolute"
    """How layers' squared errors add up: as they are, or each relative to its own layer."""
    probe: dict[str, Any] = attrs.field(factory=dict)
    """Options by a stage's name, laid over each choice while its error is found: fewer steps are enough for that."""
    replay: str | None = None
    """A loraq.json, or the folder that it lies in, whose choices are taken and nothing is probed; relative to the
    recipe."""

    def __attrs_post_init__(self) -> None:
        if len(self.choice) < 2:
            raise InputError(f"'choice' needs two or more [[allocate.choice]] tables, got {len(self.choice)}")
        if self.budget is None and self.replay is None:
            raise InputError("'budget' is missing; say how many bytes or bits, or take earlier choices with 'replay'")
        self._judge_budget()

    @property
    def like_a_branch(self) -> bool:
        """Whether the budget is "rank32@16" or its like."""
        return isinstance(self.budget, str) and _BITS.fullmatch(self.budget) is None

    def _judge_budget(self) -> None:
        try:
            if self.budget is not None and self.like_a_branch:
                budget_bytes(self.budget, out=1, inn=1)
        except InputError:
            raise InputError(f"{_BUDGET}, got {self.budget!r}") from None
        if isinstance(self.budget, int) and (isinstance(self.budget, bool) or self.budget < 1):
            raise InputError(f"{_BUDGET}, got {self.budget!r}")

    def beside(self, recipe: Path) -> Allocate:
        """With `replay` made relative to the recipe's file."""
        if self.replay is None:
            return self
        return attrs.evolve(self, replay=str(recipe.parent / Path(self.replay).expanduser()))

    def overrides(self, index: int, *, match: tuple[str, ...] = ("*",), probing: bool = False) -> tuple[Override, ...]:
        """A choice as an override of the layers that match; with `probing`, and the probe's options after it."""
        from loraq.recipe import Override

        tables = [self.choice[index], *([self.probe] if probing and self.probe else [])]
        return tuple(Override(match=match, options=table) for table in tables)

    def faults(self, stages: Sequence[AbstractStage | None]) -> list[str]:
        """What is wrong with the choices and the probe, laid over `stages` (None: one at fault), with their paths."""
        from loraq.recipe import faults_of_override

        names = [stage.name for stage in stages if stage is not None]
        tables = {f"allocate.choice[{index}]": table for index, table in enumerate(self.choice)}
        tables |= {"allocate.probe": self.probe}
        found: list[str] = []
        for path, table in tables.items():
            for key, value in table.items():
                if key not in names and None not in stages:
                    found.append(
                        f"{path}.{key}: no stage of that name; its tables have the stages' names, {', '.join(names)}"
                        f"{did_you_mean(key, names)}"
                    )
                elif not isinstance(value, Mapping):
                    found.append(f"{path}.{key}: expected a table of options, got {value!r}")
        if found:
            return found
        for index in range(len(self.choice)):
            found += faults_of_override(self.overrides(index), stages, f"allocate.choice[{index}]")
        if not found and self.probe:
            for index in range(len(self.choice)):
                path = f"allocate.probe, over choice[{index}]"
                found += faults_of_override(self.overrides(index, probing=True), stages, path)
        return found

    def budget_within(self, layers: Sequence[MatchedLayer], *, share: float = 1.0) -> int | None:
        """The budget for `layers` in bytes; None where there is none.

        For a budget like a branch, layers come as the recipe without choices has them: their main codes are counted.
        `share` is the part of all weights that they have, which a budget in bytes is scaled by.
        """
        if self.budget is None:
            return None
        if isinstance(self.budget, int):
            return int(self.budget * share)
        bits = _BITS.fullmatch(self.budget)
        if bits is not None:
            return int(float(bits[1]) * sum(layer.out * layer.inn for layer in layers) / 8)
        main = sum(_without_branch(layer.layout).stored_bytes for layer in layers)
        return main + sum(budget_bytes(self.budget, layer.out, layer.inn) for layer in layers)


def _without_branch(layout: Layout) -> Layout:
    return attrs.evolve(layout, rank=0, down=None, up=None)


@attrs.frozen(kw_only=True)
class AllocatedLayer:
    """What a layer got: the choice's index (from 0), its bytes, and the output's relative error in the probe."""

    component: str
    name: str
    out: int
    inn: int
    choice: int
    bytes: int
    error: float


@attrs.frozen(kw_only=True)
class Allocation:
    """The choice for every layer: what loraq.json keeps as `allocation`, and what `replay` takes up.

    `bytes` and `error` are totals, `bound` is what no other choice could leave within the budget; `fingerprint` is of
    all that the probes depended on.
    """

    table: Mapping[str, Any]
    budget: int | None
    bytes: int
    error: float
    bound: float
    layers: tuple[AllocatedLayer, ...]
    fingerprint: Mapping[str, Any]

    def overrides(self, allocate: Allocate) -> tuple[Override, ...]:
        """The choices as [[layers]] tables, one a choice that some layer got."""
        names: dict[int, list[str]] = {}
        for layer in self.layers:
            names.setdefault(layer.choice, []).append(glob.escape(layer.name))
        return tuple(
            override
            for index in sorted(names)
            for override in allocate.overrides(index, match=tuple(dict.fromkeys(names[index])))
        )

    def told(self) -> str:
        """In a sentence."""
        counts: dict[int, int] = {}
        for layer in self.layers:
            counts[layer.choice] = counts.get(layer.choice, 0) + 1
        choices = ", ".join(f"choice {index} for {counts[index]} layers" for index in sorted(counts))
        weights = sum(layer.out * layer.inn for layer in self.layers)
        within = "" if self.budget is None else f" of {self.budget:,}"
        return f"allocation: {choices}; {self.bytes:,} bytes{within}, {8 * self.bytes / weights:.2f} bits a weight"

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return attrs.asdict(self)


def resolved(recipe: Recipe, allocation: Allocation) -> Recipe:
    """The recipe with the choices as its first [[layers]] tables, and no [allocate] any more."""
    assert recipe.allocate is not None, "only a recipe with [allocate] is allocated"
    return attrs.evolve(recipe, layers=(*allocation.overrides(recipe.allocate), *recipe.layers), allocate=None)


def recorded(path: Path) -> Allocation | None:
    """The allocation that a loraq.json keeps, None where it keeps none. Raises CheckpointError for a broken one."""
    from loraq.source import read_json

    provenance = read_json(path)
    kept = provenance.get("allocation")
    if kept is None:
        return None
    try:
        layers = tuple(AllocatedLayer(**layer) for layer in kept["layers"])
        return Allocation(**{key: value for key, value in kept.items() if key != "layers"}, layers=layers)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its allocation cannot be read ({error!r}); take another file.") from None


def replayed(replay: str) -> Allocation:
    """The allocation that `replay` names. Raises InputError where there is none."""
    path = Path(replay)
    path = path / "loraq.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"allocate.replay: there is no file {path}; name a loraq.json, or the folder of a result.")
    found = recorded(path)
    if found is None:
        raise InputError(f"allocate.replay: {path} is of a run without [allocate]; name that of a run with it.")
    return found


def least_bits(bytes: int, weights: int) -> float:
    """The bits a weight that `bytes` need, rounded up to what a recipe would write."""
    return math.ceil(100 * 8 * bytes / weights) / 100
