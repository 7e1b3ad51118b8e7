"""LoRaQ: diffusion transformers in 4 bits, with a low-rank branch that is itself quantized.

    import loraq                                                     # lets diffusers load packed models
    pipe = PixArtSigmaPipeline.from_pretrained("out/quickstart")

    loraq.Pipeline([loraq.stage("main_quantizer", "rtn"),
                    loraq.stage("low_rank", "loraq", budget="rank32@16"),
                    loraq.stage("branch_quantizer", "rtn")]).quantize(transformer)

Importing takes a few milliseconds: torch and diffusers are imported when first needed, and diffusers learns of LoRaQ's
format as soon as it is imported, before or after this.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from loraq.adapters import Lora as Lora
    from loraq.calibration import Calibration as Calibration
    from loraq.errors import LoraqError as LoraqError
    from loraq.linear import PackedLinear as PackedLinear
    from loraq.pipeline import Pipeline as Pipeline
    from loraq.pipeline import make_stage as stage
    from loraq.recipe import Override as Override
    from loraq.recipe import Recipe as Recipe
    from loraq.recipe import load as load_recipe
    from loraq.report import Report as Report
    from loraq.run import run_recipe as run_recipe

__all__ = [
    "Calibration",
    "Lora",
    "LoraqError",
    "Override",
    "PackedLinear",
    "Pipeline",
    "Recipe",
    "Report",
    "load_recipe",
    "run_recipe",
    "stage",
]

_HOMES = {
    "Calibration": ("loraq.calibration", "Calibration"),
    "Lora": ("loraq.adapters", "Lora"),
    "LoraqError": ("loraq.errors", "LoraqError"),
    "Override": ("loraq.recipe", "Override"),
    "PackedLinear": ("loraq.linear", "PackedLinear"),
    "Pipeline": ("loraq.pipeline", "Pipeline"),
    "Recipe": ("loraq.recipe", "Recipe"),
    "Report": ("loraq.report", "Report"),
    "load_recipe": ("loraq.recipe", "load"),
    "run_recipe": ("loraq.run", "run_recipe"),
    "stage": ("loraq.pipeline", "make_stage"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loraq' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


@wrapt.when_imported("diffusers.quantizers.auto")
def _register_with_diffusers(module: object) -> None:
    del module
    importlib.import_module("loraq.diffusers")
