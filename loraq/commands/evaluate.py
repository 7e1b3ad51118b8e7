"""`loraq evaluate`: a quantized pipeline's pictures beside the original's."""

from __future__ import annotations

from pathlib import Path

import click

from loraq.commands.common import json_option, open_console, print_json
from loraq.errors import InputError, LoraqError


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", "original", required=True, type=click.Path(path_type=Path), help="The 16-bit pipeline.")
@click.option(
    "--prompts",
    "file",
    metavar="FILE|mjhq:FOLDER|sdci:FOLDER",
    help="Text file, a prompt a line, from which --seed chooses; or a data set, drawn as the field's tables are.",
)
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="How many pictures each draws.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Seed of the first picture.")
@click.option("--call", "settings", multiple=True, metavar="NAME=VALUE", help="Argument of the pipeline's call.")
@click.option("--metric", "names", multiple=True, help="What to measure (`loraq list metric`); all, if none is named.")
@click.option(
    "--set", "options", multiple=True, metavar="METRIC.OPTION=VALUE", help="Option of a metric: lpips.net=vgg."
)
@click.option("--download", is_flag=True, help="Let metrics fetch weights that they lack.")
@click.option("--require", "required", multiple=True, metavar="GATE", help="Fail unless it holds: 'psnr >= 24'.")
@click.option("--batch", type=click.IntRange(1), help="Pictures drawn at once; default by their size.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Keep pictures and figures there, and continue from it."
)
@json_option
def evaluate(
    folders: tuple[Path, ...],
    original: Path,
    file: str | None,
    prompts: tuple[str, ...],
    count: int,
    seed: int,
    settings: tuple[str, ...],
    names: tuple[str, ...],
    options: tuple[str, ...],
    download: bool,
    required: tuple[str, ...],
    batch: int | None,
    device: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Judge the quantized pipelines in FOLDERS by their pictures beside the original's, from the same noise.

    Prompts and arguments of the call default to the samples' of the recipe that made the first folder. Several folders
    are compared with each other as well, picture by picture. Exit code 1 where a --require is not met.
    """
    from loraq import evaluation
    from loraq.gates import parse_gate
    from loraq.generate import call_of, recorded_samples, unlike_original
    from loraq.pictures import Drawing, chosen_prompts, fitting_batch, prompts_in
    from loraq.prompts import is_prompt_set, prompt_set, published_call

    for warning in filter(None, (unlike_original(folder, original) for folder in folders)):
        click.echo(f"warning: {warning}", err=True)
    gates = [parse_gate(text) for text in required]
    tables = evaluation.metric_tables(options, "--set")
    metrics, refused = evaluation.load_metrics(
        names, [gate.metric for gate in gates], tables, where="--set", download=download
    )
    if file is not None and prompts:
        raise InputError("give either --prompts or --prompt, got both")
    seeds: tuple[int, ...] = ()
    references: tuple[Path, ...] = ()
    if file is not None and is_prompt_set(file):
        chosen_set = prompt_set(file, count)
        chosen, seeds, references = chosen_set.prompts, chosen_set.seeds, chosen_set.references
        call = published_call(original) | call_of(None, settings)
    else:
        asked = prompts_in(Path(file)) if file is not None else [*prompts]
        asked = asked or recorded_samples(folders[0]).get("prompts", [])
        if not asked:
            raise InputError(
                f"{folders[0]}: its recipe records no samples, so there is no prompt; give --prompts or --prompt"
            )
        chosen = chosen_prompts(asked, count, None if file is None else seed)  # a file may be sorted: choose at random
        call = call_of(folders[0], settings)
    drawing = Drawing(prompts=chosen, seed=seed, seeds=seeds, call=call, batch=batch or fitting_batch(original, call))
    found = evaluation.evaluate(
        folders,
        original,
        drawing,
        metrics,
        refused=refused,
        references=references,
        device=device,
        output=output,
    )
    if as_json:
        print_json(found.to_plain())
    else:
        found.print(open_console())
    unmet = found.unmet(gates)
    if unmet:
        raise LoraqError("; ".join(unmet))
