"""Models that cannot be quantized: each one refused in a sentence, and nothing that looks whole left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from command import done, loraq, refused
from loraq.errors import InputError, ModelError
from loraq.pipeline import Pipeline, make_stage
from loraq.plan import make_plan
from loraq.recipe import ModelSource
from loraq.source import Source, open_source

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LAYER = "transformer_blocks.1.attn1.to_k"
COMMIT = "1234" * 10


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound pipeline, never written to."""
    return models.saved_pipeline(tmp_path_factory.mktemp("sound") / "pipeline")


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline, to spoil."""
    return models.copy_of(sound, tmp_path / "model")


@pytest.fixture
def sharded(model: Path) -> Path:
    """The copy with its transformer in several shards."""
    transformer = models.transformer().to(torch.bfloat16)
    (model / WEIGHTS).unlink()
    transformer.save_pretrained(model / "transformer", max_shard_size="100KB")
    assert (model / INDEX).exists()
    return model


def pipeline() -> Pipeline:
    return Pipeline([make_stage("main_quantizer", "rtn")], workers=1)


def refusal(model: Path, component: tuple[str, ...] = ("transformer",)) -> str:
    """The sentence with which both `plan` and `run` refuse; the output's folder stays free."""
    output = model.parent / "out"
    with pytest.raises(InputError) as caught:
        pipeline().run(model, output, component=component)
    assert not output.exists()
    sentence = str(caught.value)
    assert "\n" not in sentence.strip()
    with pytest.raises(ModelError) as planned:
        make_plan(open_source(ModelSource(folder=str(model), component=component)), pipeline())
    assert str(planned.value) == sentence
    assert not (model.parent / "out.unfinished").exists(), "found before anything is written"
    return sentence


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def open_folder(folder: Path) -> Source:
    return open_source(ModelSource(folder=str(folder)))


def test_a_sound_pipeline_and_a_sound_component_open(sound: Path) -> None:
    whole, part = open_folder(sound), open_folder(sound / "transformer")
    assert (whole.is_pipeline, part.is_pipeline) == (True, False)
    assert [component.name for component in (*whole.components, *part.components)] == ["transformer", ""]
    assert whole.components[0].tensors == part.components[0].tensors
    assert set(whole.digests()) == {WEIGHTS, "transformer/config.json"}
    assert set(part.digests()) == {"diffusion_pytorch_model.safetensors", "config.json"}


def test_no_such_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing") == f"model.folder: there is no folder {tmp_path / 'nothing'}."


def test_no_diffusers_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "is no diffusers folder: it has neither model_index.json nor config.json" in refusal(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_truncated_file(model: Path, keep: float) -> None:
    path = model / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert refusal(model).startswith(f"{path}: it is truncated or no safetensors file (")


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sorted((sharded / "transformer").glob("*-of-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    assert refusal(sharded).startswith(f"{shard}: it is truncated or no safetensors file (")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted((sharded / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert refusal(sharded) == f"{shard.parent}: shard {shard.name} of {Path(INDEX).name} is missing."


@pytest.mark.parametrize("name", ["../model_index.json", "/etc/passwd", "..", "a/b.safetensors", "", "."])
def test_a_shard_name_that_leads_out_of_the_folder(sharded: Path, name: str) -> None:
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"proj_out.weight": name}))
    assert refusal(sharded).endswith(f"shard name {name!r} leads out of the folder.")


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "\x00"])
def test_a_spoilt_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded).startswith(f"{sharded / INDEX}: ")


