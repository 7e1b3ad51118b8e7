"""Recipes: each fault in its sentence, all faults at once, overrides, --set, and the way back to a table."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq import registry
from loraq.errors import InputError, RecipeError
from loraq.pipeline import Pipeline, make_stage
from loraq.recipe import Override, Recipe, from_table, load, overridden, plain_stage
from loraq.settings import toml_value

FILE = Path("some/recipe.toml")
BASE = """
[model]
folder = "model"
[run]
output = "out"
[[stage]]
kind = "pre_transform"
strategy = "hadamard"
[[stage]]
kind = "main_quantizer"
strategy = "rtn"
[[stage]]
kind = "low_rank"
strategy = "svd"
rank = 4
[[stage]]
kind = "branch_quantizer"
strategy = "rtn"
weight = "int6"
"""
STAGES = {"pre_transform": 0, "main_quantizer": 1, "low_rank": 2, "branch_quantizer": 3}


def table(extra: str = "") -> dict[str, Any]:
    return tomllib.loads(BASE + extra)


def changed(path: str, value: object) -> dict[str, Any]:
    """The base recipe with `value` at `path`, whose first key is a section or a stage's kind."""
    result = table()
    first, key = path.split(".")
    section = result["stage"][STAGES[first]] if first in STAGES else result.setdefault(first, {})
    section[key] = value
    return result


def judged(recipe: dict[str, Any], *set_: str) -> Recipe:
    return from_table(recipe, file=FILE, settings=set_)


def faults(recipe: dict[str, Any], *set_: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        judged(recipe, *set_)
    assert str(caught.value).splitlines() == list(caught.value.faults), "a line each"
    found = caught.value.faults
    assert all(fault.startswith(f"{FILE}: ") for fault in found), "the file is named"
    return tuple(fault.removeprefix(f"{FILE}: ") for fault in found)


def fault(recipe: dict[str, Any], *set_: str) -> str:
    found = faults(recipe, *set_)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("low_rank.rank", True, "stage[2].rank: expected an integer, got True"),
        ("low_rank.rank", "32", "stage[2].rank: expected an integer, got '32'"),
        ("low_rank.rank", 32.9, "stage[2].rank: expected an integer, got 32.9"),
        ("low_rank.rank", [4], "stage[2].rank: expected an integer, got [4]"),
        ("run.seed", "0", "run.seed: expected an integer, got '0'"),
        ("run.seed", False, "run.seed: expected an integer, got False"),
        ("run.device", 0, "run.device: expected a string or an array of strings, got 0"),
        ("run.output", ["out"], "run.output: expected a string, got ['out']"),
        ("model.folder", 3, "model.folder: expected a string, got 3"),
        ("model.component", 3, "model.component: expected a string or an array of strings, got 3"),
        ("model.skip", ["a", 1], "model.skip: expected a string or an array of strings, got ['a', 1]"),
        ("samples.prompts", 3, "samples.prompts: expected a string or an array of strings, got 3"),
        ("main_quantizer.weight", 4, "stage[1].weight: expected a format's name, got 4"),
        ("main_quantizer.group", 64.0, "stage[1].group: expected an integer or 'row', got 64.0"),
        ("main_quantizer.group", "rows", "stage[1].group: expected an integer or 'row', got 'rows'"),
        ("main_quantizer.scale", "least", "stage[1].scale: expected 'search' or 'amax', got 'least'"),
        ("main_quantizer.activation", 8, "stage[1].activation: expected a format's name or {format, group}, got 8"),
        ("low_rank.name", 3, "stage[2].name: expected a string, got 3"),
    ],
)
def test_wrong_types_are_refused_exactly(path: str, value: object, sentence: str) -> None:
    recipe = changed(path, value)
    if path.startswith("samples"):
        recipe["samples"].setdefault("prompts", ["a"])
    assert fault(recipe) == sentence


