"""Pages of mapped files are given back, large outputs get large pages, and nothing is ever lost by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loraq.kernels.cpu import pages
from loraq.kernels.cpu.backend import CpuKernel
from loraq.kernels.cpu.pages import expect, give_back
from random_layers import inputs_of, layout_of, same, tensors_of
from safetensors.torch import load_file, save_file

from loraq import ops


def told(tensor: torch.Tensor, field: str) -> str:
    """What /proc/self/smaps says in `field` of the mapping that holds `tensor`."""
    inside, address = False, tensor.data_ptr()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split(maxsplit=1)
        if "-" in head and not head.endswith(":"):
            start, end = (int(each, 16) for each in head.split("-"))
            inside = start <= address < end
        elif inside and head == f"{field}:":
            return rest[0]
    raise AssertionError("the tensor lies nowhere")


def resident(tensor: torch.Tensor) -> int:
    """How many bytes of the mapping that holds `tensor` are in memory."""
    return int(told(tensor, "Rss").split()[0]) * 1024


@pytest.fixture
def mapped(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors of 4 MB and of a few bytes, mapped from a file."""
    values = torch.arange(1_000_000, dtype=torch.int32)
    save_file({"large": values, "small": values[:9].clone()}, tmp_path / "file.safetensors")
    return load_file(tmp_path / "file.safetensors")


def test_pages_go_and_come_back(mapped: dict[str, torch.Tensor]) -> None:
    assert int(mapped["large"].sum(dtype=torch.int64)) == 499_999_500_000
    before = resident(mapped["large"])
    assert before >= 4_000_000
    give_back(mapped.values())
    if resident(mapped["large"]) == before:
        pytest.skip("this system does not take the advice")
    assert resident(mapped["large"]) < before // 4
    assert torch.equal(mapped["large"], torch.arange(1_000_000, dtype=torch.int32))
    assert mapped["small"].tolist() == list(range(9))


def test_what_was_written_stays(mapped: dict[str, torch.Tensor]) -> None:
    mapped["large"].mul_(2)
    give_back(mapped.values())
    assert torch.equal(mapped["large"], torch.arange(1_000_000, dtype=torch.int32) * 2)


def test_other_memory_stays() -> None:
    values = torch.arange(1_000_000)
    give_back([values, torch.empty(0)])
    assert resident(values) >= 8_000_000
    assert torch.equal(values, torch.arange(1_000_000))


def test_a_layer_from_a_file_runs_and_is_saved_as_it_was(tmp_path: Path) -> None:
    layout = layout_of(640, 640, 64)
    tensors = tensors_of(layout)
    save_file(tensors, tmp_path / "layer.safetensors")
    loaded = load_file(tmp_path / "layer.safetensors")
    kernel, input = CpuKernel(), inputs_of(20, 640)
    for _ in range(2):
        assert same(kernel.linear(input, loaded, None, layout), ops.reference(input, tensors, None, layout))
    save_file(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "layer.safetensors").read_bytes()


def test_large_outputs_are_to_have_large_pages() -> None:
    """Whether the system finds any is its own affair."""
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists():
        pytest.skip("this system has no large pages")
    output = torch.empty(10_000_001)
    assert "hg" not in told(output, "VmFlags").split()
    expect(output)
    output.fill_(1)
    assert "hg" in told(output[1_000_000:], "VmFlags").split()  # its first page belongs to the C library
    assert int(output.sum(dtype=torch.float64)) == 10_000_001


def test_small_ones_and_none_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda *advice: asked.append(advice))
    for count in (0, 1, 1000, 2**23 - 1):
        expect(torch.empty(count))
    assert not asked
    expect(torch.empty(2**23))
    assert len(asked) == 1


def test_a_large_output_is_the_reference_s() -> None:
    layout = layout_of(1056, 64)
    tensors, input = tensors_of(layout), inputs_of(8_000, 64)
    output = CpuKernel().linear(input, tensors, None, layout)
    assert output.numel() * 4 > 32 * 2**20
    assert same(output, ops.reference(input, tensors, None, layout))
