"""`loraq bench`: a suite of models, recipes and settings, run, measured and compared."""

from __future__ import annotations

from pathlib import Path

import click

from loraq.commands.common import joined, json_option, open_console, print_json, stopping_at_once
from loraq.errors import InputError, LoraqError


@click.command()
@click.argument("suite")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Override, such as pictures.count=16.")
@click.option("--output", type=click.Path(path_type=Path), help="The suite's folder; out/bench/NAME, if not said.")
@click.option("--only", metavar="PATTERN", help="Only the cells whose name matches, and what is done already.")
@click.option("--list", "listing", is_flag=True, help="Say which cells there are and which are done; run nothing.")
@click.option("--require", "required", multiple=True, metavar="GATE", help="Fail unless it holds of each cell.")
@click.option("--device", default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(0), default=0, help="Layers fitted at once; 0: as the recipes say.")
@json_option
def bench(
    suite: str,
    settings: tuple[str, ...],
    output: Path | None,
    only: str | None,
    listing: bool,
    required: tuple[str, ...],
    device: str,
    workers: int,
    as_json: bool,
) -> None:
    """Run SUITE, a matrix of recipes: tables and a report.

    Every cell is quantized, draws, is measured and compared with its baseline.

    SUITE is a TOML file, or the name of a suite that ships with LoRaQ (`loraq list suite`). What is there already is
    not done again, so a killed suite continues. A gate, such as 'psnr >= 24', 'psnr.difference_low >= 0' or
    'error_after <= 0.03', ends the command with exit code 1 where a cell does not meet it, as does a cell that fails.
    """
    from loraq import suite as suites
    from loraq.shipped import suite_path

    gates = [suites.gate_of(text) for text in required]
    loaded = suites.load(suite_path(suite), settings).requiring(gates)
    folder = output or Path("out") / "bench" / loaded.name
    states = {cell.label: suites.state_of(loaded, cell, folder) for cell in loaded.cells}
    wanted = loaded.cells if only is None else loaded.matching(only)
    if listing:
        from loraq.bench_console import print_cells

        chosen = {cell.label: states[cell.label] for cell in wanted}
        print_json(chosen) if as_json else print_cells(chosen, open_console())
        return
    from loraq.bench import Bench
    from loraq.bench_console import print_result
    from loraq.bench_result import unmet
    from loraq.html_report import write_report
    from loraq.tables import to_plain, write_tables

    if only is not None:  # with what they are compared with, and what is done: the tables stay whole
        named = {cell.label for cell in wanted}
        named |= {each.label for each in map(loaded.baseline_of, wanted) if each is not None}
        named |= {label for label, state in states.items() if state == suites.DONE}
        wanted = tuple(cell for cell in loaded.cells if cell.label in named)

    def told(sentence: str) -> None:
        click.echo(sentence, err=True)

    stopping_at_once()
    with joined() as team:
        if not team.alone:
            raise InputError("bench: it is one process, which fits several layers at once; leave torchrun out.")
        made = Bench(loaded, folder, device=device, workers=workers, told=told)
        result, pairs = made.run(wanted)
    write_tables(result, folder.resolve(), pairs)
    console = open_console()
    if as_json:
        print_json(to_plain(result, folder.resolve(), layers=False))
    else:
        print_result(result, console)
    report = write_report(result, folder.resolve())
    if not as_json:
        told_where = f"{folder / report.name}  the report; cells.csv, layers.csv and pairs.csv lie beside it"
        console.print(told_where, highlight=False, markup=False)
    clauses = unmet(result.cells)
    if clauses:
        raise LoraqError("; ".join(clauses))
