"""What a metric of a whole set is given: where the pictures lie, and what they are of."""

from __future__ import annotations

from pathlib import Path

import attrs


@attrs.frozen(kw_only=True)
class PictureSet:
    """One pipeline's pictures. All but `references` have one entry a picture, in the same order."""

    drawn: tuple[Path, ...]
    originals: tuple[Path, ...]
    """The original model's, from the same noise."""
    prompts: tuple[str, ...]
    references: tuple[Path, ...] = ()
    """Real pictures of the prompts' data set; empty where there are none."""
