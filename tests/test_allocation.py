"""[allocate]: the choices found, written down, replayed, continued; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import models
from command import done, loraq, refused
from loraq import probing
from loraq.errors import CheckpointError, InputError, RecipeError
from loraq.journal import work_folder
from loraq.knapsack import select
from loraq.linear import PackedLinear
from loraq.pipeline import bind, layer_generator, quantize_layer
from loraq.plan import Plan, make_plan
from loraq.probing import look_ahead, random_tokens
from loraq.recipe import Recipe, load, overridden
from loraq.run import calibrate_recipe, run_recipe, try_layers
from loraq.shipped import shipped_recipes
from loraq.source import open_source

BUDGET = "6.3 bits"
CHOICES = """
[[allocate.choice]]
main_quantizer.weight = "int3"
[[allocate.choice]]
low_rank.rank = 8
[[allocate.choice]]
main_quantizer.weight = "int6"
low_rank.rank = 2
branch_quantizer.weight = "int8"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline", layers=1)


def write(
    path: Path,
    model: Path,
    output: Path,
    *,
    allocate: str = f'budget = "{BUDGET}"',
    choices: str = CHOICES,
    more: str = "",
) -> Path:
    return models.write_recipe(path, model, output, extra=f"{more}\n[allocate]\n{allocate}\n{choices}")


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "recipe.toml", model, tmp_path / "out")


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run, never written to."""
    folder = tmp_path_factory.mktemp("first")
    run_recipe(load(write(folder / "recipe.toml", model, folder / "out")))
    return folder / "out"


def allocation(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "loraq.json").read_text())["allocation"]
    return found


def plan_of(recipe: Recipe) -> Plan:
    return make_plan(open_source(recipe.model), recipe.pipeline(), recipe.calibration)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first layer's name of every probe that was fitted."""
    found: list[str] = []
    quantize_group = probing.quantize_group

    def noted(weights: dict[str, torch.Tensor], *rest: Any, **options: Any) -> Any:
        found.append(next(iter(weights)))
        return quantize_group(weights, *rest, **options)

    monkeypatch.setattr(probing, "quantize_group", noted)
    return found


def test_the_choice_is_the_one_that_separate_fits_and_the_knapsack_give(model: Path, first: Path) -> None:
    found = allocation(first)
    base = load(first.parent / "recipe.toml")
    assert base.allocate is not None
    weights = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    options, sizes = [], 0
    for layer in found["layers"]:
        name, weight = layer["name"], weights[f"{layer['name']}.weight"].float()
        sizes += weight.numel()
        generator = layer_generator(0, f"transformer:{layer['inn']}")
        tokens = random_tokens(layer["inn"], None, generator, torch.device("cpu"))
        wanted = tokens @ weight.T
        row = []
        for index in range(3):
            recipe = bind(overridden(base.stage, base.allocate.overrides(index)))
            made = quantize_layer(name, weights[f"{name}.weight"], recipe, seed=0)
            left = PackedLinear(made.layout, made.tensors)(tokens) - wanted
            row.append((made.record.stored_bytes, float(left.double().square().sum()) / len(tokens)))
        options.append(row)
        norm = float(wanted.double().square().sum()) / len(tokens)
        assert layer["error"] == pytest.approx((row[layer["choice"]][1] / norm) ** 0.5, rel=1e-4)
    assert found["budget"] == int(6.3 * sizes / 8)
    selection = select(options, found["budget"])
    assert selection.picks == tuple(layer["choice"] for layer in found["layers"])
    assert len(set(selection.picks)) > 1, "a budget between the choices mixes them"
    assert found["bytes"] == selection.bytes
    assert found["error"] == pytest.approx(selection.error, rel=1e-4)


def test_the_result_is_that_of_the_recipe_with_the_choices_as_layers_tables(first: Path, tmp_path: Path) -> None:
    provenance = json.loads((first / "loraq.json").read_text())
    plain = provenance["recipe"]
    assert "allocate" not in plain
    lines = []
    for table in plain["layers"]:
        lines.append(f"[[layers]]\nmatch = {json.dumps(table.pop('match'))}")
        lines += [
            f"{stage}.{key} = {json.dumps(value)}" for stage, each in table.items() for key, value in each.items()
        ]
    model = Path(plain["model"]["folder"])
    by_hand = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out", extra="\n".join(lines))
    report = run_recipe(load(by_hand))
    assert models.tensor_files(tmp_path / "out") == models.tensor_files(first)
    assert report.stored_bytes == allocation(first)["bytes"] <= allocation(first)["budget"]


