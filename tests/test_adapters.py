"""Adapters merged while the model is read: the same as diffusers' own fusing, everywhere the model is seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from command import done, loraq, refused
from loraq.adapters import Delta, Lora, loras, merged
from loraq.errors import CheckpointError, InputError, LoraqError, ModelError
from loraq.pipeline import Pipeline, make_stage, quantize_group
from loraq.recipe import ModelSource, load
from loraq.samples import load_source
from loraq.source import open_source

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
ATTENTION = "transformer_blocks.0.attn1.to_q"
KEPT = "caption_projection.linear_1"


def factors(out: int, inn: int, rank: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down), large enough to see."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator) / 4, torch.randn(rank, inn, generator=generator) / 4


def adapter(path: Path, layers: Mapping[str, tuple[int, int]], **metadata: str) -> Path:
    """An adapter for these (out, inn) layers as PEFT names it."""
    tensors = {}
    for seed, (layer, (out, inn)) in enumerate(layers.items()):
        up, down = factors(out, inn, seed=seed)
        tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file(tensors, path, metadata=metadata or None)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline, never written to."""
    return models.saved_pipeline(tmp_path_factory.mktemp("adapted") / "pipeline")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """An adapter of a layer that is quantized and of one that is kept."""
    return adapter(tmp_path / "lora.safetensors", {ATTENTION: (64, 64), KEPT: (64, 32)})


def reading(model: Path, *adapters: Lora) -> Any:
    return open_source(ModelSource(folder=str(model), lora=adapters)).components[0]


def told(model: Path, *adapters: Lora) -> str:
    """The sentence with which adapters are refused."""
    with pytest.raises(ModelError) as caught:
        reading(model, *adapters)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a", [("a", 1.0)]),
        (["a", 0.5], [("a", 0.5)]),
        (["a", "b"], [("a", 1.0), ("b", 1.0)]),
        ([["a", 2], {"path": "b", "weight": -1.0}, "c"], [("a", 2.0), ("b", -1.0), ("c", 1.0)]),
        ([], []),
    ],
)
def test_what_a_recipe_may_write(written: object, expected: list[tuple[str, float]]) -> None:
    assert [(each.path, each.weight) for each in loras(written)] == expected


@pytest.mark.parametrize(
    "written", [3, [3], ["a", True], [["a"]], {"file": "a"}, {"path": "a", "weight": "b"}, [[]], ""]
)
def test_what_a_recipe_may_not_write(written: object) -> None:
    with pytest.raises(InputError):
        loras(written)


def test_the_recipe_s_paths_are_beside_it_and_come_back_from_its_table(tmp_path: Path, model: Path) -> None:
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")
    recipe.write_text(recipe.read_text().replace("[run]", 'lora = [["style.safetensors", 0.5], "/b"]\n[run]'))
    assert [(each.path, each.weight) for each in load(recipe).model.lora] == [
        (str(tmp_path / "style.safetensors"), 0.5),
        ("/b", 1.0),
    ]
    table = load(recipe).to_plain()["model"]["lora"]
    assert loras(table) == load(recipe).model.lora
    recipe.write_text(recipe.read_text().replace("0.5", "nan"))
    assert "model.lora: 'weight' must be a number" in refused(loraq("check", recipe))


def test_merging_is_the_formula() -> None:
    weight = torch.randn(6, 5).bfloat16()
    up, down = factors(6, 5)
    found = merged(weight, [Delta(0.5, up=up, down=down), Delta(-2.0, whole=torch.ones(6, 5))])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (weight.float() + 0.5 * up @ down - 2).bfloat16())


def test_several_adapters_add_up_before_the_one_rounding(model: Path, tmp_path: Path) -> None:
    first = adapter(tmp_path / "a.safetensors", {ATTENTION: (64, 64)})
    second = adapter(tmp_path / "b.safetensors", {KEPT: (64, 32), ATTENTION: (64, 64)})
    component = reading(model, Lora(path=str(first), weight=0.5), Lora(path=str(second), weight=2.0))
    plain = load_file(model / WEIGHTS)[f"{ATTENTION}.weight"].float()
    (up, down), (other_up, other_down) = factors(64, 64), factors(64, 64, seed=1)
    expected = plain + 0.5 * up @ down + 2 * other_up @ other_down
    assert torch.equal(component.read(f"{ATTENTION}.weight"), expected.bfloat16())
    untouched = "transformer_blocks.1.attn1.to_q.weight"
    assert torch.equal(component.read(untouched), load_file(model / WEIGHTS)[untouched])


