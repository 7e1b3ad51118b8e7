"""The recipes that ship with LoRaQ, and the file that a recipe's name or path means."""

from __future__ import annotations

import functools
from pathlib import Path

from loraq.errors import InputError, did_you_mean


def recipe_path(name: str) -> Path:
    """The file of a recipe: `name` itself if it is a path, else the shipped recipe of that name."""
    path = Path(name)
    if path.is_file() or path.suffix == ".toml" or len(path.parts) > 1:
        return path
    shipped = shipped_recipes()
    if name not in shipped:
        listed = ", ".join(shipped)
        raise InputError(
            f"there is no file '{name}', and no shipped recipe of that name; shipped are {listed}"
            f"{did_you_mean(name, shipped)}"
        )
    return shipped[name]


@functools.cache
def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with LoRaQ, by name."""
    import importlib.resources

    folder = Path(str(importlib.resources.files("loraq.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
