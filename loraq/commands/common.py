"""What the commands share: arguments, the console, JSON, and what an interrupted one says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from loraq.recipe import Recipe

Function = TypeVar("Function", bound=Callable[..., Any])

INTERRUPTED = "interrupted; the same command continues where it stopped"


def open_console() -> Console:
    """Where results are printed for people."""
    from rich.console import Console

    # A pipe gets wide lines rather than wrapped ones.
    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty())


def print_json(value: object) -> None:
    """Print a result for programs."""
    click.echo(json.dumps(value, indent=2, default=str))


def load_recipe(name: str, settings: tuple[str, ...]) -> Recipe:
    """The recipe of that file or shipped name, with the command line's --set applied."""
    from loraq.recipe import load
    from loraq.shipped import recipe_path

    return load(recipe_path(name), settings)


def recipe_arguments(function: Function) -> Function:
    """RECIPE and --set, for the commands that read a recipe."""
    settings = click.option(
        "--set", "settings", multiple=True, metavar="PATH=VALUE", help="Override, such as low_rank.rank=64."
    )
    return click.argument("recipe")(settings(function))


def json_option(function: Function) -> Function:
    """--json, for the commands whose result a program may read."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
