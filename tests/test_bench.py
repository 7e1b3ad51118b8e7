"""Suites: every cell run once and never again, figures that are evaluation's own, gates, faults told all at once."""

from __future__ import annotations

import csv
import io
import itertools
import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import models
from command import Forker, done, loraq, refused
from loraq import bench, bench_figures, pictures, recipe, side_by_side, suite
from loraq.bench_console import print_result
from loraq.bench_result import recipe_text
from loraq.bootstrap import Interval
from loraq.errors import RecipeError
from loraq.gates import parse_gate
from loraq.layer import LayerRecord
from loraq.linear import PackedLinear
from loraq.plan import make_plan
from loraq.results import Cell, Metric, SuiteResult
from loraq.samples import draw_together, load_pipeline
from loraq.shipped import shipped_recipes, shipped_suites
from loraq.side_by_side import FIRST_SEED, Original, best_of
from loraq.source import open_source

CPU = torch.device("cpu")
PROMPTS = ("a red ring", "a blue square", "a small ring on white", "a large square on black")
CALL = ", ".join(f"{name} = {json.dumps(value)}" for name, value in models.CALL.items())
SUITE = f"""
title = "A small suite"
baseline = "svd"
[[recipe]]
name = "svd"
recipe = "svd.toml"
[[recipe]]
name = "plain"
recipe = "plain.toml"
[[override]]
name = "W4A4"
[[override]]
name = "W4A8"
set = ["main_quantizer.activation=int8"]
[pictures]
prompts = {json.dumps(PROMPTS)}
count = 5
batch = 2
shown = 2
metrics = ["psnr", "ssim"]
call = {{ {CALL} }}
[measure]
repeats = 1
prompts = 2
"""
LABELS = ["svd, W4A4", "svd, W4A8", "plain, W4A4", "plain, W4A8"]


