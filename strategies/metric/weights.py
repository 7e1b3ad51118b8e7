"""Where metrics find the weights of their networks, without touching the network unless they are told to.

torchvision's and clean-fid's weights lie in torch's hub cache (`$TORCH_HOME/hub/checkpoints`, by default
~/.cache/torch/hub/checkpoints), those of transformers' models in Hugging Face's cache (`$HF_HOME`) or in any folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loraq.errors import LoraqError

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray
    from PIL import Image
else:
    from loraq.lazy import torch


_DISTRIBUTIONS = {"cleanfid": "clean-fid"}
FETCHING = "download = true (--download) fetches"


def missing(*modules: str) -> str | None:
    """The sentence for the first of `modules` that is not installed, None where all are."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            return f"{_DISTRIBUTIONS.get(name, name)} is not installed; `pip install 'loraq[eval]'` brings it."
    return None


def torch_folder() -> Path:
    """The folder in which torch's hub keeps weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def hub_file(model: str, name: str) -> Path | None:
    """The file `name` of a transformers model: in the folder `model`, else in Hugging Face's cache; None without it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        found = try_to_load_from_cache(model, name)
    except HFValidationError:  # neither a folder nor a name that a model could have
        return None
    return Path(found) if isinstance(found, str) else None


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what a library raises while it loads or fetches weights into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # URLError and hub errors are OSErrors
        reason = " ".join(str(error).split())[:300]
        raise LoraqError(f"{what} cannot be loaded: {reason}") from error


def device_for(name: str) -> torch.device:
    """The device that an option "device" names."""
    from loraq.workers import resolved_device  # imports torch, which `loraq list metric` does without

    return resolved_device(name)


def array(picture: Image.Image) -> NDArray[numpy.uint8]:
    """(rows, columns, 3) uint8."""
    import numpy

    return numpy.array(picture.convert("RGB"))


def pixels(picture: Image.Image) -> torch.Tensor:
    """(3, rows, columns) uint8."""
    return torch.from_numpy(array(picture)).permute(2, 0, 1)
