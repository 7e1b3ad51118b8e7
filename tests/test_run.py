"""Runs from end to end: byte-identical whichever way they are started, and careful with what lies on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import models
from command import done, loraq, process, refused
from loraq import fitting
from loraq.errors import CheckpointError, LoraqError, ModelError
from loraq.journal import Journal, work_folder
from loraq.linear import PackedLinear
from loraq.pipeline import Pipeline, make_stage
from loraq.recipe import Override, Recipe, load
from loraq.report import Report
from loraq.run import run_recipe, try_layers

SMALL = "[[layers]]\nmatch = 'transformer_blocks.1.*'\nskip = true\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, never written to; beside it a hidden file and a stray one."""
    folder = models.saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline")
    (folder / "README.md").write_text("about the model")
    (folder / ".gitattributes").write_text("")
    (folder / "loraq.json").write_text("{}")
    (folder / "samples.png").write_text("of another run")
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """A recipe for the pipeline; its result goes to `out` beside it."""
    return models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out", extra=SMALL)


def by_hand(**options: Any) -> Pipeline:
    """The pipeline of `recipe`, built in Python."""
    stages = [
        make_stage("pre_transform", "hadamard"),
        make_stage("main_quantizer", "rtn"),
        make_stage("low_rank", "svd", rank=4),
        make_stage("branch_quantizer", "rtn"),
    ]
    skip = [Override(match=("transformer_blocks.1.*",), skip=True)]
    return Pipeline(stages, **({"overrides": skip, "workers": 1} | options))


def times(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in [folder, *folder.rglob("*")]}


def run(recipe: Path, *settings: str, restart: bool = False) -> Report:
    return run_recipe(load(recipe, settings), restart=restart)


@pytest.mark.slow
def test_command_and_python_workers_and_order_give_the_same_bytes(
    recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(process("run", recipe))
    expected = models.tensor_files(tmp_path / "out")
    assert expected
    results = {"python": by_hand().run(model, tmp_path / "python")}
    results["two"] = run(recipe, f"run.output={tmp_path / 'two'}", "run.workers=2")
    results["one"] = run(recipe, f"run.output={tmp_path / 'one'}", "run.workers=1")
    in_order = fitting.in_parallel
    monkeypatch.setattr(fitting, "in_parallel", lambda call, items, **kw: in_order(call, items[::-1], **kw))
    results["reversed"] = run(recipe, f"run.output={tmp_path / 'reversed'}")
    for name, report in results.items():
        assert models.tensor_files(tmp_path / name) == expected, name
        assert [layer.name for layer in report.layers] == [layer.name for layer in results["one"].layers]
        assert [attrs.evolve(each, seconds=0) for each in report.layers] == [
            attrs.evolve(each, seconds=0) for each in results["one"].layers
        ]


def test_another_seed_gives_other_bytes_only_where_there_is_randomness(recipe: Path, tmp_path: Path) -> None:
    run(recipe, f"run.output={tmp_path / 'a'}", "run.seed=1")
    run(recipe, f"run.output={tmp_path / 'b'}", "run.seed=2")
    assert models.tensor_files(tmp_path / "a") == models.tensor_files(tmp_path / "b"), "the SVD draws nothing"
    for name, seed in (("c", 1), ("d", 2)):
        options = ("low_rank.strategy=loraq", "low_rank.rank=4", "low_rank.steps=3", f"run.seed={seed}")
        run(recipe, f"run.output={tmp_path / name}", *options)
    assert models.tensor_files(tmp_path / "c") != models.tensor_files(tmp_path / "d")


def test_pipeline_in_pipeline_out_the_rest_bit_for_bit(recipe: Path, model: Path, tmp_path: Path) -> None:
    report = run(recipe)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        path.name for path in model.iterdir() if path.name not in (".gitattributes", "samples.png")
    }
    for path in model.rglob("*"):
        kept = path.relative_to(model)
        if path.is_file() and kept.parts[0] not in ("transformer", ".gitattributes", "samples.png", "loraq.json"):
            assert (out / kept).read_bytes() == path.read_bytes(), kept
    assert sorted(path.name for path in (out / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    provenance = json.loads((out / "loraq.json").read_text())
    assert provenance["recipe"] == load(recipe).to_plain()
    assert set(provenance["fingerprint"]) == {"recipe", "model", "versions", "device"}
    assert provenance["report"]["total"]["quantized_layers"] == len(report.layers) == 10
    assert not work_folder(out).exists()


def test_component_in_component_out(recipe: Path, model: Path, tmp_path: Path) -> None:
    run(recipe)
    report = run(recipe, f"model.folder={model / 'transformer'}", f"run.output={tmp_path / 'lone'}")
    assert sorted(path.name for path in (tmp_path / "lone").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "loraq.json",
    ]
    of_pipeline = models.tensor_files(tmp_path / "out" / "transformer")
    assert models.tensor_files(tmp_path / "lone") == of_pipeline
    assert report.pictures is None


def test_several_components_at_once(recipe: Path, model: Path, tmp_path: Path) -> None:
    folder = models.copy_of(model, tmp_path / "two")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"transformer_2": index["transformer"]}))
    settings = [f"model.folder={folder}", 'model.component=["transformer", "transformer_2"]']
    report = run(recipe, *settings)
    first, second = (models.tensor_files(tmp_path / "out" / name) for name in ("transformer", "transformer_2"))
    assert first == second
    assert len(report.layers) == 20
    run(recipe, f"run.output={tmp_path / 'alone'}")
    assert models.tensor_files(tmp_path / "alone" / "transformer") == first
    tried = try_layers(load(recipe, settings), "*.to_q")
    assert [layer.name for layer in tried.layers] == [f"transformer_blocks.0.attn{n}.to_q" for n in (1, 2, 1, 2)]


