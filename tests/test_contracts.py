"""Every registered strategy keeps its contract: tests/contracts.py, parametrized over the registry."""

from __future__ import annotations

from pathlib import Path

import pytest

import contracts
from loraq import registry

QUANTIZERS = [
    (kind, name) for kind in ("main_quantizer", "branch_quantizer") for name in registry.names(f"loraq.{kind}")
]
KINDS = ("pre_transform", "main_quantizer", "low_rank", "branch_quantizer", "packing", "metric")
ALL = [(kind, name) for kind in KINDS for name in registry.names(f"loraq.{kind}")]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_strategy_is_an_options_class(kind: str, name: str) -> None:
    contracts.is_options_class(registry.load(f"loraq.{kind}", name))


@pytest.mark.parametrize("name", registry.names("loraq.format"))
def test_format(name: str) -> None:
    contracts.number_format(registry.load("loraq.format", name))


@pytest.mark.parametrize(("kind", "name"), QUANTIZERS)
def test_quantizer(kind: str, name: str) -> None:
    contracts.quantizer(registry.load(f"loraq.{kind}", name)())


@pytest.mark.parametrize("name", registry.names("loraq.pre_transform"))
def test_pre_transform(name: str) -> None:
    contracts.pre_transform(registry.load("loraq.pre_transform", name)())


@pytest.mark.parametrize("name", registry.names("loraq.low_rank"))
@pytest.mark.parametrize("branch", registry.names("loraq.branch_quantizer"))
def test_low_rank(name: str, branch: str) -> None:
    main = registry.load("loraq.main_quantizer", "rtn")()
    contracts.low_rank(registry.load("loraq.low_rank", name)(), main, registry.load("loraq.branch_quantizer", branch)())


@pytest.mark.parametrize("name", registry.names("loraq.low_rank"))
def test_low_rank_beside_calibrated_main_codes(name: str) -> None:
    """A final rounding that reads statistics, which no step of a fit's loop does."""
    main, branch = registry.load("loraq.main_quantizer", "gptq")(), registry.load("loraq.branch_quantizer", "rtn")()
    contracts.low_rank(registry.load("loraq.low_rank", name)(), main, branch, shapes=((3, 5), (16, 64)))


@pytest.mark.parametrize("name", registry.names("loraq.packing"))
def test_packing(name: str) -> None:
    contracts.packing(registry.load("loraq.packing", name)())


@pytest.mark.parametrize("name", registry.names("loraq.metric"))
def test_metric(name: str, tmp_path: Path) -> None:
    contracts.metric(registry.load("loraq.metric", name)(), tmp_path)
