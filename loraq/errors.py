"""The errors that LoRaQ raises, one tree.

    LoraqError                 something went wrong; the command ends with exit code 1
    └── InputError             what the user gave is wrong; the command ends with exit code 2
        ├── RecipeError        faults of a recipe, all of them, each with its TOML path
        ├── RegistryError      a strategy, stage or format that is missing, broken or offered twice
        ├── ModelError         a model, component, shard or weight that cannot be quantized
        └── CheckpointError    a quantized folder that cannot be read or continued

Every message is one sentence: where, what was found, what would do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LoraqError(Exception):
    """Something went wrong; the message is one sentence that says where, what, and what would do."""

    exit_code = 1


class InputError(LoraqError):
    """What the user gave is wrong."""

    exit_code = 2


class RegistryError(InputError):
    """A strategy, stage, format or backend that is missing, broken or offered by two distributions."""


class ModelError(InputError):
    """A model, component, shard or weight that cannot be quantized."""


class CheckpointError(InputError):
    """A quantized folder that cannot be read or continued."""


class RecipeError(InputError):
    """Faults of a recipe, all of them at once.

    `faults` holds one sentence each; the message is the sentences, a line each.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


def choices(names: Iterable[str]) -> str:
    """`'a', 'b' or 'c'`, for the end of a sentence."""
    quoted = [f"'{name}'" for name in names]
    if len(quoted) < 2:
        return "".join(quoted) or "none"
    return ", ".join(quoted[:-1]) + " or " + quoted[-1]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`; did you mean 'svd'?` where a name is near `word`, else nothing."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
