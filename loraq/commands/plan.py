"""`loraq plan`: what a run would do."""

from __future__ import annotations

import click

from loraq.commands.common import json_option, load_recipe, open_console, print_json, recipe_arguments


@click.command()
@recipe_arguments
@click.option("--time", "measure", is_flag=True, help="Measure what a run takes here, for half a minute; kept.")
@json_option
def plan(recipe: str, settings: tuple[str, ...], measure: bool, as_json: bool) -> None:
    """Say what RECIPE would do: layers, bytes, memory, what is left out and why. Reads no weight, writes nothing."""
    loaded = load_recipe(recipe, settings)
    import attrs

    from loraq.estimate import estimate
    from loraq.plan import make_plan
    from loraq.report import plan_table, size, skipped_line
    from loraq.source import open_source
    from loraq.workers import Workers

    source = open_source(loaded.model)
    allocation = None
    if loaded.allocate is not None:
        from loraq.allocation import resolved
        from loraq.probing import foretold

        outlook, allocation = foretold(loaded, source)
        if allocation is None:
            if as_json:
                print_json({"source": str(source.root), "allocation": outlook.to_plain()})
            else:
                outlook.print(open_console())
            return
        loaded = resolved(loaded, allocation)
    made = make_plan(source, loaded.pipeline(), loaded.calibration)
    workers = Workers.of(loaded.run.device, loaded.run.workers, loaded.run.threads)
    expected = estimate(made, workers, seed=loaded.run.seed, measure=measure)
    if as_json:
        told = made.to_plain() | {"estimate": attrs.asdict(expected)}
        print_json(told | ({} if allocation is None else {"allocation": allocation.to_plain()}))
        return
    from rich.markup import escape

    console = open_console()
    for component in made.components:
        title = escape(component.component.name or str(made.source.root))
        changed = len(component.component.deltas)
        merged = f", adapters merged into {changed} of its tensors" if changed else ""
        console.print(f"[bold]{title}[/bold]  {component.component.class_name}{merged}", highlight=False)
        console.print(plan_table(component.layers))
        if component.skipped:
            console.print(skipped_line(component.skipped), style="dim", highlight=False, markup=False)
    bits = 8 * made.packed_bytes / made.weights if made.weights else 0
    console.print(
        f"{size(made.source_bytes)} would become {size(made.written_bytes)} "
        f"({made.written_bytes:,} bytes in safetensors files), {bits:.2f} bits a quantized weight",
        highlight=False,
    )
    if allocation is not None:
        console.print(allocation.told(), highlight=False)
    if made.calibration is not None:
        console.print(made.calibration.told(), highlight=False)
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    for line in expected.told():
        console.print(line, highlight=False, markup=False)
