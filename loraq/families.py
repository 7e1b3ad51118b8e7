"""Model families as data: what stays in 16 bits, and what is quantized by weight only.

By default the layers before and after the blocks stay in 16 bits: patch, time and caption embedders and the final
projection; they are few and every pixel passes through them. Modulation layers (adaLN) inside the blocks see one token
an image and their output scales everything; where they are a large share of the weights (a third of FLUX) they are
quantized by weight only, with 16-bit activations, rather than left.

Patterns are fnmatch patterns over dotted names within the component. `model.skip` and `model.keep` of a recipe add to
them.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Family:
    """Defaults of one model class. `skip` stays in 16 bits; `weight_only` keeps 16-bit activations.

    `same_input` lists layers that read one tensor, by what follows their common prefix: of those of a list that a block
    has, all read the same.
    """

    skip: tuple[str, ...] = ()
    weight_only: tuple[str, ...] = ()
    same_input: tuple[tuple[str, ...], ...] = ()


_SELF = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_CROSS = ("attn2.to_k", "attn2.to_v")
_JOINT = (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))


_EMBEDDERS = ("*embed*", "*caption_projection*", "*caption_norm*")
_LAST = ("proj_out", "norm_out.*", "final_layer.*")

FAMILIES: dict[str, Family] = {
    "PixArtTransformer2DModel": Family(
        skip=("pos_embed.*", "adaln_single.*", "caption_projection.*", "proj_out"), same_input=(_SELF, _CROSS)
    ),
    "SanaTransformer2DModel": Family(
        skip=("patch_embed.*", "time_embed.*", "caption_projection.*", "proj_out"), same_input=(_SELF, _CROSS)
    ),
    "FluxTransformer2DModel": Family(
        skip=("x_embedder", "context_embedder", "time_text_embed.*", "norm_out.*", "proj_out"),
        weight_only=("*.norm.linear", "*.norm1.linear", "*.norm1_context.linear"),
        same_input=(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), _JOINT[1]),
    ),
    "SD3Transformer2DModel": Family(
        skip=("pos_embed.*", "time_text_embed.*", "context_embedder", "norm_out.*", "proj_out"),
        weight_only=("*.norm1.linear", "*.norm1_context.linear"),
        same_input=(*_JOINT, ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    ),
    "QwenImageTransformer2DModel": Family(
        skip=("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out"),
        weight_only=("*.img_mod.1", "*.txt_mod.1"),
        same_input=_JOINT,
    ),
}

UNKNOWN_DIFFUSERS = Family(skip=(*_EMBEDDERS, *_LAST), weight_only=("*norm*.linear", "*_mod.1"))
"""For a diffusers model of another class: what its kin have in common."""

ANY_MODULE = Family()
"""For an nn.Module that is no diffusers model: every linear layer is quantized."""


def family_of(class_name: str, *, diffusers: bool) -> Family:
    """The family of a model class; `diffusers` says whether the class is a diffusers model."""
    return FAMILIES.get(class_name, UNKNOWN_DIFFUSERS if diffusers else ANY_MODULE)