@pytest.fixture(autouse=True)
def _one_thread_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, two recipes, a suite of four cells, and its result in `out`."""
    folder = tmp_path_factory.mktemp("home")
    models.saved_pipeline(folder / "model", layers=1)
    models.write_recipe(folder / "svd.toml", folder / "model", folder / "unused")
    models.write_recipe(folder / "plain.toml", folder / "model", folder / "unused", low_rank="none")
    (folder / "suite.toml").write_text(SUITE)
    (folder / "printed").write_text(done(loraq("bench", folder / "suite.toml", "--output", folder / "out")))
    return folder


def written(home: Path, text: str) -> Path:
    path = home / "other.toml"
    path.write_text(text)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob(pattern))}


def counted(folder: Path, pattern: str) -> int:
    """How many files match; a folder that is renamed meanwhile counts next time."""
    try:
        return len(list(folder.rglob(pattern)))
    except FileNotFoundError:
        return 0


def loaded(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "suite.json").read_text()))


def test_every_cell_is_there_with_its_figures(home: Path) -> None:
    found = loaded(home / "out")
    cells = {cell["label"]: cell for cell in found["cells"]}
    assert [*cells] == LABELS
    for label, cell in cells.items():
        report = json.loads((home / "out" / cell["folder"] / "loraq.json").read_text())["report"]
        assert (cell["state"], cell["model"]) == ("done", "model")
        assert cell["stored_bytes"] == report["total"]["stored_bytes"]
        assert cell["error_after"] == report["total"]["error_after"]
        assert cell["quantize_seconds"] == pytest.approx(sum(layer["seconds"] for layer in report["layers"]))
        assert min(cell["step_seconds"], cell["original_step_seconds"]) > 0
        assert cell["baseline"] == (None if label.startswith("svd") else label.replace("plain", "svd"))
        assert len(cell["run_errors"]) == len(cell["layers"]) == 10
        assert [picture["prompt"] for picture in cell["pictures"]] == [*PROMPTS[:2]]
        assert all((home / "out" / picture["path"]).is_file() for picture in cell["pictures"])
        assert recipe.from_table(tomllib.loads(cell["recipe_text"]), file=Path("x")).digest
    assert cells["plain, W4A4"]["bytes_above"] < 0
    assert cells["svd, W4A8"]["run_error_after"] < cells["svd, W4A4"]["run_error_after"]
    assert cells["svd, W4A4"]["output_error_after"] < cells["plain, W4A4"]["output_error_after"]
    assert found["baselines"] == {"model": "svd, W4A4"}
    assert (home / "out" / "report.html").is_file()


def test_figures_are_those_of_loraq_evaluate(home: Path, tmp_path: Path) -> None:
    """The same pictures are drawn by another command, and judged."""
    cells = {cell["label"]: cell for cell in loaded(home / "out")["cells"]}
    folders = [home / "out" / cells[label]["folder"] for label in ("plain, W4A8", "svd, W4A8")]
    settings = [f"{name}={json.dumps(value)}" for name, value in models.CALL.items()]
    evaluated = json.loads(
        done(
            loraq(
                *("evaluate", *folders, "--against", home / "model", "--count", 5, "--batch", 2, "--json"),
                *("--output", tmp_path / "pictures", "--metric", "psnr", "--metric", "ssim"),
                *itertools.chain(*(("--prompt", prompt) for prompt in PROMPTS)),
                *itertools.chain(*(("--call", setting) for setting in settings)),
            )
        )
    )
    interval = ("mean", "low", "high", "pictures", "prompts")
    for row in evaluated["means"]:
        label = row["pipeline"].replace("-W4A8", ", W4A8")
        assert cells[label]["figures"][row["metric"]] == {name: row[name] for name in interval}
    for row in evaluated["differences"]:
        assert cells["plain, W4A8"]["differences"][row["metric"]] == {name: row[name] for name in interval}


def test_tables_hold_the_same(home: Path) -> None:
    found = loaded(home / "out")
    cells = rows(home / "out" / "cells.csv")
    lines = [json.loads(line) for line in (home / "out" / "cells.jsonl").read_text().splitlines()]
    assert [row["label"] for row in cells] == [row["label"] for row in lines] == LABELS
    for row, line, cell in zip(cells, lines, found["cells"], strict=True):
        assert float(row["psnr"]) == line["psnr"] == cell["figures"]["psnr"]["mean"]
        assert float(row["run_error_after"]) == line["run_error_after"] == cell["run_error_after"]
        difference = cell["differences"].get("psnr", {}).get("low")
        assert line["psnr_difference_low"] == difference
        assert row["psnr_difference_low"] == ("" if difference is None else str(difference))
    layers = rows(home / "out" / "layers.csv")
    assert len(layers) == 4 * 10
    assert {row["cell"] for row in layers} == set(LABELS)
    for row in layers:
        assert 0 < float(row["output_error_after"]) < 1.01 * float(row["run_error_after"]) < 1
    pairs = rows(home / "out" / "pairs.csv")
    assert [(row["cell"], int(row["place"])) for row in pairs] == [(label, n) for label in LABELS for n in range(5)]
    for cell in found["cells"]:
        own = [float(row["psnr"]) for row in pairs if row["cell"] == cell["label"]]
        assert cell["figures"]["psnr"]["mean"] == pytest.approx(sum(own) / 5)


def test_what_is_there_is_not_done_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = loaded(home / "out")
    stamps = times(home / "out", "*.png") | times(home / "out", "*.safetensors")
    for module in (pictures, side_by_side):
        for load in ("load_pipeline", "load_source"):
            monkeypatch.setattr(module, load, lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(bench_figures, "_figures", lambda *_: pytest.fail("a picture is measured"))
    done(loraq("bench", home / "suite.toml", "--output", home / "out"))
    assert times(home / "out", "*.png") | times(home / "out", "*.safetensors") == stamps
    after = loaded(home / "out")
    assert after | {"finished": ""} == before | {"finished": ""}


def test_list_says_what_is_done(home: Path, tmp_path: Path) -> None:
    listed = json.loads(done(loraq("bench", home / "suite.toml", "--output", home / "out", "--list", "--json")))
    assert listed == dict.fromkeys(LABELS, "done")
    listed = json.loads(done(loraq("bench", home / "suite.toml", "--output", tmp_path, "--list", "--json")))
    assert listed == dict.fromkeys(LABELS, "waiting")
    text = done(loraq("bench", home / "suite.toml", "--output", home / "out", "--list", "--only", "svd*"))
    assert [line.split() for line in text.splitlines() if "svd" in line] == [
        ["svd,", w, "done"] for w in ("W4A4", "W4A8")
    ]
    sentence = refused(loraq("bench", home / "suite.toml", "--only", "svd, W4A5"))
    assert sentence == (
        "error: --only svd, W4A5: no cell matches; the first is 'svd, W4A4'; did you mean 'svd, W4A8'?\n"
    ) or sentence.endswith("did you mean 'svd, W4A4'?\n")


def test_only_runs_some_cells_with_their_baseline(home: Path, tmp_path: Path) -> None:
    arguments = ("bench", home / "suite.toml", "--output", tmp_path, "--set", "pictures.count=1")
    found = json.loads(done(loraq(*arguments, "--only", "plain, W4A8", "--json")))
    assert [cell["label"] for cell in found["cells"]] == ["svd, W4A8", "plain, W4A8"]
    assert found["cells"][1]["differences"]["psnr"]["low"] is None
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["plain-W4A8", "svd-W4A8"]
    again = json.loads(done(loraq(*arguments, "--only", "svd, W4A8", "--json")))
    assert [cell["label"] for cell in again["cells"]] == ["svd, W4A8", "plain, W4A8"], "what is done stays in the table"


def test_a_changed_recipe_remakes_its_cells_and_no_other(home: Path, tmp_path: Path) -> None:
    out = models.copy_of(home / "out", tmp_path / "out")
    text = SUITE.replace('recipe = "plain.toml"', 'recipe = "plain.toml"\nset = ["main_quantizer.group=32"]')
    stamps = times(out / "models", "*.safetensors")
    done(loraq("bench", written(home, text), "--output", out))
    after = times(out / "models", "*.safetensors")
    assert {name.split("/")[0] for name in after if after[name] != stamps[name]} == {"plain-W4A4", "plain-W4A8"}
    assert loaded(out)["cells"][2]["effective_bits"] > loaded(home / "out")["cells"][2]["effective_bits"]


def test_a_cell_that_fails_says_why_and_the_rest_goes_on(home: Path, tmp_path: Path) -> None:
    models.write_recipe(home / "bad.toml", home / "gone", home / "unused")
    text = SUITE.replace("[pictures]", "[pictures]\n", 1) + '\n[[recipe]]\nname = "bad"\nrecipe = "bad.toml"\n'
    finished = loraq("bench", written(home, text), "--output", tmp_path, "--only", "*W4A4", "--set", "pictures.count=2")
    assert finished.code == 1
    assert f"bad, W4A4 failed: model.folder: there is no folder {home / 'gone'}." in " ".join(finished.out.split("\n"))
    assert finished.err.endswith("error: bad, W4A4 failed\n")
    cells = {cell["label"]: cell for cell in loaded(tmp_path)["cells"]}
    assert [cell["state"] for cell in cells.values()] == ["done", "done", "failed"]
    assert cells["bad, W4A4"]["figures"] == {}
    assert cells["plain, W4A4"]["differences"]["psnr"]["pictures"] == 2


def test_gates_are_exit_codes(home: Path, tmp_path: Path) -> None:
    arguments = ("bench", home / "suite.toml", "--output", home / "out")
    met = ("psnr >= 1", "error_after <= 0.9", "ssim.difference_high <= 1", "step_seconds >= 0")
    done(loraq(*arguments, *itertools.chain(*(("--require", gate) for gate in met))))
    finished = loraq(*arguments, "--require", "psnr >= 98", "--require", "psnr.difference >= 5", "--json")
    assert finished.code == 1
    unmet = finished.err.splitlines()[-1].removeprefix("error: ").split("; ")
    assert len(unmet) == 4 + 2, "the baselines have no difference"
    assert unmet[0].startswith("svd, W4A4: 'psnr >= 98' is required, and found is ")
    plain = next(cell for cell in json.loads(finished.out)["cells"] if cell["label"] == "plain, W4A8")
    assert plain["gates"][1]["found"] == plain["differences"]["psnr"]["mean"]
    own = SUITE.replace('recipe = "plain.toml"', 'recipe = "plain.toml"\nrequire = ["effective_bits <= 1"]')
    finished = loraq("bench", written(home, own), "--output", models.copy_of(home / "out", tmp_path / "own"))
    assert finished.err.count("is required") == 2, "a recipe's own gates are for its cells alone"
    assert "plain, W4A8: 'effective_bits <= 1' is required, and found is " in finished.err


def test_equal_bytes_fails_a_cell_above_its_baseline(home: Path, tmp_path: Path) -> None:
    text = SUITE.replace('baseline = "svd"', 'baseline = "plain"\nequal_bytes = true')
    finished = loraq("bench", written(home, text), "--output", models.copy_of(home / "out", tmp_path / "out"))
    assert finished.code == 1
    assert finished.err.count("'bytes_above <= 0' is required, and found is") == 2
    assert "More bytes than the baseline: svd, W4A4, svd, W4A8." in finished.out


@pytest.mark.slow
def test_killed_at_any_moment_it_continues(home: Path, tmp_path: Path) -> None:
    """Finished models and pictures keep their bytes and times, and the end is that of an undisturbed run."""
    forker = Forker(tmp_path / "log")
    out = tmp_path / "out"
    kept: dict[str, int] = {}
    try:
        for shots, pattern in ((3, "*.png"), (2, "measured/*.json"), (17, "*.png")):
            forker.start("bench", home / "suite.toml", "--output", out)
            deadline = time.monotonic() + 60
            while counted(out, pattern) < shots and forker.running and time.monotonic() < deadline:
                time.sleep(0.002)
            assert forker.end(signal.SIGKILL) == -signal.SIGKILL, (tmp_path / "log").read_text()
            now = times(out, "*.png") | times(out, "*.safetensors")
            assert {name: now.get(name) for name in kept} == kept, "nothing finished is done twice"
            kept = {name: stamp for name, stamp in now.items() if ".unfinished" not in name}
    finally:
        forker.close()
    done(loraq("bench", home / "suite.toml", "--output", out))
    undisturbed, found = loaded(home / "out"), loaded(out)
    for expected, cell in zip(undisturbed["cells"], found["cells"], strict=True):
        for name in ("label", "stored_bytes", "error_after", "figures", "differences", "run_errors"):
            assert cell[name] == expected[name]
    for path in (home / "out").rglob("*.png"):
        with Image.open(path) as one, Image.open(out / path.relative_to(home / "out")) as other:
            assert one.tobytes() == other.tobytes()


def test_models_and_seeds_are_axes_too(home: Path, tmp_path: Path) -> None:
    models.saved_pipeline(home / "second", layers=1, dtype=torch.float32)
    table = SUITE[: SUITE.index("[[override]]")].replace("title", "seeds = [0, 7]\ntitle")
    table += '[[model]]\nname = "first"\nfolder = "model"\n[[model]]\nname = "second"\nfolder = "second"\n'
    made = suite.load(written(home, table + SUITE[SUITE.index("[pictures]") :]))
    labels = [cell.label for cell in made.cells]
    assert labels[:4] == ["svd, first, seed 0", "svd, first, seed 7", "svd, second, seed 0", "svd, second, seed 7"]
    assert {cell.recipe.run.seed for cell in made.cells} == {0, 7}
    assert {cell.recipe.model.folder for cell in made.cells} == {str(home / "model"), str(home / "second")}
    [compared] = {made.baseline_of(cell).label for cell in made.cells if cell.label == "plain, second, seed 7"}  # type: ignore[union-attr]
    assert compared == "svd, second, seed 7"


def test_two_models_of_one_name_are_refused(home: Path, tmp_path: Path) -> None:
    models.saved_pipeline(tmp_path / "model", layers=1)
    models.write_recipe(tmp_path / "svd.toml", tmp_path / "model", home / "unused")
    path = written(home, SUITE.replace('"svd.toml"', f'"{tmp_path / "svd.toml"}"'))
    text = refused(loraq("bench", path))
    assert "recipe: their models called 'model' are not the same one; tell them apart as [[model]]" in text
    assert len(text.splitlines()) == 1


def test_a_data_set_gives_prompts_and_seeds(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    table = {f"{place:02}": {"category": "x", "prompt": prompt} for place, prompt in enumerate(PROMPTS)}
    (folder / "meta_data.json").write_text(json.dumps(table))
    only = ("--only", "svd, W4A4", "--set", "measure.output_error=false", "--set", "measure.step_time=false")
    arguments = ("bench", home / "suite.toml", "--output", tmp_path / "out", "--set", f"pictures.prompts=mjhq:{folder}")
    found = json.loads(done(loraq(*arguments, *only, "--set", "pictures.count=3", "--json")))
    assert found["cells"][0]["step_seconds"] is None
    pairs = rows(tmp_path / "out" / "pairs.csv")
    assert [int(row["seed"]) for row in pairs] != [0, 1, 2]
    assert {row["prompt"] for row in pairs} <= set(PROMPTS)
    sentence = refused(loraq(*arguments, *only, "--set", "pictures.count=9"))
    assert sentence.startswith(f"error: pictures.prompts: mjhq:{folder}: 9 prompts are asked for and there are 4")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (("[pictures]", "[picture]"), "picture: unknown key 'picture' (a suite knows title, seeds, baseline, require"),
        (('baseline = "svd"', 'baseline = "svdd"'), "baseline: no recipe is called 'svdd'; there are svd, plain; did"),
        (('recipe = "svd.toml"', 'recipe = "quickstat"'), "there is no shipped recipe 'quickstat'; give one of"),
        (('recipe = "svd.toml"', 'recipe = "none.toml"'), "recipe[0]: "),
        (("main_quantizer.activation=int8", "main_quantizer.activation=int9"), "recipe[1] with override[1]: "),
        (('name = "plain"', 'name = "svd"'), "recipe[1].name: 'svd' is recipe[0]'s name too"),
        (('name = "W4A8"', 'name = "W4A8"\nmatch = "x*"'), "override[1].match: no recipe's name matches 'x*'; there"),
        (('name = "W4A8"', 'name = "W4A8"\nfurther = { x = ["a=b"] }'), "override[1].further: no recipe is called 'x'"),
        (("count = 5", "count = '5'"), "pictures.count: expected an integer, got '5'"),
        (("count = 5", "cuont = 5"), "pictures.cuont: unknown key 'cuont' (pictures knows prompts, count, seed"),
        (("repeats = 1", "repeats = 0"), "measure: 'repeats' must be >= 1: 0"),
        (("title", 'require = ["psnrr >= 3"]\ntitle'), "require 'psnrr >= 3': there is no metric 'psnrr'; there are"),
        (("title", 'require = ["error_after.low >= 3"]\ntitle'), "error_after is one figure; write it without '.low'"),
        (("title", "seeds = [1, 1]\ntitle"), "seeds: expected one or more numbers from 0 on, each once, got [1, 1]"),
        (('baseline = "svd"', "equal_bytes = true"), "equal_bytes: compares with the baseline's bytes; name a recipe"),
        (('name = "plain"', 'name = " "'), "recipe[1]: 'name' must be text, got ' '"),
    ],
)
def test_faults_are_told(home: Path, changed: tuple[str, str], sentence: str) -> None:
    path = written(home, SUITE.replace(*changed, 1))
    text = refused(loraq("bench", path))
    assert sentence in text, text
    assert all(line.startswith(f"error: {path}: ") for line in text.splitlines())


def test_all_faults_at_once(home: Path) -> None:
    text = SUITE.replace("count = 5", "count = 0").replace('baseline = "svd"', 'baseline = "x"\nwhat = 1')
    text = text.replace('recipe = "plain.toml"', 'recipe = "plain.toml"\nset = ["low_rank.strategy=svdd"]')
    with pytest.raises(RecipeError) as error:
        suite.load(written(home, text))
    told = "\n".join(error.value.faults)
    for part in ("what: unknown key", "pictures", "baseline: no recipe", "recipe[1]: "):
        assert part in told
    assert told.count("recipe[1]") == 1, "what is wrong with every override is told once"
    assert "there is no file 'nothing', and no shipped suite of that name; shipped are" in refused(
        loraq("bench", "nothing")
    )


@given(st.text(min_size=1, max_size=12), st.sampled_from(["label", "reason", "model"]))
def test_any_text_is_printed_as_it_is(text: str, field: str) -> None:
    cell = Cell(label="a", model="m", recipe="a", state="failed", reason="r")
    cell = attrs.evolve(cell, **{field: f"[bold]{text}"})
    result = SuiteResult(name="n", title="[red]t", cells=(cell,), metrics=())
    out = io.StringIO()
    print_result(result, Console(file=out, width=80))
    assert "[red]t" in out.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_into_the_window(width: int) -> None:
    record = LayerRecord("x", 8, 8, 2, 0.1, 0.05, 40, 1.0, "")
    interval = Interval(39.8167, 39.1001, 40.4599, 256, 256)
    cell = Cell(
        label="a long name of a recipe indeed", model="m", recipe="a long name of a recipe indeed", setting="W4A4",
        effective_bits=7.5, stored_bytes=5_898_240, error_before=0.1, error_after=0.0238, output_error_after=0.0158,
        run_error_after=0.0304, quantize_seconds=104.2, step_seconds=0.0072, original_step_seconds=0.009,
        figures={"psnr": interval}, differences={"psnr": interval}, baseline="b", bytes_above=12, layers=(record,),
    )  # fmt: skip
    metric = Metric(name="psnr", unit="dB", better="higher", what="How far each pixel is from the original's.")
    result = SuiteResult(name="n", title="t", cells=(cell,), metrics=(metric,))
    out = io.StringIO()
    print_result(result, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(out.getvalue().split())
    for part in (
        "7.50",
        "5.9 MB",
        "0.0238",
        "0.0158",
        "0.0304",
        "0.80x",
        "104.2 s",
        "39.8 [39.1, 40.5]",
        "+39.8 [+39.1, +40.5]",
    ):
        assert part in text
    assert "More bytes than the baseline: a long name of a recipe indeed." in text


def test_output_errors_are_those_of_the_inputs(home: Path) -> None:
    """By hand: every layer's input caught in the 16-bit pipeline, given to the plain layer and to the packed one."""
    folder = home / "out" / "models" / "svd-W4A4"
    source = open_source(recipe.load(home / "svd.toml").model)
    original = Original(source, ["transformer"], PROMPTS[:2], models.CALL, CPU, tokens=10**6, repeats=0)
    beside = original.beside(folder)
    assert beside.step_seconds is None
    pipeline, packed = load_pipeline(home / "model", CPU), load_pipeline(folder, CPU)
    layers = {name: each for name, each in packed.transformer.named_modules() if isinstance(each, PackedLinear)}
    caught: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, inputs in caught.items():
        module = pipeline.transformer.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, given, inputs=inputs: inputs.append(given[0].reshape(-1, given[0].shape[-1]))
        )
    for place in range(2):
        draw_together(pipeline, [PROMPTS[place]], [FIRST_SEED + place], models.CALL)
    assert set(beside.output_errors) == set(beside.run_errors) == set(beside.main_run_errors) == set(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            tokens = torch.cat(caught[name])
            wanted = tokens @ pipeline.transformer.get_submodule(name).weight.T
            approximate = tokens @ layer.dequantized().weight.T
            ran = layer(tokens) - layer.bias
            norm = wanted.norm()
            assert beside.output_errors[name] == pytest.approx(float((approximate - wanted).norm() / norm), rel=1e-3)
            assert beside.run_errors[name] == pytest.approx(float((ran - wanted).norm() / norm), rel=1e-3)
            assert beside.output_errors[name] < beside.main_run_errors[name]
    plain = original.beside(home / "out" / "models" / "plain-W4A4")
    assert plain.main_run_errors == pytest.approx(plain.run_errors, rel=1e-4), "without a branch that is all"
    assert max(abs(beside.run_errors[name] / beside.main_run_errors[name] - 1) for name in layers) > 1e-4


@given(st.integers(1, 4), st.integers(1, 3))
def test_models_take_the_step_by_turns(repeats: int, count: int) -> None:
    calls: list[int] = []
    best = best_of([lambda place=place: calls.append(place) for place in range(count)], repeats, CPU)
    assert calls == [*range(count)] * (repeats + 1)
    assert len(best) == count
    assert all(0 <= seconds < 60 for seconds in best)


def test_without_pictures_weights_alone_are_judged(home: Path, tmp_path: Path) -> None:
    """Of a lone component, too, which draws nothing."""
    text = (
        SUITE[: SUITE.index("[pictures]")] + f'[[model]]\nname = "lone"\nfolder = "{home / "model" / "transformer"}"\n'
    )
    path = written(home, text)
    printed = done(loraq("bench", path, "--output", tmp_path, "--require", "error_after <= 0.9"))
    cells = loaded(tmp_path)["cells"]
    assert [cell["state"] for cell in cells] == ["done"] * 4
    assert all(cell["figures"] == {} and cell["run_error_after"] is None for cell in cells)
    assert cells[2]["bytes_above"] < 0
    assert "step" in printed
    listed = json.loads(done(loraq("bench", path, "--output", tmp_path, "--list", "--json")))
    assert listed == dict.fromkeys(LABELS, "done")


def test_list_needs_no_torch() -> None:
    code = "import sys; from loraq.cli import main; sys.argv[1:] = ['bench', 'tiny', '--list']\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.split()[-2:] == ["waiting", "False"], found


def test_a_resolved_recipe_as_text_is_the_recipe(home: Path) -> None:
    allocated = recipe.load(shipped_recipes()["tiny-allocated"])
    text = recipe_text(allocated.to_plain())
    assert recipe.from_table(tomllib.loads(text), file=Path("/x")).digest == allocated.digest
    for path in shipped_suites().values():
        if path.stem.startswith("tiny"):
            for cell in suite.load(path).cells:
                text = recipe_text(cell.recipe.to_plain())
                assert recipe.from_table(tomllib.loads(text), file=Path("/x")).digest == cell.recipe.digest


@pytest.mark.parametrize("name", sorted(shipped_suites()))
def test_shipped_suites_are_sound(name: str) -> None:
    made = suite.load(shipped_suites()[name])
    assert made.baseline is not None
    assert made.equal_bytes
    assert made.pictures is not None
    assert len({cell.slug for cell in made.cells}) == len(made.cells) >= 12
    assert name in done(loraq("list", "suite"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny-full", "tiny-grid"])
def test_shipped_suites_compare_equal_bytes(name: str) -> None:
    """Known from the headers: no cell is planned with more bytes than its baseline, nor with 2 % fewer."""
    made = suite.load(shipped_suites()[name])
    planned = {}
    for cell in made.cells:
        plan = make_plan(open_source(cell.recipe.model), cell.recipe.pipeline(), cell.recipe.calibration)
        planned[cell.label] = plan.packed_bytes
    for cell in made.cells:
        baseline = made.baseline_of(cell)
        if baseline is not None:
            assert 0.98 < planned[cell.label] / planned[baseline.label] <= 1


def test_captions_of_the_shipped_suites_are_apart_from_calibration() -> None:
    folder = shipped_suites()["tiny"].parent
    drawn = (folder / "tiny-captions.txt").read_text().splitlines()
    calibrated = (folder.parent / "tiny-prompts.txt").read_text().splitlines()
    assert len(set(drawn)) == 256
    assert not set(drawn) & set(calibrated)


def test_gates_of_suites_read_what_they_write() -> None:
    for end in ("difference", "difference_low", "difference_high"):
        gate = suite.gate_of(f"psnr.{end} >= 2")
        assert str(gate) == f"psnr.{end} >= 2"
        assert gate.of_difference
        found = Interval(3.0, 1.0, 4.0, 9, 9)
        assert gate.is_met(found) is (end != "difference_low")
    assert not parse_gate("psnr >= 2").of_difference
    assert bench._sentence(RuntimeError("out of\nmemory")) == "RuntimeError: out of memory"
