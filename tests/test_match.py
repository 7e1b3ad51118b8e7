"""Which layers are quantized, decided by class; and each model family's layers, from the real diffusers classes."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from loraq.errors import ModelError
from loraq.families import ANY_MODULE, FAMILIES, family_of
from loraq.match import MatchedLayer, SkippedLayer, idle_patterns, match_layers
from loraq.pipeline import Pipeline, make_stage
from loraq.recipe import Override


class OwnForward(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Renamed(nn.Linear):
    """A linear layer under another name."""


def pipeline(**options: Any) -> Pipeline:
    stages = [
        make_stage("main_quantizer", "rtn"),
        make_stage("low_rank", "svd", rank=2),
        make_stage("branch_quantizer", "rtn"),
    ]
    return Pipeline(stages, **options)


def matched(module: nn.Module, **options: Any) -> tuple[dict[str, MatchedLayer], dict[str, SkippedLayer]]:
    quantized, skipped = match_layers(module, pipeline(**options), ANY_MODULE)
    return {layer.name: layer for layer in quantized}, {layer.name: layer for layer in skipped}


def test_linear_layers_and_products_in_disguise_are_matched() -> None:
    module = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 6),
            "renamed": Renamed(8, 6, bias=False),
            "pointwise": nn.Conv2d(8, 6, 1),
            "valid": nn.Conv2d(8, 6, (1, 1), padding="valid", bias=False),
            "same": nn.Conv2d(8, 6, 1, padding="same"),
            "dilated": nn.Conv2d(8, 6, 1, dilation=3),
        }
    )
    layers, skipped = matched(module)
    assert list(layers) == list(module)
    assert skipped == {}
    assert {(layer.out, layer.inn) for layer in layers.values()} == {(6, 8)}
    assert [name for name, layer in layers.items() if not layer.bias] == ["renamed", "valid"]
    assert [name for name, layer in layers.items() if layer.convolution] == ["pointwise", "valid", "same", "dilated"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 6, 3),
        nn.Conv2d(8, 6, (1, 3)),
        nn.Conv2d(8, 6, 1, stride=2),
        nn.Conv2d(8, 6, 1, padding=1),
        nn.Conv2d(8, 6, 1, groups=2),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv1d(8, 6, 1),
        nn.Conv3d(8, 6, 1),
        nn.ConvTranspose2d(8, 6, 1),
        nn.Embedding(8, 6),
        nn.Bilinear(8, 6, 4),
        OwnForward(8, 6),
    ],
    ids=lambda layer: repr(layer).replace(" ", ""),
)
def test_what_is_no_product_stays_and_says_why(layer: nn.Module) -> None:
    layers, skipped = matched(nn.Sequential(layer))
    assert layers == {}
    assert skipped["0"].reason == f"parameters of {type(layer).__name__}, which is no linear layer"
    assert skipped["0"].weights == sum(parameter.numel() for parameter in layer.parameters())


def test_attention_keeps_the_projection_whose_weight_it_takes_itself() -> None:
    module = nn.Sequential(nn.MultiheadAttention(8, 2))
    layers, skipped = matched(module)
    assert layers == {}
    assert set(skipped) == {"0", "0.out_proj"}


def test_norms_and_biases_are_not_told() -> None:
    assert matched(nn.Sequential(nn.LayerNorm(8), nn.BatchNorm2d(4))) == ({}, {})


def test_skip_and_keep_patterns_and_their_reasons() -> None:
    module = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    layers, skipped = matched(module, skip=("nothing*", "a.?"), keep=("a.1",))
    assert list(layers) == ["b"], "skip is stronger than keep"
    assert {name: each.reason for name, each in skipped.items()} == {
        "a.0": "model.skip has 'a.?'",
        "a.1": "model.skip has 'a.?'",
    }
    overrides = [Override(match=("a.*",), skip=True), Override(match=("a.1",), skip=False)]
    layers, skipped = matched(module, overrides=overrides)
    assert list(layers) == ["a.1", "b"]
    assert skipped["a.0"].reason == "[[layers]] says skip"


def test_keep_takes_layers_back_from_the_family() -> None:
    model = meta("PixArtTransformer2DModel")
    family = family_of("PixArtTransformer2DModel", diffusers=True)
    layers, skipped = match_layers(model, pipeline(keep=("caption_projection.*",)), family)
    kept = {layer.name for layer in layers if "caption" in layer.name}
    assert kept == {"caption_projection.linear_1", "caption_projection.linear_2"}
    assert {each.reason for each in skipped if each.name == "proj_out"} == {
        "the model family keeps 'proj_out' in 16 bits"
    }


def test_overrides_change_single_layers() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    override = Override(match=("1",), options={"low_rank": {"rank": 5}, "main_quantizer": {"weight": "int8"}})
    layers, _ = matched(module, overrides=[override])
    assert [(each.layout.rank, each.layout.main.format.name) for each in layers.values()] == [(2, "int4"), (5, "int8")]


def test_a_recipes_activation_wins_over_the_familys_weight_only() -> None:
    model = meta("FluxTransformer2DModel")
    family = family_of("FluxTransformer2DModel", diffusers=True)
    override = Override(match=("*.norm1.linear",), options={"main_quantizer": {"activation": "int8"}})
    layers, _ = match_layers(model, pipeline(overrides=[override]), family)
    told = {layer.name: str(layer.layout.activation) for layer in layers if ".norm1" in layer.name}
    assert told == {
        "transformer_blocks.0.norm1.linear": "int8",
        "transformer_blocks.0.norm1_context.linear": "none",
    }


def test_nothing_left_to_quantize_is_refused_and_nothing_is_changed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 3))
    with pytest.raises(ModelError, match="no layer left to quantize"):
        pipeline().quantize(module)


CONFIGS: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "cross_attention_dim": 64,
        "sample_size": 8,
        "caption_channels": 32,
        "use_additional_conditions": True,
    },
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 8,
        "sample_size": 8,
        "guidance_embeds": True,
    },
    "FluxTransformer2DModel": {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "out_channels": 4,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    },
}
SELF = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*SELF, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TIME = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
GUIDANCE = ("guidance_embedder.linear_1", "guidance_embedder.linear_2")
TEXT = ("text_embedder.linear_1", "text_embedder.linear_2")
FEED_FORWARD = ("net.0.proj", "net.2")
CAPTION = ("linear_1", "linear_2")


def below(path: str, *leaves: str | tuple[str, ...]) -> set[str]:
    return {f"{path}.{each}" for leaf in leaves for each in ((leaf,) if isinstance(leaf, str) else leaf)}


BLOCK = "transformer_blocks.0"
QUANTIZED = {
    "PixArtTransformer2DModel": below(f"{BLOCK}.attn1", SELF)
    | below(f"{BLOCK}.attn2", SELF)
    | below(f"{BLOCK}.ff", FEED_FORWARD),
    "SanaTransformer2DModel": below(f"{BLOCK}.attn1", SELF)
    | below(f"{BLOCK}.attn2", SELF)
    | below(f"{BLOCK}.ff", "conv_inverted", "conv_point"),
    "FluxTransformer2DModel": below(f"{BLOCK}.attn", JOINT)
    | below(f"{BLOCK}.ff", FEED_FORWARD)
    | below(f"{BLOCK}.ff_context", FEED_FORWARD)
    | below("single_transformer_blocks.0", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"),
    "SD3Transformer2DModel": below(f"{BLOCK}.attn", JOINT)
    | below(f"{BLOCK}.attn2", SELF)
    | below(f"{BLOCK}.ff", FEED_FORWARD)
    | below(f"{BLOCK}.ff_context", FEED_FORWARD)
    | below("transformer_blocks.1.attn", JOINT[:-1])
    | below("transformer_blocks.1.ff", FEED_FORWARD),
    "QwenImageTransformer2DModel": below(f"{BLOCK}.attn", JOINT)
    | below(f"{BLOCK}.img_mlp", FEED_FORWARD)
    | below(f"{BLOCK}.txt_mlp", FEED_FORWARD),
}
WEIGHT_ONLY = {
    "FluxTransformer2DModel": below(BLOCK, "norm1.linear", "norm1_context.linear")
    | {"single_transformer_blocks.0.norm.linear"},
    "SD3Transformer2DModel": below(BLOCK, "norm1.linear", "norm1_context.linear")
    | below("transformer_blocks.1", "norm1.linear", "norm1_context.linear"),
    "QwenImageTransformer2DModel": below(BLOCK, "img_mod.1", "txt_mod.1"),
}
SIXTEEN_BITS = {
    "PixArtTransformer2DModel": {"proj_out", "adaln_single.linear"}
    | below("adaln_single.emb", TIME)
    | below("adaln_single.emb.resolution_embedder", CAPTION)
    | below("adaln_single.emb.aspect_ratio_embedder", CAPTION)
    | below("caption_projection", CAPTION),
    "SanaTransformer2DModel": {"proj_out", "patch_embed.proj", "time_embed.linear"}
    | below("time_embed", TIME, GUIDANCE)
    | below("caption_projection", CAPTION),
    "FluxTransformer2DModel": {"proj_out", "x_embedder", "context_embedder", "norm_out.linear"}
    | below("time_text_embed", TIME, GUIDANCE, TEXT),
    "SD3Transformer2DModel": {"proj_out", "context_embedder", "norm_out.linear", "pos_embed.proj"}
    | below("time_text_embed", TIME, TEXT),
    "QwenImageTransformer2DModel": {"proj_out", "img_in", "txt_in", "norm_out.linear"} | below("time_text_embed", TIME),
}


def meta(class_name: str) -> nn.Module:
    with init_empty_weights():
        model: nn.Module = getattr(diffusers, class_name)(**CONFIGS[class_name])
    return model


@pytest.mark.parametrize("class_name", FAMILIES)
def test_each_family_quantizes_exactly_the_layers_of_its_blocks(class_name: str) -> None:
    layers, skipped = match_layers(meta(class_name), pipeline(), family_of(class_name, diffusers=True))
    weight_only = {layer.name for layer in layers if layer.layout.activation.format is None}
    assert weight_only == WEIGHT_ONLY.get(class_name, set())
    assert {layer.name for layer in layers} - weight_only == QUANTIZED[class_name]
    assert all(layer.layout.branch_activation.format is None for layer in layers if layer.name in weight_only)
    family = {each.name for each in skipped if each.reason.startswith("the model family keeps")}
    assert family == SIXTEEN_BITS[class_name]


@pytest.mark.parametrize("class_name", FAMILIES)
def test_no_pattern_of_a_family_is_idle(class_name: str) -> None:
    import fnmatch

    names = [name for name, _ in meta(class_name).named_modules()]
    family = FAMILIES[class_name]
    for pattern in (*family.skip, *family.weight_only):
        assert fnmatch.filter(names, pattern), pattern


def test_sanas_convolutions_hold_half_of_its_weights_and_are_matched() -> None:
    model = meta("SanaTransformer2DModel")
    layers, skipped = match_layers(model, pipeline(), family_of("SanaTransformer2DModel", diffusers=True))
    blocks = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("transformer_b"))
    convolutions = sum(layer.out * layer.inn for layer in layers if layer.convolution)
    quantized = sum(layer.out * layer.inn for layer in layers)
    assert {layer.name for layer in layers if layer.convolution} == below(f"{BLOCK}.ff", "conv_inverted", "conv_point")
    assert convolutions > 0.4 * quantized
    assert quantized > 0.7 * blocks
    reasons = {each.name: each.reason for each in skipped}
    assert reasons[f"{BLOCK}.ff.conv_depth"] == "parameters of Conv2d, which is no linear layer"


def test_an_unknown_diffusers_class_gets_what_its_kin_have_in_common() -> None:
    assert family_of("SomethingElse", diffusers=False) is ANY_MODULE
    for class_name in FAMILIES:
        layers, _ = match_layers(meta(class_name), pipeline(), family_of("Unknown", diffusers=True))
        names = {layer.name for layer in layers}
        assert QUANTIZED[class_name] <= names
        assert not names & {"proj_out", "norm_out.linear", "patch_embed.proj", "x_embedder", "context_embedder"}


def test_a_transformer_encoder_layer_still_runs_once_what_can_be_is_quantized() -> None:
    module = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.Linear(64, 64)).eval()
    report = Pipeline([make_stage("main_quantizer", "rtn")]).quantize(module)
    assert [layer.name for layer in report.layers] == ["1"]
    assert any("read by something else" in each.reason for each in report.skipped)
    with torch.inference_mode():
        assert module(torch.zeros(2, 3, 64)).shape == (2, 3, 64)


def test_patterns_that_match_nothing_are_told() -> None:
    """Exact names, wildcards and each pattern of a table apart; once each, with what may have been meant."""
    module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    named = nn.ModuleDict({"blocks": module, "last": nn.Linear(4, 4)})
    made = pipeline(
        skip=["blocks.0", "blokcs.1", "blokcs.1"],
        keep=["last", "norm*"],
        overrides=[Override(match=("blocks.*", "*.7"), skip=True), Override(match=("last",), options={})],
    )
    names = [layer.name for layers in match_layers(named, made, ANY_MODULE) for layer in layers]
    assert idle_patterns(made, names) == (
        "model.skip has 'blokcs.1', which matches no layer; did you mean 'blocks.1'?",
        "model.keep has 'norm*', which matches no layer",
        "[[layers]] match has '*.7', which matches no layer",
    )
