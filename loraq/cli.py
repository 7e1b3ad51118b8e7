"""The command `loraq`: its subcommands, found in loraq/commands when they are called, and how it ends.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong. Errors are one sentence on standard error, never a traceback;
results go to standard output, as JSON with `--json`. Heavy imports wait until a command needs them, so that `--help`,
`list` and `check` answer at once.
"""

from __future__ import annotations

import importlib
import sys

import click

from loraq.commands.common import INTERRUPTED
from loraq.errors import LoraqError, RecipeError

COMMANDS = {
    "run": "run",
    "plan": "plan",
    "calibrate": "calibrate",
    "check": "check",
    "list": "list_",
    "inspect": "inspect",
    "generate": "generate",
    "evaluate": "evaluate",
    "bench": "bench",
    "verify": "verify",
}
"""Each command, in the order of `--help`, and what it is called in the module of loraq/commands that is named so."""


class _Commands(click.Group):
    """A group whose commands are imported when they are called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(f"loraq.commands.{cmd_name}"), COMMANDS[cmd_name])
        return found


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="loraq")
def cli() -> None:
    """Quantize diffusion transformers to 4 bits, with a low-rank branch that is itself quantized.

    RECIPE is a TOML file, or the name of a recipe that ships with LoRaQ (`loraq list recipe`).
    """


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
        click.echo(INTERRUPTED, err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
