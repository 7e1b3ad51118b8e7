"""Layouts and their plain form: what config.json keeps of a strategy comes back as it was."""

from __future__ import annotations

import attrs
import pytest

from loraq import registry
from loraq.activation import Activation, activation
from loraq.contracts import AbstractFormat
from loraq.errors import CheckpointError
from loraq.formats import INT6, INT8, named
from loraq.layout import strategy_from_plain, strategy_to_plain


@attrs.frozen(kw_only=True)
class Odd:
    """Options that JSON has no types for."""

    patterns: tuple[str, ...] = ()
    format: AbstractFormat = attrs.field(default=INT8, converter=named)
    activation: Activation = attrs.field(default=Activation(INT8), converter=activation)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "name_of", lambda group, target: "odd")
    monkeypatch.setattr(registry, "load", lambda group, name: Odd if name == "odd" else INT6)


@pytest.mark.usefixtures("_registered")
def test_any_option_of_a_recipe_survives_json() -> None:
    strategy = Odd(patterns=("a", "b"), format=INT6, activation={"format": INT6, "group": "token"})
    table = strategy_to_plain("pre_transform", strategy)
    assert table["patterns"] == ["a", "b"]
    assert table["format"] == "int6"
    found = strategy_from_plain("pre_transform", table)
    assert found == strategy
    assert hash(found) == hash(strategy)


@pytest.mark.usefixtures("_registered")
def test_options_that_the_strategy_lacks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown key 'blocks'"):
        strategy_from_plain("pre_transform", {"strategy": "odd", "blocks": 3})