def test_a_number_may_be_written_as_an_integer_where_a_float_is_meant() -> None:
    recipe = changed("low_rank.strategy", "loraq")
    recipe["stage"][2]["learning_rate"] = 3
    strategy = judged(recipe).stage[2].strategy  # type: ignore[attr-defined]
    assert strategy.learning_rate == 3.0
    assert isinstance(strategy.learning_rate, float)
    recipe["stage"][2]["learning_rate"] = "3"
    assert fault(recipe) == "stage[2].learning_rate: expected a number, got '3'"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (
            "low_rank.rnak",
            4,
            "stage[2].rnak: unknown key 'rnak' (low_rank svd knows rank, budget, share_down); did you",
        ),
        ("run.outptu", "o", "run.outptu: unknown key 'outptu' (run knows output, seed,"),
        ("model.components", [], "model.components: unknown key 'components' (model knows folder, hub, revision,"),
        ("low_rank.strategy", "svdd", "stage[2].strategy: no low rank called 'svdd'; on offer: "),
        ("low_rank.kind", "low_rnk", "stage[2].kind: no stage called 'low_rnk'; on offer: "),
        ("main_quantizer.weight", "itn4", "stage[1].weight: no format called 'itn4'; on offer: "),
        ("main_quantizer.activation", {"fromat": "int8"}, "stage[1].activation: unknown key 'fromat' (an activation"),
        (
            "main_quantizer.activation",
            {"format": 8},
            "stage[1].activation: an activation's 'format' is a",
        ),
        ("main_quantizer.activation", {"group": 64}, "stage[1].activation: an activation needs 'format'"),
        ("main_quantizer.group", 0, "stage[1]: 'group' must be an integer of at least 1 or 'row', got 0"),
        ("run.threads", 0, "run: 'threads' must be >= 1: 0"),
        ("run.output", "", "run: 'output' must be a folder's path, got ''"),
        ("run.output", "a\0b", "run: 'output' must be a folder's path, got 'a\\x00b'"),
        ("model.hub", "owner/name", "model: give either 'folder' or 'hub', got both"),
        ("model.revision", "main", "model: 'revision' goes with 'hub'"),
        ("model.component", [], "model: 'component' must name one or more components, each once, got []"),
        (
            "model.component",
            ["a", "a"],
            "model: 'component' must name one or more components, each",
        ),
        ("samples.prompts", [], "samples: 'prompts' is empty"),
    ],
)
def test_unknown_words_and_values_are_refused_with_what_would_do(path: str, value: object, sentence: str) -> None:
    assert fault(changed(path, value)).startswith(sentence)


@pytest.mark.parametrize(
    ("path", "value", "near"),
    [
        ("run.outptu", "o", "output"),
        ("low_rank.strategy", "lorq", "loraq"),
        ("low_rank.kind", "low_rnk", "low_rank"),
        ("main_quantizer.weight", "in4", "int4"),
        ("main_quantizer.activation", "int88", "int8"),
        ("main_quantizer.activation", {"fromat": "int8"}, "format"),
    ],
)
def test_a_near_miss_is_guessed(path: str, value: object, near: str) -> None:
    assert fault(changed(path, value)).endswith(f"; did you mean '{near}'?")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[model]\nfolder = 'm'", "run: is missing; a recipe needs [run]"),
        ("[run]\noutput = 'm'", "model: is missing; a recipe needs [model]"),
        ("model = 3", "model: expected a table, got 3"),
        ("[model]", "model: give either 'folder' or 'hub', got neither"),
        ("[run]", "run.output: is missing"),
        ("stage = 3", "stage: expected [[stage]] tables, got 3"),
        ("stage = [3]", "stage[0]: expected a table, got 3"),
        ("[[stage]]\nstrategy = 'rtn'", "stage[0].kind: is missing"),
        ("[[stage]]\nkind = ['a']", "stage[0].kind: expected a string, got ['a']"),
        ("[[stage]]\nkind = 'low_rank'", "stage[0].strategy: is missing; on offer: alternating, "),
        ("layers = 3", "layers: expected [[layers]] tables, got 3"),
        ("layers = [3]", "layers[0]: expected a table, got 3"),
        (
            "[laiers]",
            "laiers: unknown key 'laiers' (a recipe knows model, run, stage, layers, samples, calibration, allocate)",
        ),
        ("[samples]", "samples.prompts: is missing"),
        ("[samples]\nprompts = 'a'\ncall = 3", "samples.call: expected a table, got 3"),
        ("[samples]\nprompts = 'a'\ncall = { at = 2026-01-01 }", "samples.call: 'at' must be text, a number, true or"),
        ("[[stage]]\nkind = 'low_rank'\nstrategy = 'none'", "stage: there is no stage 'main_quantizer'; add one"),
    ],
)
def test_structure_is_judged(text: str, sentence: str) -> None:
    assert any(found.startswith(sentence) for found in faults(tomllib.loads(text)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strategy": "svd"}, "'low_rank' needs either 'rank' or 'budget', got neither"),
        ({"strategy": "svd", "rank": 4, "budget": 9}, "'low_rank' needs either 'rank' or 'budget', got both"),
        (
            {"strategy": "svd", "rank": 0},
            "'low_rank.rank' must be at least 1, got 0; for no branch use",
        ),
        ({"strategy": "none", "rank": 4}, "'low_rank' makes no branch, so it takes neither 'rank' nor 'budget'"),
        ({"strategy": "svd", "budget": "32@16"}, "'budget' is a number of bytes or like 'rank32@16'"),
        ({"strategy": "svd", "budget": "rank0@16"}, "'budget' is a number of bytes or like 'rank32@16'"),
        ({"strategy": "svd", "budget": "rank32"}, "'budget' is a number of bytes or like 'rank32@16'"),
        ({"strategy": "svd", "budget": f"rank{'9' * 5000}@16"}, "'budget' is a number of bytes or like"),
        (
            {"strategy": "svd", "budget": -1},
            "'budget' is a number of bytes or like 'rank32@16' (rank and bits), got",
        ),
    ],
)
def test_the_size_of_the_branch_is_judged(options: dict[str, Any], sentence: str) -> None:
    recipe = table()
    recipe["stage"][2] = {"kind": "low_rank"} | options
    assert fault(recipe).startswith(f"stage[2]: {sentence}")


