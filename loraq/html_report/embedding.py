"""Pictures for a page that stands alone: recompressed, as data URIs, with what differs from the 16-bit model's.

A difference shows, for each pixel and colour, FACTOR times how far the picture is from the 16-bit model's: black is
equal. It is taken from the pictures as they were drawn, before anything is made smaller or compressed with loss.
Small pictures are kept exactly. Larger ones become smaller, in steps, until all of them together fit into LIMIT; where
even the smallest do not, fewer prompts are shown. What was done is said beside them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from PIL import Image, ImageChops, features

from loraq.results import Picture
from loraq.samples import psnr

FACTOR = 8
LIMIT = 12_000_000
"""Characters of all data URIs together, about."""
_SIDES = (768, 512, 384, 256)
_EXACT = 256
"""Pictures whose longer side is no longer than this are kept exactly."""
_QUALITY = 88


@attrs.frozen
class Shot:
    """One embedded picture; `difference` and `psnr` (dB) are to the 16-bit model's, None where that one is missing."""

    picture: str
    difference: str | None = None
    psnr: float | None = None


@attrs.frozen(kw_only=True)
class Gallery:
    """The pictures of one model: for each prompt and seed the 16-bit model's and every cell's (by label), or None."""

    scenes: tuple[tuple[str, int], ...]
    originals: tuple[Shot | None, ...]
    cells: Mapping[str, tuple[Shot | None, ...]]
    note: str
    pixelated: bool
    """Whether the pictures are so small that they are shown enlarged."""


def gallery(
    originals: Sequence[Picture], cells: Mapping[str, Sequence[Picture]], folder: Path, limit: int = LIMIT
) -> Gallery | None:
    """Embed the pictures, whose paths lie below `folder`. None where there is none that can be read."""
    scenes = list(dict.fromkeys((each.prompt, each.seed) for each in originals))
    for pictures in cells.values():
        scenes += [key for each in pictures if (key := (each.prompt, each.seed)) not in scenes]
    found = _Found.of(originals, cells, folder)
    scenes = [scene for scene in scenes if any((label, scene) in found.paths for label in found.labels)]
    if not scenes:
        return None
    longest = max(max(picture.size) for label in found.labels if (picture := found.opened(label, scenes[0])))
    side, count = _fitting(found, scenes, longest, limit)
    shown = scenes[:count]
    by_scene = [found.shots(scene, side) for scene in shown]
    by_label = {label: tuple(shots[label] for shots in by_scene) for label in found.labels}
    return Gallery(
        scenes=tuple(shown),
        originals=by_label[None],
        cells={label: each for label, each in by_label.items() if label is not None and any(each)},
        note=_note(longest, side, len(shown), len(scenes)),
        pixelated=longest <= _EXACT,
    )


def _fitting(found: _Found, scenes: Sequence[tuple[str, int]], longest: int, limit: int) -> tuple[int, int]:
    """The longer side and the number of scenes with which all fits, judged by the first scene."""
    sides = [longest] if longest <= _EXACT else [side for side in _SIDES if side < longest] or [_SIDES[-1]]
    if _EXACT < longest <= _SIDES[0]:
        sides.insert(0, longest)
    size = 1
    for side in sides:
        shots = found.shots(scenes[0], side).values()
        size = max(1, sum(len(shot.picture) + len(shot.difference or "") for shot in shots if shot))
        if size * len(scenes) <= limit:
            return side, len(scenes)
    return sides[-1], max(1, min(len(scenes), limit // size))


def _note(longest: int, side: int, shown: int, there: int) -> str:
    """A sentence on what was done to the pictures to make them fit."""
    form = "WebP" if features.check("webp") else "PNG"
    if longest <= _EXACT:
        size = f"The pictures are as they were drawn ({longest} pixels, {form} without loss)"
    elif side >= longest:
        size = f"The pictures are of full size ({longest} pixels), compressed with loss ({form})"
    else:
        size = f"The pictures were made smaller, from {longest} to {side} pixels, and compressed with loss ({form})"
    fewer = "" if shown == there else f"; the first {shown} of {there} are shown, to keep this file small"
    return size + fewer + "."


@attrs.frozen
class _Found:
    """Where each picture lies, by label (None is the 16-bit model) and scene; and the pictures, opened."""

    labels: tuple[str | None, ...]
    paths: Mapping[tuple[str | None, tuple[str, int]], Path]

    @classmethod
    def of(cls, originals: Sequence[Picture], cells: Mapping[str, Sequence[Picture]], folder: Path) -> _Found:
        by_label: dict[str | None, Sequence[Picture]] = {None: originals}
        by_label.update(cells)
        paths = {
            (label, (each.prompt, each.seed)): folder / each.path
            for label, pictures in by_label.items()
            for each in pictures
            if _is_picture(folder / each.path)
        }
        return cls(tuple(by_label), paths)

    def opened(self, label: str | None, scene: tuple[str, int]) -> Image.Image | None:
        path = self.paths.get((label, scene))
        if path is None:
            return None
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def shots(self, scene: tuple[str, int], side: int) -> dict[str | None, Shot | None]:
        """The pictures of one scene by label, with a longer side of at most `side`."""
        original = self.opened(None, scene)
        return {
            label: _shot(self.opened(label, scene), None if label is None else original, side) for label in self.labels
        }


def _shot(picture: Image.Image | None, original: Image.Image | None, side: int) -> Shot | None:
    if picture is None:
        return None
    if original is None or original.size != picture.size:
        return Shot(_uri(picture, side))
    return Shot(_uri(picture, side), _uri(amplified(picture, original), side), psnr(picture, original))


def _is_picture(path: Path) -> bool:
    """Whether the file is there and whole."""
    try:
        with Image.open(path) as picture:
            picture.load()
        return True
    except (OSError, SyntaxError):  # Pillow's words for a broken PNG
        return False


def amplified(picture: Image.Image, original: Image.Image) -> Image.Image:
    """FACTOR times the distance of each pixel and colour from the original's, white where that is too much."""
    return ImageChops.difference(picture, original).point([min(255, FACTOR * value) for value in range(256)] * 3)


def _uri(picture: Image.Image, side: int) -> str:
    """The picture with a longer side of at most `side`, as a data URI; exact where it is small anyway."""
    exact = max(picture.size) <= _EXACT
    if max(picture.size) > side:
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    if features.check("webp"):
        picture.save(data, "WEBP", lossless=exact, quality=100 if exact else _QUALITY, method=4)
        kind = "webp"
    else:
        picture.save(data, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