@pytest.mark.parametrize("how", ["tensor", "metadata", "pattern", "peft", "rslora"])
def test_alpha_wherever_it_is_told(model: Path, tmp_path: Path, how: str) -> None:
    """alpha 6 at rank 3 doubles; rsLoRA's divides by the root."""
    settings = {"r": 3, "lora_alpha": 6}
    if how == "pattern":
        settings = {"r": 3, "lora_alpha": 3, "alpha_pattern": {"attn1.to_q": 6}}  # type: ignore[dict-item]
    if how == "rslora":
        settings["use_rslora"] = True
    told = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    metadata = {} if how in ("tensor", "peft") else {"lora_adapter_metadata": told}
    path = adapter(tmp_path / "lora.safetensors", {ATTENTION: (64, 64)}, **metadata)
    if how == "tensor":
        save_file(load_file(path) | {f"transformer.{ATTENTION}.alpha": torch.tensor(6.0)}, path)
    if how == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    up, down = factors(64, 64)
    expected = (
        load_file(model / WEIGHTS)[f"{ATTENTION}.weight"]
        .float()
        .addmm(up, down, alpha=6 / 3**0.5 if how == "rslora" else 2)
    )
    found = reading(model, Lora(path=str(path))).read(f"{ATTENTION}.weight")
    assert torch.equal(found, expected.bfloat16())


def test_kohya_s_names_without_dots(model: Path, tmp_path: Path) -> None:
    up, down = factors(64, 64)
    name = f"lora_unet_{ATTENTION.replace('.', '_')}"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    expected = load_file(model / WEIGHTS)[f"{ATTENTION}.weight"].float().addmm(up, down, alpha=0.5)
    found = reading(model, Lora(path=str(tmp_path / "kohya.safetensors"))).read(f"{ATTENTION}.weight")
    assert torch.equal(found, expected.bfloat16())


def test_whole_differences_and_biases(model: Path, tmp_path: Path) -> None:
    up, down = factors(64, 64)
    tensors = {
        f"transformer.{ATTENTION}.lora_A.weight": down,
        f"transformer.{ATTENTION}.lora_B.weight": up,
        f"transformer.{ATTENTION}.lora_B.bias": torch.ones(64),
        f"diffusion_model.{KEPT}.diff": torch.ones(64, 32),
        f"diffusion_model.{KEPT}.diff_b": torch.full((64,), 3.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    component = reading(model, Lora(path=str(tmp_path / "lora.safetensors"), weight=0.5))
    plain = load_file(model / WEIGHTS)
    for name, added in ((f"{ATTENTION}.bias", 0.5), (f"{KEPT}.weight", 0.5), (f"{KEPT}.bias", 1.5)):
        assert torch.equal(component.read(name), (plain[name].float() + added).bfloat16())


def fused_by_diffusers(transformer: Any, path: Path, weight: float) -> dict[str, torch.Tensor]:
    """The state dict after diffusers' own loading and fusing, float32."""
    pytest.importorskip("peft")
    transformer.load_lora_adapter(load_file(path), prefix="transformer")
    transformer.fuse_lora(lora_scale=weight)
    transformer.unload_lora()
    return dict(transformer.state_dict())


def test_the_same_as_diffusers_fusing_sana_with_its_convolutions(tmp_path: Path) -> None:
    pipeline = models.sana_pipeline()
    folder = tmp_path / "sana"
    pipeline.save_pretrained(folder)
    plain = pipeline.transformer.state_dict()
    layers = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in plain.items()
        if name.endswith(".weight") and (tensor.dim() == 2 or tensor.shape[2:] == (1, 1)) and "embed" not in name
    }
    path = adapter(tmp_path / "lora.safetensors", layers)
    tensors = load_file(path)
    for layer in layers:  # PEFT's factors of a convolution are convolutions
        if plain[f"{layer}.weight"].dim() == 4:
            for end in ("A", "B"):
                tensors[f"transformer.{layer}.lora_{end}.weight"].unsqueeze_(-1).unsqueeze_(-1)
    save_file(tensors, path)
    component = reading(folder, Lora(path=str(path), weight=0.7))
    expected = fused_by_diffusers(pipeline.transformer, path, 0.7)
    assert len(component.deltas) == len(layers)
    for name, tensor in expected.items():
        assert torch.allclose(component.read(name), tensor, rtol=1e-5, atol=1e-6), name


def kohya_flux(path: Path, inner: int) -> Path:
    """An adapter in the names of FLUX's original layout, with fused q, k, v, as kohya's scripts write it.

    Without the single blocks' fused linear1, of which diffusers' converter knows the true sizes only.
    """
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * inner, inner),
        "double_blocks_0_img_mlp_0": (4 * inner, inner),
        "single_blocks_0_linear2": (inner, 5 * inner),
    }
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        up, down = factors(*shape, seed=seed)
        tensors |= {f"lora_unet_{name}.lora_up.weight": up, f"lora_unet_{name}.lora_down.weight": down}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)
    return path