def test_replayed_without_probing_it_gives_the_same_bytes(
    model: Path, first: Path, tmp_path: Path, probes: list[str]
) -> None:
    for replay, output in ((first, "folder"), (first / "loraq.json", "file")):
        recipe = write(tmp_path / "r.toml", model, tmp_path / output, allocate=f'replay = "{replay}"')
        run_recipe(load(recipe, ["run.workers=1"]))
        assert models.tensor_files(tmp_path / output) == models.tensor_files(first)
        kept, earlier = allocation(tmp_path / output), allocation(first)
        assert (kept["layers"], kept["bytes"]) == (earlier["layers"], earlier["bytes"])
    assert probes == []
    assert run_recipe(load(recipe)).already_done
    again = write(tmp_path / "again.toml", model, tmp_path / "again", allocate=f'replay = "{tmp_path / "folder"}"')
    run_recipe(load(again))  # of a run that was itself a replay
    assert models.tensor_files(tmp_path / "again") == models.tensor_files(first)


def test_a_killed_run_probes_nothing_twice_and_ends_with_the_same_bytes(
    recipe: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probes: list[str]
) -> None:
    quantize_group = probing.quantize_group
    left = [13]

    def killed(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return quantize_group(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(probing, "quantize_group", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load(recipe, ["run.workers=1"]))
    journal = work_folder(work_folder(tmp_path / "out") / "allocation") / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 13
    with journal.open("a") as file:
        file.write('{"unit": "cut off')
    probes.clear()
    with monkeypatch.context() as patched:
        patched.setattr("loraq.fitting.quantize_group", killed)  # and once more, while layers are fitted
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load(recipe))
    assert len(probes) == 3 * 10 - 13
    with pytest.raises(CheckpointError, match="unfinished run with another recipe"):
        run_recipe(load(recipe, ["allocate.budget=7 bits"]))
    run_recipe(load(recipe))
    assert len(probes) == 3 * 10 - 13, "the choices were known"
    assert models.tensor_files(tmp_path / "out") == models.tensor_files(first)
    assert not work_folder(tmp_path / "out").exists()
    assert run_recipe(load(recipe)).already_done
    assert len(probes) == 3 * 10 - 13


def test_an_output_of_another_recipe_is_refused_before_anything_is_probed(
    recipe: Path, first: Path, tmp_path: Path, probes: list[str]
) -> None:
    shutil.copytree(first, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is finished and was made with another recipe; .* --restart"):
        run_recipe(load(recipe, ["allocate.budget=7 bits"]))
    plain = models.write_recipe(tmp_path / "plain.toml", Path(load(recipe).model.folder or ""), tmp_path / "plain")
    run_recipe(load(plain))
    with pytest.raises(CheckpointError, match="is finished and was made with another recipe"):
        run_recipe(load(recipe, [f"run.output={tmp_path}/plain"]))
    work_folder(tmp_path / "other").mkdir()
    (work_folder(tmp_path / "other") / "journal.jsonl").write_text('{"recipe": "another"}\n')
    with pytest.raises(CheckpointError, match="holds an unfinished run with another recipe"):
        run_recipe(load(recipe, [f"run.output={tmp_path}/other"]))
    assert probes == []
    run_recipe(load(recipe, ["allocate.budget=7 bits"]), restart=True)
    assert allocation(tmp_path / "out")["budget"] > allocation(first)["budget"]


def test_plan_says_the_range_then_the_choice(recipe: Path, first: Path, tmp_path: Path, probes: list[str]) -> None:
    known = json.loads(done(loraq("plan", recipe, "--json")))["allocation"]
    totals = [each["packed_bytes"] for each in known["choices"]]
    assert known["least_bytes"] == min(totals) < known["budget"] < known["most_bytes"] == max(totals)
    told = done(loraq("plan", recipe))
    assert f"between {min(totals):,} bytes" in told
    assert f"the budget is {known['budget']:,} (6.30 bits a weight)" in told
    replay = ["--set", f"allocate.replay={first}"]
    exact = json.loads(done(loraq("plan", recipe, *replay, "--json")))
    assert exact["packed_bytes"] == exact["allocation"]["bytes"] == allocation(first)["bytes"]
    assert "layers; " in done(loraq("plan", recipe, *replay))
    shutil.copytree(first, tmp_path / "out")
    assert json.loads(done(loraq("plan", recipe, "--json")))["packed_bytes"] == exact["packed_bytes"]
    other = json.loads(done(loraq("plan", recipe, "--set", "allocate.budget=7 bits", "--json")))
    assert "packed_bytes" not in other, "what lies there is another recipe's"
    assert probes == []


def test_too_small_a_budget_is_refused_with_the_least_that_would_do(recipe: Path) -> None:
    least = json.loads(done(loraq("plan", recipe, "--json")))["allocation"]["least_bytes"]
    told = refused(loraq("plan", recipe, "--set", "allocate.budget=1000"))
    assert f"allocate.budget: 1000 is 1,000 bytes, but the cheapest choices take {least:,}; allow that many" in told
    enough = told.partition("('")[2].partition("'")[0]
    done(loraq("plan", recipe, "--set", f"allocate.budget={enough}"))
    done(loraq("plan", recipe, "--set", f"allocate.budget={least}"))
    refused(loraq("run", recipe, "--set", f"allocate.budget={least - 1}"))


def test_a_budget_may_be_like_a_branch(recipe: Path, model: Path) -> None:
    found = look_ahead(load(recipe, ["allocate.budget=rank4@16"]), open_source(load(recipe).model))
    plain = plan_of(load(models.write_recipe(recipe, model, recipe.parent / "x", low_rank="none")))
    assert found.budget == plain.packed_bytes + sum(2 * 4 * (layer.out + layer.inn) for layer in plain.layers)


def test_layers_tables_come_after_the_choices_and_pin_what_they_say(
    model: Path, tmp_path: Path, probes: list[str]
) -> None:
    pin = '[[layers]]\nmatch = "*.attn1.*"\nmain_quantizer.weight = "int8"\nlow_rank.rank = 1\n'
    pin += 'branch_quantizer.weight = "int6"\n[[layers]]\nmatch = "*.ff.*"\nskip = true\n'
    recipe = write(tmp_path / "r.toml", model, tmp_path / "out", allocate='budget = "8 bits"', more=pin)
    report = run_recipe(load(recipe))
    names = [layer.name for layer in report.layers]
    assert len(names) == 8
    assert sorted(probes) == sorted(name for name in names for _ in range(1 if ".attn1." in name else 3))
    assert all(layer.rank == 1 for layer in report.layers if ".attn1." in layer.name)


def test_layers_that_share_their_down_get_one_choice(model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", model, tmp_path / "out")
    report = run_recipe(load(recipe, ["low_rank.share_down=true"]))
    found = allocation(tmp_path / "out")
    choices = {layer["name"].removeprefix("transformer_blocks.0."): layer["choice"] for layer in found["layers"]}
    assert choices["attn1.to_q"] == choices["attn1.to_k"] == choices["attn1.to_v"]
    assert choices["attn2.to_k"] == choices["attn2.to_v"]
    assert report.stored_bytes == found["bytes"] == sum(layer["bytes"] for layer in found["layers"]) <= found["budget"]


def test_layers_of_one_name_in_two_components_are_one_unit() -> None:
    def plan(*layers: tuple[str, str, int]) -> Any:
        made = [
            (component, SimpleNamespace(name=name, leader=name, layout=SimpleNamespace(stored_bytes=size)))
            for component, name, size in layers
        ]
        return SimpleNamespace(named_layers=made)

    cheap = plan(("one", "a", 1), ("one", "b", 2), ("two", "a", 4))
    dear = plan(("one", "a", 10), ("one", "b", 20), ("two", "a", 40))
    units = probing._units([cheap, dear], 2)
    assert [(unit.layers, unit.bytes) for unit in units] == [
        ((("one", "a"), ("two", "a")), (5, 50)),
        ((("one", "b"),), (2, 20)),
    ]


def test_only_probes_the_layers_that_match(recipe: Path, tmp_path: Path, probes: list[str]) -> None:
    report = try_layers(load(recipe), "*.attn2.to_*")
    assert sorted(probes) == sorted(layer.name for layer in report.layers for _ in range(3))
    assert report.effective_bits <= 6.3
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--only nothing: no layer matches"):
        try_layers(load(recipe), "nothing")


def test_relative_errors_give_every_layer_the_same_say(recipe: Path, first: Path, tmp_path: Path) -> None:
    run_recipe(load(recipe, ["allocate.compare=relative"]))
    found = allocation(tmp_path / "out")
    assert found["error"] == pytest.approx(sum(layer["error"] ** 2 for layer in found["layers"]), rel=1e-9)
    assert found["error"] <= sum(layer["error"] ** 2 for layer in allocation(first)["layers"])


def test_the_probe_s_options_shape_the_probes_alone(recipe: Path, tmp_path: Path) -> None:
    fits = ["low_rank.strategy=loraq_fast", "low_rank.rank=4", "low_rank.steps=40"]
    run_recipe(load(recipe, [*fits, "allocate.probe={low_rank = {steps = 1}}"]))
    quick = allocation(tmp_path / "out")
    run_recipe(load(recipe, fits), restart=True)
    full = allocation(tmp_path / "out")
    assert sum(layer["error"] for layer in quick["layers"]) > sum(layer["error"] for layer in full["layers"])
    replay = [*fits, f"run.output={tmp_path}/replay", f"allocate.replay={tmp_path}/out"]
    run_recipe(load(recipe, replay))
    assert models.tensor_files(tmp_path / "replay") == models.tensor_files(tmp_path / "out")


def test_with_calibration_outputs_are_judged(model: Path, tmp_path: Path) -> None:
    call = ", ".join(f"{name} = {json.dumps(value)}" for name, value in models.CALL.items())
    data = f'[calibration]\nprompts = ["a red ring", "a small square"]\nthreads = 1\ncache = "{tmp_path}/cache"\n'
    recipe = write(tmp_path / "r.toml", model, tmp_path / "out", more=f"{data}call = {{ {call} }}")
    recipe.write_text(
        recipe.read_text().replace('main_quantizer"\nstrategy = "rtn"', 'main_quantizer"\nstrategy = "gptq"')
    )
    collected = calibrate_recipe(load(recipe))
    assert collected is not None
    assert (collected.layers, collected.passes) == (10, 1)
    report = run_recipe(load(recipe))
    found = allocation(tmp_path / "out")
    by_name = {layer.name: layer for layer in report.layers}
    for layer in found["layers"]:  # what the fit is said to leave, and the rounding of activations
        assert by_name[layer["name"]].output_error_after < layer["error"] < 0.5
    mixed = ["allocate.choice=[{main_quantizer = {strategy = 'rtn'}}, {low_rank = {rank = 8}}]"]
    run_recipe(load(recipe, [*mixed, "allocate.budget=8 bits"]), restart=True)
    assert len(allocation(tmp_path / "out")["layers"]) == 10


def test_the_shipped_recipe_is_fine_and_its_choices_differ() -> None:
    recipe = load(shipped_recipes()["tiny-allocated"])
    found = look_ahead(recipe, open_source(recipe.model))
    assert len(found.layers) == 60
    assert found.budget is not None
    assert found.least < found.budget < found.most
    assert len({plan.packed_bytes for plan in found.plans}) == len(found.plans)
    report = try_layers(recipe, "transformer_blocks.3.attn1.to_q")
    assert report.layers[0].error_after < report.layers[0].error_before
    assert report.effective_bits <= 4.25 + 4, "int4 with its scales, and rank 32 of a square layer in 16 bits"


def test_random_tokens_have_the_inputs_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_TOKENS", 100_000)
    half = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for gram in (None, half @ half.T):
        tokens = random_tokens(6, gram, torch.Generator().manual_seed(1), torch.device("cpu"))
        found = tokens.T @ tokens / len(tokens)
        assert torch.allclose(found, torch.eye(6) if gram is None else gram, atol=0.05 * float(found.max()))


def test_a_choice_that_reads_data_needs_calibration(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + '[[allocate.choice]]\nmain_quantizer.strategy = "gptq"\n')
    with pytest.raises(RecipeError, match="calibration: is missing, and main_quantizer gptq reads Gram"):
        load(recipe)


@pytest.mark.parametrize(
    ("allocate", "choices", "told"),
    [
        ("", CHOICES, "allocate: 'budget' is missing; say how many bytes or bits, or take earlier choices"),
        ('budget = "4 bytes"', CHOICES, "allocate: 'budget' is a number of bytes, or like '4.5 bits' .* got '4 bytes'"),
        ("budget = 0", CHOICES, "allocate: 'budget' is a number of bytes, .* got 0"),
        ("budget = true", CHOICES, "allocate.budget: expected an integer or a string, got True"),
        ("budget = 9\nbugdet = 9", CHOICES, "allocate.bugdet: .*did you mean 'budget'"),
        ("budget = 9", "[[allocate.choice]]\nlow_rank.rank = 1", "'choice' needs two or more .* got 1"),
        (
            "budget = 9",
            CHOICES + "low_rnk.rank = 1",
            r"allocate.choice\[2\].low_rnk: no stage of that name; .* mean 'low_rank'",
        ),
        ("budget = 9", CHOICES + "pre_transform = 1", r"allocate.choice\[2\].pre_transform: expected a table"),
        (
            "budget = 9",
            CHOICES + "pre_transform.kind = 'x'",
            r"allocate.choice\[2\].pre_transform.kind: a choice cannot",
        ),
        ("budget = 9", CHOICES + "pre_transform.size = 1", r"allocate.choice\[2\].pre_transform.size: "),
        ("budget = 9\nprobe.low_rank.steps = 5", CHOICES, r"allocate.probe, over choice\[0\].low_rank.steps: .*svd"),
        ("budget = 9\ncompare = 'none'", CHOICES, "allocate.compare: expected .*absolute.*, got 'none'"),
    ],
)
def test_faults_are_told_with_their_path(model: Path, tmp_path: Path, allocate: str, choices: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load(write(tmp_path / "r.toml", model, tmp_path / "out", allocate=allocate, choices=choices))


def test_a_replay_of_something_else_is_refused(recipe: Path, first: Path, model: Path, tmp_path: Path) -> None:
    replay = f"allocate.replay={first}"

    def refusal(*settings: str, match: str) -> None:
        with pytest.raises(InputError, match=match):
            run_recipe(load(recipe, [replay, *settings]))

    refusal("allocate.choice=[{low_rank={rank=1}}, {low_rank={rank=2}}]", match="chose among other choices than")
    refusal("model.skip=['*.attn2.to_k']", match=r"it has layer '.*attn2.to_k' and this model has not")
    refusal("main_quantizer.group=32", match=r"layer '.*' took [\d,]+ bytes and here takes [\d,]+; give the \[\[stage")
    refusal("allocate.budget=5 bits", match=r"takes [\d,]+ bytes, more than allocate.budget's [\d,]+; leave one out")
    replay = f"allocate.replay={tmp_path}/nowhere"
    refusal(match="there is no file .*nowhere; name a loraq.json, or the folder of a result")
    plain = models.write_recipe(tmp_path / "plain.toml", model, tmp_path / "plain")
    run_recipe(load(plain))
    replay = f"allocate.replay={tmp_path}/plain"
    refusal(match=r"plain/loraq.json is of a run without \[allocate\]; name that of a run with it")
    broken = json.loads((first / "loraq.json").read_text())
    broken["allocation"]["layers"][0].pop("choice")
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    replay = f"allocate.replay={tmp_path}/broken.json"
    refusal(match=r"broken.json: its allocation cannot be read \(.*choice.*\); take another file")
    with pytest.raises(InputError, match="allocate: its choices are made by a run"):
        load(recipe).pipeline()
