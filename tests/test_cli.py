"""The command: exit codes, what it prints for people and for programs, and its sentences for whatever goes wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import models
from command import done, loraq, process, refused
from loraq import registry
from loraq.shipped import shipped_recipes

SAMPLES = f"""
[[layers]]
match = "transformer_blocks.1.*"
skip = true
[samples]
prompts = ["a red ring", "a blue square"]
seed = 3
call = {{ {", ".join(f"{key} = {json.dumps(value)}" for key, value in models.CALL.items())} }}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, a recipe, and that recipe's result in `out`."""
    folder = tmp_path_factory.mktemp("home")
    models.saved_pipeline(folder / "model")
    models.write_recipe(folder / "recipe.toml", folder / "model", folder / "out", extra=SAMPLES)
    (folder / "printed").write_text(done(loraq("run", folder / "recipe.toml")))
    return folder


def printed_json(*arguments: object) -> Any:
    return json.loads(done(loraq(*arguments, "--json")))


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("run", "--help"), ("--version",)])
def test_help_is_exit_code_0(arguments: tuple[str, ...]) -> None:
    assert "loraq" in done(loraq(*arguments)).lower()


@pytest.mark.parametrize(
    "arguments",
    [(), ("rnu",), ("run",), ("run", "a.toml", "--nope"), ("check", "a", "b"), ("generate", "x"), ("inspect",)],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    finished = loraq(*arguments)
    assert (finished.code, finished.out) == (2, "")
    assert "Usage: " in finished.err
    assert "Traceback" not in finished.err


WITHOUT_TORCH = """
import sys
from loraq.cli import main
sys.argv = ["loraq", *sys.argv[1:]]
try:
    main()
finally:
    heavy = [name for name in ("torch", "diffusers", "transformers", "numba", "numpy") if name in sys.modules]
    sys.stderr.write(f"heavy: {heavy}")
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("list",), 0),
        (("list", "low_rank"), 0),
        (("list", "low_rank", "loraq"), 0),
        (("list", "--json"), 0),
        (("check", "quickstart"), 0),
        (("check", "{home}/recipe.toml", "--set", "low_rank.strategy=lorq"), 2),
    ],
)
def test_help_list_and_check_need_no_torch(arguments: tuple[str, ...], code: int, home: Path) -> None:
    called = [argument.format(home=home) for argument in arguments]
    found = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, *called], capture_output=True, text=True, check=False
    )
    assert found.returncode == code, found.stderr
    assert found.stderr.endswith("heavy: []"), found.stderr


def test_check_says_what_a_recipe_does_and_prints_it_whole(home: Path) -> None:
    recipe = home / "recipe.toml"
    assert done(loraq("check", recipe)) == (
        f"{recipe}: fine; pre_transform hadamard -> main_quantizer rtn -> low_rank svd -> branch_quantizer rtn\n"
    )
    found = printed_json("check", recipe, "--set", "low_rank.rank=7")
    expected = {"kind": "low_rank", "strategy": "svd", "name": "low_rank", "rank": 7, "share_down": False}
    assert found["stage"][2] == expected
    assert found["run"]["output"] == str(home / "out")
    assert found["layers"] == [{"match": ["transformer_blocks.1.*"], "skip": True}]


@pytest.mark.slow
def test_all_faults_come_at_once_a_line_each_from_a_real_process(home: Path) -> None:
    settings = ("--set", "low_rank.strategy=lorq", "--set", "run.seeed=3", "--set", "main_quantizer.weight=int5")
    sentences = refused(process("check", home / "recipe.toml", *settings)).splitlines()
    assert len(sentences) == 3
    starts = ("run.seeed: unknown key", "stage[1].weight: no format called", "stage[2].strategy: no low rank called")
    for sentence, start in zip(sentences, starts, strict=True):
        assert sentence.startswith(f"error: {home / 'recipe.toml'}: {start}")
        assert "did you mean '" in sentence


def test_shipped_recipes_are_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "quickstart" in shipped_recipes()
    for name in shipped_recipes():
        assert done(loraq("check", name)).startswith(f"{name}: fine; ")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # such as a result of that name
    assert done(loraq("check", "quickstart")).startswith("quickstart: fine; ")
    assert refused(loraq("check", "quickstrat")) == (
        f"error: there is no file 'quickstrat', and no shipped recipe of that name; shipped are "
        f"{', '.join(shipped_recipes())}; did you mean 'quickstart'?\n"
    )
    assert refused(loraq("check", "nowhere/quickstart")).endswith(
        "there is no such file; give a recipe's path or a shipped recipe's name\n"
    )
    assert set(printed_json("list", "recipe")) == set(shipped_recipes())
    assert "quickstart" in done(loraq("list", "recipe"))


def test_list_names_all_kinds_and_their_strategies() -> None:
    text = done(loraq("list"))
    found = printed_json("list")
    for kind in ("stage", "pre_transform", "main_quantizer", "low_rank", "branch_quantizer", "packing", "format"):
        assert [each["name"] for each in found[kind]] == registry.names(f"loraq.{kind}")
        line = next(line for line in text.splitlines() if line.startswith(f"{kind} "))
        assert line.split(maxsplit=1)[1] == ", ".join(registry.names(f"loraq.{kind}"))
        assert all(each["distribution"] == "loraq" and each["summary"] for each in found[kind])


def test_list_shows_what_a_kind_offers_and_a_strategys_options() -> None:
    rows = printed_json("list", "low_rank")
    text = done(loraq("list", "low_rank"))
    for row in rows:
        assert row["name"] in text
        assert row["summary"] in text
    options = printed_json("list", "low_rank", "loraq")
    assert options[0]["option"] == "steps"
    assert options[0]["default"] == 400
    assert options[0]["what"].startswith("Steps of gradient descent")
    text = done(loraq("list", "low_rank", "loraq"))
    assert all(f"  {each['option']} = " in text and each["what"] in text for each in options)
    assert {"option": "budget", "default": None, "required": False} in [
        {key: each[key] for key in ("option", "default", "required")} for each in options
    ]
    assert "no options" in done(loraq("list", "low_rank", "none"))
    assert done(loraq("list", "format", "int4")).startswith("format int4: ")
    for kind in registry.names("loraq.stage"):
        for name in registry.names(f"loraq.{kind}"):
            assert isinstance(printed_json("list", kind, name), list)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("list", "lowrank"), "no kind 'lowrank'; kinds are stage, pre_transform, "),
        (
            ("list", "low_rank", "svdd"),
            "no low rank called 'svdd'; on offer: 'alternating', ",
        ),
        (("check", "{home}"), "{home}: cannot be read: "),
        (("check", "{home}/nothing.toml"), "{home}/nothing.toml: there is no such file; give a recipe's path or"),
        (("plan", "{home}/recipe.toml", "--set", "model.folder=nothing"), "model.folder: there is no folder "),
        (
            ("plan", "{home}/recipe.toml", "--set", "model.component=vea"),
            "model.component: {home}/model has no",
        ),
        (("run", "{home}/recipe.toml", "--set", "run.device=cuda:99"), "device 'cuda:99' is not to be had here ("),
        (("run", "{home}/recipe.toml", "--set", "model.skip=*"), "{home}/model: no layer is left to quantize;"),
        (("inspect", "{home}/nothing"), "there is no folder {home}/nothing."),
        (("inspect", "{home}/model"), "{home}/model: nothing in it was packed by LoRaQ."),
        (
            ("generate", "{home}/nothing", "--prompt", "a"),
            "{home}/nothing: there is no model_index.json; ",
        ),
        (
            ("generate", "{home}/out", "--prompt", "a", "--output", "a.nothing"),
            "--output a.nothing: a picture's name",
        ),
        (("generate", "{home}/out", "--prompt", "a", "--output", "{home}"), "--output {home}: a picture's name ends"),
        (
            ("generate", "{home}/out", "--prompt", "a", "--call", "height"),
            "--call height: expected name=value, such",
        ),
        (("generate", "{home}/out", "--prompt", "a", "--device", "gpu"), "device 'gpu' is not to be had here ("),
        (
            ("generate", "{home}/out", "--prompt", "a", "--call", "hight=3"),
            "samples.call: PixArtSigmaPipeline takes",
        ),
    ],
)
def test_errors_are_one_sentence_each_on_standard_error(arguments: tuple[str, ...], sentence: str, home: Path) -> None:
    found = refused(loraq(*(argument.format(home=home) for argument in arguments)))
    assert found.startswith("error: " + sentence.format(home=home))
    assert found.count("\n") == 1


def test_the_plan_for_programs_holds_what_the_table_shows(home: Path) -> None:
    recipe = home / "recipe.toml"
    text, found = done(loraq("plan", recipe)), printed_json("plan", recipe)
    (component,) = found["components"]
    assert len(component["layers"]) == 10
    for layer in component["layers"]:
        row = next(line for line in text.splitlines() if f" {layer['name']} " in line)
        assert row.split() == [
            layer["name"], f"{layer['out']}x{layer['inn']}", "int4", "x", "int4", "int8", "x", "int8",
            str(layer["rank"]), f"{8 * layer['stored_bytes'] / layer['out'] / layer['inn']:.2f}",
            f"{layer['stored_bytes']:,}",
        ]  # fmt: skip
    assert f"({found['written_bytes']:,} bytes in safetensors files)" in text
    assert f"{found['packed_bytes']:,}" in text
    assert {each["reason"] for each in component["skipped"]} == set(re.findall(r"weights\): (.*)", text))
    assert sum(component["files"].values()) == found["written_bytes"]


def test_a_run_says_what_it_did(home: Path) -> None:
    text = (home / "printed").read_text()
    found = printed_json("run", home / "recipe.toml")
    assert found["already_done"]
    for layer in found["layers"]:
        row = next(line for line in text.splitlines() if f" {layer['name']} " in line)
        shown = [f"{layer['error_before']:.4f}", f"{layer['error_after']:.4f}", f"{layer['stored_bytes']:,}"]
        assert all(word in row.split() for word in shown)
        assert layer["error_after"] < layer["error_before"]
    total = found["total"]
    assert total["quantized_layers"] == len(found["layers"]) == 10
    assert f"{total['effective_bits']:.2f} bits a quantized weight" in text
    assert f"error {total['error_before']:.4f} without the branch and {total['error_after']:.4f} with it" in text
    again = done(loraq("run", home / "recipe.toml"))
    assert f"{home / 'out'}  was finished already: " in again
    assert again.splitlines()[:20] == text.splitlines()[:20]


def test_the_samples_picture_shows_all_prompts_twice(home: Path) -> None:
    with Image.open(home / "out" / "samples.png") as picture:
        picture.load()
        assert picture.width > 2 * 192
    assert f"{home / 'out' / 'samples.png'}  16-bit beside quantized" in (home / "printed").read_text()
    assert {path.name for path in (home / "out").iterdir() if path.is_file()} == {
        "loraq.json", "model_index.json", "samples.png",
    }  # fmt: skip
    (home / "out" / "samples.png").unlink()
    done(loraq("run", home / "recipe.toml"))
    assert (home / "out" / "samples.png").exists(), "drawn again where it is missing"


def test_inspect_says_what_is_in_a_result(home: Path, tmp_path: Path) -> None:
    text, found = done(loraq("inspect", home / "out")), printed_json("inspect", home / "out")
    assert list(found["components"]) == ["transformer"]
    component = found["components"]["transformer"]
    assert component["class"] == "PixArtTransformer2DModel"
    assert component["layers"] == 10
    assert component["plugins"] == {}
    assert sum(component["files"].values()) > component["packed_bytes"] + component["kept_bytes"]
    assert f"{component['layers']} packed layers, {component['quantized_weights']:,} weights" in text
    assert f"{component['effective_bits']:.2f} bits each" in text
    assert all(f" {layer['name']} " in text for layer in found["provenance"]["report"]["layers"])
    assert "made with loraq " in text
    lone = models.copy_of(home / "out" / "transformer", tmp_path / "lone")
    assert list(printed_json("inspect", lone)["components"]) == [""]
    assert done(loraq("inspect", lone)).startswith(f"{lone}  PixArtTransformer2DModel")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 99}, "format version 99, this LoRaQ reads versions 1 and 2: upgrade loraq"),
        ({"layouts": [{}]}, "its quantization_config is malformed ("),
        (
            {"layers": {"proj_in": 0}},
            "6 packed tensors are missing or not as config.json says, the first is 'proj_",
        ),
        ({"layers": 3}, "its quantization_config is malformed ("),
    ],
)
def test_inspect_refuses_a_spoilt_config(change: dict[str, Any], sentence: str, home: Path, tmp_path: Path) -> None:
    folder = models.copy_of(home / "out", tmp_path / "spoilt")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    assert sentence in refused(loraq("inspect", folder))
    path.write_text("{")
    assert "cannot be read as JSON" in refused(loraq("inspect", folder))


def test_inspect_notices_a_truncated_shard_and_an_unfinished_run(home: Path, tmp_path: Path) -> None:
    folder = models.copy_of(home / "out", tmp_path / "spoilt")
    shard = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "it is truncated or no safetensors file" in refused(loraq("inspect", folder))
    (tmp_path / "other.unfinished").mkdir()
    assert refused(loraq("inspect", tmp_path / "other")) == (
        f"error: there is no folder {tmp_path / 'other'}; {tmp_path / 'other.unfinished'} is an unfinished run, which "
        "`loraq run` continues.\n"
    )


def test_generate_draws_pictures_with_the_recipes_settings(home: Path, tmp_path: Path) -> None:
    one = tmp_path / "new" / "one.png"
    assert done(loraq("generate", home / "out", "--prompt", "a red ring", "--output", one, "--seed", 3)) == f"{one}\n"
    with Image.open(one) as picture:
        assert picture.size == (16, 16), "the recipe's own height and width"
    prompts = ("--prompt", "a red ring", "--prompt", "a blue square")
    printed = done(loraq("generate", home / "out", *prompts, "--output", tmp_path / "two.png", "--seed", 3))
    assert printed.splitlines() == [str(tmp_path / "two-0.png"), str(tmp_path / "two-1.png")]
    assert (tmp_path / "two-0.png").read_bytes() == one.read_bytes(), "the same prompt and seed, the same picture"
    call = [option for key, value in models.CALL.items() for option in ("--call", f"{key}={json.dumps(value)}")]
    done(loraq("generate", home / "model", "--prompt", "a red ring", "--output", tmp_path / "whole.png", *call))


def test_words_in_brackets_are_no_markup(home: Path, tmp_path: Path) -> None:
    settings = ["--set", f"run.output={tmp_path / '[bold]out[/red]'}", "--set", 'model.skip=["*[/x]*", "*.[1-9].*"]']
    text = done(loraq("run", home / "recipe.toml", *settings))
    assert f"{tmp_path / '[bold]out[/red]'}  done in " in text
    assert "model.skip has '*.[1-9].*'" in text
    assert f"{tmp_path / '[bold]out[/red]'}" in done(loraq("inspect", tmp_path / "[bold]out[/red]"))


def test_a_call_that_the_pipeline_refuses_is_told_after_the_result_is_whole(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = ("--set", f"run.output={output}", "--set", "samples.call.height=17")
    assert refused(loraq("run", home / "recipe.toml", *settings)).startswith("error: samples.call: ")
    assert (output / "loraq.json").exists()
    assert sorted(path.name for path in output.glob("*.png")) == []
    done(loraq("run", home / "recipe.toml", "--set", f"run.output={output}"))
    assert (output / "samples.png").exists()
