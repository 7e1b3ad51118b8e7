"""Judging by pictures: the same noise for both, figures that are those of the pictures, gates, nothing drawn twice."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import signal
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import models
from command import Forker, done, loraq, process, refused
from loraq import evaluation, pictures
from loraq.contracts import AbstractMetric
from loraq.errors import CheckpointError, InputError, LoraqError, RegistryError
from loraq.evaluation import load_metrics
from loraq.gates import Gate, parse_gate
from loraq.generate import unlike_original
from loraq.pictures import Drawing, chosen_prompts, draw_into, fitting_batch
from loraq.samples import draw, load_pipeline

CPU = torch.device("cpu")
CALL = [f"{name}={json.dumps(value)}" for name, value in models.CALL.items()]
PROMPTS = ("a red ring", "a blue square", "a small ring on white", "a large square on black")
SAMPLES = f"""
[samples]
prompts = {json.dumps(PROMPTS)}
call = {{ {", ".join(CALL)} }}
"""


@pytest.fixture(autouse=True)
def _one_thread_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads gain nothing on pictures of 16 x 16, and on a busy machine they wait for one another."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline in `model`, and quantized in `branch` (with one) and `plain` (without)."""
    folder = tmp_path_factory.mktemp("home")
    models.saved_pipeline(folder / "model")
    for name, low_rank, extra in (("branch", "svd", SAMPLES), ("plain", "none", "")):
        recipe = folder / f"{name}.toml"
        done(loraq("run", models.write_recipe(recipe, folder / "model", folder / name, low_rank=low_rank, extra=extra)))
    return folder


@pytest.fixture(scope="module")
def kept(home: Path) -> tuple[Path, Any]:
    """(folder, report) of an evaluation of both quantized pipelines, in batches of three."""
    arguments = ("evaluate", home / "branch", home / "plain", "--against", home / "model", "--count", 7)
    output = home / "kept"
    return output, json.loads(done(loraq(*arguments, "--batch", 3, "--output", output, "--json")))


def drawing(count: int = 3, *, batch: int = 1, seed: int = 0, **call: Any) -> Drawing:
    return Drawing(prompts=chosen_prompts(PROMPTS, count), seed=seed, call=models.CALL | call, batch=batch)


def pairs_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "pairs.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def array(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path), dtype=float)


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


def test_equal_models_draw_equal_pictures(home: Path, tmp_path: Path) -> None:
    """Both get the same noise for the same place; another place, or another seed, gives another picture."""
    copy = models.copy_of(home / "model", tmp_path / "copy")
    settings = [argument for each in CALL for argument in ("--call", each)]
    found = loraq(
        *("evaluate", copy, "--against", home / "model", "--prompt", "a ring", "--count", 3, "--json"),
        *("--output", tmp_path / "out", *settings),
    )
    means = {row["metric"]: row for row in json.loads(done(found))["means"]}
    assert (means["psnr"]["mean"], means["psnr"]["low"], means["psnr"]["pictures"]) == (99.0, None, 3)
    assert means["ssim"]["mean"] == pytest.approx(1)
    drawn = [array(path) for path in sorted((tmp_path / "out" / "copy").glob("*.png"))]
    assert len(drawn) == 3
    assert not any(numpy.array_equal(drawn[place], drawn[place - 1]) for place in range(3))


def test_the_noise_is_that_of_the_seed_and_the_place_in_any_batch(home: Path, tmp_path: Path) -> None:
    """The pictures are those that `loraq generate` draws; in a batch they differ by no more than rounding."""
    plain = draw(load_pipeline(home / "model", CPU), PROMPTS, 5, models.CALL, "drawing")
    one = draw_into(tmp_path / "one", home / "model", drawing(4, seed=5), CPU)
    three = draw_into(tmp_path / "three", home / "model", drawing(4, seed=5, batch=3), CPU)
    for place, picture in enumerate(plain):
        assert numpy.array_equal(array(one[place]), numpy.asarray(picture, dtype=float))
        assert abs(array(three[place]) - array(one[place])).max() <= 1


