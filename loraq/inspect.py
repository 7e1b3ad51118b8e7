"""What is in a quantized folder, from its configs, headers and provenance: for `loraq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.errors import CheckpointError
from loraq.journal import work_folder
from loraq.provenance import PROVENANCE, report_of
from loraq.report import layer_table, size, skipped_line
from loraq.source import DTYPES, read_header, read_json

if TYPE_CHECKING:
    from rich.console import Console


def inspect_folder(folder: Path) -> dict[str, Any]:
    """The quantized components of `folder` and its provenance. Raises CheckpointError where there is nothing packed."""
    if not folder.is_dir():
        unfinished = work_folder(folder.absolute())
        hint = f"; {unfinished} is an unfinished run, which `loraq run` continues" if unfinished.is_dir() else ""
        raise CheckpointError(f"there is no folder {folder}{hint}.")
    components = {}
    for config_path in sorted({folder / "config.json", *folder.glob("*/config.json")}):
        if not config_path.exists():
            continue
        config = read_json(config_path, CheckpointError)
        quantization = config.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == "loraq":
            name = "" if config_path.parent == folder else config_path.parent.name
            components[name] = _component(config_path.parent, config)
    if not components:
        raise CheckpointError(f"{folder}: nothing in it was packed by LoRaQ.")
    provenance_path = folder / PROVENANCE
    provenance = read_json(provenance_path, CheckpointError) if provenance_path.exists() else None
    return {"folder": str(folder), "components": components, "provenance": provenance}


def _component(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from loraq.diffusers import LoraqConfig

    quantization = config["quantization_config"]
    try:
        layouts = LoraqConfig(quantization).layouts  # refuses other versions and missing plugins
        stored = {
            f"{name}.{key}": each
            for name, index in quantization["layers"].items()
            for key, each in layouts[index].stored().items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: its quantization_config is malformed ({error!r}).") from None
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    packed = stored.keys()
    specs = {name: spec for path in folder.glob("*.safetensors") for name, spec in read_header(path).items()}
    wrong = [
        name
        for name, each in stored.items()
        if name not in specs or (specs[name].shape, DTYPES[specs[name].dtype][0]) != (each.shape, each.dtype)
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} packed tensors are missing or not as config.json says, the first is '{wrong[0]}'."
        )
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
    from rich.markup import escape

    for name, component in found["components"].items():
        title = escape(f"{found['folder']}/{name}" if name else found["folder"])
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
            console.print(skipped_line(report.skipped), style="dim", highlight=False, markup=False)
        made = found["provenance"]["fingerprint"]["versions"]
        console.print("made with " + ", ".join(f"{key} {value}" for key, value in made.items()), highlight=False)