def test_a_budget_is_a_number_or_a_likeness() -> None:
    assert fault(changed("low_rank.budget", True)) == "stage[2].budget: expected an integer or a string, got True"
    recipe = table()
    del recipe["stage"][2]["rank"]
    for budget in (0, 4096, "rank32@16"):
        recipe["stage"][2]["budget"] = budget
        assert judged(recipe).stage[2].budget == budget  # type: ignore[attr-defined]


def test_all_faults_are_told_at_once_and_each_once() -> None:
    recipe = table("""
[[layers]]
match = "*"
low_rank.rnk = 3
[[layers]]
main_quantiser.weight = "int4"
low_rank = 3
skip = 1
[sampels]
prompts = []
""")
    recipe["run"] = {"outptu": "o", "seed": "a"}
    recipe["model"]["hub"] = "a/b"
    recipe["stage"][0]["largest_block"] = 3
    recipe["stage"][1] |= {"weight": "int5", "group": True}
    recipe["stage"][2]["budget"] = 5
    recipe["stage"][3]["kind"] = "branch"
    found = faults(recipe, "low_rank.damp=3", "nothing.at=3")
    expected = [
        "--set nothing.at=3:", "sampels:", "model: give either", "run.outptu:", "run.seed:", "run.output: is missing",
        "stage[0]: 'largest_block' must be a power of two, got 3", "stage[1].weight:", "stage[1].group:",
        "stage[2].damp: unknown key", "stage[3].kind:", "layers[1].low_rank: expected a table",
        "layers[1].match: is missing", "layers[1].skip:",
    ]  # fmt: skip
    for start in expected:
        assert sum(each.startswith(start) for each in found) == 1, (start, found)
    assert len(set(found)) == len(found)
    assert len(found) == len(expected), found


def test_faults_of_the_stages_together_are_told_beside_others() -> None:
    recipe = changed("run.seed", -1)
    recipe["stage"] = [stage for stage in recipe["stage"] if stage["kind"] != "main_quantizer"]
    found = faults(recipe)
    assert found[0] == "run: 'seed' must be >= 0: -1"
    assert found[1].startswith("stage: there is no stage 'main_quantizer'; add one")


def test_one_stage_listed_twice_is_one_fault() -> None:
    recipe = table()
    recipe["stage"].append(dict(recipe["stage"][2]))
    assert fault(recipe) == "stage: stage 'low_rank' is listed twice; only one is possible"


def test_two_stages_of_one_name_are_refused() -> None:
    recipe = table()
    recipe["stage"].append({"kind": "pre_transform", "strategy": "smooth"})
    assert fault(recipe).startswith("stage[4].name: 'pre_transform' is stage[0]'s name too; give one of them another")
    recipe["stage"][4]["name"] = "low_rank"
    assert fault(recipe).startswith("stage[4].name: 'low_rank' is stage[2]'s name too")


