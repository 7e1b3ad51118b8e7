"""`loraq inspect`: what is in a quantized folder."""

from __future__ import annotations

from pathlib import Path

import click

from loraq.commands.common import json_option, open_console, print_json


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Say what is in a quantized FOLDER: layers, formats, bytes, where it came from."""
    from loraq.inspect import inspect_folder, print_inspection

    found = inspect_folder(folder)
    if as_json:
        print_json(found)
    else:
        print_inspection(found, open_console())
