"""loraq.json: where a quantized folder came from, never needed to load it.

The resolved recipe, what the bytes depend on (the fingerprint: recipe, digests of the source, versions, device), the
report, the machine, what was allocated, and a digest of each unit that was written (a layer, the tensors that were only
copied, a config): `loraq verify` recomputes them.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from loraq import registry
from loraq.allocation import Allocation
from loraq.checkpoint import write_text
from loraq.layer import LayerRecord
from loraq.plan import Plan
from loraq.recipe import Recipe
from loraq.report import Report, Skipped

PROVENANCE = "loraq.json"


def versions(recipe: Recipe, plan: Plan) -> dict[str, str]:
    """The versions of everything that shapes the result: libraries, and each distribution that offers a strategy."""
    found = {name: importlib.metadata.version(name) for name in ("loraq", "torch", "diffusers", "numba")}
    wanted = {("loraq.stage", stage.kind) for stage in recipe.stage}
    for layer in plan.layers:
        bound = layer.recipe
        strategies = {"main_quantizer": bound.main, "low_rank": bound.low_rank, "branch_quantizer": bound.branch}
        named = [*strategies.items(), *(("pre_transform", each) for each in bound.transforms)]
        wanted |= {(f"loraq.{kind}", registry.name_of(f"loraq.{kind}", type(each))) for kind, each in named}
    for component in plan.components:  # of formats and packings, which a loader needs as well
        found |= json.loads(component.config_text)["quantization_config"]["plugins"]
    for group, name in wanted:
        offer = registry.offer(group, name)
        found[offer.distribution] = offer.version
    return found


def report_of(provenance: Mapping[str, Any]) -> Report:
    """The report that loraq.json keeps."""
    report = dict(provenance["report"])
    known = {field.name for field in attrs.fields(Report)}
    rest = {key: value for key, value in report.items() if key in known and key not in ("layers", "skipped")}
    layers = tuple(record_of(each) for each in report["layers"])
    return Report(layers=layers, skipped=tuple(Skipped(**each) for each in report["skipped"]), **rest)


def record_of(plain: Mapping[str, Any]) -> LayerRecord:
    """A layer's record, from JSON."""
    return LayerRecord(**{field.name: plain[field.name] for field in attrs.fields(LayerRecord) if field.name in plain})


def write_provenance(
    folder: Path,
    recipe: Recipe,
    report: Report,
    fingerprint: Mapping[str, Any],
    allocation: Allocation | None,
    digests: Mapping[str, str],
) -> None:
    """Write `folder`'s loraq.json. `digests` are those of the units written, "COMPONENT:NAME"."""
    provenance = {
        "format_version": 1,
        "fingerprint": fingerprint,
        "recipe": recipe.to_plain(),
        "report": report.to_plain(),
        "digests": dict(sorted(digests.items())),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    } | ({} if allocation is None else {"allocation": allocation.to_plain()})
    write_text(folder / PROVENANCE, json.dumps(provenance, indent=1) + "\n")
