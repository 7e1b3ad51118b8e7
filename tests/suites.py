"""Small suites for tests of the report: cells, figures, layers and pictures made up, below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from loraq.bootstrap import Interval
from loraq.layer import LayerRecord
from loraq.results import Cell, Metric, Picture, SuiteResult

NASTY = """</script><script>window.hacked=1</script>"'><img src=x onerror="window.hacked=1">&amp;"""
MODEL = "small-model"
LAYERS = ("proj_in", *(f"blocks.{block}.{part}" for block in range(3) for part in ("attn.to_q", "attn.to_k", "ff")))


def record(name: str, error: float, output: float | None = None) -> LayerRecord:
    return LayerRecord(name, 64, 128, 8, 0.1, error, 5000, 0.25, "digest", None, output)


def made_cell(place: int, folder: Path, **changes: Any) -> Cell:
    """A finished cell with figures of its own, and two pictures below `folder`."""
    label = f"method {place}"
    pictures = []
    for seed in range(2):
        path = Path(f"cell{place}-{seed}.png")
        pixels = numpy.random.default_rng([seed, place + 1]).integers(0, 255, (16, 24, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / path)
        pictures.append(Picture(prompt=f"picture {seed}", seed=seed, path=path))
    psnr, gain = 30.0 + 2.0 * place, 2.0 * place
    values: dict[str, Any] = {
        "label": label,
        "model": MODEL,
        "recipe": f"recipe-{place}",
        "effective_bits": 5.0 + place % 3,
        "stored_bytes": 1_000_000 + 250_000 * (place % 3),
        "written_bytes": 2_000_000 + 250_000 * (place % 3),
        "source_bytes": 8_000_000,
        "error_before": 0.1,
        "error_after": 0.08 / (place + 1),
        "quantize_seconds": 3.0 + place,
        "step_seconds": 0.02,
        "original_step_seconds": 0.04,
        "figures": {"psnr": Interval(psnr, psnr - 1, psnr + 1, 16, 16)},
        "differences": {} if place == 0 else {"psnr": Interval(gain, gain - 0.5, gain + 0.5, 16, 16)},
        "layers": tuple(record(name, 0.01 * (1 + (at + place) % 5)) for at, name in enumerate(LAYERS)),
        "pictures": tuple(pictures),
        "recipe_text": f'[model]\nfolder = "{label}"\n',
    }
    return Cell(**(values | changes))


def suite(folder: Path, cells: int = 5, **changes: Any) -> SuiteResult:
    """A suite of one model: `cells` finished cells and one that failed."""
    originals = []
    for seed in range(2):
        path = Path(f"original-{seed}.png")
        pixels = numpy.random.default_rng([seed, 0]).integers(0, 255, (16, 24, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / path)
        originals.append(Picture(prompt=f"picture {seed}", seed=seed, path=path))
    failed = Cell(label="broken", model=MODEL, recipe="bad", state="failed", reason="stage[0]: there is no 'hadamart'")
    values: dict[str, Any] = {
        "name": "small",
        "title": "A small suite",
        "cells": (*(made_cell(place, folder) for place in range(cells)), failed),
        "metrics": (Metric(name="psnr", unit="dB", better="higher", what="How near the pictures are."),),
        "baselines": {MODEL: "method 0"},
        "originals": {MODEL: tuple(originals)},
        "left_out": {"lpips": "its weights are not there."},
        "prompts": 16,
        "versions": {"loraq": "0.1.0"},
        "machine": {"processor": "a processor"},
        "finished": "2026-01-31T12:00:00Z",
    }
    return SuiteResult(**(values | changes))