def test_a_repeatable_stage_may_be_listed_twice_with_names() -> None:
    recipe = table("[[layers]]\nmatch = '*'\nsmoothing.strategy = 'none'\n")
    recipe["stage"].append({"kind": "pre_transform", "strategy": "smooth", "name": "smoothing"})
    made = judged(recipe)
    bound = made.pipeline().layer_recipe("a")
    assert bound is not None
    assert [type(each).__name__ for each in bound.transforms] == ["Hadamard", "NoTransform"]


@pytest.mark.parametrize("name", ["match", "skip", "model", "run", "samples", ""])
def test_a_stage_cannot_take_a_word_that_means_something_else(name: str) -> None:
    assert fault(changed("low_rank.name", name)).startswith(f"stage[2].name: '{name}' means something else")


def test_an_override_needs_a_known_stage_and_cannot_change_its_kind() -> None:
    assert fault(table("[[layers]]\nmatch='*'\nlow_rnk.rank=3")) == (
        "layers[0].low_rnk: no stage of that name; a [[layers]] table has match, skip and the stages' names, "
        "pre_transform, main_quantizer, low_rank, branch_quantizer; did you mean 'low_rank'?"
    )
    for key in ("kind", "name"):
        found = fault(table(f"[[layers]]\nmatch='*'\nlow_rank.{key}='packing'"))
        assert found == f"layers[0].low_rank.{key}: a [[layers]] table cannot change a stage's {key}"


def test_an_override_is_judged_with_the_options_it_lies_over() -> None:
    assert fault(table("[[layers]]\nmatch='*'\nlow_rank.strategy='loraq'")) == (
        "layers[0].low_rank: 'low_rank' needs either 'rank' or 'budget', got neither"
    )
    assert fault(table("[[layers]]\nmatch='*'\nlow_rank.steps=3")).startswith("layers[0].low_rank.steps: unknown key")


def options_of(recipe: dict[str, Any], layer: str) -> dict[str, Any] | None:
    """The main quantizer's and the low-rank stage's options for one layer."""
    made = judged(recipe)
    if made.pipeline().layer_recipe(layer) is None:
        return None
    stages = overridden(made.stage, [each for each in made.layers if each.matches(layer)])
    return plain_stage(stages[1]) | plain_stage(stages[2])


def test_later_overrides_win() -> None:
    recipe = table("""
[[layers]]
match = "blocks.*"
main_quantizer.group = 32
main_quantizer.scale = "amax"
[[layers]]
match = ["blocks.0.*", "last"]
main_quantizer.group = 16
""")
    options = {name: options_of(recipe, name) for name in ("blocks.0.a", "blocks.1.a", "last", "first")}
    assert {name: (each["group"], each["scale"]) for name, each in options.items() if each} == {
        "blocks.0.a": (16, "amax"),
        "blocks.1.a": (32, "amax"),
        "last": (16, "search"),
        "first": (64, "search"),
    }


def test_rank_and_budget_replace_one_another() -> None:
    found = options_of(table("[[layers]]\nmatch='*'\nlow_rank.budget='rank8@16'"), "a")
    assert found is not None
    assert found["budget"] == "rank8@16"
    assert "rank" not in found
    again = options_of(table("[[layers]]\nmatch='*'\nlow_rank.budget=9\n[[layers]]\nmatch='*'\nlow_rank.rank=2"), "a")
    assert again is not None
    assert again["rank"] == 2
    assert "budget" not in again


def test_another_strategy_drops_the_base_options() -> None:
    recipe = changed("low_rank.strategy", "loraq")
    recipe["stage"][2]["steps"] = 7
    recipe["layers"] = [{"match": "*", "low_rank": {"strategy": "svd", "rank": 3}}]
    found = options_of(recipe, "a")
    assert found is not None
    assert (found["strategy"], found["rank"], "steps" in found) == ("svd", 3, False)
    recipe["layers"] = [{"match": "*", "low_rank": {"strategy": "none"}}]
    found = options_of(recipe, "a")
    assert found is not None
    assert "rank" not in found
    recipe["layers"] = [{"match": "*", "low_rank": {"strategy": "loraq", "learning_rate": 1.0}}]
    found = options_of(recipe, "a")
    assert found is not None
    assert (found["steps"], found["learning_rate"], found["rank"]) == (7, 1.0, 4), "the same strategy keeps them"


