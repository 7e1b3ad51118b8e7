"""What is in a quantized folder, from its configs, headers and provenance: for `loraq inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.errors import CheckpointError
from loraq.layout import Layout
from loraq.report import layer_table, size, skipped_line
from loraq.run import PROVENANCE, report_of
from loraq.source import read_header

if TYPE_CHECKING:
    from rich.console import Console


def inspect_folder(folder: Path) -> dict[str, Any]:
    """The quantized components of `folder` and its provenance. Raises CheckpointError where there is nothing packed."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}.")
    components = {}
    for config_path in sorted({folder / "config.json", *folder.glob("*/config.json")}):
        if not config_path.exists():
            continue
        config = json.loads(config_path.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config") or {}
        if quantization.get("quant_method") == "loraq":
            name = "" if config_path.parent == folder else config_path.parent.name
            components[name] = _component(config_path.parent, config)
    if not components:
        raise CheckpointError(f"{folder}: nothing in it was packed by LoRaQ.")
    provenance_path = folder / PROVENANCE
    provenance = json.loads(provenance_path.read_text(encoding="utf-8")) if provenance_path.exists() else None
    return {"folder": str(folder), "components": components, "provenance": provenance}


def _component(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    quantization = config["quantization_config"]
    layouts = [Layout.from_plain(each) for each in quantization["layouts"]]
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    packed = {f"{name}.{stored}" for name, i in quantization["layers"].items() for stored in layouts[i].stored()}
    specs = {name: spec for path in folder.glob("*.safetensors") for name, spec in read_header(path).items()}
    missing = sorted(packed - specs.keys())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} packed tensors are missing, the first is '{missing[0]}'.")
    weights = sum(layouts[index].out * layouts[index].inn for index in quantization["layers"].values())
    packed_bytes = sum(layouts[index].stored_bytes for index in quantization["layers"].values())
    return {
        "class": config.get("_class_name"),
        "format_version": quantization["format_version"],
        "plugins": quantization["plugins"],
        "layers": len(quantization["layers"]),
        "quantized_weights": weights,
        "packed_bytes": packed_bytes,
        "effective_bits": 8 * packed_bytes / weights if weights else 0.0,
        "kept_tensors": len(specs.keys() - packed),
        "kept_bytes": sum(spec.bytes for name, spec in specs.items() if name not in packed),
        "files": files,
        "layouts": quantization["layouts"],
    }


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """For people."""
    for name, component in found["components"].items():
        title = f"{found['folder']}/{name}" if name else found["folder"]
        console.print(f"[bold]{title}[/bold]  {component['class']}, format version {component['format_version']}")
        console.print(
            f"  {component['layers']} packed layers, {component['quantized_weights']:,} weights in "
            f"{size(component['packed_bytes'])}, {component['effective_bits']:.2f} bits each; "
            f"{component['kept_tensors']} other tensors, {size(component['kept_bytes'])}",
            highlight=False,
        )
        for distribution, version in component["plugins"].items():
            console.print(f"  needs {distribution} (made with {version})", highlight=False)
    if found["provenance"] is not None:
        report = report_of(found["provenance"])
        console.print(layer_table(report.layers))
        if report.skipped:
            console.print(skipped_line(report.skipped), style="dim", highlight=False)
        made = found["provenance"]["fingerprint"]["versions"]
        console.print("made with " + ", ".join(f"{key} {value}" for key, value in made.items()), highlight=False)
