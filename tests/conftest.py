"""What all tests share: helpers as a module, a deterministic hypothesis profile, two torch threads at most."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests/*.py helpers: contracts, matrices, models

hypothesis.settings.register_profile("default", deadline=None, print_blob=True, max_examples=50)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
