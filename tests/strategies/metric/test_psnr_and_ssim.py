"""PSNR and SSIM against formulas written out, and their laws."""

from __future__ import annotations

import importlib.util
import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.metric.psnr import Psnr
from loraq.strategies.metric.ssim import Ssim
from PIL import Image

from loraq.errors import InputError


def noise(seed: int, width: int = 20, height: int = 17, low: int = 0, high: int = 256) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=numpy.uint8)


def picture(array: numpy.ndarray) -> Image.Image:
    return Image.fromarray(array)


def psnr(first: numpy.ndarray, second: numpy.ndarray) -> float:
    return Psnr().measure(picture(first), picture(second), "")


def ssim(first: numpy.ndarray, second: numpy.ndarray) -> float:
    return Ssim().measure(picture(first), picture(second), "")


def plain_psnr(first: numpy.ndarray, second: numpy.ndarray) -> float:
    squares = [(int(a) - int(b)) ** 2 for a, b in zip(first.ravel(), second.ravel(), strict=True)]
    return 20 * math.log10(255) - 10 * math.log10(sum(squares) / len(squares))


def plain_ssim(first: numpy.ndarray, second: numpy.ndarray) -> float:
    """Pixel by pixel, as the paper writes it: weighted means, variances and covariance of an 11 x 11 window.

    At the border the picture is mirrored, as torchmetrics does.
    """
    steps = numpy.arange(-5, 6)
    line = numpy.exp(-(steps**2) / (2 * 1.5**2))
    window = numpy.outer(line, line) / line.sum() ** 2
    figures = []
    for colour in range(3):
        a, b = (numpy.pad(each[..., colour] / 255, 5, mode="reflect") for each in (first, second))
        for row in range(5, a.shape[0] - 5):
            for column in range(5, a.shape[1] - 5):
                x = a[row - 5 : row + 6, column - 5 : column + 6]
                y = b[row - 5 : row + 6, column - 5 : column + 6]
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                variance_x = (window * (x - mean_x) ** 2).sum()
                variance_y = (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                one, two = 0.01**2, 0.03**2
                top = (2 * mean_x * mean_y + one) * (2 * covariance + two)
                figures.append(top / ((mean_x**2 + mean_y**2 + one) * (variance_x + variance_y + two)))
    return float(numpy.mean(figures))


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 256))
def test_psnr_is_its_formula(seed: int, high: int) -> None:
    first, second = noise(seed), noise(seed + 1, high=high)
    assert psnr(first, second) == pytest.approx(plain_psnr(first, second))
    assert psnr(first, second) == psnr(second, first)


@pytest.mark.parametrize(("step", "decibels"), [(1, 48.1308), (2, 42.1102), (255, 0.0)])
def test_psnr_of_a_known_distance(step: int, decibels: float) -> None:
    black = numpy.zeros((4, 4, 3), numpy.uint8)
    assert psnr(black, black + numpy.uint8(step)) == pytest.approx(decibels, abs=1e-4)


def test_equal_pictures_count_99_db() -> None:
    assert psnr(noise(0), noise(0)) == 99.0


@pytest.mark.parametrize(("low", "high"), [(0, 256), (100, 110)])
def test_ssim_is_its_formula(low: int, high: int) -> None:
    first, second = noise(0, low=low, high=high), noise(1, low=low, high=high)
    mixed = ((first.astype(int) * 3 + second) // 4).astype(numpy.uint8)
    assert ssim(first, mixed) == pytest.approx(plain_ssim(first, mixed), abs=1e-9)
    assert ssim(first, second) == pytest.approx(plain_ssim(first, second), abs=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_ssim_is_symmetric_and_at_most_one(seed: int) -> None:
    first, second = noise(seed), noise(seed + 1)
    assert ssim(first, second) == pytest.approx(ssim(second, first), abs=1e-12)
    assert -1 <= ssim(first, second) < 1
    assert ssim(first, first) == pytest.approx(1)


def test_a_picture_smaller_than_half_the_window_is_refused() -> None:
    assert ssim(noise(0, width=6), noise(0, width=6)) == pytest.approx(1)
    with pytest.raises(InputError, match=r"metric 'ssim': it mirrors 5 pixels .* the picture is 5 x 17; draw larger"):
        ssim(noise(0, width=5), noise(1, width=5))


def test_ssim_says_which_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ssim().refusal() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Ssim().refusal() == "torchmetrics is not installed; `pip install 'loraq[eval]'` brings it."
    assert Psnr().refusal() is None
