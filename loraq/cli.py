"""The command `loraq`: run, plan, calibrate, check, list, inspect, generate, evaluate.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong. Errors are one sentence on standard error, never a traceback;
results go to standard output, as JSON with `--json`. Heavy imports wait until a command needs them, so that `--help`,
`list` and `check` answer at once.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import click

from loraq import registry
from loraq.errors import InputError, LoraqError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from loraq.recipe import Recipe

Function = TypeVar("Function", bound=Callable[..., Any])

KINDS = (
    "stage",
    "pre_transform",
    "main_quantizer",
    "low_rank",
    "branch_quantizer",
    "packing",
    "format",
    "kernel",
    "metric",
)


def _console() -> Console:
    from rich.console import Console

    # A pipe gets wide lines rather than wrapped ones.
    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty())


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def recipe_arguments(function: Function) -> Function:
    """RECIPE and --set, for the commands that read a recipe."""
    settings = click.option(
        "--set", "settings", multiple=True, metavar="PATH=VALUE", help="Override, such as low_rank.rank=64."
    )
    return click.argument("recipe")(settings(function))


def json_option(function: Function) -> Function:
    """--json, for the commands whose result a program may read."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="loraq")
def cli() -> None:
    """Quantize diffusion transformers to 4 bits, with a low-rank branch that is itself quantized.

    RECIPE is a TOML file, or the name of a recipe that ships with LoRaQ (`loraq list recipe`).
    """


def recipe_path(name: str) -> Path:
    """The file of a recipe: `name` itself if it is a path, else the shipped recipe of that name."""
    path = Path(name)
    if path.is_file() or path.suffix == ".toml" or len(path.parts) > 1:
        return path
    shipped = shipped_recipes()
    if name not in shipped:
        listed = ", ".join(shipped)
        raise InputError(
            f"there is no file '{name}', and no shipped recipe of that name; shipped are {listed}"
            f"{did_you_mean(name, shipped)}"
        )
    return shipped[name]


@functools.cache
def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with LoRaQ, by name."""
    import importlib.resources

    folder = Path(str(importlib.resources.files("loraq.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _load(recipe: str, settings: tuple[str, ...]) -> Recipe:
    from loraq.recipe import load

    return load(recipe_path(recipe), settings)


@cli.command()
@recipe_arguments
@click.option("--restart", is_flag=True, help="Replace a finished result, or an unfinished one of another recipe.")
@click.option("--only", metavar="PATTERN", help="Try the layers that match, write nothing.")
@json_option
def run(recipe: str, settings: tuple[str, ...], restart: bool, only: str | None, as_json: bool) -> None:
    """Quantize what RECIPE names, or continue where a run was stopped."""
    loaded = _load(recipe, settings)
    from loraq.report import size
    from loraq.run import run_recipe, try_layers

    if threading.current_thread() is threading.main_thread():
        click.get_current_context().call_on_close(
            functools.partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, _stop_at_once))
        )
    report = run_recipe(loaded, restart=restart) if only is None else try_layers(loaded, only)
    if as_json:
        _print_json(report.to_plain())
        return
    from rich.markup import escape

    console = _console()
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


@cli.command()
@recipe_arguments
@json_option
def plan(recipe: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Say what RECIPE would do: layers, bytes, what is left out and why. Reads no weight, writes nothing."""
    loaded = _load(recipe, settings)
    from loraq.plan import make_plan
    from loraq.report import plan_table, size, skipped_line
    from loraq.source import open_source

    source = open_source(loaded.model)
    allocation = None
    if loaded.allocate is not None:
        from loraq.allocation import resolved
        from loraq.probing import foretold

        outlook, allocation = foretold(loaded, source)
        if allocation is None:
            if as_json:
                _print_json({"source": str(source.root), "allocation": outlook.to_plain()})
            else:
                outlook.print(_console())
            return
        loaded = resolved(loaded, allocation)
    made = make_plan(source, loaded.pipeline(), loaded.calibration)
    if as_json:
        _print_json(made.to_plain() | ({} if allocation is None else {"allocation": allocation.to_plain()}))
        return
    from rich.markup import escape

    console = _console()
    for component in made.components:
        title = escape(component.component.name or str(made.source.root))
        console.print(f"[bold]{title}[/bold]  {component.component.class_name}")
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


