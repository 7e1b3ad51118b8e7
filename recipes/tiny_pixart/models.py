"""The parts of the tiny PixArt-Sigma pipeline: tokenizer, text encoder, VAE, transformer and scheduler.

Every part is a class of diffusers or transformers, only with small sizes, so that whatever works on the
published PixArt-Sigma works on this model too. The transformer keeps the proportions of a real diffusion
transformer (heads of 64, feed-forward four times as wide, cross-attention to the caption in every block);
text encoder and VAE are as small as the pictures of `shapes` allow.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from loraq.shapes import PICTURE_SIDE, vocabulary

# diffusers loads its classes lazily; type checkers see placeholders without methods in their place.
library: Any = diffusers
Vae: TypeAlias = Any
TextEncoder: TypeAlias = Any
Transformer: TypeAlias = Any
Scheduler: TypeAlias = Any
Pipeline: TypeAlias = Any

LATENT_CHANNELS = 4
LATENT_SIDE = PICTURE_SIDE // 8
TEXT_WIDTH = 128
HEADS = 4
HEAD_WIDTH = 64
BLOCKS = 6
TRAINING_TIMESTEPS = 1000


def build_tokenizer() -> T5Tokenizer:
    """Build a T5 tokenizer that knows the captions' words and, for anything else, single letters."""
    # Unigram scores are log probabilities: whole words must beat any way to spell them letter by letter.
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [(f"\u2581{word}", -1.0) for word in vocabulary()]
    pieces += [(letter, -10.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=None, model_max_length=300)


def build_text_encoder(vocabulary_size: int) -> TextEncoder:
    """Build an untrained two-layer T5 encoder."""
    config = T5Config(
        vocab_size=-(-vocabulary_size // 64) * 64,
        d_model=TEXT_WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_vae() -> Vae:
    """Build an untrained convolutional VAE that shrinks each side eightfold."""
    return library.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # Few groups: normalizing pairs of channels over the whole picture would wipe out its absolute colour.
        norm_num_groups=2,
        sample_size=PICTURE_SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer() -> Transformer:
    """Build an untrained transformer: 16 tokens of 2x2 latents, six blocks of width 256."""
    transformer: Transformer = library.PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        sample_size=LATENT_SIDE,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    initialize_transformer(transformer)
    return transformer


def initialize_transformer(transformer: Transformer) -> None:
    """Initialize like PixArt: Xavier weights, small time embedding, silent cross-attention and output."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch_projection = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patch_projection.weight.view(patch_projection.weight.shape[0], -1))
    for linear in (
        transformer.adaln_single.emb.timestep_embedder.linear_1,
        transformer.adaln_single.emb.timestep_embedder.linear_2,
        transformer.adaln_single.linear,
    ):
        nn.init.normal_(linear.weight, std=0.02)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)


def build_scheduler() -> Scheduler:
    """Build the sampler for flow matching; its time steps are 1000 times the share of noise."""
    return library.DPMSolverMultistepScheduler(
        num_train_timesteps=TRAINING_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        algorithm_type="dpmsolver++",
        solver_order=2,
    )


def assemble(vae: Vae, text_encoder: TextEncoder, transformer: Transformer) -> Pipeline:
    """Put the parts together, in bfloat16 and ready to save."""
    pipeline: Pipeline = library.PixArtSigmaPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    return pipeline.to(torch.bfloat16)


def load_pipeline(folder: Path) -> Pipeline:
    """Load a saved pipeline, quantized or not, for computing in float32, without progress bars."""
    import loraq  # noqa: F401  # lets diffusers load packed models; training needs none of it

    pipeline = library.PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quieten() -> None:
    """Keep diffusers and transformers from printing a dozen lines at every save and load."""
    messages: Any
    for messages in (diffusers.utils.logging, transformers.utils.logging):
        messages.set_verbosity_error()
        messages.disable_progress_bar()
    warnings.filterwarnings("ignore")