def test_figures_are_those_of_the_pictures(kept: tuple[Path, Any]) -> None:
    folder, report = kept
    rows = pairs_in(folder)
    assert [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()] == [
        row | {name: json.loads(row[name]) for name in ("place", "seed", "psnr", "ssim")} for row in rows
    ]
    by_pipeline: dict[str, list[float]] = {"branch": [], "plain": []}
    for row in rows:
        name, place = row["pipeline"], int(row["place"])
        error = array(folder / name / f"{place:05}.png") - array(folder / "original" / f"{place:05}.png")
        assert float(row["psnr"]) == pytest.approx(10 * math.log10(255**2 / (error**2).mean()))
        assert (row["prompt"], int(row["seed"])) == (PROMPTS[place % 4], place)
        by_pipeline[name].append(float(row["psnr"]))
    assert [len(values) for values in by_pipeline.values()] == [7, 7]
    means = {(row["pipeline"], row["metric"]): row for row in report["means"]}
    for name, values in by_pipeline.items():
        assert means[name, "psnr"]["mean"] == pytest.approx(statistics.fmean(values))
        assert (means[name, "psnr"]["pictures"], means[name, "psnr"]["prompts"]) == (7, 4)
        assert means[name, "psnr"]["low"] <= means[name, "psnr"]["mean"] <= means[name, "psnr"]["high"]
    difference = report["differences"][0]
    assert (difference["pipeline"], difference["subtracted"], difference["metric"]) == ("branch", "plain", "psnr")
    assert difference["mean"] == pytest.approx(
        statistics.fmean(by_pipeline["branch"]) - statistics.fmean(by_pipeline["plain"])
    )
    assert json.loads((folder / "report.json").read_text()) == report
    assert (report["prompts"], report["pictures"], report["batch"]) == (4, 7, 3)
    assert not {"psnr", "ssim"} & {*report["left_out"]}
    assert "is none." in report["left_out"]["caption"], "it judges the shipped model alone"
    assert report["call"] == models.CALL, "the recipe's samples say how to draw"


def test_people_see_means_intervals_and_a_warning_of_few_prompts(home: Path, kept: tuple[Path, Any]) -> None:
    folder, report = kept
    arguments = ("evaluate", home / "branch", home / "plain", "--against", home / "model", "--count", 7)
    text = done(loraq(*arguments, "--batch", 3, "--output", folder))
    assert text.startswith("7 pictures of 4 prompts, seeds from 0, num_inference_steps=2, ")
    for row in report["means"]:
        assert re.search(rf"{row['pipeline']} .*{row['metric']} .*{row['mean']:.4g} .*{row['low']:.4g} to", text)
    assert "branch - plain" in text
    assert "Only 4 different prompts: the intervals are too narrow; give 20 or more." in text


