"""`loraq run`: quantize, or continue."""

from __future__ import annotations

import click

from loraq.commands.common import (
    joined,
    json_option,
    load_recipe,
    open_console,
    print_json,
    recipe_arguments,
    stopping_at_once,
)
from loraq.errors import InputError


@click.command()
@recipe_arguments
@click.option("--restart", is_flag=True, help="Replace a finished result, or an unfinished one of another recipe.")
@click.option("--only", metavar="PATTERN", help="Try the layers that match, write nothing.")
@json_option
def run(recipe: str, settings: tuple[str, ...], restart: bool, only: str | None, as_json: bool) -> None:
    """Quantize what RECIPE names, or continue where a run was stopped.

    Several processes do it together: torchrun --nproc-per-node N -m loraq run RECIPE.
    """
    with joined() as team:
        loaded = load_recipe(recipe, settings)
        from loraq.run import run_recipe, try_layers

        stopping_at_once()
        if only is not None and not team.alone:
            raise InputError("--only: tries layers in one process; leave torchrun out.")
        report = run_recipe(loaded, restart=restart, team=team) if only is None else try_layers(loaded, only)
    if not team.first:
        return
    from loraq.report import size

    if as_json:
        print_json(report.to_plain())
        return
    from rich.markup import escape

    console = open_console()
    report.print(console)
    if report.output is None:
        console.print(f"{len(report.layers)} layers tried in {report.seconds:.1f} s, nothing written")
        return
    share = report.written_bytes / report.source_bytes
    done = "was finished already" if report.already_done else f"done in {report.seconds:.1f} s"
    console.print(
        f"[bold]{escape(report.output)}[/bold]  {done}: {size(report.source_bytes)} became "
        f"{size(report.written_bytes)} ({share:.0%}), {report.effective_bits:.2f} bits a quantized weight, "
        f"error {report.error_before:.4f} without the branch and {report.error_after:.4f} with it",
        highlight=False,
    )
    if report.pictures:
        console.print(
            f"[bold]{escape(report.pictures)}[/bold]  16-bit beside quantized, same prompts and seeds", highlight=False
        )