def test_flux_s_original_layout_by_diffusers_converter(tmp_path: Path) -> None:
    transformer = models.flux_transformer()
    transformer.save_pretrained(tmp_path / "flux")
    component = reading(tmp_path / "flux", Lora(path=str(kohya_flux(tmp_path / "kohya.safetensors", 64))))
    plain = transformer.state_dict()
    up, down = factors(192, 64)
    parts = (up @ down / 2).split(64)
    for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
        full = f"transformer_blocks.0.attn.{name}.weight"
        assert torch.allclose(component.read(full), plain[full] + part, atol=1e-6)
    up, down = factors(64, 320, seed=2)
    last = "single_transformer_blocks.0.proj_out.weight"
    assert torch.allclose(component.read(last), plain[last] + up @ down / 2, atol=1e-6)


CALIBRATED = f"""
[calibration]
prompts = ["a red ring"]
cache = false
call = {{ {", ".join(f"{name} = {json.dumps(value)}" for name, value in models.CALL.items())} }}
"""


@pytest.mark.parametrize(("low_rank", "extra"), [("svd", ""), ("qera", CALIBRATED)], ids=["data-free", "calibrated"])
def test_the_run_is_that_of_the_fused_model(model: Path, lora: Path, tmp_path: Path, low_rank: str, extra: str) -> None:
    """Byte for byte, quantized and kept layers alike; and the pipeline that calibrates has the same weights."""
    source = open_source(ModelSource(folder=str(model), lora=(Lora(path=str(lora), weight=0.8),)))
    fused = models.copy_of(model, tmp_path / "fused")
    tensors = {name: source.components[0].read(name) for name in load_file(fused / WEIGHTS)}
    save_file(tensors, fused / WEIGHTS, {"format": "pt"})
    for folder, line in ((model, f'lora = ["{lora}", 0.8]'), (fused, "")):
        output = tmp_path / f"out-{folder.name}"
        recipe = models.write_recipe(tmp_path / f"{folder.name}.toml", folder, output, low_rank=low_rank, extra=extra)
        recipe.write_text(recipe.read_text().replace("[run]", f"{line}\n[run]"))
        done(loraq("run", recipe))
    assert models.tensor_files(tmp_path / "out-pipeline") == models.tensor_files(tmp_path / "out-fused")
    transformer = load_source(source, torch.device("cpu")).transformer
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in transformer.state_dict().items())


