"""The share of pictures that show what their caption says, for the small model that ships with LoRaQ.

Its captions name a size, a colour, a shape and a ground, and loraq/shapes.py reads all four from the pixels, by
templates: nothing is learned, so the judge shares no fault with the model. All four must be right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from loraq.contracts import AbstractMetric, AbstractParticular, AbstractShare
from loraq.errors import InputError
from loraq.picture_set import PictureSet

from .weights import array

if TYPE_CHECKING:
    from PIL import Image


@attrs.frozen(kw_only=True)
class Caption(AbstractMetric, AbstractParticular, AbstractShare):
    """Whether size, colour, shape and ground are as the caption says, 1 or 0; for the small shipped model."""

    paired: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def refusal(self) -> str | None:
        return None

    def objection(self, pictures: PictureSet) -> str | None:
        from loraq.shapes import scene_of

        odd = next((prompt for prompt in pictures.prompts if scene_of(prompt) is None), None)
        if odd is None:
            return None
        return f"it reads captions such as 'a small red ring on white', and '{_short(odd)}' is none."

    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        del original
        from loraq.shapes import PICTURE_SIDE, matches, measure, scene_of

        wanted = scene_of(prompt)
        if wanted is None:
            raise InputError(f"metric 'caption': '{_short(prompt)}' is no caption of the small model; leave it out.")
        if picture.size != (PICTURE_SIDE, PICTURE_SIDE):
            raise InputError(
                f"metric 'caption': it reads pictures of {PICTURE_SIDE} x {PICTURE_SIDE}, and the picture is "
                f"{picture.width} x {picture.height}; leave the metric out."
            )
        return float(all(matches(wanted, measure(array(picture)).scene)))


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
