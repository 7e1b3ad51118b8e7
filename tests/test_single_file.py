"""A component's weights from one file, in diffusers' layout or the original one: the same model, read as lazily."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

import models
from command import done, loraq, refused
from loraq.adapters import Lora
from loraq.errors import ModelError
from loraq.recipe import ModelSource
from loraq.samples import load_source
from loraq.source import open_source

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline, never written to."""
    return models.saved_pipeline(tmp_path_factory.mktemp("base") / "pipeline")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Another model's weights in one file."""
    tensors = models.transformer(seed=1).to(torch.bfloat16).state_dict()
    save_file(dict(tensors), tmp_path / "tuned.safetensors", {"format": "pt"})
    return tmp_path / "tuned.safetensors"


def original_sd3(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A one-block SD3's weights under the names of its original layout: the converter's way back."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "transformer_blocks.0.attn.to_out.0": "joint_blocks.0.x_block.attn.proj",
        "transformer_blocks.0.norm1.linear": "joint_blocks.0.x_block.adaLN_modulation.1",
        "transformer_blocks.0.ff.net.0.proj": "joint_blocks.0.x_block.mlp.fc1",
        "transformer_blocks.0.ff.net.2": "joint_blocks.0.x_block.mlp.fc2",
        "proj_out": "final_layer.linear",
    }
    swapped = {
        "transformer_blocks.0.norm1_context.linear": "joint_blocks.0.context_block.adaLN_modulation.1",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    fused = {"x_block": [f"to_{each}" for each in "qkv"], "context_block": [f"add_{each}_proj" for each in "qkv"]}
    made = {"pos_embed": tensors["pos_embed.pos_embed"]}
    for end in ("weight", "bias"):
        made |= {f"{theirs}.{end}": tensors[f"{ours}.{end}"] for ours, theirs in names.items()}
        for ours, theirs in swapped.items():  # scale and shift changed places
            scale, shift = tensors[f"{ours}.{end}"].chunk(2)
            made[f"{theirs}.{end}"] = torch.cat([shift, scale])
        for block, layers in fused.items():
            parts = [tensors[f"transformer_blocks.0.attn.{each}.{end}"] for each in layers]
            made[f"joint_blocks.0.{block}.attn.qkv.{end}"] = torch.cat(parts)
    assert sum(each.numel() for each in made.values()) == sum(each.numel() for each in tensors.values())
    return made


def opened(base: Path, file: Path) -> Any:
    return open_source(ModelSource(folder=str(base), file=str(file))).components[0]


def refusal(base: Path, file: Path) -> str:
    with pytest.raises(ModelError) as caught:
        opened(base, file).skeleton()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_is_that_of_the_folder_with_these_weights(model: Path, tuned: Path, tmp_path: Path) -> None:
    """Byte for byte; the base's own weights may be missing, and the 16-bit pipeline has the file's."""
    folder = models.copy_of(model, tmp_path / "folder")
    (folder / WEIGHTS).write_bytes(tuned.read_bytes())
    base = models.copy_of(model, tmp_path / "base")
    (base / WEIGHTS).unlink()
    for name, source, line in (("one", folder, ""), ("two", base, f'file = "{tuned}"')):
        recipe = models.write_recipe(tmp_path / f"{name}.toml", source, tmp_path / name)
        recipe.write_text(recipe.read_text().replace("[run]", f"{line}\n[run]"))
        done(loraq("run", recipe))
    assert models.tensor_files(tmp_path / "one") == models.tensor_files(tmp_path / "two")
    fingerprint = json.loads((tmp_path / "two/loraq.json").read_text())["fingerprint"]
    assert set(fingerprint["model"]) == {"transformer/config.json", "model.file"}
    assert "was finished already" in done(loraq("run", tmp_path / "two.toml"))
    source = open_source(ModelSource(folder=str(base), file=str(tuned)))
    drawn = load_source(source, torch.device("cpu")).transformer.state_dict()
    assert all(torch.equal(drawn[name], tensor.float()) for name, tensor in load_file(tuned).items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_original_layout(tmp_path: Path, prefix: str) -> None:
    """By diffusers' converter; pieces of fused tensors are read from their place, and only what was swapped is held."""
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=32, out_channels=16, pos_embed_max_size=8,
    )  # fmt: skip
    transformer.save_pretrained(tmp_path / "sd3")
    plain = dict(transformer.state_dict())
    (tmp_path / "sd3/diffusion_pytorch_model.safetensors").unlink()
    original = {f"{prefix}{name}": tensor for name, tensor in original_sd3(plain).items()}
    save_file(original, tmp_path / "sd3.safetensors")
    component = opened(tmp_path / "sd3", tmp_path / "sd3.safetensors")
    assert set(component.skeleton().state_dict()) == set(plain)
    assert all(torch.equal(component.read(name), tensor) for name, tensor in plain.items())
    held = {name.rpartition(".")[0] for name, piece in component.pieces.items() if piece.held is not None}
    assert held == {"norm_out.linear", "transformer_blocks.0.norm1_context.linear"}
    assert component.held_bytes == sum(plain[f"{name}.{end}"].nbytes for name in held for end in ("weight", "bias"))


def test_an_adapter_goes_onto_the_file_s_weights(model: Path, tuned: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn1.to_q"
    factors = {
        f"transformer.{name}.lora_A.weight": torch.ones(1, 64),
        f"transformer.{name}.lora_B.weight": torch.ones(64, 1),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    lora = (Lora(path=str(tmp_path / "lora.safetensors")),)
    source = open_source(ModelSource(folder=str(model), file=str(tuned), lora=lora))
    expected = (load_file(tuned)[f"{name}.weight"].float() + 1).bfloat16()
    assert torch.equal(source.components[0].read(f"{name}.weight"), expected)


def test_a_file_that_is_gone_wrong_is_refused(model: Path, tuned: Path, tmp_path: Path) -> None:
    assert refusal(model, tmp_path / "no.safetensors") == f"model.file: there is no file {tmp_path / 'no.safetensors'}."
    (tmp_path / "tuned.ckpt").write_bytes(b"")
    assert "no other is read; convert it" in refusal(model, tmp_path / "tuned.ckpt")
    whole = tuned.read_bytes()
    for content in (b"", whole[:4], whole[:-1], b"\xff" * 100):
        tuned.write_bytes(content)
        assert "is truncated or no safetensors file" in refusal(model, tuned)


def test_another_model_s_file_is_refused(model: Path, tmp_path: Path) -> None:
    save_file({"something": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "has not the names of PixArtTransformer2DModel" in refusal(model, tmp_path / "other.safetensors")
    models.flux_transformer().save_pretrained(tmp_path / "flux")
    assert "is it another model's?" in refusal(tmp_path / "flux", tmp_path / "other.safetensors")


def test_a_file_needs_the_model_that_it_goes_with(tmp_path: Path, model: Path, tuned: Path) -> None:
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")
    recipe.write_text(recipe.read_text().replace(f'folder = "{model}"', f'file = "{tuned}"'))
    assert "give either 'folder' or 'hub', of the model that 'file' goes with" in refused(loraq("check", recipe))
