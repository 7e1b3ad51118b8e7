"""`loraq verify`: is a quantized folder still what was written."""

from __future__ import annotations

from pathlib import Path

import click

from loraq.commands.common import json_option, open_console, print_json
from loraq.errors import LoraqError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="The 16-bit source; the recorded one, if not said.")
@json_option
def verify(folder: Path, against: Path | None, as_json: bool) -> None:
    """Check a quantized FOLDER: digests and errors.

    Digests of all layers, and their errors where the 16-bit source is at hand. Exit code 1 where anything differs from
    what was written.
    """
    from loraq.verify import verify as check

    found = check(folder, against)
    if as_json:
        print_json(found.to_plain())
    else:
        found.print(open_console())
    if found.faulty:
        raise LoraqError(found.sentence())