def test_what_is_kept_is_not_drawn_again(home: Path, kept: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, report = kept
    before = times(folder)
    monkeypatch.setattr(pictures, "load_pipeline", lambda *_: pytest.fail("a model is loaded"))
    arguments = ("evaluate", home / "branch", home / "plain", "--against", home / "model", "--count", 7, "--json")
    assert json.loads(done(loraq(*arguments, "--batch", 3, "--output", folder))) == report
    assert times(folder) == before


def test_only_what_is_missing_damaged_or_another_picture_is_drawn(home: Path, tmp_path: Path) -> None:
    paths = draw_into(tmp_path, home / "branch", drawing(6, batch=2), CPU)
    whole = [path.read_bytes() for path in paths]
    before = times(tmp_path)
    paths[1].unlink()
    paths[2].write_bytes(whole[2][: len(whole[2]) // 2])
    paths[3].write_bytes(b"")
    paths[4].write_bytes(whole[5])
    Image.open(paths[5]).save(paths[5])  # a picture that does not say what it is
    draw_into(tmp_path, home / "branch", drawing(6, batch=2), CPU)
    assert [path.read_bytes() for path in paths] == whole
    assert times(tmp_path)["00000.png"] == before["00000.png"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "changed",
    [
        drawing(2, seed=1),
        drawing(2, batch=2),
        drawing(2, guidance_scale=2.0),
        Drawing(prompts=PROMPTS[2:], seed=0, call=models.CALL, batch=1),
    ],
    ids=["seed", "batch", "call", "prompts"],
)
def test_another_drawing_is_drawn_anew(home: Path, tmp_path: Path, changed: Drawing) -> None:
    before = {path: path.read_bytes() for path in draw_into(tmp_path, home / "model", drawing(2), CPU)}
    assert all(path.read_bytes() != before[path] for path in draw_into(tmp_path, home / "model", changed, CPU))


def test_another_model_is_drawn_anew_and_more_pictures_begin_with_those_there(home: Path, tmp_path: Path) -> None:
    draw_into(tmp_path, home / "model", drawing(2), CPU)
    before = times(tmp_path)
    draw_into(tmp_path, home / "model", drawing(4), CPU)
    assert {name: times(tmp_path)[name] for name in before} == before
    draw_into(tmp_path, home / "plain", drawing(4), CPU)
    assert all(times(tmp_path)[name] != before[name] for name in before)


@pytest.mark.slow
def test_killed_it_continues_and_ends_as_if_undisturbed(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("evaluate", home / "branch", "--against", home / "model", "--count", 24, "--batch", 2, "--json")
    forker = Forker(tmp_path / "log")
    try:
        forker.start(*arguments, "--output", output)
        deadline = time.monotonic() + 60
        while len(list(output.rglob("*.png"))) < 5 and forker.running and time.monotonic() < deadline:
            time.sleep(0.002)
        assert forker.end(signal.SIGKILL) == -signal.SIGKILL, (tmp_path / "log").read_text()
    finally:
        forker.close()
    before = times(output)
    assert 5 <= len(before) < 48
    found = done(loraq(*arguments, "--output", output))
    assert {name: times(output)[name] for name in before} == before, "no picture is drawn twice"
    undisturbed = tmp_path / "undisturbed"
    assert found == done(loraq(*arguments, "--output", undisturbed))
    for path in undisturbed.rglob("*.*"):
        assert path.read_bytes() == (output / path.relative_to(undisturbed)).read_bytes()


@pytest.mark.slow
def test_gates_end_real_processes_with_their_exit_codes(home: Path, kept: tuple[Path, Any]) -> None:
    folder, _ = kept
    arguments = ("evaluate", home / "branch", home / "plain", "--against", home / "model", "--count", 7, "--batch", 3)
    met = loraq(*arguments, "--output", folder, "--require", "psnr >= 1", "--require", "ssim<=1")
    assert "branch" in done(met)
    unmet = process(*arguments, "--output", folder, "--require", "psnr >= 98", "--json")
    assert unmet.code == 1
    assert {row["metric"] for row in json.loads(unmet.out)["means"]} == {"psnr", "ssim"}
    sentence = r"error: {0}/branch: psnr is [\d.]+, and 'psnr >= 98' is required; {0}/plain: psnr is .*\n"
    assert re.fullmatch(sentence.format(re.escape(str(home))), unmet.err)


@given(
    st.sampled_from(["psnr", "ssim", "my-metric"]),
    st.sampled_from(["mean", "low", "high"]),
    st.booleans(),
    st.integers(-1000, 1000).map(lambda value: value / 8),
)
def test_a_gate_reads_what_it_writes(metric: str, end: str, at_least: bool, bound: float) -> None:
    gate = Gate(metric=metric, end=end, at_least=at_least, bound=bound)
    assert parse_gate(str(gate)) == gate
    assert parse_gate(str(gate).replace(" ", "")) == gate


@pytest.mark.parametrize(
    "text", ["", "psnr", "psnr > 3", "psnr >= ", ">= 3", "psnr >= x", "psnr >= nan", "psnr.top >= 3"]
)
def test_other_gates_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=rf"--require '{re.escape(text)}': expected METRIC >= NUMBER or"):
        parse_gate(text)


def test_a_gate_looks_at_its_end_of_the_interval() -> None:
    found = evaluation.Interval(mean=20.0, low=19.0, high=21.0, pictures=9, prompts=9)
    alone = attrs.evolve(found, low=None, high=None)
    for text, met in [("p >= 20", True), ("p.low >= 20", False), ("p.high >= 21", True), ("p <= 19.9", False)]:
        assert parse_gate(text).is_met(found) is met
    assert parse_gate("p >= 20").is_met(alone)
    assert not parse_gate("p.low >= 1").is_met(alone), "one prompt has no interval to look at"


@attrs.frozen(kw_only=True)
class Brightness(AbstractMetric):
    """A metric that judges a picture by itself."""

    paired: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    figure: float | None = None

    def refusal(self) -> str | None:
        return None

    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        del original, prompt
        return float(numpy.asarray(picture).mean()) if self.figure is None else self.figure


def test_a_metric_without_pairs_measures_the_original_too(home: Path, tmp_path: Path) -> None:
    found = evaluation.evaluate(
        [home / "plain"], home / "model", drawing(3), {"light": Brightness()}, output=tmp_path / "o"
    )
    means = {row.pipeline: row.found.mean for row in found.means()}
    for name in ("original", "plain"):
        expected = statistics.fmean(array(tmp_path / "o" / name / f"{place:05}.png").mean() for place in range(3))
        assert means[name] == pytest.approx(expected)
    [difference] = found.differences()
    assert (difference.pipeline, difference.subtracted) == ("plain", "original")
    assert difference.found.mean == pytest.approx(means["plain"] - means["original"])
    assert found.unmet([parse_gate("light <= 0")]) == [
        f"{home / 'plain'}: light is {means['plain']:.4g}, and 'light <= 0' is required"
    ]


def test_a_figure_that_is_no_number_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraqError, match=r"metric 'light' gave nan for .*/original/00000.png; leave the metric out"):
        evaluation.evaluate(
            [home / "plain"], home / "model", drawing(1), {"light": Brightness(figure=math.nan)}, output=tmp_path
        )


def test_pictures_of_different_sizes_are_refused(home: Path, tmp_path: Path) -> None:
    other = models.copy_of(home / "model", tmp_path / "other")
    config = other / "vae" / "config.json"
    assert fitting_batch(other, {}) == 32
    small = drawing(1, batch=1)
    draw_into(tmp_path / "out" / "original", home / "model", small, CPU)
    path = draw_into(tmp_path / "out" / "other", other, small, CPU)[0]
    with Image.open(path) as picture:  # as if it drew larger ones
        text = pictures.PngImagePlugin.PngInfo()
        text.add_text("loraq", picture.info["loraq"])
        picture.resize((20, 18)).save(path, pnginfo=text)
    with pytest.raises(InputError, match=r"cannot be compared \(original draws 16 x 16, other draws 20 x 18\); give"):
        evaluation.evaluate([other], home / "model", small, {"light": Brightness()}, output=tmp_path / "out")
    config.unlink()
    assert fitting_batch(other, {}) == 1


def test_a_metric_that_lacks_its_library_is_left_out_and_the_rest_goes_on(
    home: Path, kept: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else known(name))
    metrics, left_out = load_metrics(())
    sentence = "torchmetrics is not installed; `pip install 'loraq[eval]'` brings it."
    assert "psnr" in metrics
    assert "ssim" not in metrics
    assert left_out["ssim"] == sentence
    arguments = ("evaluate", home / "branch", home / "plain", "--against", home / "model", "--count", 7, "--batch", 3)
    assert f"ssim is left out: {sentence}\n" in done(loraq(*arguments, "--output", kept[0]))
    assert (
        refused(loraq(*arguments, "--require", "ssim >= 0.9")) == f"error: metric 'ssim' is required, and {sentence}\n"
    )
    assert refused(loraq(*arguments, "--metric", "ssim")) == f"error: no metric is left: ssim: {sentence}\n"


def test_a_metric_nobody_offers_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"no metric called 'psnrr'; on offer: .*did you mean 'psnr'"):
        load_metrics(("psnrr",))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30, unique=True), st.integers(1, 60), st.integers(0, 9))
