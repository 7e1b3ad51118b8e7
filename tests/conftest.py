"""What all tests share: helpers as a module, a deterministic hypothesis profile, one torch thread each."""

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
def _one_thread() -> None:
    torch.set_num_threads(1)
