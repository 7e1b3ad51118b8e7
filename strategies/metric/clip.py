"""CLIP for the metrics that need it: found or fetched, and in the form in which torchmetrics calls it.

torchmetrics takes a callable that gives (model, processor). Newer transformers answer with an output object where
torchmetrics expects the features, so a thin wrapper takes them out. Only safetensors are read.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .weights import FETCHING, device_for, hub_file, loading, missing

if TYPE_CHECKING:
    import torch

DEFAULT = "openai/clip-vit-large-patch14"
"""The field's choice."""
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
_TOKENS = ("tokenizer.json", "vocab.json")


def refusal(model: str, download: bool) -> str | None:
    """Why CLIP cannot be loaded, None where it can."""
    lacking = missing("torchmetrics")
    if lacking is not None or download:
        return lacking
    absent = [name for name in _FILES if hub_file(model, name) is None]
    if not any(hub_file(model, name) for name in _TOKENS):
        absent.append(_TOKENS[0])
    if absent:
        return (
            f"CLIP's weights are not at hand ({model} has no {absent[0]} on this machine); {FETCHING} them, as does "
            f"`hf download {model}`."
        )
    return None


class Features:
    """A CLIP model as torchmetrics calls it: features are tensors."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config

    def to(self, device: torch.device) -> Features:
        """Itself: it is on its device, and pictures are sent there."""
        del device
        return self

    def get_image_features(self, values: torch.Tensor) -> torch.Tensor:
        """(pictures, features)."""
        return self._tensor(self._model.get_image_features(pixel_values=values.to(self._model.device)))

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(texts, features)."""
        device = self._model.device
        return self._tensor(self._model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device)))

    @staticmethod
    def _tensor(found: Any) -> torch.Tensor:
        features: torch.Tensor = getattr(found, "pooler_output", found)
        return features.cpu()


@functools.cache
def loaded(model: str, download: bool, device: str) -> tuple[Features, Any]:
    """(model, processor), loaded once. Raises LoraqError where that fails."""
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # it has no types
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells of missing torchvision
    logging.disable_progress_bar()
    try:
        with loading(f"CLIP {model}"):
            load: Any = CLIPModel.from_pretrained
            found = load(model, local_files_only=not download, use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(model, local_files_only=not download)
    finally:
        logging.set_verbosity(level)
    return Features(found.eval().to(device_for(device))), processor
