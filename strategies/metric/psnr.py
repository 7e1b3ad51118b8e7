"""Peak signal-to-noise ratio: how far each pixel is from the original's, in dB.

`10 log10(255² / mean((a - b)²))` over all pixels and the three colours of one picture; the figure of a set is the mean
of its pictures', as in the field's tables. Equal pictures count 99 dB, so that a mean exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from loraq.contracts import AbstractMetric

if TYPE_CHECKING:
    from PIL import Image


@attrs.frozen(kw_only=True)
class Psnr(AbstractMetric):
    """Peak signal-to-noise ratio to the original's picture; 99 dB for equal ones."""

    paired: ClassVar[bool] = True
    unit: ClassVar[str] = "dB"
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def refusal(self) -> str | None:
        return None

    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        del prompt
        from loraq.samples import psnr  # imports torch, which `loraq list metric` does without

        return psnr(picture, original)