def test_an_index_with_odd_values(sharded: Path) -> None:
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"a": ["x"], "b": 3}))
    assert "shard" in refusal(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted((sharded / "transformer").glob("*-of-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    assert refusal(sharded).endswith(f" is in {first.name} too.")


def test_shapes_that_disagree_with_the_config(model: Path) -> None:
    edit(model / "transformer" / "config.json", lambda config: config.update(caption_channels=16))
    assert refusal(model) == (
        f"{model / WEIGHTS}: 'caption_projection.linear_1.weight' has shape [64, 32], but config.json makes it "
        "[64, 16]."
    )


def test_missing_tensors(model: Path) -> None:
    edit(model / "transformer" / "config.json", lambda config: config.update(num_layers=3))
    sentence = refusal(model)
    assert "tensors of PixArtTransformer2DModel are not in its files, the first is 'transformer_blocks.2." in sentence
    assert sentence.endswith("is a shard missing, or config.json another model's?")


def test_tensors_that_the_class_does_not_have_are_told_and_left_out(model: Path) -> None:
    save_file(load_file(model / WEIGHTS) | {"stray": torch.zeros(3)}, model / WEIGHTS, {"format": "pt"})
    plan = make_plan(open_folder(model), pipeline())
    assert [(each.name, each.reason) for each in plan.components[0].skipped if each.name == "stray"] == [
        ("stray", "not a tensor of this model class; it is left out")
    ]
    assert all("stray" not in file.places for file in plan.components[0].files)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"_class_name": "NoSuchModel"}, "diffusers has no model class 'NoSuchModel'."),
        ({"_class_name": "DDIMScheduler"}, "diffusers has no model class 'DDIMScheduler'."),
        ({"_class_name": "ModelMixin"}, "cannot be built from it"),
        ({"_class_name": 3}, "diffusers has no model class '3'."),
        ({"num_layers": "two"}, "PixArtTransformer2DModel cannot be built from it: "),
        ({"quantization_config": {"quant_method": "torchao"}}, "it is quantized already (by torchao); give the 16-bit"),
        ({"quantization_config": 3}, "it is quantized already (by 3); give the 16-bit model."),
    ],
)
def test_a_config_that_makes_no_model(model: Path, change: dict[str, Any], sentence: str) -> None:
    edit(model / "transformer" / "config.json", lambda config: config.update(change))
    assert sentence in refusal(model)


