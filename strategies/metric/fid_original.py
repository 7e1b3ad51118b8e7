"""FID to the 16-bit model: how far a set of pictures is, as a set, from the original's; see frechet.py.

Unlike pixel by pixel metrics it does not punish a picture that is another but as good. No table of the field has it, as
it needs no real pictures.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs

from loraq.contracts import AbstractParticular, AbstractSetMetric
from loraq.picture_set import PictureSet

from . import frechet


@attrs.frozen(kw_only=True)
class FidOriginal(AbstractSetMetric, AbstractParticular):
    """Distance of the whole set to the original's pictures, as sets (clean-fid); needs its network."""

    download: bool = False
    """Whether the missing network may be fetched."""
    device: str = "auto"
    """Where the network runs: "auto", "cpu", "cuda"."""
    paired: ClassVar[bool] = True
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    enough: ClassVar[int] = frechet.ENOUGH

    def refusal(self) -> str | None:
        return frechet.refusal(self.download)

    def objection(self, pictures: PictureSet) -> str | None:
        return "a set of two pictures or more is compared; draw more." if len(pictures.drawn) < 2 else None

    def measure(self, pictures: PictureSet) -> float:
        drawn, originals = (
            frechet.features(paths, download=self.download, device=self.device)
            for paths in (pictures.drawn, pictures.originals)
        )
        return frechet.distance(drawn, originals)