def test_prompts_come_in_turn_and_a_choice_grows(prompts: list[str], count: int, seed: int) -> None:
    assert chosen_prompts(prompts, count) == tuple((prompts * count)[:count])
    chosen = chosen_prompts(prompts, count, seed)
    assert chosen == chosen_prompts(prompts, count + 1, seed)[:-1] == chosen_prompts(prompts, count, seed)
    for start in range(0, count, len(prompts)):
        assert len(set(chosen[start : start + len(prompts)])) == min(len(prompts), count - start)
    assert set(chosen) <= set(prompts)


def test_a_file_of_prompts_is_chosen_from_at_random(home: Path, tmp_path: Path) -> None:
    (tmp_path / "sorted.txt").write_text("\n\n".join(f"a ring {number:03}" for number in range(300)))
    loraq(
        *("evaluate", home / "plain", "--against", home / "model", "--count", 2, "--seed", 3),
        *("--prompts", tmp_path / "sorted.txt", "--output", tmp_path / "out"),
        *[argument for each in CALL for argument in ("--call", each)],
    )
    expected = numpy.random.default_rng(3).permutation(300)[:2]
    assert [row["prompt"] for row in pairs_in(tmp_path / "out")] == [f"a ring {number:03}" for number in expected]


@pytest.mark.parametrize(
    ("call", "batch"), [({}, 32), ({"height": 256, "width": 128}, 8), ({"height": 2048, "width": 2048}, 1)]
)
def test_small_pictures_are_drawn_together(home: Path, call: dict[str, int], batch: int) -> None:
    assert fitting_batch(home / "model", call) == batch


