"""The recipes and suites that ship with LoRaQ, and the file that a recipe's or suite's name or path means."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from loraq.errors import InputError, did_you_mean


def recipe_path(name: str) -> Path:
    """The file of a recipe: `name` itself if it is a path, else the shipped recipe of that name."""
    return _path(name, shipped_recipes(), "recipe")


def suite_path(name: str) -> Path:
    """The file of a suite: `name` itself if it is a path, else the shipped suite of that name."""
    return _path(name, shipped_suites(), "suite")


def _path(name: str, shipped: Mapping[str, Path], what: str) -> Path:
    path = Path(name)
    if path.is_file() or path.suffix == ".toml" or len(path.parts) > 1:
        return path
    if name not in shipped:
        listed = ", ".join(shipped)
        raise InputError(
            f"there is no file '{name}', and no shipped {what} of that name; shipped are {listed}"
            f"{did_you_mean(name, shipped)}"
        )
    return shipped[name]


@functools.cache
def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with LoRaQ, by name."""
    return _tables(".")


@functools.cache
def shipped_suites() -> dict[str, Path]:
    """The suites that ship with LoRaQ, by name."""
    return _tables("suites")


def _tables(below: str) -> dict[str, Path]:
    import importlib.resources

    folder = Path(str(importlib.resources.files("loraq.recipes"))) / below
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda each: each.stem)}
