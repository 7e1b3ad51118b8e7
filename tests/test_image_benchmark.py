"""The benchmark that compares methods by pictures: its captions, its shares, and that nothing is drawn twice."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def _loaded() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "images.py"
    spec = importlib.util.spec_from_file_location("benchmark_images", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # attrs looks its classes' module up
    spec.loader.exec_module(module)
    return module


images = _loaded()


@given(st.integers(1, 400), st.data())
def test_wilsons_interval_solves_its_equation(total: int, data: st.DataObject) -> None:
    """Its ends are the shares from which the one that was found is 1.96 standard errors away."""
    right = data.draw(st.integers(0, total))
    share, low, high = images.wilson(right, total)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / total, abs=1e-9)
    assert high > low, "even where all are right, nothing is certain"


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (32, 12), (256, 96), (900, 96), (960, 96)])
def test_captions_are_different_and_three_in_eight_are_new_to_the_model(count: int, held_out: int) -> None:
    scenes = images.chosen_scenes(count, seed=0)
    new = set(images.split_scenes()[1])
    assert len(scenes) == len(set(scenes)) == count
    assert sum(scene in new for scene in scenes) == held_out
    assert scenes == images.chosen_scenes(count, seed=0)
    assert count in (1, 960) or set(scenes) != set(images.chosen_scenes(count, seed=1))


@pytest.mark.slow
def test_a_table_and_the_same_again_without_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    settings = ["--pictures", "4", "--steps", "2", "--activation", "int4", "--budget", "rank8@16", "--workers", "1"]
    settings += [
        "--method",
        "rtn",
        "--method",
        "svd W16",
        "--keep",
        str(tmp_path),
        "--json",
        str(tmp_path / "rows.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["images.py", *settings])

    def table() -> tuple[list[str], list[dict[str, Any]]]:
        images.main()
        return capsys.readouterr().out.splitlines()[:-1], json.loads((tmp_path / "rows.json").read_text())

    lines, rows = table()
    assert [row["method"] for row in rows] == ["rtn", "svd W16"]
    pictures = {
        name: numpy.load(tmp_path / f"{name}.npz")["pictures"].astype(float)
        for name in ("original", "hadamard-Aint4-rtn", "hadamard-Aint4-rank8@16-svd-W16")
    }
    original, *quantized = pictures.values()
    ratios = [10 * numpy.log10(255**2 / ((each - original) ** 2).mean(axis=(1, 2, 3))) for each in quantized]
    assert [row["psnr"]["mean"] for row in rows] == pytest.approx([ratio.mean() for ratio in ratios])
    assert rows[0]["difference"]["mean"] == pytest.approx((ratios[0] - ratios[1]).mean())
    assert rows[1]["difference"] is None
    assert rows[0]["stored_bytes"] < rows[1]["stored_bytes"]
    monkeypatch.setattr(images, "draw_together", lambda *_: pytest.fail("a picture is drawn"))
    monkeypatch.setattr(images.loraq.Pipeline, "quantize", lambda *_: pytest.fail("a model is quantized"))
    assert table() == (lines, rows)
    monkeypatch.setattr(images, "code_digest", lambda: "of other code")
    with pytest.raises(pytest.fail.Exception, match="a picture is drawn"):
        images.main()