def test_a_finished_run_run_again_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    first = run(recipe)
    before = times(tmp_path)
    again = run(recipe)
    assert times(tmp_path) == before
    assert again.already_done
    assert not first.already_done
    assert (again.layers, again.skipped, again.written_bytes) == (first.layers, first.skipped, first.written_bytes)
    run(recipe, "run.workers=1")
    assert times(tmp_path) == before, "how many workers there are is no part of the result"


def test_a_changed_recipe_is_refused_and_restart_replaces(recipe: Path, tmp_path: Path) -> None:
    run(recipe)
    before, bytes_before = times(tmp_path), models.tensor_files(tmp_path / "out")
    sentence = refused(loraq("run", recipe, "--set", "low_rank.rank=2"))
    assert sentence == (
        f"error: {tmp_path / 'out'} is finished and was made with another recipe; choose another run.output, or "
        "replace it with --restart.\n"
    )
    assert times(tmp_path) == before
    report = run(recipe, "low_rank.rank=2", restart=True)
    assert {layer.rank for layer in report.layers} == {2}
    assert models.tensor_files(tmp_path / "out") != bytes_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.toml"]
    run(recipe, restart=True)
    assert models.tensor_files(tmp_path / "out") == bytes_before


def test_changed_weights_are_noticed(recipe: Path, model: Path, tmp_path: Path) -> None:
    folder = models.copy_of(model, tmp_path / "model")
    run(recipe, f"model.folder={folder}")
    models.transformer(seed=5).to(torch.bfloat16).save_pretrained(folder / "transformer")
    with pytest.raises(CheckpointError, match="was made with another model;"):
        run(recipe, f"model.folder={folder}")


class StoppedError(Exception):
    """Stands for whatever may end a run."""


