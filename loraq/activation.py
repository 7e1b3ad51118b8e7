"""How the input of a product is rounded at run time: part of each quantizer's options.

In a recipe `activation = "int8"` (groups of 64), `activation = {format = "int8", group = "token"}` (one scale a token),
or `activation = "none"`: the input stays in 16 bits and the product runs in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs

from loraq import formats
from loraq.contracts import AbstractFormat
from loraq.errors import InputError, did_you_mean

DEFAULT_GROUP = 64


def group_validator(whole: str) -> Callable[[object, attrs.Attribute[Any], object], None]:
    """A validator for group sizes: an integer of at least 1, or the word `whole` for one scale a row."""

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        del instance
        if value != whole and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"'{attribute.name}' must be an integer of at least 1 or '{whole}', got {value!r}")

    return validate


def _no_none(value: str | AbstractFormat | None) -> AbstractFormat | None:
    return None if value is None or value == "none" else formats.named(value)


@attrs.frozen
class Activation:
    """The format that a product's input is rounded to, and how many neighbouring columns share a scale.

    `format` None leaves the input as it is; `group` "token" gives each token one scale.
    """

    format: AbstractFormat | None = attrs.field(converter=_no_none)
    group: int | Literal["token"] = attrs.field(default=DEFAULT_GROUP, validator=group_validator("token"))

    def __str__(self) -> str:
        if self.format is None:
            return "none"
        return self.format.name if self.group == DEFAULT_GROUP else f"{self.format.name}/{self.group}"

    def group_for(self, columns: int) -> int:
        """How many columns share a scale in an input of `columns`."""
        return max(1, columns) if self.format is None else formats.group_within(self.format, self.group, columns)

    def to_plain(self) -> str | dict[str, Any]:
        """As a recipe or config.json writes it."""
        if self.format is None:
            return "none"
        if self.group == DEFAULT_GROUP:
            return self.format.name
        return {"format": self.format.name, "group": self.group}


NONE = Activation(None)


def activation(value: str | Mapping[str, Any] | Activation) -> Activation:
    """The Activation that a recipe's value stands for. Raises InputError for what is none."""
    if isinstance(value, Activation):
        return value
    if isinstance(value, str):
        return Activation(value)
    if not isinstance(value, Mapping):
        raise InputError(f"expected a format's name or {{format, group}}, got {value!r}")
    unknown = [key for key in value if key not in ("format", "group")]
    if unknown:
        raise InputError(
            f"unknown key '{unknown[0]}' (an activation knows format, group)"
            f"{did_you_mean(unknown[0], ['format', 'group'])}"
        )
    if "format" not in value:
        raise InputError("an activation needs 'format'")
    if not isinstance(value["format"], str | AbstractFormat):
        raise InputError(f"an activation's 'format' is a format's name, got {value['format']!r}")
    return Activation(value["format"], value.get("group", DEFAULT_GROUP))