def test_equal_names_are_told_apart(home: Path) -> None:
    folders = [home / "plain", home / "x" / "plain", home / "original"]
    assert evaluation._labelled(folders) == dict(zip(("plain", "plain-2", "original-2"), folders, strict=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("{home}/branch", "--against", "{home}/nothing"),
            "{home}/nothing: there is no model_index.json; give the folder of a whole diffusers pipeline.",
        ),
        (
            ("{home}/branch", "{home}/branch/transformer", "--against", "{home}/model"),
            "{home}/branch/transformer: there is no model_index.json; give",
        ),
        (("{home}/plain", "--against", "{home}/model"), "{home}/plain: its recipe records no samples, so there is no"),
        (
            ("{home}/plain", "--against", "{home}/model", "--prompts", "{home}/none.txt"),
            "--prompts {home}/none.txt: cannot be read (No such file or directory); give a text file, a prompt a line.",
        ),
        (
            ("{home}/plain", "--against", "{home}/model", "--prompts", "{home}/empty.txt"),
            "--prompts {home}/empty.txt: there is no prompt in it; give a text file",
        ),
        (
            ("{home}/plain", "--against", "{home}/model", "--prompts", "{home}/bytes.txt"),
            "--prompts {home}/bytes.txt: cannot be read (it is not UTF-8 text); give",
        ),
        (
            ("{home}/plain", "--against", "{home}/model", "--prompts", "{home}/empty.txt", "--prompt", "a"),
            "give either --prompts or --prompt, got both",
        ),
        (
            ("{home}/branch", "--against", "{home}/model", "--call", "hight=3"),
            "samples.call: PixArtSigmaPipeline takes no 'hight'; did you mean 'height'?",
        ),
        (
            ("{home}/branch", "--against", "{home}/model", "--call", "num_images_per_prompt=2", "--batch", "1"),
            "--call: one picture a prompt is compared, and PixArtSigmaPipeline drew 2 for 1 prompts; leave",
        ),
        (
            ("{home}/branch", "--against", "{home}/model", "--output", "{home}/branch/pictures"),
            "--output {home}/branch/pictures: it lies in {home}/branch, which is evaluated; choose another place.",
        ),
        (("{home}/branch", "--against", "{home}/model", "--device", "gpu"), "device 'gpu' is not to be had here ("),
        (("{home}/branch", "--against", "{home}/model", "--require", "psnr = 3"), "--require 'psnr = 3': expected"),
        (("{home}/branch", "--against", "{home}/model", "--require", "lpip <= 1"), "no metric called 'lpip'; on"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: tuple[str, ...], sentence: str, home: Path) -> None:
    (home / "empty.txt").write_text(" \n\n")
    (home / "bytes.txt").write_bytes(b"\xff\xfe")
    said = refused(loraq("evaluate", *(argument.format(home=home) for argument in arguments)))
    assert said.startswith(f"error: {sentence.format(home=home)}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("{home}/branch",), ("{home}/branch", "--against", "x", "--count", "0")])
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], home: Path) -> None:
    finished = loraq("evaluate", *(argument.format(home=home) for argument in arguments))
    assert (finished.code, finished.out) == (2, "")
    assert "Usage: " in finished.err


def test_other_weights_than_the_original_s_are_told(tmp_path: Path) -> None:
    merged, plain, other = tmp_path / "merged", tmp_path / "plain", tmp_path / "other"
    for folder, model in ((merged, {"folder": "m", "lora": [["style.safetensors", 0.8]]}), (plain, {"folder": "m"})):
        folder.mkdir()
        (folder / "loraq.json").write_text(json.dumps({"recipe": {"model": model}}))
    told = unlike_original(merged, other)
    assert told is not None
    assert "made with model.lora" in told
    assert "--against" in told
    assert unlike_original(plain, other) is None
    assert unlike_original(other, other) is None
    (plain / "loraq.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        unlike_original(plain, other)