def stopped(recipe: Path, monkeypatch: pytest.MonkeyPatch, *settings: str, after: int, restart: bool = False) -> None:
    """Run until so many lines are in the journal."""
    add = Journal.add
    lines = 0

    def counted(self: Journal, unit: str, digest: str, record: Any) -> None:
        nonlocal lines
        if lines == after:
            raise StoppedError
        lines += 1
        add(self, unit, digest, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(StoppedError):
            run(recipe, "run.workers=1", *settings, restart=restart)


def test_an_unfinished_run_of_another_recipe_is_refused_and_restart_discards_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(recipe, monkeypatch, after=4)
    assert not (tmp_path / "out").exists()
    before = times(tmp_path)
    sentence = refused(loraq("run", recipe, "--set", "low_rank.rank=2"))
    assert sentence == (
        f"error: {tmp_path / 'out.unfinished'} holds an unfinished run with another recipe; run that one to its end, "
        "choose another run.output, or discard it with --restart.\n"
    )
    assert times(tmp_path) == before
    assert {layer.rank for layer in run(recipe, "low_rank.rank=2", restart=True).layers} == {2}
    assert not work_folder(tmp_path / "out").exists()


def test_a_stopped_restart_continues_and_keeps_the_old_result_until_then(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe)
    old = models.tensor_files(tmp_path / "out")
    stopped(recipe, monkeypatch, "low_rank.rank=2", after=4, restart=True)
    assert models.tensor_files(tmp_path / "out") == old
    journal = work_folder(tmp_path / "out") / "journal.jsonl"
    lines = journal.read_text()
    assert lines.count("\n") == 5
    stopped(recipe, monkeypatch, "low_rank.rank=2", after=2, restart=True)
    assert journal.read_text().startswith(lines), "the command that was killed continues"
    assert journal.read_text().count("\n") == 7
    run(recipe, "low_rank.rank=2", restart=True)
    fresh = run(recipe, "low_rank.rank=2", f"run.output={tmp_path / 'fresh'}")
    assert {layer.rank for layer in fresh.layers} == {2}
    assert models.tensor_files(tmp_path / "out") == models.tensor_files(tmp_path / "fresh")


def test_what_lies_in_an_unfinished_folder_without_a_journal_does_not_count(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(recipe, monkeypatch, after=4)
    work = work_folder(tmp_path / "out")
    (work / "journal.jsonl").write_bytes((work / "journal.jsonl").read_bytes()[:20])
    (work / "result" / "transformer" / "stray.safetensors.partial").write_bytes(b"x")
    run(recipe)
    assert sorted(path.name for path in (tmp_path / "out" / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_finished_run_leaves_another_runs_work_alone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe)
    fingerprint = json.loads((tmp_path / "out" / "loraq.json").read_text())["fingerprint"]
    with Journal(tmp_path / "out", fingerprint, restart=True) as journal:  # a --restart at work
        assert run(recipe).already_done
        assert journal.folder.exists()
    assert run(recipe).already_done
    assert not journal.folder.exists(), "nobody is at work: what a killed run left goes"


def test_a_finished_folder_that_lost_a_shard_is_not_called_done(recipe: Path, tmp_path: Path) -> None:
    run(recipe)
    shard = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"safetensors is missing or cut off; make the folder anew"):
        run(recipe)
    (tmp_path / "out" / "loraq.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"loraq.json: cannot be read .* replace the folder with --restart"):
        run(recipe)
    run(recipe, restart=True)
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("{model}", "lie in one another"),
        ("{model}/out", "lie in one another"),
        ("{model}/transformer", "lie in one another"),
        ("{model}/..", "lie in one another"),
        ("{tmp}/link/out", "lie in one another"),
        ("{tmp}/full", "is not empty and was not made by LoRaQ; choose another folder"),
        ("{tmp}/file", "is a file; choose a folder"),
        ("{tmp}/file/out", "cannot be written (Not a directory)"),
        (".", "is not empty and was not made by LoRaQ"),
        ("{tmp}/empty", "is a mount point or the working folder; choose a folder in it"),
        ("/proc", "is not empty and was not made by LoRaQ"),
        ("/proc/out", "cannot be written ("),
    ],
)
def test_an_output_that_must_not_be_written_is_refused(
    output: str, sentence: str, recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / ("empty" if "empty" in output else "full"))
    before, before_model = times(tmp_path), times(model)
    with pytest.raises(CheckpointError) as caught:
        run(recipe, "run.output=" + output.format(model=model, tmp=tmp_path))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("run.output: ")
    assert (times(tmp_path), times(model)) == (before, before_model)


def test_an_empty_output_and_a_link_to_one_are_taken(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    report = run(recipe, "run.output=link")
    assert report.output == "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "loraq.json").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    assert run(recipe, "run.output=./link").already_done


def test_no_folder_of_somebody_else_is_touched(recipe: Path, tmp_path: Path) -> None:
    for name in ("out.replaced", "out.partial", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    run(recipe)
    run(recipe, "low_rank.rank=2", restart=True)
    assert all((tmp_path / name / "mine").exists() for name in ("out.replaced", "out.partial", "out.old"))


def test_a_disk_without_room_is_told_before_the_first_fit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(fitting, "quantize_group", None)
    with pytest.raises(CheckpointError, match=r"run.output: .* needs [\d,]+ more bytes, but its disk has 1,000; free"):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_only_tries_layers_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = times(tmp_path)
    text = done(loraq("run", recipe, "--only", "*.attn1.to_?", "--json"))
    found = json.loads(text)
    assert [layer["name"][-4:] for layer in found["layers"]] == ["to_q", "to_k", "to_v"]
    assert found["output"] is None
    assert times(tmp_path) == before
    assert refused(loraq("run", recipe, "--only", "nothing")) == (
        "error: --only nothing: no layer matches; the first layer is 'transformer_blocks.0.attn1.to_q'.\n"
    )


def test_layers_tried_alone_are_the_layers_of_the_whole_run(recipe: Path) -> None:
    whole = {layer.name: attrs.evolve(layer, seconds=0) for layer in run(recipe).layers}
    tried = try_layers(load(recipe), "*.ff.*").layers
    assert [attrs.evolve(layer, seconds=0) for layer in tried] == [whole[layer.name] for layer in tried]


def test_quantize_in_place_equals_the_run(recipe: Path, model: Path, tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel
    from safetensors.torch import load_file

    run(recipe)
    transformer = PixArtTransformer2DModel.from_pretrained(model / "transformer", torch_dtype=torch.bfloat16)
    report = by_hand().quantize(transformer)
    expected = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    found = transformer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(report.layers) == 10
    transformer.save_pretrained(tmp_path / "saved")
    assert models.tensor_files(tmp_path / "saved")["diffusion_pytorch_model.safetensors"] == (
        (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    )


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(48, 32, 1), nn.ReLU(), nn.Flatten(2), nn.Linear(25, 64, bias=False))
    return module.to(torch.bfloat16).eval()


def test_any_module_is_quantized_in_place() -> None:
    module, input = two_layers(), torch.randn(2, 48, 5, 5, dtype=torch.bfloat16)
    before = module(input).detach()
    report = by_hand(overrides=()).quantize(module)
    assert [type(layer) for layer in module] == [PackedLinear, nn.ReLU, nn.Flatten, PackedLinear]
    assert [layer.name for layer in report.layers] == ["0", "3"]
    after = module(input)
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert float((after - before).float().norm() / before.float().norm()) < 0.4
    assert not module[0].training
    with pytest.raises(ModelError, match="holds packed layers already"):
        by_hand().quantize(module)


def test_tensors_do_not_depend_on_workers_or_device_of_the_caller() -> None:
    first, second = two_layers(), two_layers()
    torch.set_num_threads(2)
    by_hand(overrides=()).quantize(first)
    torch.set_num_threads(1)
    by_hand(overrides=(), workers=2).quantize(second)
    assert torch.get_num_threads() == 1
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def spoilt() -> nn.Sequential:
    module = two_layers()
    with torch.no_grad():
        module[3].weight[0, 0] = float("nan")
    return module


def on_meta() -> nn.Sequential:
    return two_layers().to("meta")


def of_integers() -> nn.Sequential:
    module = two_layers()
    module[3].weight = nn.Parameter(torch.ones(64, 25, dtype=torch.int8), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (spoilt, "layer '3': its weight has NaN; mend the model, or skip the layer"),
        (on_meta, "is on the meta device: load the weights before quantizing"),
        (of_integers, "layer '3': its weight is torch.int8, quantized already"),
        (lambda: nn.Linear(4, 4), "the module itself is a linear layer and cannot be replaced in place"),
        (lambda: nn.Sequential(nn.ReLU()), "has no layer left to quantize"),
    ],
)
def test_on_error_the_module_is_as_it_was(make: Any, sentence: str) -> None:
    module = make()
    before = dict(module.named_modules())
    with pytest.raises(ModelError, match=sentence):
        by_hand(overrides=()).quantize(module)
    assert dict(module.named_modules()) == before


def test_a_strategy_that_config_json_cannot_name_is_refused_before_a_model_is_changed() -> None:
    from loraq.strategies.pre_transform.none import NoTransform

    unregistered = type("Homemade", (NoTransform,), {"__module__": "nowhere"})
    stages = [attrs.evolve(make_stage("pre_transform", "none"), strategy=unregistered())]  # type: ignore[misc]
    pipeline = Pipeline([*stages, make_stage("main_quantizer", "rtn")])
    transformer = models.transformer()
    with pytest.raises(LoraqError, match=r"nowhere:Homemade is not registered in loraq\.pre_transform"):
        pipeline.quantize(transformer)
    assert not any(isinstance(child, PackedLinear) for child in transformer.modules())
    pipeline.quantize(nn.Sequential(nn.Linear(8, 8)))  # a plain module needs no name for it


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", "hpu", "", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str, recipe: Path) -> None:
    with pytest.raises(LoraqError, match=f"device '{device}' "):
        run(recipe, f'run.device="{device}"')


def test_a_recipe_and_the_pipeline_built_by_hand_are_the_same_run(recipe: Path, tmp_path: Path) -> None:
    made: Recipe = load(recipe)
    run_recipe(made)
    assert run_recipe(attrs.evolve(made, samples=None)).already_done
    assert by_hand().run(made.model.folder or "", tmp_path / "out").already_done
