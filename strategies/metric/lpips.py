"""LPIPS: how far a network's features of the picture are from those of the original's, 0 for equal pictures.

Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018 (arXiv 1801.03924),
equation 1, with learned weights of the channels. By torchmetrics, which brings those weights; the network itself is
torchvision's. The field's tables use AlexNet.
"""

from __future__ import annotations

import functools
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from loraq.contracts import AbstractMetric
from loraq.errors import InputError

from .weights import FETCHING, device_for, loading, missing, pixels, torch_folder

if TYPE_CHECKING:
    import torch
    from PIL import Image
else:
    from loraq.lazy import torch

_NETWORKS = {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet1_1"}
_SMALLEST = 32
"""AlexNet's strides and pools leave nothing of smaller pictures."""


@attrs.frozen(kw_only=True)
class Lpips(AbstractMetric):
    """Distance to the original's picture by a network's features, 0 for equal; needs torchvision and its weights."""

    net: Literal["alex", "vgg", "squeeze"] = "alex"
    """The network whose features are compared."""
    download: bool = False
    """Whether missing weights may be fetched."""
    device: str = "auto"
    """Where the network runs: "auto", "cpu", "cuda"."""
    paired: ClassVar[bool] = True
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "lower"

    def refusal(self) -> str | None:
        lacking = missing("torchmetrics", "torchvision")
        if lacking is not None or self.download:
            return lacking
        try:
            path = torch_folder() / _weights_name(self.net)
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch
            return f"torchvision cannot be imported ({error}); install the build that belongs to this torch."
        if not path.is_file():
            return f"{path} is not there: the weights of torchvision's network; {FETCHING} them."
        return None

    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        del prompt
        if min(picture.size) < _SMALLEST:
            raise InputError(
                f"metric 'lpips': it needs pictures of {_SMALLEST} x {_SMALLEST} or more, and the picture is "
                f"{picture.width} x {picture.height}; draw larger ones or leave the metric out."
            )
        device = device_for(self.device)
        network = _network(self.net, str(device))
        with torch.inference_mode():
            first, second = (pixels(each)[None].to(device).float() / 255 for each in (picture, original))
            found = float(network(first, second))
        network.reset()  # it adds up what it is shown
        return found


def _weights_name(net: str) -> str:
    """The file's name of torchvision's weights, which ends in their digest."""
    import torchvision

    weights = getattr(torchvision.models, f"{_NETWORKS[net]}_Weights").DEFAULT
    return PurePosixPath(str(weights.url)).name


@functools.cache
def _network(net: str, device: str) -> Any:
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    with loading(f"torchvision's {_NETWORKS[net]}"):
        made = LearnedPerceptualImagePatchSimilarity(net, normalize=True)  # type: ignore[arg-type]
    return made.eval().to(device)
