"""`loraq generate`: draw pictures."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to draw; may be given several times.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("picture.png"), show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=0,
    show_default=True,
    help="Seed of the first picture; each further one has the next.",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--call", "settings", multiple=True, metavar="NAME=VALUE", help="Argument of the pipeline's call.")
def generate(
    folder: Path, prompts: tuple[str, ...], output: Path, seed: int, device: str, settings: tuple[str, ...]
) -> None:
    """Draw pictures with the pipeline in FOLDER, quantized or not.

    Arguments of the call, such as num_inference_steps=20, default to the samples' of the recipe that made FOLDER.
    """
    from loraq.generate import generate_pictures

    for path in generate_pictures(folder, prompts, output, seed, device, settings):
        click.echo(path)