def test_skip_is_taken_back_by_a_later_table() -> None:
    recipe = table("[[layers]]\nmatch='a.*'\nskip=true\n[[layers]]\nmatch='a.b'\nskip=false")
    assert options_of(recipe, "a.c") is None
    assert options_of(recipe, "a.b") is not None
    assert options_of(recipe, "b") is not None


def test_overrides_that_only_together_do_not_go_name_the_layer() -> None:
    import torch

    stages = [make_stage("main_quantizer", "rtn"), make_stage("low_rank", "svd", rank=2)]
    overrides = [
        Override(match=("*",), options={"low_rank": {"strategy": "none"}}),
        Override(match=("0",), options={"low_rank": {"rank": 2}}),
    ]
    with pytest.raises(InputError, match=r"layer '0', with all .* tables that match it.*'low_rank' makes no branch"):
        Pipeline(stages, overrides=overrides).quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("low_rank.rank=64", 64),
        ("low_rank.rank= 64 ", 64),
        ("low_rank.budget=rank8@16", "rank8@16"),
        ('low_rank.budget="rank8@16"', "rank8@16"),
        ("low_rank.strategy=loraq", "loraq"),
        ("run.output=out/x=1", "out/x=1"),
        ("run.output=2026-01-01", "2026-01-01"),
        ("model.component=vae", ("vae",)),
        ('model.component=["vae", "transformer"]', ("vae", "transformer")),
        ("samples.prompts=a ring", ("a ring",)),
    ],
)
def test_set_overrides_an_option(setting: str, value: object) -> None:
    recipe, before = table(), table()
    extra = ["low_rank.rank=4"] if "strategy" in setting else []
    made = judged(recipe, setting, *extra)
    assert recipe == before, "the table that was given stays as it is"
    key = setting.split("=")[0].split(".")[1]
    if setting.startswith("low_rank.strategy"):
        assert plain_stage(made.stage[2])["strategy"] == value
    else:
        home: Any = made.stage[2] if setting.startswith("low") else getattr(made, setting.split(".")[0])
        assert getattr(home, key) == value


def test_set_makes_sections_and_tables() -> None:
    made = judged(table(), "samples.prompts=['a']", "samples.call.height=16", "samples.call.clean=false")
    assert made.samples is not None
    assert made.samples.call == {"height": 16, "clean": False}
    made = judged(table(), "main_quantizer.activation.format=int8", "main_quantizer.activation.group=token")
    assert plain_stage(made.stage[1])["activation"] == {"format": "int8", "group": "token"}


def test_set_prefers_a_stage_of_that_name_and_refuses_to_guess() -> None:
    recipe = table()
    recipe["stage"][0]["name"] = "first"
    recipe["stage"].insert(1, {"kind": "pre_transform", "strategy": "hadamard", "name": "second"})
    assert fault(recipe, "pre_transform.largest_block=2") == (
        "--set pre_transform.largest_block=2: 2 stages are of that kind; use a stage's name: first, second"
    )
    assert plain_stage(judged(recipe, "second.largest_block=2").stage[1])["largest_block"] == 2
    del recipe["stage"][1]["name"]
    named = judged(recipe, "pre_transform.largest_block=2").stage[1]
    assert plain_stage(named)["largest_block"] == 2


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("low_rank.rank", "--set low_rank.rank: expected path=value, such as low_rank.rank=64"),
        ("rank=3", "--set rank=3: expected path=value"),
        ("=3", "--set =3: expected path=value"),
        ("low_rank..rank=3", "--set low_rank..rank=3: expected path=value"),
        (
            "lowrank.rank=3",
            "--set lowrank.rank=3: no section or stage 'lowrank'; there are model, run, samples, calibration",
        ),
        ("low_rank.rank=abc", "stage[2].rank: expected an integer, got 'abc'"),
        ("low_rank.rank=true", "stage[2].rank: expected an integer, got True"),
        ("low_rank.rnk=3", "stage[2].rnk: unknown key 'rnk'"),
        ("run.seed=", "run.seed: expected an integer, got ''"),
    ],
)
def test_a_wrong_setting_is_a_fault(setting: str, sentence: str) -> None:
    assert fault(table(), setting).startswith(sentence)


