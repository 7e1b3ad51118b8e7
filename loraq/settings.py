"""`--set PATH=VALUE`: a recipe's TOML table with single options laid over, and what laying options over a stage means.

`low_rank.rank=64` names a section or a stage, by its name or its kind, and a key; the value is TOML, or bare text.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from loraq import registry
from loraq.contracts import AbstractStage
from loraq.errors import LoraqError, did_you_mean


def laid_over(table: Mapping[str, Any], change: Mapping[str, Any], stage: type) -> dict[str, Any]:
    """`table` with `change` over it: another strategy drops the old one's options, an alternative its alternatives."""
    kept = dict(table)
    if "strategy" in change and change["strategy"] != table.get("strategy"):
        kept = {key: table[key] for key in ("kind", "name") if key in table}
    for alternatives in getattr(stage, "alternatives", ()):
        if alternatives & change.keys():
            kept = {key: value for key, value in kept.items() if key not in alternatives}
    return kept | dict(change)


def with_settings(
    table: Mapping[str, Any], settings: Sequence[str], sections: Sequence[str], faults: list[str]
) -> dict[str, Any]:
    """A copy of `table` with each `path=value` of `settings` laid over: sections by key, stages by name or kind."""
    result = dict(table)
    if isinstance(table.get("stage"), list):
        result["stage"] = [dict(each) if isinstance(each, Mapping) else each for each in table["stage"]]
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            faults.append(f"--set {setting}: expected path=value, such as low_rank.rank=64")
            continue
        targets, rest = _setting_targets(result, keys[0], sections), keys[1:]
        if not targets:
            known = [*sections, *_stage_names(result)]
            faults.append(
                f"--set {setting}: no section or stage '{keys[0]}'; there are {', '.join(known)}"
                f"{did_you_mean(keys[0], known)}"
            )
            continue
        if len(targets) > 1:
            named = ", ".join(str(each.get("name", keys[0])) for each in targets)
            faults.append(f"--set {setting}: {len(targets)} stages are of that kind; use a stage's name: {named}")
            continue
        section = targets[0]
        for key in rest[:-1]:
            inner = section.get(key)
            section[key] = dict(inner) if isinstance(inner, Mapping) else {}
            section = section[key]
        _set_value(section, rest[-1], toml_value(text.strip()))
    return result


def _stage_names(table: Mapping[str, Any]) -> list[str]:
    return [str(stage.get("name", stage.get("kind"))) for stage in _stage_tables(table)]


def _stage_tables(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = table.get("stage")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _setting_targets(table: dict[str, Any], key: str, sections: Sequence[str]) -> list[dict[str, Any]]:
    """The tables that a setting's first key may mean: a section, the stage of that name, else those of the kind."""
    if key in sections:
        if not isinstance(table.get(key, {}), Mapping):
            return [{}]  # told as the section's own fault
        table[key] = dict(table.get(key, {}))
        return [table[key]]
    stages = _stage_tables(table)
    named = [stage for stage in stages if stage.get("name", stage.get("kind")) == key]
    return named or [stage for stage in stages if stage.get("kind") == key]


def _set_value(section: dict[str, Any], key: str, value: Any) -> None:
    """Set `key`; for a stage, another strategy drops the old options and an alternative its alternatives."""
    changed: dict[str, Any] = {key: value}
    if isinstance(section.get("kind"), str):
        try:
            stage_class = registry.load("loraq.stage", section["kind"])
        except LoraqError:
            stage_class = AbstractStage  # the fault is told where the stage is structured
        changed = laid_over(section, changed, cast("type", stage_class))
        section.clear()
    section.update(changed)


def toml_value(text: str) -> Any:
    """A TOML value, or the bare text where it is none: `--set low_rank.strategy=svd` needs no quotes.

    No option is a date or a time: `--set run.output=2026-01-01` is a folder's name.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return value if isinstance(value, str | int | float | bool | list | dict) else text
