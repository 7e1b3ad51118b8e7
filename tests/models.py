"""Small untrained models for tests: real diffusers classes, seeded weights, made in a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("<pad>", "</s>", "<unk>", "a", "small", "large", "red", "blue", "ring", "square", "on", "white", "black")


def transformer(layers: int = 2, seed: int = 0, **changes: Any) -> PixArtTransformer2DModel:
    """A PixArt transformer of inner width 64 with weights that look trained."""
    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": layers,
        "cross_attention_dim": 64,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": 32,
        "use_additional_conditions": False,
        "norm_type": "ada_norm_single",
    }
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(**(config | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # no layer of zeros, so that every layer matters to the picture
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows WORDS."""
    vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def pipeline(layers: int = 2, seed: int = 0) -> PixArtSigmaPipeline:
    """A whole PixArtSigmaPipeline that draws 16 x 16 noise."""
    torch.manual_seed(seed)
    text = T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(text).eval(),
        vae=vae.eval(),
        transformer=transformer(layers, seed),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    )


def sana_pipeline(seed: int = 0) -> SanaPipeline:
    """A whole SanaPipeline of one block, whose feed-forward has the 1x1 convolutions, that draws noise."""
    torch.manual_seed(seed)
    text = Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_cross_attention_heads": 2}
    sizes |= {"cross_attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 1, "caption_channels": 32}
    return SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=Gemma2Model(text).eval(),
        vae=vae.eval(),
        transformer=SanaTransformer2DModel(**sizes, in_channels=4, out_channels=4, sample_size=8).eval(),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    )


def flux_transformer(seed: int = 0) -> FluxTransformer2DModel:
    """A FLUX transformer of one block of each kind."""
    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2}
    sizes |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}
    return FluxTransformer2DModel(**sizes, in_channels=16).eval()


CALL = {
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "height": 16,
    "width": 16,
}
"""Arguments with which the small pipeline draws quickly."""


def saved_pipeline(folder: Path, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The small pipeline saved below `folder`, in this dtype."""
    made = pipeline(layers)
    made.to(dtype).save_pretrained(folder)
    # transformers would load the text encoder in the files' dtype and diffusers the others in float32.
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    return folder


def write_recipe(path: Path, model: Path, output: Path, *, low_rank: str = "svd", extra: str = "") -> Path:
    """A recipe for `model`: Hadamard, int4, a branch of rank 4 in int8, unless `low_rank` or `extra` say otherwise."""
    rank = "" if low_rank == "none" else "rank = 4"
    path.write_text(
        f"""
[model]
folder = "{model}"
[run]
output = "{output}"
workers = 2
[[stage]]
kind = "pre_transform"
strategy = "hadamard"
[[stage]]
kind = "main_quantizer"
strategy = "rtn"
[[stage]]
kind = "low_rank"
strategy = "{low_rank}"
{rank}
[[stage]]
kind = "branch_quantizer"
strategy = "rtn"
{extra}
"""
    )
    return path


def tensor_files(folder: Path) -> dict[str, bytes]:
    """What must be byte-identical of a result: safetensors, indices and config.json, by path."""
    kept = (".safetensors", ".index.json")
    paths = [path for path in folder.rglob("*") if path.name == "config.json" or path.name.endswith(kept)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def copy_of(folder: Path, target: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, target))