def test_a_config_that_says_it_is_not_quantized_is_fine(model: Path) -> None:
    edit(model / "transformer" / "config.json", lambda config: config.update(quantization_config=None))
    assert make_plan(open_folder(model), pipeline()).weights > 0


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{"])
@pytest.mark.parametrize("name", ["transformer/config.json", "model_index.json"])
def test_spoilt_json(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    assert refusal(model).startswith(f"{model / name}: ")


def test_a_model_that_loraq_packed_already(model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pipeline().run(model, packed)
    assert refusal(packed).endswith("it is quantized already (by loraq); give the 16-bit model.")


def test_a_component_that_the_pipeline_lacks(model: Path) -> None:
    sentence = refusal(model, ("transfomer",))
    assert sentence.startswith(f"model.component: {model} has no component 'transfomer'; it has ")
    assert sentence.endswith("did you mean 'transformer'?")


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_component_whose_folder_is_missing(model: Path, name: str) -> None:
    (model / name).rename(model / "elsewhere")
    assert name in refusal(model)


def test_a_component_without_a_config(model: Path) -> None:
    (model / "transformer" / "config.json").unlink()
    assert refusal(model) == f"{model / 'transformer'}: there is no config.json."


def test_a_component_of_transformers(model: Path) -> None:
    assert refusal(model, ("text_encoder",)) == (
        "model.component: 'text_encoder' is a model of transformers, but only models of diffusers can be packed; leave "
        "it out, it will be copied as it is."
    )


def test_a_component_that_is_no_model(model: Path) -> None:
    assert "there is no config.json" in refusal(model, ("scheduler",))


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "..", "a/b"])
def test_a_component_name_that_leads_out_of_the_folder(model: Path, name: str) -> None:
    edit(model / "model_index.json", lambda index: index.update({name: ["diffusers", "AutoencoderKL"]}))
    assert refusal(model).endswith(f"component name {name!r} leads out of the folder.")


def test_optional_components_may_be_absent(model: Path) -> None:
    edit(model / "model_index.json", lambda index: index.update(a=[None, None], b=[], c=3, d=None))
    assert make_plan(open_folder(model), pipeline()).weights > 0


def test_pickles_are_never_read(model: Path) -> None:
    torch.save({}, model / "transformer" / "diffusion_pytorch_model.bin")
    (model / WEIGHTS).unlink()
    assert refusal(model) == (
        f"{model / 'transformer'}: there is no diffusion_pytorch_model.safetensors; diffusion_pytorch_model.bin is a "
        "pickle, which LoRaQ never reads: convert it to safetensors."
    )


def test_no_weights_at_all(model: Path) -> None:
    (model / WEIGHTS).unlink()
    assert refusal(model) == f"{model / 'transformer'}: there is no diffusion_pytorch_model.safetensors."


def test_a_single_variant_is_taken(model: Path) -> None:
    (model / WEIGHTS).rename(model / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    assert make_plan(open_folder(model), pipeline()).weights > 0


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_weights_that_are_quantized_by_somebody_else(model: Path, dtype: str) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(getattr(torch, dtype))
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    assert f"layer '{LAYER}' has a weight of " in refusal(model)


def test_a_dtype_that_nobody_knows(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"dtype":"BF16"', b'"dtype":"F6_X"', 1)
    (model / WEIGHTS).write_bytes(content[:8] + header + content[8 + length :])
    assert str(model / WEIGHTS) in refusal(model)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinite value")])
def test_a_weight_that_is_not_finite_names_its_layer(model: Path, value: float, word: str) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[f"{LAYER}.weight"][3, 5] = value
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    output = model.parent / "out"
    with pytest.raises(ModelError) as caught:
        pipeline().run(model, output)
    assert str(caught.value) == (
        f"layer '{LAYER}': its weight has {word}; mend the model, or skip the layer with model.skip."
    )
    assert not output.exists()
    assert not list((model.parent / "out.unfinished" / "result").rglob("*.safetensors")), "partial files only"


def test_no_layer_is_left(model: Path) -> None:
    with pytest.raises(ModelError, match="no layer is left to quantize"):
        Pipeline([make_stage("main_quantizer", "rtn")], skip=("*",)).run(model, model.parent / "out")


@pytest.fixture
def hub(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub client's cache with the pipeline as commit COMMIT of owner/name, and no network."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "models--owner--name"
    models.copy_of(sound, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("line", ["", 'revision = "main"', f'revision = "{COMMIT}"'])
def test_a_hub_repository_is_taken_from_the_local_cache(hub: Path, sound: Path, tmp_path: Path, line: str) -> None:
    """The bytes are those of the same folder; nothing of the repository's is written to."""
    before = models.tensor_files(hub)
    recipe = models.write_recipe(tmp_path / "hub.toml", sound, tmp_path / "hubbed")
    done(loraq("run", models.write_recipe(tmp_path / "folder.toml", sound, tmp_path / "out")))
    recipe.write_text(recipe.read_text().replace(f'folder = "{sound}"', f'hub = "owner/name"\n{line}'))
    done(loraq("plan", recipe))
    done(loraq("run", recipe))
    assert models.tensor_files(tmp_path / "hubbed") == models.tensor_files(tmp_path / "out")
    assert models.tensor_files(hub) == before
    provenance = json.loads((tmp_path / "hubbed/loraq.json").read_text())
    assert provenance["recipe"]["model"]["hub"] == "owner/name"
    assert set(provenance["fingerprint"]["model"]) == {WEIGHTS, "transformer/config.json"}


@pytest.mark.parametrize("line", ['hub = "owner/other"', 'hub = "owner/name"\nrevision = "5678"', 'hub = "a/b/c"'])
def test_a_hub_repository_that_is_not_there_is_refused(hub: Path, sound: Path, tmp_path: Path, line: str) -> None:
    recipe = models.write_recipe(tmp_path / "recipe.toml", sound, tmp_path / "out")
    recipe.write_text(recipe.read_text().replace(f'folder = "{sound}"', line))
    sentence = refused(loraq("plan", recipe))
    assert sentence.startswith("error: model.hub: '")
    assert "cannot be fetched (" in sentence
    assert len(sentence.splitlines()) == 1
