"""The report of a suite: what is in the file, and that nothing in it runs or loads; the rest needs a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loraq.bootstrap import Interval
from loraq.html_report import write_report
from loraq.html_report.embedding import FACTOR, amplified, gallery
from loraq.html_report.figures import decimals_for, duration, fixed, significant, verdict
from loraq.html_report.strip import in_order, strip
from loraq.html_report.summary import is_baseline, summary
from loraq.report import Skipped
from loraq.results import Cell, GateResult, Metric, Picture, SuiteResult
from suites import LAYERS, MODEL, NASTY, made_cell, record, suite


class Page(HTMLParser):
    """What a page holds: text, attributes, and the contents of scripts and styles."""

    VOID = frozenset(("meta", "link", "img", "br", "input", "circle", "path"))

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag, (tag, self.getpos())

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, text: str) -> None:
        inside = self._open[-1] if self._open else ""
        {"script": self.scripts, "style": self.styles}.get(inside, self.texts).append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def read(result: SuiteResult, folder: Path) -> Page:
    return Page(write_report(result, folder).read_text(encoding="utf-8"))


def test_everything_is_in_the_file(tmp_path: Path) -> None:
    result = suite(tmp_path)
    page = read(result, tmp_path)
    for cell in result.cells:
        assert cell.label in page.text
        assert cell.recipe in page.text
        assert " ".join(cell.recipe_text.split()) in page.text
    for told in (
        "A small suite", "there is no 'hadamart'", "1 failed", "a processor", "2026-01-31T12:00:00Z", "16 pictures",
        "its weights are not there.", "How near the pictures are.", "37.0 to 39.0", "+7.5 to +8.5", "25% of 16-bit",
        "Highest psnr 38.0 dB by method 4 (+7.5 to +8.5 against method 0); lowest weight error 0.0160 by method 4",
    ):  # fmt: skip
        assert told in page.text, told
    (model,) = page.data["models"]
    assert model["strip"]["layers"] == list(LAYERS)
    assert [scene["prompt"] for scene in model["pictures"]["scenes"]] == ["picture 0", "picture 1"]
    assert model["first"] == ["method 0", "method 4"]  # the baseline and the highest PSNR


def test_it_says_its_own_size(tmp_path: Path) -> None:
    path = write_report(suite(tmp_path), tmp_path)
    told = re.search(r"This file: ([\d.]+) kB", path.read_text(encoding="utf-8"))
    assert told
    assert float(told[1]) == pytest.approx(path.stat().st_size / 1000, abs=0.2)


def test_nothing_is_loaded_and_only_the_own_script_may_run(tmp_path: Path) -> None:
    page = read(suite(tmp_path), tmp_path)
    assert all(value.startswith("#") or value == "data:," for value in page.values("href"))
    assert not page.values("src")
    assert "url(" not in page.styles[0]
    assert "@import" not in page.styles[0]
    assert not re.search(r"https?:", page.styles[0] + page.scripts[1])
    assert not page.values("style"), "the policy forbids style attributes"
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    for text, directive in ((page.styles[0], "style-src"), (page.scripts[1], "script-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'; img-src data:" in policy


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    result = suite(tmp_path, cells=1)
    original = result.originals[MODEL][0]
    cell = attrs.evolve(
        result.cells[0],
        label=NASTY,
        model=NASTY,
        recipe=NASTY,
        overrides=(NASTY,),
        setting=NASTY,
        recipe_text=NASTY,
        layers=(record(NASTY, 0.02),),
        skipped=(Skipped(NASTY, 10, NASTY),),
        pictures=(attrs.evolve(result.cells[0].pictures[0], prompt=NASTY),),
        gates=(GateResult(gate=NASTY, met=False),),
    )
    failed = Cell(label=f"2 {NASTY}", model=NASTY, recipe=NASTY, state="failed", reason=NASTY)
    metric = Metric(name="psnr", unit=NASTY, better="higher", what=NASTY)
    bad = attrs.evolve(
        result,
        name=NASTY,
        title=NASTY,
        cells=(cell, failed),
        metrics=(metric,),
        originals={NASTY: (attrs.evolve(original, prompt=NASTY),)},
        left_out={NASTY: NASTY},
        versions={NASTY: NASTY},
        machine={NASTY: NASTY},
    )
    page = read(bad, tmp_path)
    assert len(page.scripts) == 2
    assert "img" not in {tag for tag, _, _ in page.attributes}
    assert NASTY in page.text
    (model,) = page.data["models"]
    assert (model["name"], model["cells"][0]["label"], model["strip"]["layers"]) == (NASTY, NASTY, [NASTY])
    assert model["pictures"]["scenes"][0]["prompt"] == NASTY


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written.append(write_report(suite(tmp_path / name), tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_a_suite_without_cells_pictures_layers_or_figures_is_shown_as_well(tmp_path: Path) -> None:
    whole = suite(tmp_path)
    assert "The suite has no cells" in read(attrs.evolve(whole, cells=()), tmp_path).text
    assert "there is no 'hadamart'" in read(attrs.evolve(whole, cells=whole.cells[-1:]), tmp_path).text
    bare = attrs.evolve(whole.cells[0], layers=(), pictures=(), figures={}, differences={}, effective_bits=None)
    page = read(attrs.evolve(whole, cells=(bare,), metrics=(), originals={}, left_out={}, machine={}), tmp_path)
    assert "No pictures were measured." in page.text
    assert page.data["models"][0]["strip"] is None
    assert page.data["models"][0]["pictures"] is None


def test_pictures_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    result = suite(tmp_path)
    (tmp_path / "cell1-0.png").unlink()
    (tmp_path / "cell2-0.png").write_text("no picture")
    whole = (tmp_path / "cell3-0.png").read_bytes()
    (tmp_path / "cell3-0.png").write_bytes(whole[: len(whole) // 2])
    pictures = read(result, tmp_path).data["models"][0]["pictures"]
    both = (pictures["labels"], pictures["shots"])
    there = {label: [shot is not None for shot in shots] for label, shots in zip(*both, strict=True)}
    assert there["method 0"] == [True, True]
    assert there["method 1"] == there["method 2"] == there["method 3"] == [False, True]


# The table.


def test_the_best_of_each_column_is_marked_within_its_setting(tmp_path: Path) -> None:
    cells = [made_cell(place, tmp_path, setting="ab"[place % 2]) for place in range(6)]
    table = summary(attrs.evolve(suite(tmp_path), cells=tuple(cells)), MODEL)
    best = {
        column.key: {row.cell.label for row in table.rows if row.figures[place].best}
        for place, column in enumerate(table.columns)
    }
    assert best["mean.psnr"] == {"method 4", "method 5"}  # the highest of each setting
    assert best["after"] == {"method 4", "method 5"}  # the lowest
    assert best["quantize"] == {"method 0", "method 1"}
    assert best["bits"] == {"method 0", "method 3"}
    assert not best["before"]  # all are equal, and nobody's merit
    assert not best["step"]


def test_each_settings_baseline_is_named_be_it_alone(tmp_path: Path) -> None:
    first = made_cell(0, tmp_path, label="base a", recipe="base", setting="a")
    alone = made_cell(0, tmp_path, label="base b", recipe="base", setting="b")
    other = made_cell(1, tmp_path, label="other", recipe="other", setting="a", baseline="base a")
    orphan = made_cell(2, tmp_path, label="orphan", recipe="other", setting="c", differences={})  # its baseline failed
    result = attrs.evolve(suite(tmp_path), cells=(first, alone, other, orphan), baselines={MODEL: "base a"})
    assert [cell.label for cell in result.cells if is_baseline(result, cell)] == ["base a", "base b"]


def test_cells_of_one_setting_stand_together_under_their_own_names(tmp_path: Path) -> None:
    places = [("svd", "a"), ("svd", "b"), ("loraq", "a"), ("loraq", "b")]
    cells = [made_cell(0, tmp_path, label=f"{name}, {setting}", setting=setting) for name, setting in places]
    result = attrs.evolve(suite(tmp_path), cells=tuple(cells))
    rows = summary(result, MODEL).rows
    assert [(row.name, row.cell.label) for row in rows] == [
        ("svd", "svd, a"), ("loraq", "loraq, a"), ("svd", "svd, b"), ("loraq", "loraq, b"),
    ]  # fmt: skip
    assert [cell["label"] for cell in read(result, tmp_path).data["models"][0]["cells"]] == [
        row.cell.label for row in rows
    ]
    alone = attrs.evolve(result, cells=result.cells[:1])
    assert summary(alone, MODEL).rows[0].name == "svd, a"


def test_sizes_that_are_practically_equal_have_no_best(tmp_path: Path) -> None:
    cells = [made_cell(place, tmp_path, effective_bits=7.5 + 0.01 * place) for place in range(3)]
    table = summary(attrs.evolve(suite(tmp_path), cells=tuple(cells)), MODEL)
    assert not any(row.figures[0].best for row in table.rows)


def test_differences_say_which_is_better_by_the_metrics_own_direction(tmp_path: Path) -> None:
    found = {"loss": Interval(-0.2, -0.3, -0.1, 16, 16)}
    cells = (made_cell(0, tmp_path, figures=found, differences={}), made_cell(1, tmp_path, differences=found))
    metric = Metric(name="loss", unit="", better="lower", what="")
    table = summary(attrs.evolve(suite(tmp_path), cells=cells, metrics=(metric,)), MODEL)
    place = [column.key for column in table.columns].index("difference.loss")
    assert (table.rows[1].figures[place].mark, table.rows[1].figures[place].text) == ("better", "−0.20")
    assert verdict(Interval(0.1, -0.1, 0.3, 16, 16), "higher") == "unclear"
    assert verdict(Interval(0.2, None, None, 1, 1), "higher") == "unclear"
    assert verdict(Interval(0.2, 0.1, 0.3, 16, 16), "lower") == "worse"


def test_the_16_bit_model_has_a_row_of_what_is_known(tmp_path: Path) -> None:
    known = {MODEL: {"psnr": Interval(41.0, 40.0, 42.0, 16, 16)}}
    table = summary(attrs.evolve(suite(tmp_path), original_figures=known), MODEL)
    shown = {column.key: table.reference[place].text for place, column in enumerate(table.columns)}
    assert {key: text for key, text in shown.items() if text} == {"written": "8.0 MB", "mean.psnr": "41.0"}


def test_a_figure_that_is_not_finite_is_told_and_sorts_last(tmp_path: Path) -> None:
    bad = made_cell(1, tmp_path, error_after=math.inf, layers=(record("proj_in", math.nan),))
    page = read(attrs.evolve(suite(tmp_path), cells=(made_cell(0, tmp_path), bad)), tmp_path)
    assert " inf " in page.text
    (model,) = page.data["models"]
    assert "after" not in model["cells"][1]["points"]
    assert model["strip"]["values"]["after"][1] == [None] * len(LAYERS)


def test_gates_that_are_missed_say_what_was_found(tmp_path: Path) -> None:
    gates = (GateResult(gate="psnr >= 24", met=False, found=23.1), GateResult(gate="ssim >= 0.9", met=True, found=0.95))
    page = read(_gated(tmp_path, gates), tmp_path)
    assert "1 of 2 missed" in page.text
    assert "psnr >= 24: 23.10" in page.text


def _gated(folder: Path, gates: tuple[GateResult, ...]) -> SuiteResult:
    whole = suite(folder, cells=2)
    return attrs.evolve(whole, cells=(attrs.evolve(whole.cells[0], gates=gates), *whole.cells[1:]))


# Figures.


@given(st.floats(-1e6, 1e6), st.integers(0, 5))
def test_fixed_is_the_number_rounded(value: float, decimals: int) -> None:
    text = fixed(value, decimals).replace("−", "-")
    assert abs(float(text) - value) <= 0.5000001 * 10**-decimals
    assert not re.fullmatch(r"-0\.?0*", text)
    assert fixed(value, decimals, sign=True)[0] in ("+−" if float(text) else "0")


@given(st.floats(1e-9, 1e9) | st.floats(-1e9, -1e-9))
def test_significant_keeps_three_digits(value: float) -> None:
    found = float(significant(value).replace("−", "-").replace(",", ""))
    assert found == pytest.approx(value, rel=0.0051)


@given(st.floats(1e-4, 1e5))
def test_a_duration_is_what_it_says(seconds: float) -> None:
    units = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
    words = duration(seconds).split()
    found = sum(float(words[at]) * units[words[at + 1]] for at in range(0, len(words), 2))
    last = {"ms": 1e-3 if seconds >= 0.1 else 1e-4, "s": 1.0 if "min" in words else 0.1, "min": 60.0}[words[-1]]
    assert abs(found - seconds) <= 0.5 * last * (1 + 1e-9)


@given(st.floats(1e-3, 100), st.floats(-50, 50))
def test_an_intervals_half_shows_one_or_two_digits(half: float, mean: float) -> None:
    decimals = decimals_for([Interval(mean, mean - half, mean + half, 8, 8)])
    assert decimals == 0 or 2.9 <= half * 10**decimals <= 30.1


# Layers.


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_layers_keep_the_models_order(first: list[bool], second: list[bool]) -> None:
    names = [f"layer.{place}" for place in range(12)]
    picked = [[name for name, taken in zip(names, each, strict=True) if taken] for each in (first, second)]
    cells = [
        Cell(label=str(place), model=MODEL, recipe="r", layers=tuple(record(name, 0.1) for name in each))
        for place, each in enumerate([*picked, names])
    ]
    assert in_order(cells) == names
    partly = in_order(cells[:2])
    assert sorted(partly) == sorted({*picked[0], *picked[1]})
    for each in picked:
        assert [name for name in partly if name in each] == each


def test_a_layer_that_a_cell_leaves_in_16_bits_is_empty_there() -> None:
    both = Cell(label="a", model=MODEL, recipe="r", layers=(record("x", 0.02), record("y", 0.04, output=0.5)))
    one = Cell(
        label="b",
        model=MODEL,
        recipe="r",
        layers=(record("x", 0.03),),
        skipped=(Skipped("y", 9, "the recipe skips it"),),
    )
    found = strip([both, one])
    assert found is not None
    assert found["values"]["after"] == [[0.02, 0.04], [0.03, None]]
    assert found["values"]["output"] == [[None, 0.5], [None, None]]
    assert found["reasons"][1] == {"y": "the recipe skips it"}
    assert "run" not in found["values"]  # nobody measured it


# Pictures.


def opened(uri: str) -> Image.Image:
    assert uri.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_a_difference_is_the_distance_times_the_factor(seed: int) -> None:
    first, second = numpy.random.default_rng(seed).integers(0, 256, (2, 5, 7, 3), dtype=numpy.uint8)
    expected = numpy.minimum(255, FACTOR * numpy.abs(first.astype(int) - second.astype(int)))
    found = numpy.asarray(amplified(Image.fromarray(first), Image.fromarray(second)))
    assert (found == expected).all()


def test_small_pictures_are_kept_exactly(tmp_path: Path) -> None:
    result = suite(tmp_path)
    cells = {cell.label: cell.pictures for cell in result.cells if cell.pictures}
    found = gallery(result.originals[MODEL], cells, tmp_path)
    assert found is not None
    shot = found.cells["method 3"][1]
    assert shot is not None
    assert shot.difference is not None
    original, picture = (Image.open(tmp_path / name) for name in ("original-1.png", "cell3-1.png"))
    assert (numpy.asarray(opened(shot.picture)) == numpy.asarray(picture)).all()
    assert (numpy.asarray(opened(shot.difference)) == numpy.asarray(amplified(picture, original))).all()
    square = (numpy.asarray(picture, float) - numpy.asarray(original, float)) ** 2
    assert shot.psnr == pytest.approx(10 * math.log10(255**2 / square.mean()))
    assert "without loss" in found.note


def test_large_pictures_become_smaller_and_then_fewer(tmp_path: Path) -> None:
    pictures = []
    for seed in range(3):
        pixels = numpy.random.default_rng(seed).normal(128, 40, (300, 900, 3)).clip(0, 255).astype(numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
        pictures.append(Picture(prompt="noise", seed=seed, path=Path(f"{seed}.png")))
    notes, sizes = [], []
    for limit in (10_000_000, 300_000, 30_000):
        found = gallery(pictures, {"cell": pictures[::-1]}, tmp_path, limit)
        assert found is not None
        shots = [shot for shot in (*found.originals, *found.cells["cell"]) if shot]
        taken = sum(len(shot.picture) + len(shot.difference or "") for shot in shots)
        assert taken < 1.2 * limit
        sizes.append((max(opened(shots[0].picture).size), len(found.scenes)))
        notes.append(found.note)
    assert sizes[0] == (768, 3)
    assert sizes[1][0] < 768
    assert sizes[2] == (256, 1)
    assert "from 900 to 768 pixels" in notes[0]
    assert "the first 1 of 3" in notes[2]


# Colours.


def luminance(code: str) -> float:
    channels = [int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_have_the_contrast_of_wcag_aa(tmp_path: Path, theme: int) -> None:
    style = read(suite(tmp_path), tmp_path).styles[0]
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colours = {name: codes[theme] for name, *codes in pairs}
    assert {"page", "raised", "wash", "ink", "soft", "accent", "bad", "edge"} <= set(colours)
    for least, names in ((4.5, ("ink", "soft", "accent", "bad")), (3.0, ("edge",))):
        for text, ground in itertools.product(names, ("page", "raised", "wash") if least > 3 else ("page",)):
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (text, ground)
