"""`loraq run`: quantize, or continue."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading

import click

from loraq.commands.common import INTERRUPTED, json_option, load_recipe, open_console, print_json, recipe_arguments


@click.command()
@recipe_arguments
@click.option("--restart", is_flag=True, help="Replace a finished result, or an unfinished one of another recipe.")
@click.option("--only", metavar="PATTERN", help="Try the layers that match, write nothing.")
@json_option
def run(recipe: str, settings: tuple[str, ...], restart: bool, only: str | None, as_json: bool) -> None:
    """Quantize what RECIPE names, or continue where a run was stopped."""
    loaded = load_recipe(recipe, settings)
    from loraq.report import size
    from loraq.run import run_recipe, try_layers

    if threading.current_thread() is threading.main_thread():
        click.get_current_context().call_on_close(
            functools.partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, _stop_at_once))
        )
    report = run_recipe(loaded, restart=restart) if only is None else try_layers(loaded, only)
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


def _stop_at_once(number: int, frame: object) -> None:
    """Ctrl-C in a run: end now, not when the fits in flight are done. What is written survives any kind of kill."""
    del number, frame
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # the progress bar hid the cursor
    sys.stderr.write(INTERRUPTED + "\n")
    sys.stderr.flush()
    os._exit(1)
