"""What the commands share: arguments, the console, JSON, and what an interrupted one says."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loraq.errors import LoraqError
from loraq.team import Team, join, number_here

if TYPE_CHECKING:
    from rich.console import Console

    from loraq.recipe import Recipe

Function = TypeVar("Function", bound=Callable[..., Any])

INTERRUPTED = "interrupted; the same command continues where it stopped"


def stopping_at_once() -> None:
    """While the command runs, Ctrl-C ends it now, not when the fits in flight are done: what is written survives."""
    if threading.current_thread() is threading.main_thread():
        click.get_current_context().call_on_close(
            functools.partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, _stop_at_once))
        )


def _stop_at_once(number: int, frame: object) -> None:
    del number, frame
    if number_here():
        os._exit(1)
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # the progress bar hid the cursor
    sys.stderr.write(INTERRUPTED + "\n")
    sys.stderr.flush()
    os._exit(1)


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


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """The processes that torchrun started, or this one alone: an error in one ends all, and the first one tells it."""
    team = join()
    try:
        with team:
            yield team
    except (LoraqError, click.ClickException, OSError) as error:
        team.end_after_first()
        if team.first:
            raise
        sys.exit(error.exit_code if isinstance(error, LoraqError) else 1)


def recipe_arguments(function: Function) -> Function:
    """RECIPE and --set, for the commands that read a recipe."""
    settings = click.option(
        "--set", "settings", multiple=True, metavar="PATH=VALUE", help="Override, such as low_rank.rank=64."
    )
    return click.argument("recipe")(settings(function))


def json_option(function: Function) -> Function:
    """--json, for the commands whose result a program may read."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