@cli.command()
@recipe_arguments
@click.option("--part", type=click.IntRange(1), help="Collect this part of calibration.parts alone, counted from 1.")
@json_option
def calibrate(recipe: str, settings: tuple[str, ...], part: int | None, as_json: bool) -> None:
    """Collect what RECIPE's strategies read of their layers' inputs; `run` does so too, for what is missing.

    With calibration.parts in the recipe, several processes may each collect some parts into one cache folder.
    """
    loaded = _load(recipe, settings)
    from loraq.report import size
    from loraq.run import calibrate_recipe

    found = calibrate_recipe(loaded, None if part is None else part - 1)
    if as_json:
        _print_json(None if found is None else attrs.asdict(found))
    elif found is None:
        click.echo(f"{recipe}: no strategy reads its layers' inputs; there is nothing to calibrate")
    else:
        passes = "1 pass" if found.passes == 1 else f"{found.passes} passes"
        done = f"{passes} over the prompts" if found.passes else "all was there already"
        click.echo(f"{found.folder}: {size(found.bytes)} of {found.layers} layers' inputs; {done}")


@cli.command()
@recipe_arguments
@json_option
def check(recipe: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Validate RECIPE: all its faults at once. Reads no model."""
    loaded = _load(recipe, settings)
    if as_json:
        _print_json(loaded.to_plain())
        return
    stages = " -> ".join(
        f"{stage.name} {registry.name_of(f'loraq.{stage.kind}', type(stage.strategy))}"
        if hasattr(stage, "strategy")
        else stage.name
        for stage in loaded.stage
    )
    click.echo(f"{recipe}: fine; {stages}")


@cli.command(name="list")
@click.argument("kind", required=False)
@click.argument("name", required=False)
@json_option
def list_(kind: str | None, name: str | None, as_json: bool) -> None:
    """List what is installed: all kinds, one KIND, or the options of KIND NAME."""
    if kind is None:
        _list_all(as_json)
        return
    if kind == "recipe":
        if as_json:
            _print_json({recipe: str(path) for recipe, path in shipped_recipes().items()})
            return
        for recipe, path in shipped_recipes().items():
            click.echo(f"{recipe}  {path}")
        return
    kinds = [*dict.fromkeys([*KINDS, *registry.names("loraq.stage")])]
    if kind not in kinds:
        raise InputError(f"no kind '{kind}'; kinds are {', '.join([*kinds, 'recipe'])}{did_you_mean(kind, kinds)}")
    if name is None:
        _list_kind(kind, as_json)
    else:
        _list_options(kind, name, as_json)


def _offers(kind: str) -> list[dict[str, str]]:
    """What is on offer of a kind; a name that two distributions offer, or that cannot be imported, says so."""
    rows = []
    for name in registry.names(f"loraq.{kind}"):
        try:
            offer = registry.offer(f"loraq.{kind}", name)
            # A kernel backend imports its compiler: it is named by where it lies.
            summary = offer.target if kind == "kernel" else _summary(offer.load())
        except LoraqError as error:
            rows.append({"name": name, "summary": f"refused: {error}", "distribution": "", "version": ""})
            continue
        rows.append({"name": name, "summary": summary, "distribution": offer.distribution, "version": offer.version})
    return rows


def _summary(target: object) -> str:
    doc = target.__doc__ if isinstance(target, type) else type(target).__doc__
    return (doc or "").strip().split("\n")[0]


def _list_all(as_json: bool) -> None:
    kinds = [*dict.fromkeys([*KINDS, *registry.names("loraq.stage")])]
    if as_json:
        _print_json({kind: _offers(kind) for kind in kinds})
        return
    lines = {kind: [_told(kind, name) for name in registry.names(f"loraq.{kind}")] for kind in kinds}
    for kind, names in (lines | {"recipe": shipped_recipes()}).items():
        line = f"{kind:<18}{', '.join(names) or '-'}"
        if sys.stdout.isatty():  # for people, within the window; for programs, a line a kind
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, subsequent_indent=" " * 18, break_on_hyphens=False)
        click.echo(line)


def _told(kind: str, name: str) -> str:
    """A name, with the distribution behind it where that is not LoRaQ itself."""
    try:
        offer = registry.offer(f"loraq.{kind}", name)
    except LoraqError:
        return f"{name} (refused: see `loraq list {kind}`)"
    return name if offer.distribution == "loraq" else f"{name} ({offer.distribution} {offer.version})"


def _list_kind(kind: str, as_json: bool) -> None:
    rows = _offers(kind)
    if as_json:
        _print_json(rows)
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("name", "what it is", "from"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], escape(row["summary"]), f"{row['distribution']} {row['version']}".strip())
    _console().print(table)


def _list_options(kind: str, name: str, as_json: bool) -> None:
    target = registry.load(f"loraq.{kind}", name)
    if not isinstance(target, type) or not attrs.has(target):
        click.echo(f"{kind} {name}: {target!r}")
        return
    from loraq.structure import options_of

    options = options_of(target)
    if kind in registry.names("loraq.stage"):  # the stage's own options stand in the same table of a recipe
        stage = registry.load("loraq.stage", kind)
        shared = [each for each in options_of(stage) if each["option"] not in ("strategy", "name")]  # type: ignore[arg-type]
        if getattr(target, "has_branch", True):
            options += shared
    if as_json:
        _print_json(options)
        return
    click.echo(f"{kind} {name}: {(target.__doc__ or '').strip()}\n")
    for option in options:
        default = "(required)" if option["required"] else json.dumps(option["default"])
        default = "(not set)" if default == "null" else default
        click.echo(f"  {option['option']} = {default}" + (f"\n      {option['what']}" if option["what"] else ""))
    if not options:
        click.echo("  no options")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Say what is in a quantized FOLDER: layers, formats, bytes, where it came from."""
    from loraq.inspect import inspect_folder, print_inspection

    found = inspect_folder(folder)
    if as_json:
        _print_json(found)
    else:
        print_inspection(found, _console())


@cli.command()
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


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", "original", required=True, type=click.Path(path_type=Path), help="The 16-bit pipeline.")
@click.option(
    "--prompts", "file", type=click.Path(path_type=Path), help="Text file, a prompt a line, from which --seed chooses."
)
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="How many pictures each draws.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Seed of the first picture.")
@click.option("--call", "settings", multiple=True, metavar="NAME=VALUE", help="Argument of the pipeline's call.")
@click.option("--metric", "names", multiple=True, help="What to measure (`loraq list metric`); all, if none is named.")
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
    file: Path | None,
    prompts: tuple[str, ...],
    count: int,
    seed: int,
    settings: tuple[str, ...],
    names: tuple[str, ...],
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
    from loraq.generate import call_of, recorded_samples
    from loraq.pictures import Drawing, chosen_prompts, fitting_batch, prompts_in

    gates = [evaluation.parse_gate(text) for text in required]
    metrics, refused = evaluation.load_metrics(names, [gate.metric for gate in gates])
    if file is not None and prompts:
        raise InputError("give either --prompts or --prompt, got both")
    asked = prompts_in(file) if file is not None else [*prompts] or recorded_samples(folders[0]).get("prompts", [])
    if not asked:
        raise InputError(
            f"{folders[0]}: its recipe records no samples, so there is no prompt; give --prompts or --prompt"
        )
    call = call_of(folders[0], settings)
    chosen = chosen_prompts(asked, count, None if file is None else seed)  # a file may be sorted: choose at random
    drawing = Drawing(prompts=chosen, seed=seed, call=call, batch=batch or fitting_batch(original, call))
    found = evaluation.evaluate(folders, original, drawing, metrics, refused=refused, device=device, output=output)
    if as_json:
        _print_json(found.to_plain())
    else:
        found.print(_console())
    unmet = found.unmet(gates)
    if unmet:
        raise LoraqError("; ".join(unmet))


_INTERRUPTED = "interrupted; the same command continues where it stopped"


def _stop_at_once(number: int, frame: object) -> None:
    """Ctrl-C in a run: end now, not when the fits in flight are done. What is written survives any kind of kill."""
    del number, frame
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # the progress bar hid the cursor
    sys.stderr.write(_INTERRUPTED + "\n")
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    """The command's entry point."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except RecipeError as error:
        for fault in error.faults:
            click.echo(f"error: {fault}", err=True)
        sys.exit(error.exit_code)
    except LoraqError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo(_INTERRUPTED, err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
