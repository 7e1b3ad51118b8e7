"""benchmarks/gpu.py without a GPU: its checks in the emulator, its timing with a clock that counts calls."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from loraq.kernels.cuda import build, emulator, plan, runner
from loraq.kernels.cuda.emulated import EmulatedDevice

PATH = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # attrs looks annotations up there
    spec.loader.exec_module(module)
    return module


def test_every_layer_is_checked(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    sizes = ["--shape", "72x64", "--tokens", "3", "--tokens", "17"]
    assert gpu.main(["--emulate", *sizes, "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert "8 of 8 cases equal to the reference, bit for bit" in output
    assert output.count(" equal ") >= 8
    found = json.loads(path.read_text())
    assert [figure["case"]["layer"] for figure in found["figures"]] == [name for name in gpu.LAYERS for _ in range(2)]
    assert found["cases_left"] == 0


def test_a_wrong_kernel_is_seen(gpu: ModuleType) -> None:
    class Wrong:
        """One code in the product is off."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(emulator, name)
            return found if name != "mma_s8" else lambda *words: found(words[0] ^ 1, *words[1:])

    figure = gpu.check(gpu.Case("w4a8", 72, 64, 3), EmulatedDevice(machine=Wrong()), torch.Generator().manual_seed(0))
    assert not figure.right
    assert 0 < figure.worst < 1


def test_an_output_that_nothing_wrote_is_seen(gpu: ModuleType) -> None:
    class Silent:
        """Stores of the output go nowhere."""

        def __getattr__(self, name: str) -> Any:
            return (lambda *operands: None) if name == "stg16_if" else getattr(emulator, name)

    figure = gpu.check(gpu.Case("w4a8", 72, 64, 3), EmulatedDevice(machine=Silent()), torch.Generator().manual_seed(0))
    assert figure.equal == 0


class Counting:
    """A clock for which a call takes 2 us, or 1 in a graph."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def __call__(self, calls: Sequence[Callable[[], torch.Tensor]]) -> tuple[float, float]:
        for call in calls:
            assert call().isfinite().all()
        self.runs.append(len(calls))
        return 2e-6 * len(calls), 1e-6 * len(calls)


def test_times_are_a_call_s_and_copies_exceed_the_cache(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Counting()
    cases = gpu.cases_of(["72x64"], [3], ["w4a8"])
    cache_bytes = 12_000
    figures = gpu.run(
        cases, EmulatedDevice(), clock, torch.Generator().manual_seed(0),
        seed=1, cache_bytes=cache_bytes, seconds=60, json_path=None, machine="stand-in",
    )  # fmt: skip
    assert (figures[0].eager, figures[0].graph) == (pytest.approx(2), pytest.approx(1))
    assert (figures[0].bf16_eager, figures[0].bf16_graph) == (pytest.approx(2), pytest.approx(1))
    packed, plain = clock.runs
    assert packed * (0.53 * 72 * 64 + 2 * 3 * 136) >= 2 * cache_bytes
    assert plain * (2 * 72 * 64 + 2 * 3 * 136) >= 2 * cache_bytes
    assert packed > plain
    assert "1.00    1.00" in capsys.readouterr().out


def test_out_of_time_keeps_what_is_there(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    cases = gpu.cases_of(["40x32"], [1, 2, 3], ["w4a8"])
    steps = iter([0.0, 1.0, 11.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.time, "monotonic", lambda: next(steps))
        figures = gpu.run(
            cases, EmulatedDevice(), gpu.no_clock, torch.Generator().manual_seed(0),
            seed=1, cache_bytes=0, seconds=10, json_path=path, machine="stand-in",
        )  # fmt: skip
    assert len(figures) == 1
    assert json.loads(path.read_text())["cases_left"] == 2
    assert "out of time: 2 cases were left out" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["86", "90", "90a"])
def test_cubins_built_beforehand_are_all_that_it_needs(gpu: ModuleType, architecture: str) -> None:
    there = set(build.standard_programs(architecture))
    for case in gpu.cases_of(gpu.SHAPES, gpu.TOKENS, list(gpu.LAYERS)):
        planned = plan.Plan.of(case.layout())
        needed = runner.programs_of(planned, torch.bfloat16, torch.bfloat16, True, architecture)
        assert set(needed) <= there


def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "loraq: torch finds no CUDA GPU\n"
