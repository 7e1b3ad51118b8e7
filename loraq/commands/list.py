"""`loraq list`: what is installed."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap

import attrs
import click

from loraq import registry
from loraq.commands.common import json_option, open_console, print_json
from loraq.errors import InputError, LoraqError, did_you_mean
from loraq.shipped import shipped_recipes, shipped_suites

SHIPPED = {"recipe": shipped_recipes, "suite": shipped_suites}
KINDS = (
    "stage",
    "pre_transform",
    "main_quantizer",
    "low_rank",
    "branch_quantizer",
    "packing",
    "format",
    "kernel",
    "metric",
)


@click.command(name="list")
@click.argument("kind", required=False)
@click.argument("name", required=False)
@json_option
def list_(kind: str | None, name: str | None, as_json: bool) -> None:
    """List what is installed: all kinds, one KIND, or the options of KIND NAME."""
    if kind is None:
        _list_all(as_json)
        return
    if kind in SHIPPED:
        shipped = SHIPPED[kind]()
        if as_json:
            print_json({name: str(path) for name, path in shipped.items()})
            return
        for name, path in shipped.items():
            click.echo(f"{name}  {path}")
        return
    kinds = [*dict.fromkeys([*KINDS, *registry.names("loraq.stage")])]
    if kind not in kinds:
        raise InputError(f"no kind '{kind}'; kinds are {', '.join([*kinds, *SHIPPED])}{did_you_mean(kind, kinds)}")
    if name is None:
        _list_kind(kind, as_json)
    else:
        _list_options(kind, name, as_json)


def _offers(kind: str) -> list[dict[str, str]]:
    """What is on offer of a kind; a name that two distributions offer, or that cannot be imported, says so."""
    rows = []
    for name in registry.names(f"loraq.{kind}"):
        try:
            offer = registry.offer(f"loraq.{kind}", name)
            # A kernel backend imports its compiler: it is named by where it lies.
            summary = offer.target if kind == "kernel" else _summary(offer.load())
        except LoraqError as error:
            rows.append({"name": name, "summary": f"refused: {error}", "distribution": "", "version": ""})
            continue
        rows.append({"name": name, "summary": summary, "distribution": offer.distribution, "version": offer.version})
    return rows


def _summary(target: object) -> str:
    doc = target.__doc__ if isinstance(target, type) else type(target).__doc__
    return (doc or "").strip().split("\n")[0]


def _list_all(as_json: bool) -> None:
    kinds = [*dict.fromkeys([*KINDS, *registry.names("loraq.stage")])]
    if as_json:
        print_json({kind: _offers(kind) for kind in kinds})
        return
    lines = {kind: [_told(kind, name) for name in registry.names(f"loraq.{kind}")] for kind in kinds}
    for kind, names in (lines | {kind: [*found()] for kind, found in SHIPPED.items()}).items():
        line = f"{kind:<18}{', '.join(names) or '-'}"
        if sys.stdout.isatty():  # for people, within the window; for programs, a line a kind
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, subsequent_indent=" " * 18, break_on_hyphens=False)
        click.echo(line)


def _told(kind: str, name: str) -> str:
    """A name, with the distribution behind it where that is not LoRaQ itself."""
    try:
        offer = registry.offer(f"loraq.{kind}", name)
    except LoraqError:
        return f"{name} (refused: see `loraq list {kind}`)"
    return name if offer.distribution == "loraq" else f"{name} ({offer.distribution} {offer.version})"


def _list_kind(kind: str, as_json: bool) -> None:
    rows = _offers(kind)
    if as_json:
        print_json(rows)
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("name", "what it is", "from"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], escape(row["summary"]), f"{row['distribution']} {row['version']}".strip())
    open_console().print(table)


def _list_options(kind: str, name: str, as_json: bool) -> None:
    target = registry.load(f"loraq.{kind}", name)
    if not isinstance(target, type) or not attrs.has(target):
        click.echo(f"{kind} {name}: {target!r}")
        return
    from loraq.structure import options_of

    options = options_of(target)
    if kind in registry.names("loraq.stage"):  # the stage's own options stand in the same table of a recipe
        stage = registry.load("loraq.stage", kind)
        shared = [each for each in options_of(stage) if each["option"] not in ("strategy", "name")]  # type: ignore[arg-type]
        if getattr(target, "has_branch", True):
            options += shared
    if as_json:
        print_json(options)
        return
    click.echo(f"{kind} {name}: {(target.__doc__ or '').strip()}\n")
    for option in options:
        default = "(required)" if option["required"] else json.dumps(option["default"])
        default = "(not set)" if default == "null" else default
        click.echo(f"  {option['option']} = {default}" + (f"\n      {option['what']}" if option["what"] else ""))
    if not options:
        click.echo("  no options")