def test_toml_values_and_bare_words() -> None:
    assert [toml_value(text) for text in ("3", "3.5", "true", "'a'", "a b", "[1, 2]", "{a = 1}", "", "[" * 9999)] == [
        3, 3.5, True, "a", "a b", [1, 2], {"a": 1}, "", "[" * 9999,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file; give a recipe's path or a shipped recipe's name"),
        (b"[model", "is not TOML: "),
        (b"\xff\xfe", "cannot be read: "),
        (b"a = " + b"[" * 9999, "is not TOML: it is nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {sentence}")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)


def test_folders_are_relative_to_the_recipe_and_home_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / "recipe.toml"
    path.write_text(BASE)
    assert load(path).model.folder == str(tmp_path / "model")
    made = load(path, ["model.folder=~/model", "run.output=~/out"])
    assert (made.model.folder, made.run.output) == ("/home/somebody/model", "/home/somebody/out")


def test_the_plain_recipe_comes_back() -> None:
    recipe = table("""
[samples]
prompts = ["a"]
call = { height = 16 }
[[layers]]
match = ["a.*", "b"]
skip = true
[[layers]]
match = "a.b"
skip = false
low_rank = { strategy = "loraq", budget = "rank8@16" }
main_quantizer.activation = { format = "int8", group = "token" }
""")
    made = judged(recipe)
    again = from_table(made.to_plain(), file=Path("recipe.toml"))
    assert again == made
    assert again.to_plain() == made.to_plain()
    assert from_table(tomllib.loads(BASE), file=FILE).to_plain()["layers"] == []


def test_every_registered_strategy_comes_back_from_its_plain_form() -> None:
    for kind in registry.names("loraq.stage"):
        for name in registry.names(f"loraq.{kind}"):
            size = {"rank": 4} if kind == "low_rank" and name != "none" else {}
            made = make_stage(kind, name, **size)
            plain = plain_stage(made)
            assert make_stage(plain.pop("kind"), plain.pop("strategy"), **plain) == made


PATHS = [
    ("model",), ("model", "folder"), ("model", "component"), ("run",), ("run", "output"), ("run", "seed"), ("stage",),
    ("stage", 0), ("stage", 0, "largest_block"), ("stage", 1, "weight"), ("stage", 1, "activation"),
    ("stage", 1, "group"), ("stage", 2, "rank"), ("stage", 2, "budget"), ("stage", 2, "strategy"), ("stage", 2, "kind"),
    ("stage", 2, "name"), ("stage", 3, "scale"), ("layers",), ("layers", 0), ("layers", 0, "match"),
    ("layers", 0, "skip"), ("layers", 0, "low_rank"), ("layers", 0, "low_rank", "rank"), ("layers", 0, "low_rank", "x"),
    ("samples",), ("samples", "prompts"), ("samples", "call"), ("samples", "call", "height"), ("what",),
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.times(),
    st.sampled_from(["int4", "none", "rtn", "svd", "loraq", "row", "token", "rank8@16", "*", "match", "\0"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("format"), inner, max_size=3)
    ),
    max_leaves=5,
)
SETTINGS = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["low_rank", "run", "model", "samples", "stage", "layers", "", "pre_transform"]),
    st.sampled_from([".", "", "..", ".activation.", ".a.b."]) | st.text(max_size=3),
    st.sampled_from(["rank", "strategy", "kind", "name", "output", ""]),
    st.just("") | st.text(max_size=6).map("={}".format),
)


def place(tree: Any, path: tuple[str | int, ...], value: object) -> None:
    """Set `value` at `path`, as far as the tree still has such a place."""
    for step in path[:-1]:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return
    try:
        tree[path[-1]] = value
    except (IndexError, TypeError):
        return


@settings(max_examples=250)
@given(
    mutations=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=4),
    set_=st.lists(SETTINGS, max_size=2),
)
def test_no_table_raises_anything_but_an_input_error(
    mutations: list[tuple[tuple[str | int, ...], object]], set_: list[str]
) -> None:
    recipe = table("[[layers]]\nmatch='*'\nlow_rank.rank=2\n[samples]\nprompts=['a']\ncall.height=16")
    for path, value in mutations:
        place(recipe, path, copy.deepcopy(value))
    try:
        made = from_table(recipe, file=FILE, settings=set_)
    except InputError:
        return
    assert from_table(made.to_plain(), file=Path("recipe.toml")).to_plain() == made.to_plain()
