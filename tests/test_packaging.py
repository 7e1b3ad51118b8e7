"""What is shipped: every folder of code, modules that can be read, and public names that exist."""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest

import loraq
from loraq import registry

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOMES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
MODULES = sorted(path for home in HOMES.values() for path in (ROOT / home).rglob("*.py"))


def test_every_folder_of_code_is_a_package_of_the_wheel() -> None:
    found = {
        ".".join([name, *path.parent.relative_to(ROOT / home).parts])
        for name, home in HOMES.items()
        for path in (ROOT / home).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_code_that_is_imported_is_a_package() -> None:
    """A folder without __init__.py works from the checkout and is missing from the wheel."""
    for path in MODULES:
        home = next(home for home in HOMES.values() if path.is_relative_to(ROOT / home))
        if home != "recipes":  # holds the script that trains the model, which is no part of the package
            assert (path.parent / "__init__.py").exists(), path


def test_every_entry_point_leads_somewhere() -> None:
    for group, names in PROJECT["project"]["entry-points"].items():
        for name, target in names.items():
            assert name in registry.names(group), f"{group} {name}: run `pip install -e .` again"
            assert registry.offer(group, name).target == target
            assert registry.load(group, name) is not None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "every module has a docstring"
    assert len(docstring.splitlines()[0]) > 15, "whose first line stands alone"


def test_every_public_name_is_there() -> None:
    for name in loraq.__all__:
        assert getattr(loraq, name) is not None
    assert sorted(loraq._HOMES) == sorted(loraq.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        loraq.nothing  # noqa: B018


def test_no_room_imports_another() -> None:
    """The rooms meet in loraq/ alone; ruff forbids it for absolute imports, this looks at relative ones as well."""
    rooms = {"stages", "strategies", "kernels", "recipes"}
    for path in MODULES:
        room = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "loraq" and len(parts) > 1:
                    assert parts[1] not in rooms or parts[1] == room, f"{path} imports {name}"


def test_all_modules_import() -> None:
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        importlib.import_module(name)
