"""Draw pictures with a pipeline's folder, for `loraq generate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from loraq.errors import CheckpointError, InputError
from loraq.provenance import PROVENANCE
from loraq.samples import draw, load_pipeline
from loraq.workers import resolved_device


def generate_pictures(
    folder: Path, prompts: Sequence[str], output: Path, seed: int, device: str, settings: Sequence[str]
) -> list[Path]:
    """Draw a picture for each prompt; several are numbered. Returns their paths."""
    if output.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--output {output}: a picture's name ends in .png or .jpg.")
    call = call_of(folder, settings)
    pipeline = load_pipeline(folder, resolved_device(device))
    pictures = draw(pipeline, prompts, seed, call, "drawing")
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, picture in enumerate(pictures):
        numbered = output.with_stem(f"{output.stem}-{place}") if len(pictures) > 1 else output
        picture.save(numbered)
        paths.append(numbered)
    return paths


def call_of(folder: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    """The arguments of the pipeline's call: `settings`, name=value, over the recorded samples' of `folder`, if any."""
    from loraq.settings import toml_value

    call = {} if folder is None else dict(recorded_samples(folder).get("call", {}))
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"--call {setting}: expected name=value, such as num_inference_steps=20.")
        call[name] = toml_value(value)
    return call


def recorded_samples(folder: Path) -> dict[str, Any]:
    """The table [samples] of the recipe that made a quantized folder; empty where there is none."""
    samples = _recorded(folder, "samples")
    if not isinstance(samples.get("call", {}), dict):
        raise CheckpointError(f"{folder / PROVENANCE}: cannot be read (samples.call is no table).")
    return samples


def unlike_original(folder: Path, original: Path) -> str | None:
    """A sentence where `folder` was made of other weights than those that lie in `original`; None where not."""
    model = _recorded(folder, "model")
    merged = [f"model.{name}" for name in ("lora", "file") if model.get(name)]
    if not merged:
        return None
    return (
        f"{folder} was made with {' and '.join(merged)}, and {original} is drawn as it lies there: differences between "
        "the two are not quantization's alone; give --against a folder with the same weights merged."
    )


def _recorded(folder: Path, table: str) -> dict[str, Any]:
    """A table of the recipe that made a quantized folder; empty where there is none."""
    path = folder / PROVENANCE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["recipe"].get(table) or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}).") from None
