"""The Fréchet distance between two sets of pictures, by features of an Inception network.

Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017 (arXiv 1706.08500), equation 6:
`|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)` for means and covariances of the features. Pictures are made 299 x 299 and
features taken by clean-fid (Parmar et al., arXiv 2104.11222), mode "clean": bicubic by Pillow, not rounded.

The trace of the root is the nuclear norm of `A Bᵀ`, where `C1 = Aᵀ A` and `C2 = Bᵀ B` are the centred features: the
eigenvalues of `C1 C2` are the squared singular values of `A Bᵀ`. So no root of a matrix that is nearly singular is
taken, and few pictures are quick.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.errors import InputError
from loraq.prompts import PICTURES

from .weights import FETCHING, array, device_for, loading, missing, torch_folder

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray

    _Array = NDArray[numpy.float64]
else:
    from loraq.lazy import torch

ENOUGH = 5_000
"""Fewer pictures than the field's tables use give a larger figure, whatever they show."""
_WEIGHTS = "inception-2015-12-05.pt"
_OWN_FOLDER = Path("/tmp")
"""Where clean-fid keeps the network."""
_BATCH = 16


def refusal(download: bool) -> str | None:
    """Why features cannot be taken, None where they can."""
    lacking = missing("cleanfid")
    if lacking is not None or download or _weights_folder() is not None:
        return lacking
    return f"{torch_folder() / _WEIGHTS} is not there: the Inception network of clean-fid; {FETCHING} it."


def _weights_folder() -> Path | None:
    return next((folder for folder in (torch_folder(), _OWN_FOLDER) if (folder / _WEIGHTS).is_file()), None)


@functools.cache
def _network(download: bool, device: str) -> Any:
    from cleanfid.inception_torchscript import InceptionV3W

    folder = _weights_folder() or torch_folder()
    if download:
        folder.mkdir(parents=True, exist_ok=True)
    with loading(f"{folder / _WEIGHTS}"):
        return InceptionV3W(str(folder), download=download).eval().to(device)


def features(paths: Sequence[Path], *, download: bool, device: str) -> _Array:
    """(pictures, features) of the pictures at `paths`. Raises InputError for a file that is no picture."""
    stamps = tuple(path.stat().st_mtime_ns for path in paths)
    return _features(tuple(paths), stamps, download, str(device_for(device)))


@functools.lru_cache(maxsize=4)  # references and originals are compared with every pipeline
def _features(paths: tuple[Path, ...], stamps: tuple[int, ...], download: bool, device: str) -> _Array:
    import numpy
    from cleanfid.resize import build_resizer

    del stamps
    network, resize = _network(download, device), build_resizer("clean")
    found = []
    for start in range(0, len(paths), _BATCH):
        resized = numpy.stack([resize(_opened(path)) for path in paths[start : start + _BATCH]])
        with torch.inference_mode():
            found.append(network(torch.from_numpy(resized).permute(0, 3, 1, 2).to(device)).double().cpu().numpy())
    return numpy.concatenate(found)


def _opened(path: Path) -> NDArray[numpy.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return array(picture)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}).") from None


def distance(first: _Array, second: _Array) -> float:
    """The Fréchet distance of two sets of features (pictures, features), two pictures or more each."""
    import numpy

    means = first.mean(0) - second.mean(0)
    roots = [_root(each) for each in (first, second)]
    cross = numpy.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(means @ means + sum((root**2).sum() for root in roots) - 2 * cross)


def _root(values: _Array) -> _Array:
    """A (at most features rows) with `Aᵀ A` the covariance of `values`."""
    import numpy

    centred = (values - values.mean(0)) / numpy.sqrt(len(values) - 1)
    return numpy.asarray(numpy.linalg.qr(centred, mode="r")) if len(values) > values.shape[1] else centred


def pictures_in(folder: Path) -> tuple[Path, ...]:
    """Every picture below `folder`, sorted by path."""
    return tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES))
