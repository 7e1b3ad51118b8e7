"""`loraq calibrate`: collect what strategies read of their layers' inputs."""

from __future__ import annotations

import attrs
import click

from loraq.commands.common import joined, json_option, load_recipe, print_json, recipe_arguments


@click.command()
@recipe_arguments
@click.option("--part", type=click.IntRange(1), help="Collect this part of calibration.parts alone, counted from 1.")
@json_option
def calibrate(recipe: str, settings: tuple[str, ...], part: int | None, as_json: bool) -> None:
    """Collect what RECIPE's strategies read of their layers' inputs; `run` does so too, for what is missing.

    With calibration.parts in the recipe, several processes may each collect some parts into one cache folder: those
    that torchrun started share them out.
    """
    with joined() as team:
        loaded = load_recipe(recipe, settings)
        from loraq.run import calibrate_recipe

        found = calibrate_recipe(loaded, None if part is None else part - 1, team=team)
    if not team.first:
        return
    from loraq.report import size

    if as_json:
        print_json(None if found is None else attrs.asdict(found))
    elif found is None:
        click.echo(f"{recipe}: no strategy reads its layers' inputs; there is nothing to calibrate")
    else:
        passes = "1 pass" if found.passes == 1 else f"{found.passes} passes"
        done = f"{passes} over the prompts" if found.passes else "all was there already"
        click.echo(f"{found.folder}: {size(found.bytes)} of {found.layers} layers' inputs; {done}")
