"""Pictures: drawn from a pipeline by prompt and seed, and side by side with the 16-bit model's.

A picture's randomness comes from a generator of its own, seeded by the first seed plus its place, on the CPU: the same
prompt and seed give both models the same noise, on any device.
"""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import loraq  # noqa: F401  # lets diffusers load packed models
from loraq.errors import InputError, ModelError, did_you_mean
from loraq.progress import Progress
from loraq.recipe import Samples
from loraq.source import Source

_MARGIN = 8
_SHORTEST = 192
"""Smaller pictures are enlarged to this many pixels."""


def load_source(source: Source, device: torch.device) -> Any:
    """The 16-bit pipeline of a recipe's model, with a single file's weights and adapters where it has such."""
    dtype = _dtype_on(device)
    rewritten = {each.name: each.loaded(dtype) for each in source.components if each.rewritten}
    return load_pipeline(source.root, device, rewritten)


def _dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_pipeline(folder: Path, device: torch.device, components: Mapping[str, nn.Module] | None = None) -> Any:
    """The diffusers pipeline in `folder`, packed or not, with `components` instead of its own.

    Raises ModelError where it cannot be loaded.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    quiet: tuple[Any, ...] = (diffusers_logging, transformers_logging)  # the latter has no types
    for library in quiet:
        library.disable_progress_bar()
    if not (folder / "model_index.json").exists():
        raise ModelError(f"{folder}: there is no model_index.json; pictures need a whole pipeline.")
    dtype = _dtype_on(device)
    try:
        load: Any = DiffusionPipeline.from_pretrained  # diffusers' signatures are partly untyped
        pipeline = load(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **(components or {})
        )  # no pickle is read
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the pipeline cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_call(pipeline: Any, call: Mapping[str, Any], where: str = "samples.call") -> None:
    """Raise InputError for an argument that the pipeline's call does not have; `where` the call was given."""
    known = list(inspect.signature(type(pipeline).__call__).parameters)
    for name in call:
        if name not in known:  # some pipelines take any argument and drop it silently
            raise InputError(f"{where}: {type(pipeline).__name__} takes no '{name}'{did_you_mean(name, known)}")


def draw_together(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]
) -> list[Image.Image]:
    """A picture for each prompt and its seed, in one call of the pipeline. Raises InputError for a bad call."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    one = len(prompts) == 1  # a pipeline that takes no lists draws pictures one by one
    try:
        found = pipeline(prompts[0] if one else list(prompts), generator=generators[0] if one else generators, **call)
    except (TypeError, ValueError) as error:
        raise InputError(f"samples.call: {type(pipeline).__name__} does not take it: {error}") from error
    return list(found.images)


def draw(pipeline: Any, prompts: Sequence[str], seed: int, call: Mapping[str, Any], title: str) -> list[Image.Image]:
    """A picture for each prompt; the first has `seed`, each further one the next. Raises InputError for a bad call."""
    check_call(pipeline, call)
    pictures = []
    with Progress(title, len(prompts)) as progress:
        for place, prompt in enumerate(prompts):
            pictures.append(draw_together(pipeline, [prompt], [seed + place], call)[0])
            progress.advance(1, prompt)
    return pictures


def draw_comparison(original: Source, quantized: Path, samples: Samples, path: Path, device: torch.device) -> float:
    """Write the picture "16-bit beside quantized" to `path`. Returns the mean PSNR in dB.

    The models are loaded one after the other, so that memory holds one.
    """
    columns = []
    loads: list[tuple[Callable[[], Any], str]] = [
        (lambda: load_source(original, device), "drawing with the 16-bit model"),
        (lambda: load_pipeline(quantized, device), "drawing with the packed model"),
    ]
    for load, title in loads:
        pipeline = load()
        columns.append(draw(pipeline, samples.prompts, samples.seed, samples.call, title))
        del pipeline
        gc.collect()
    ratios = [psnr(first, second) for first, second in zip(*columns, strict=True)]
    sheet(list(samples.prompts), ["16-bit", "quantized"], columns, ratios).save(path)
    return sum(ratios) / len(ratios)


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; 99 for equal ones."""
    difference = numpy.asarray(first.convert("RGB"), float) - numpy.asarray(second.convert("RGB"), float)
    mean_square = float((difference**2).mean())
    return 99.0 if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def sheet(
    prompts: Sequence[str], titles: Sequence[str], columns: Sequence[Sequence[Image.Image]], ratios: Sequence[float]
) -> Image.Image:
    """One picture of all: a cell a prompt, in it the columns' pictures side by side, the prompt and PSNR below."""
    shown = [[_enlarged(picture) for picture in column] for column in columns]
    width, height = shown[0][0].size
    font = ImageFont.load_default(15)
    cell_width = len(shown) * (width + _MARGIN) + 2 * _MARGIN
    cell_height = height + 3 * _MARGIN + 2 * 18
    across = max(1, min(len(prompts), round(math.sqrt(len(prompts) * cell_height / cell_width * 1.5))))
    down = math.ceil(len(prompts) / across)
    canvas = Image.new("RGB", (across * cell_width, down * cell_height), "white")
    pen = ImageDraw.Draw(canvas)
    for place, prompt in enumerate(prompts):
        left = (place % across) * cell_width + _MARGIN
        top = (place // across) * cell_height + _MARGIN
        for index, (title, column) in enumerate(zip(titles, shown, strict=True)):
            x = left + index * (width + _MARGIN)
            pen.text((x, top), title, fill="#666666", font=font)
            canvas.paste(column[place], (x, top + 20))
            pen.rectangle((x - 1, top + 19, x + width, top + 20 + height), outline="#cccccc")
        room = cell_width - 2 * _MARGIN
        caption = f"{prompt} ({ratios[place]:.1f} dB)"
        while pen.textlength(caption, font=font) > room and len(prompt) > 4:
            prompt = prompt[:-4]
            caption = f"{prompt}… ({ratios[place]:.1f} dB)"
        pen.text((left, top + 24 + height), caption, fill="#222222", font=font)
    return canvas


def _enlarged(picture: Image.Image) -> Image.Image:
    """`picture`, at least `_SHORTEST` pixels on its shorter side, by a whole factor."""
    factor = max(1, _SHORTEST // min(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
