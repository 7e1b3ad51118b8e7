"""Runs tests/other_device.py in processes of their own: torch keeps a device made in Python as long as it lives, and
checks of its own stumble over it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = str(Path(__file__).parent / "other_device.py")
LONG = [f"{CASES}::{name}" for name in ("test_strategies", "test_under_another_default_dtype", "test_a_whole_run")]
REST = [CASES, *(part for each in LONG for part in ("--deselect", each))]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [REST, *([each] for each in LONG)], ids=["rest", "strategies", "default", "runs"])
def test_in_a_process_of_its_own(chosen: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout or " skipped" in run.stdout
