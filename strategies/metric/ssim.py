"""Structural similarity: how alike local brightness, contrast and structure are, 1 for equal pictures.

Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE Trans. Image Processing
13(4), 2004, equation 13: with mu, sigma² and sigma_ab weighted by a Gaussian window (1.5 pixels, 11 wide) around each
pixel, `(2 mu_a mu_b + C1)(2 sigma_ab + C2) / ((mu_a² + mu_b² + C1)(sigma_a² + sigma_b² + C2))`, C1 = 0.01² and
C2 = 0.03² for values from 0 to 1; the mean over all pixels, the picture mirrored at its border, and over the three
colours. By torchmetrics, which the field's tables use.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from loraq.contracts import AbstractMetric
from loraq.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image
else:
    from loraq.lazy import torch

_WINDOW = 11
_BORDER = _WINDOW // 2


@attrs.frozen(kw_only=True)
class Ssim(AbstractMetric):
    """Structural similarity to the original's picture, at most 1; needs torchmetrics (the extra `eval`)."""

    paired: ClassVar[bool] = True
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def refusal(self) -> str | None:
        if importlib.util.find_spec("torchmetrics") is None:
            return "torchmetrics is not installed; `pip install 'loraq[eval]'` brings it."
        return None

    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        del prompt
        from torchmetrics.functional.image import structural_similarity_index_measure

        if min(picture.size) <= _BORDER:
            raise InputError(
                f"metric 'ssim': it mirrors {_BORDER} pixels at the border, and the picture is {picture.width} x "
                f"{picture.height}; draw larger ones or leave the metric out."
            )
        found = structural_similarity_index_measure(
            _values(picture), _values(original), gaussian_kernel=True, sigma=1.5, kernel_size=_WINDOW, data_range=1.0
        )
        assert isinstance(found, torch.Tensor), "one figure is asked for, and no map"
        return float(found)


def _values(picture: Image.Image) -> torch.Tensor:
    """(1, 3, rows, columns) float64 between 0 and 1; variances from float32 squares would be off by 1e-6."""
    import numpy

    return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)[None].double() / 255
