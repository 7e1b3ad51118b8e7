"""Pictures kept in a folder while they are drawn, so that a killed evaluation continues with those that are there.

Each picture is a PNG whose text says what it is: the model's fingerprint, prompt, seed, call, batch, device, versions.
A file that says exactly what is asked for is kept, any other is drawn anew, so pictures of another model or call are
never taken for these. Files are written beside their place and renamed: what is there is whole.

Picture `place` has the noise of its own seed, whatever else is in its batch. Batches begin at fixed places, and one
that lacks a picture is drawn whole again, so that an evaluation that was killed ends with the same pictures: a batch of
another size sums floats in another order, which 16-bit layers hide and roundings to 4-bit activations make visible.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from PIL import Image, PngImagePlugin

from loraq.errors import InputError, ModelError
from loraq.progress import Progress
from loraq.samples import check_call, draw_together, load_pipeline, load_source
from loraq.source import Source

_TEXT = "loraq"
_LARGEST_BATCH = 32
_BATCH_PIXELS = 2**18
"""As many pixels are drawn at once as one picture of 512 x 512 has: small pictures leave a processor idle."""


@attrs.frozen(kw_only=True)
class Drawing:
    """What is drawn: picture `place` shows `prompts[place]` from the noise of `seed_of(place)`.

    That is `seed + place`, unless `seeds` gives each picture its own, as data sets with published protocols do.
    """

    prompts: tuple[str, ...]
    seed: int
    call: Mapping[str, Any]
    batch: int
    seeds: tuple[int, ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.seeds and len(self.seeds) != len(self.prompts):
            raise ValueError(f"Drawing: there are {len(self.seeds)} seeds for {len(self.prompts)} prompts.")

    def seed_of(self, place: int) -> int:
        """The seed of the noise of the picture at `place`."""
        return self.seeds[place] if self.seeds else self.seed + place

    def batches(self) -> list[range]:
        """The places of each call of the pipeline."""
        total = len(self.prompts)
        return [range(start, min(start + self.batch, total)) for start in range(0, total, self.batch)]


def fitting_batch(folder: Path, call: Mapping[str, Any]) -> int:
    """How many pictures of the pipeline in `folder` to draw at once: up to 32 small ones, one of unknown size."""
    try:
        side = own_side(folder)
        height, width = int(call.get("height") or side), int(call.get("width") or side)
        return max(1, min(_LARGEST_BATCH, _BATCH_PIXELS // (height * width)))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 1


def own_side(folder: Path) -> int:
    """The side of the pictures that a pipeline draws by itself, from its configurations."""
    network = "transformer" if (folder / "transformer").is_dir() else "unet"
    latent = json.loads((folder / network / "config.json").read_text(encoding="utf-8"))["sample_size"]
    autoencoder = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    channels = autoencoder.get("encoder_block_out_channels") or autoencoder["block_out_channels"]
    return int(latent) << (len(channels) - 1)


def fingerprint(model: Path | Source) -> str:
    """A digest of the names, sizes and times of a pipeline's files: a model that was changed has another one.

    Of a source whose weights are not those in its folder, as of one with adapters, their digests count too. Raises
    ModelError for a folder that holds no pipeline.
    """
    if isinstance(model, Source):
        told = model.digests() if any(each.rewritten for each in model.components) else {}
        own = fingerprint(model.root)
        return hashlib.sha256(json.dumps([own, told], sort_keys=True).encode()).hexdigest() if told else own
    folder = model
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder}: there is no model_index.json; give the folder of a whole diffusers pipeline.")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def picture_paths(folder: Path, drawing: Drawing) -> tuple[Path, ...]:
    """Where the pictures of `drawing` lie in `folder`, in order."""
    return tuple(folder / f"{place:05}.png" for place in range(len(drawing.prompts)))


def draw_into(
    folder: Path, model: Path | Source, drawing: Drawing, device: torch.device, *, title: str = "drawing"
) -> list[Path]:
    """Draw what `folder` lacks with `model`, a pipeline's folder or a recipe's source. Returns the pictures' paths.

    They are in order. A model whose pictures are all there is not loaded. Raises ModelError or InputError where it
    cannot draw.
    """
    told = told_of(model, drawing, device)
    paths = list(picture_paths(folder, drawing))
    missing = {place for place, path in enumerate(paths) if not _is_kept(path, told[place])}
    if not missing:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model, device) if isinstance(model, Path) else load_source(model, device)
    check_call(pipeline, drawing.call)
    with Progress(title, len(told), done=len(told) - len(missing)) as progress:
        for places in drawing.batches():
            if missing.isdisjoint(places):
                continue
            prompts = [drawing.prompts[place] for place in places]
            drawn = draw_together(pipeline, prompts, [drawing.seed_of(place) for place in places], drawing.call)
            if len(drawn) != len(places):
                raise InputError(
                    f"--call: one picture a prompt is compared, and {type(pipeline).__name__} drew {len(drawn)} for "
                    f"{len(places)} prompts; leave num_images_per_prompt out."
                )
            for place, picture in zip(places, drawn, strict=True):
                if place in missing:
                    _keep(paths[place], picture, told[place])
                    progress.advance(1, drawing.prompts[place])
    del pipeline
    gc.collect()
    return paths


def told_of(model: Path | Source, drawing: Drawing, device: torch.device) -> list[str]:
    """What each picture's file says of itself: two files that say the same show the same picture."""
    made = fingerprint(model)
    return [_told(made, drawing, place, device) for place in range(len(drawing.prompts))]


def _told(model: str, drawing: Drawing, place: int, device: torch.device) -> str:
    """What the picture's file says of it."""
    versions = {name: importlib.metadata.version(name) for name in ("loraq", "diffusers", "torch")}
    told = {
        "prompt": drawing.prompts[place],
        "seed": drawing.seed_of(place),
        "call": dict(drawing.call),
        "batch": drawing.batch,
        "model": model,
        "device": device.type,
        "versions": versions,
    }
    return json.dumps(told, sort_keys=True)


def _is_kept(path: Path, told: str) -> bool:
    """Whether the file at `path` is the picture asked for, and whole."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.info.get(_TEXT) == told
    except (OSError, SyntaxError, ValueError):  # Pillow raises any of them for a damaged file
        return False


def _keep(path: Path, picture: Image.Image, told: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text(_TEXT, told)
    partial = path.with_name(f".{path.name}.partial")
    picture.convert("RGB").save(partial, "PNG", pnginfo=text)
    partial.replace(path)


def opened(path: Path) -> Image.Image:
    """The picture at `path`, read whole, RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def prompts_in(path: Path, where: str = "--prompts") -> list[str]:
    """The prompts of a text file, one a line, empty lines left out. Raises InputError where there are none.

    `where` is where the file was named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{where} {path}: cannot be read ({reason}); give a text file, a prompt a line.") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"{where} {path}: there is no prompt in it; give a text file, a prompt a line.")
    return found


def chosen_prompts(prompts: Sequence[str], count: int, seed: int | None = None) -> tuple[str, ...]:
    """`count` prompts: these in turn, as they come, or, with a `seed`, in a random order that it makes.

    More than `count` are chosen from, fewer come again, and a larger count begins with the choice of a smaller one.
    """
    import numpy

    places = range(len(prompts)) if seed is None else numpy.random.default_rng(seed).permutation(len(prompts))
    return tuple(prompts[places[place % len(prompts)]] for place in range(count))
