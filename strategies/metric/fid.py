"""FID: how far a set of pictures is, as a set, from real ones of the same prompts; see frechet.py.

The field's tables take the pictures of MJHQ-30K or sDCI that belong to the prompts as the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import attrs

from loraq.contracts import AbstractParticular, AbstractSetMetric
from loraq.picture_set import PictureSet

from . import frechet


@attrs.frozen(kw_only=True)
class Fid(AbstractSetMetric, AbstractParticular):
    """Distance of the whole set to real pictures, as sets (clean-fid); needs its network and the real pictures."""

    reference: str = ""
    """Folder of real pictures; those of the prompts' data set (`--prompts mjhq:FOLDER`) unless it is given."""
    download: bool = False
    """Whether the missing network may be fetched."""
    device: str = "auto"
    """Where the network runs: "auto", "cpu", "cuda"."""
    paired: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    enough: ClassVar[int] = frechet.ENOUGH

    def refusal(self) -> str | None:
        if self.reference and len(frechet.pictures_in(Path(self.reference))) < 2:
            return f"fid.reference = '{self.reference}' holds fewer than two pictures; give the folder of real ones."
        return frechet.refusal(self.download)

    def objection(self, pictures: PictureSet) -> str | None:
        if len(self._references(pictures)) < 2:
            return "there are no real pictures to compare with; fid.reference = 'FOLDER', or --prompts mjhq:FOLDER."
        return "a set of two pictures or more is compared; draw more." if len(pictures.drawn) < 2 else None

    def measure(self, pictures: PictureSet) -> float:
        drawn, real = (
            frechet.features(paths, download=self.download, device=self.device)
            for paths in (pictures.drawn, self._references(pictures))
        )
        return frechet.distance(drawn, real)

    def _references(self, pictures: PictureSet) -> tuple[Path, ...]:
        return frechet.pictures_in(Path(self.reference)) if self.reference else pictures.references
