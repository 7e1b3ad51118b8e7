"""The checkpoint as diffusers sees it: load, draw, save again, refuse what cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import ModelMixin, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image

import loraq
import models
from loraq.diffusers import LoraqConfig
from loraq.linear import PackedLinear


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small pipeline in 16 bits ("model"), its recipe, and what the recipe made of it ("out")."""
    root = tmp_path_factory.mktemp("diffusers")
    model = models.saved_pipeline(root / "model")
    recipe = models.write_recipe(root / "recipe.toml", model, root / "out")
    loraq.run_recipe(loraq.load_recipe(recipe))
    return {"model": model, "recipe": recipe, "out": root / "out"}


def drawn(pipeline: Any) -> numpy.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    picture: Image.Image = pipeline("a red ring", generator=torch.Generator().manual_seed(0), **models.CALL).images[0]
    return numpy.asarray(picture)


def packed_layers(model: Any) -> list[str]:
    return [name for name, child in model.named_modules() if isinstance(child, PackedLinear)]


def test_a_loaded_pipeline_draws_what_the_in_memory_model_draws(folders: dict[str, Path]) -> None:
    loaded = PixArtSigmaPipeline.from_pretrained(folders["out"])
    assert len(packed_layers(loaded.transformer)) == 20
    in_memory = PixArtSigmaPipeline.from_pretrained(folders["model"])
    sixteen_bit = drawn(in_memory)
    loraq.load_recipe(folders["recipe"]).pipeline().quantize(in_memory.transformer)
    assert numpy.array_equal(drawn(loaded), drawn(in_memory))
    assert not numpy.array_equal(drawn(loaded), sixteen_bit)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saving_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = PixArtTransformer2DModel.from_pretrained(folders["out"] / "transformer", torch_dtype=dtype)
    model.save_pretrained(tmp_path)
    first, second = models.tensor_files(folders["out"] / "transformer"), models.tensor_files(tmp_path)
    assert first.keys() == second.keys()
    config, saved_config = json.loads(first.pop("config.json")), json.loads(second.pop("config.json"))
    saved_config.pop("_name_or_path")
    assert config == saved_config
    assert first == second


def test_a_changed_tensor_is_saved_changed(folders: dict[str, Path], tmp_path: Path) -> None:
    model = PixArtTransformer2DModel.from_pretrained(folders["out"] / "transformer", torch_dtype=torch.float16)
    with torch.no_grad():
        model.proj_out.weight.fill_(0.5)
    model.save_pretrained(tmp_path)
    again = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(again.proj_out.weight, torch.full_like(again.proj_out.weight, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_tensors_keep_their_bytes_in_any_dtype(folders: dict[str, Path], dtype: torch.dtype) -> None:
    path = folders["out"] / "transformer"
    plain = PixArtTransformer2DModel.from_pretrained(path)
    other = PixArtTransformer2DModel.from_pretrained(path, torch_dtype=dtype)
    assert other.proj_out.weight.dtype == dtype
    for name in packed_layers(plain):
        mine, theirs = plain.get_submodule(name).stored(), other.get_submodule(name).stored()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_model_quantized_in_memory_saves_and_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(folders["model"])
    report = loraq.load_recipe(folders["recipe"]).pipeline().quantize(pipeline.transformer)
    assert report.error_after < report.error_before
    pipeline.save_pretrained(tmp_path)
    assert numpy.array_equal(drawn(PixArtSigmaPipeline.from_pretrained(tmp_path)), drawn(pipeline))


def test_a_component_loads_by_itself_and_by_its_general_class(folders: dict[str, Path]) -> None:
    model = PixArtTransformer2DModel.from_pretrained(folders["out"], subfolder="transformer")
    assert isinstance(model, ModelMixin)
    assert model.hf_quantizer.is_serializable
    assert not model.hf_quantizer.is_trainable


def test_what_is_loaded_in_inference_mode_counts_its_writes(folders: dict[str, Path]) -> None:
    """Otherwise the CPU kernel would have to look at every byte of the weights in each call."""
    with torch.inference_mode():
        model = PixArtTransformer2DModel.from_pretrained(folders["out"] / "transformer")
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed
    assert not any(buffer.is_inference() for module in packed for buffer in module.buffers())


def test_dequantize_gives_plain_layers_with_nearly_the_same_output(folders: dict[str, Path]) -> None:
    model = PixArtTransformer2DModel.from_pretrained(folders["out"] / "transformer")
    weight = model.transformer_blocks[0].attn1.to_q.dequantized().weight
    original = PixArtTransformer2DModel.from_pretrained(folders["model"] / "transformer")
    expected = original.transformer_blocks[0].attn1.to_q.weight
    assert (weight - expected).norm() / expected.norm() < 0.15
    model.dequantize()
    assert not packed_layers(model)
    assert torch.equal(model.transformer_blocks[0].attn1.to_q.weight, weight)


@pytest.mark.parametrize("first", ["loraq", "diffusers"])
def test_either_import_may_come_first(folders: dict[str, Path], first: str) -> None:
    second = {"loraq": "diffusers", "diffusers": "loraq"}[first]
    code = (
        f"import {first}\nimport {second}\nfrom diffusers import PixArtTransformer2DModel\n"
        f"PixArtTransformer2DModel.from_pretrained({str(folders['out'] / 'transformer')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def spoilt(folders: dict[str, Path], target: Path, change: dict[str, Any]) -> Path:
    """A copy of the packed transformer whose quantization_config has `change` laid over."""
    folder = models.copy_of(folders["out"] / "transformer", target)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_newer_format_version_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = spoilt(folders, tmp_path / "newer", {"format_version": 3})
    with pytest.raises(loraq.LoraqError, match=r"format version 3.*upgrade loraq"):
        PixArtTransformer2DModel.from_pretrained(folder)


def test_a_missing_plugin_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["out"] / "transformer" / "config.json").read_text())["quantization_config"]
    config["layouts"][0]["main"]["format"] = "nf9"
    folder = spoilt(folders, tmp_path / "plugin", {"layouts": config["layouts"], "plugins": {"loraq-nf9": "1.2"}})
    with pytest.raises(loraq.LoraqError, match=r"plugin that is missing \(loraq-nf9 1.2\).*no format called 'nf9'"):
        PixArtTransformer2DModel.from_pretrained(folder)


def test_a_layer_that_the_class_lacks_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = spoilt(folders, tmp_path / "lacks", {"layers": {"transformer_blocks.9.attn1.to_q": 0}})
    with pytest.raises(loraq.LoraqError, match=r"names the layer 'transformer_blocks.9.attn1.to_q'"):
        PixArtTransformer2DModel.from_pretrained(folder)


def test_quantizing_inside_from_pretrained_is_refused(folders: dict[str, Path]) -> None:
    config = json.loads((folders["out"] / "transformer" / "config.json").read_text())["quantization_config"]
    with pytest.raises(loraq.LoraqError, match="loraq run"):
        PixArtTransformer2DModel.from_pretrained(
            folders["model"] / "transformer", quantization_config=LoraqConfig(config)
        )