def test_a_run_that_broke_off_continues_with_the_same_adapter(
    model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [Lora(path=str(lora), weight=0.8)]
    made = Pipeline([make_stage("main_quantizer", "rtn")], workers=1)
    made.run(model, tmp_path / "whole", lora=adapters)
    left = iter(range(5))

    def breaking(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise LoraqError("the power went.")
        return quantize_group(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr("loraq.fitting.quantize_group", breaking)
        with pytest.raises(LoraqError, match="the power went"):
            made.run(model, tmp_path / "broken", lora=adapters)
    with pytest.raises(CheckpointError, match="holds an unfinished run with another model"):
        made.run(model, tmp_path / "broken")
    made.run(model, tmp_path / "broken", lora=adapters)
    assert models.tensor_files(tmp_path / "broken") == models.tensor_files(tmp_path / "whole")


def test_adapters_are_part_of_the_fingerprint_and_of_loraq_json(model: Path, lora: Path, tmp_path: Path) -> None:
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")
    recipe.write_text(recipe.read_text().replace("[run]", f'lora = ["{lora}", 0.8]\n[run]'))
    done(loraq("run", recipe))
    provenance = json.loads((tmp_path / "out/loraq.json").read_text())
    assert provenance["fingerprint"]["model"]["model.lora[0]"].startswith("0.8 * ")
    assert provenance["recipe"]["model"]["lora"] == [{"path": str(lora), "weight": 0.8}]
    assert "was finished already" in done(loraq("run", recipe))
    text = recipe.read_text()
    recipe.write_text(text.replace("0.8", "0.7"))
    assert "made with another model" in refused(loraq("run", recipe))
    recipe.write_text(text)
    tensors = load_file(lora)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, lora)
    assert "made with another model" in refused(loraq("run", recipe))


def test_no_key_is_left_out(model: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora.safetensors", {ATTENTION: (64, 64), "transformer_blocks.0.attn1.to_qq": (64, 64)})
    assert told(model, Lora(path=str(path))) == (
        f"model.lora[0]: {path}: its tensor 'transformer.transformer_blocks.0.attn1.to_qq.lora_A.weight' belongs to no "
        f"layer of PixArtTransformer2DModel; did you mean '{ATTENTION}'?"
    )


def edited(path: Path, change: Mapping[str, torch.Tensor], without: tuple[str, ...] = ()) -> Lora:
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
    save_file(tensors | dict(change), path)
    return Lora(path=str(path))


def test_what_is_no_plain_lora_is_refused(model: Path, lora: Path) -> None:
    name = f"transformer.{ATTENTION}.lora_magnitude_vector"
    assert "it is DoRA ('transformer." in told(model, edited(lora, {name: torch.ones(64)}))
    text = {"lora_te1_layer.lora_up.weight": torch.ones(1)}
    assert "it changes a text encoder as well" in told(model, edited(lora, text, (name,)))


def test_factors_that_do_not_fit_are_refused(model: Path, lora: Path) -> None:
    down = f"transformer.{ATTENTION}.lora_A.weight"
    sentence = told(model, edited(lora, {down: torch.ones(3, 65)}))
    assert f"for '{ATTENTION}.weight' it makes [64, 65], but the model has [64, 64]" in sentence
    assert f"of layer '{ATTENTION}' it has one factor and not the other" in told(model, edited(lora, {}, (down,)))


@pytest.mark.parametrize("how", ["missing", "empty folder", "pickle", "truncated"])
def test_files_that_cannot_be_read_are_refused(model: Path, lora: Path, tmp_path: Path, how: str) -> None:
    path, sentence = {
        "missing": (tmp_path / "no.safetensors", "there is no such file"),
        "empty folder": (tmp_path / "empty", "the folder holds 0 safetensors files"),
        "pickle": (tmp_path / "lora.pt", "only safetensors are read"),
        "truncated": (lora, "it is truncated or no safetensors file"),
    }[how]
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora.pt").write_bytes(b"")
    lora.write_bytes(lora.read_bytes()[:-3])
    assert sentence in told(model, Lora(path=str(path)))


def test_the_plan_knows_the_adapter_without_merging_it(model: Path, lora: Path) -> None:
    from loraq.plan import make_plan

    source = open_source(ModelSource(folder=str(model), lora=(Lora(path=str(lora)),)))
    plain = make_plan(open_source(ModelSource(folder=str(model))), Pipeline([make_stage("main_quantizer", "rtn")]))
    made = make_plan(source, Pipeline([make_stage("main_quantizer", "rtn")]))
    assert made.written_bytes == plain.written_bytes
    held = sum(tensor.nbytes for tensor in load_file(lora).values())
    assert [component.held_bytes for component in source.components] == [held]
    assert attrs.evolve(source.components[0], deltas={}).held_bytes == 0
