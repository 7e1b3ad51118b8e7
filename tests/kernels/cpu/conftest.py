"""What the tests of the CPU kernel share: random_layers.py beside this file, and a backend for each machine at hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from loraq.kernels.cpu import machines
from loraq.kernels.cpu.backend import CpuKernel

from loraq import ops


@pytest.fixture(params=[each.name for each in machines.MACHINES if machines.runs(each)], scope="session")
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    """The backend on each machine that this processor has the instructions for; test_arm.py has another's."""
    return CpuKernel(request.param)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> CpuKernel:
    """The fastest backend, taken by every layer that it does not refuse."""
    backend = CpuKernel()
    monkeypatch.setattr(ops, "kernel_for", lambda layout, device: backend if backend.refusal(layout) is None else None)
    return backend


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch with two threads, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
