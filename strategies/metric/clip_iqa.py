"""CLIP-IQA: how much rather CLIP calls a picture "Good photo." than "Bad photo.", from 0 to 1.

Wang et al., "Exploring CLIP for assessing the look and feel of images", AAAI 2023 (arXiv 2207.12396): the softmax over
100 times the cosines to a pair of opposite phrases. By torchmetrics, with the CLIP that the field's tables use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from loraq.contracts import AbstractMetric

from . import clip
from .weights import pixels

if TYPE_CHECKING:
    import torch
    from PIL import Image
else:
    from loraq.lazy import torch


@attrs.frozen(kw_only=True)
class ClipIqa(AbstractMetric):
    """How good the picture looks, 0 to 1, by CLIP; needs torchmetrics and CLIP's weights."""

    model: str = clip.DEFAULT
    """Name on Hugging Face's hub, or a folder."""
    aspect: str = "quality"
    """What is judged, a word that torchmetrics knows: quality, noisiness, sharpness, natural ..."""
    download: bool = False
    """Whether missing weights may be fetched."""
    device: str = "auto"
    """Where CLIP runs: "auto", "cpu", "cuda"."""
    paired: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def refusal(self) -> str | None:
        return clip.refusal(self.model, self.download)

    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        del original, prompt
        from torchmetrics.functional.multimodal import clip_image_quality_assessment

        model = clip.loaded(self.model, self.download, self.device)
        with torch.inference_mode():
            found = clip_image_quality_assessment(
                pixels(picture)[None].float(),
                lambda: model,  # type: ignore[arg-type]
                data_range=1.0,  # CLIP's processor divides by 255 itself
                prompts=(self.aspect,),
            )
        return float(found)  # type: ignore[arg-type]
