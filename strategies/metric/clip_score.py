"""CLIP score: how well a picture fits its prompt, 100 times the cosine of CLIP's two embeddings, at least 0.

Hessel et al., "CLIPScore", EMNLP 2021 (arXiv 2104.08718), as torchmetrics has it and the field's tables use it; prompts
longer than CLIP reads (77 tokens) are cut. The figure of a set is the mean of its pictures'.
"""

from __future__ import annotations

import warnings
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
class ClipScore(AbstractMetric):
    """How well the picture fits its prompt, 0 to 100, by CLIP; needs torchmetrics and CLIP's weights."""

    model: str = clip.DEFAULT
    """Name on Hugging Face's hub, or a folder."""
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
        del original
        from torchmetrics.functional.multimodal import clip_score

        model = clip.loaded(self.model, self.download, self.device)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore", UserWarning)  # of a prompt that is cut
            return float(clip_score(pixels(picture), prompt, lambda: model))  # type: ignore[arg-type, return-value]
