"""`loraq check`: validate a recipe, without its model."""

from __future__ import annotations

import click

from loraq import registry
from loraq.commands.common import json_option, load_recipe, print_json, recipe_arguments


@click.command()
@recipe_arguments
@json_option
def check(recipe: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Validate RECIPE: all its faults at once. Reads no model."""
    loaded = load_recipe(recipe, settings)
    if as_json:
        print_json(loaded.to_plain())
        return
    stages = " -> ".join(
        f"{stage.name} {registry.name_of(f'loraq.{stage.kind}', type(stage.strategy))}"
        if hasattr(stage, "strategy")
        else stage.name
        for stage in loaded.stage
    )
    click.echo(f"{recipe}: fine; {stages}")
