"""Is a quantized folder still what was written: every layer's digest, and its error beside the recorded one.

loraq.json keeps a digest of each unit that a run wrote: a layer's stored tensors, the tensors that were only copied,
and config.json. All are taken anew from the files. With the 16-bit source at hand each layer is decoded, one at a time,
its transforms are laid over the source's weight, and `‖W̃ - Ŵ‖ / ‖W̃‖` must be the error that was recorded; files that a
run copies must still be the source's. A folder without digests, or without loraq.json, is judged by what is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraq.errors import CheckpointError, InputError, LoraqError, ModelError
from loraq.layer import LayerRecord
from loraq.layout import Layout
from loraq.pipeline import tensor_bytes
from loraq.progress import Progress
from loraq.provenance import PROVENANCE, report_of
from loraq.recipe import ModelSource
from loraq.source import Component, Source, open_source, read_json
from loraq.structure import structure

if TYPE_CHECKING:
    from rich.console import Console

_OWN_STAGES = {"pre_transform", "main_quantizer", "low_rank", "branch_quantizer", "packing"}
_RELATIVE, _ABSOLUTE = 1e-3, 1e-6
"""How far an error may be from the recorded one: another device or version sums in another order."""
_KEPT = "(kept)"


@attrs.frozen(kw_only=True)
class Checked:
    """One unit: a layer, or something else that was written. No `faults`, and it is what it was."""

    component: str
    name: str
    is_layer: bool = True
    faults: tuple[str, ...] = ()
    recorded_error: float | None = None
    found_error: float | None = None


@attrs.frozen(kw_only=True)
class Verification:
    """What was checked. `source` is what the errors were compared with; `notes` say what could not be checked."""

    folder: str
    source: str | None
    units: tuple[Checked, ...]
    notes: tuple[str, ...] = ()

    @property
    def faulty(self) -> tuple[Checked, ...]:
        """The units that are not what they were."""
        return tuple(unit for unit in self.units if unit.faults)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": self.folder,
            "source": self.source,
            "ok": not self.faulty,
            "notes": list(self.notes),
            "units": [attrs.asdict(unit) for unit in self.units],
        }

    def sentence(self) -> str:
        """What is wrong, for an error; empty where nothing is."""
        if not self.faulty:
            return ""
        named = ", ".join(f"'{unit.name}'" for unit in self.faulty[:3]) + (", ..." if len(self.faulty) > 3 else "")
        return (
            f"{self.folder}: {len(self.faulty)} of {len(self.units)} checks failed ({named}); quantize or copy the "
            "folder anew."
        )

    def print(self, console: Console) -> None:
        """The units that differ, in a table, and what was checked."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        if self.faulty:
            table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
            table.add_column("where", overflow="fold")
            table.add_column("what differs", overflow="fold")
            for unit in self.faulty:
                where = f"{unit.component}: {unit.name}" if unit.component else unit.name
                table.add_row(escape(where), escape("; ".join(unit.faults)))
            console.print(table)
        for line in self._told():
            console.print(line, highlight=False, markup=False)

    def _told(self) -> Iterator[str]:
        layers = [unit for unit in self.units if unit.is_layer]
        well = sum(not unit.faults for unit in layers)
        rest = len(self.units) - len(layers)
        compared = [unit for unit in layers if unit.found_error is not None and unit.recorded_error is not None]
        yield (
            f"{self.folder}: {well} of {len(layers)} layers and {sum(not u.faults for u in self.units) - well} of "
            f"{rest} other parts are as they were written."
        )
        if compared:
            worst = max(abs((unit.found_error or 0) - (unit.recorded_error or 0)) for unit in compared)
            yield (
                f"Errors of {len(compared)} layers were taken anew from {self.source}; the largest difference to the "
                f"recorded one is {worst:.1e}."
            )
        yield from self.notes


def verify(folder: Path, against: Path | None = None) -> Verification:
    """Check the quantized `folder`. `against` is the 16-bit source, else the recorded one is taken if it is there.

    Raises CheckpointError where nothing in `folder` was packed by LoRaQ, ModelError or InputError for a source that is
    another model's.
    """
    configs = _packed_configs(folder)
    provenance = read_json(folder / PROVENANCE, CheckpointError) if (folder / PROVENANCE).exists() else None
    if against is not None and provenance is None:
        raise InputError(f"--against {against}: {folder} has no {PROVENANCE}, so no errors are recorded to compare.")
    notes: list[str] = []
    recorded = _Recorded.read(folder, provenance, notes)
    source = None if provenance is None else _source(provenance, recorded, against, notes)
    units: list[Checked] = []
    for name in recorded.ordered(configs):
        packed = _Packed.read(name, configs[name], recorded, source)
        units += packed.checked()
        recorded = recorded.without(packed.layouts)
    if source is not None:
        units += _copied(folder, source.source, configs)
    return Verification(
        folder=str(folder), source=None if source is None else str(source.source.root), units=tuple(units),
        notes=tuple(notes),
    )  # fmt: skip


def _packed_configs(folder: Path) -> dict[str, Path]:
    """The folders of packed components, by name."""
    found = {}
    for path in sorted({folder / "config.json", *folder.glob("*/config.json")}):
        if path.exists():
            quantization = read_json(path, CheckpointError).get("quantization_config")
            if isinstance(quantization, dict) and quantization.get("quant_method") == "loraq":
                found["" if path.parent == folder else path.parent.name] = path.parent
    if not found:
        raise CheckpointError(f"{folder}: nothing in it was packed by LoRaQ.")
    return found


@attrs.frozen
class _Recorded:
    """What loraq.json says: digests by unit, and records by layer: of several components, in their order."""

    digests: Mapping[str, str]
    records: Mapping[str, tuple[LayerRecord, ...]]
    components: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path, provenance: Mapping[str, Any] | None, notes: list[str]) -> _Recorded:
        if provenance is None:
            notes.append(f"There is no {PROVENANCE}: only the files' structure was checked.")
            return cls({}, {})
        records: dict[str, tuple[LayerRecord, ...]] = {}
        try:
            for record in report_of(provenance).layers:
                records[record.name] = (*records.get(record.name, ()), record)
            digests = {str(unit): str(digest) for unit, digest in provenance.get("digests", {}).items()}
            components = tuple(provenance["recipe"]["model"]["component"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / PROVENANCE}: cannot be read ({error!r}).") from None
        if not digests:
            notes.append(f"{PROVENANCE} records no digests, it was written by an older LoRaQ: bytes were not checked.")
        return cls(digests, records, components)

    def ordered(self, names: Iterable[str]) -> list[str]:
        """The components of these names as the run had them."""
        return sorted(names, key=lambda name: self.components.index(name) if name in self.components else 0)

    def without(self, layers: Iterable[str]) -> _Recorded:
        """What is left for the components that follow one with these layers."""
        records = dict(self.records)
        for name in layers:
            records[name] = records.get(name, ())[1:]
        return attrs.evolve(self, records=records)


@attrs.frozen
class _Against:
    """The 16-bit source."""

    source: Source

    def component(self, name: str) -> Component | None:
        """The component of that name; a lone component stands for any."""
        if not self.source.is_pipeline:
            return self.source.components[0]
        return next((each for each in self.source.components if each.name == name), None)


def _source(
    provenance: Mapping[str, Any], recorded: _Recorded, against: Path | None, notes: list[str]
) -> _Against | None:
    """The source to compare with, None and a note where there is none."""
    faults: list[str] = []
    model = structure(provenance.get("recipe", {}).get("model", {}), ModelSource, "model", faults)
    if model is None:
        raise CheckpointError(f"{PROVENANCE}: its recipe's {'; '.join(faults)}.")
    try:
        if against is not None:
            model = attrs.evolve(model, folder=str(against), hub=None, revision=None)
        elif model.hub is not None:
            model = attrs.evolve(model, folder=_cached(model), hub=None, revision=None)
        found = _Against(open_source(model))
        other = _other_weight(found, recorded)
    except (LoraqError, OSError) as error:
        if against is not None:
            raise
        notes.append(f"Errors were not compared, the recorded source is not there ({error}); --against names one.")
        return None
    if other is not None and against is not None:
        raise InputError(
            f"--against {against}: the weight of '{other}' is not the one that was quantized; give the source of then."
        )
    if other is not None:
        notes.append(
            f"Errors were not compared: {found.source.root} holds another weight of '{other}' now; --against names the "
            "source of then."
        )
        return None
    odd = {str(stage.get("kind")) for stage in provenance["recipe"].get("stage", [])} - _OWN_STAGES
    if odd:
        notes.append(f"Errors were not compared: the stage {', '.join(sorted(odd))} may have changed weights.")
        return None
    return found


def _cached(model: ModelSource) -> str:
    """The hub repository's folder in the local cache."""
    from huggingface_hub import snapshot_download

    assert model.hub is not None, "asked of models of the hub alone"
    try:
        return snapshot_download(model.hub, revision=model.revision, local_files_only=True)
    except Exception as error:  # the hub client raises a dozen kinds
        raise ModelError(f"model.hub: '{model.hub}' is not in the local cache") from error


def _other_weight(against: _Against, recorded: _Recorded) -> str | None:
    """The first layer, if its weight in the source is not the one that was quantized; the rest is looked at later."""
    component = against.source.components[0]
    for name, records in recorded.records.items():
        if f"{name}.weight" in component.tensors:
            digest = hashlib.sha256(tensor_bytes(component.read(f"{name}.weight"))).hexdigest()
            return None if digest == records[0].source_digest else name
    return next(iter(recorded.records), None)


@attrs.frozen
class _Packed:
    """A packed component: its layouts, where its tensors lie, and what is known of it."""

    name: str
    folder: Path
    layouts: Mapping[str, Layout]
    shared: Mapping[str, str]
    places: Mapping[str, Path]
    broken: tuple[Checked, ...]
    recorded: _Recorded
    against: _Against | None

    @classmethod
    def read(cls, name: str, folder: Path, recorded: _Recorded, against: _Against | None) -> _Packed:
        from loraq.diffusers import LoraqConfig

        quantization = read_json(folder / "config.json", CheckpointError)["quantization_config"]
        try:
            layouts = LoraqConfig(quantization).layouts  # refuses other versions and missing plugins
            order = {layer: place for place, layer in enumerate(recorded.records)}
            named = sorted(quantization["layers"].items(), key=lambda item: order.get(item[0], len(order)))
            by_layer = {layer: layouts[index] for layer, index in named}
            shared = dict(quantization.get("shared_down", {}))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'}: its quantization_config is malformed ({error!r})."
            ) from None
        places: dict[str, Path] = {}
        broken = []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    places |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                fault = f"it cannot be read ({error})"
                broken.append(Checked(component=name, name=path.name, is_layer=False, faults=(fault,)))
        return cls(name, folder, by_layer, shared, places, tuple(broken), recorded, against)

    def checked(self) -> Iterator[Checked]:
        """Every unit of the component."""
        yield from self.broken
        yield self._config()
        total = sum(layout.out * layout.inn for layout in self.layouts.values())
        with Progress(f"verifying {self.name}".strip(), total) as progress:
            for name, layout in self.layouts.items():
                yield self._layer(name, layout)
                progress.advance(layout.out * layout.inn, name)
        packed = {f"{name}.{key}" for name, layout in self.layouts.items() for key in layout.stored()}
        kept = [name for name in self.places if name not in packed]
        yield Checked(
            component=self.name, name="tensors that are kept as they were", is_layer=False,
            faults=self._digest_fault(_KEPT, kept),
        )  # fmt: skip

    def _config(self) -> Checked:
        recorded = self.recorded.digests.get(f"{self.name}:config.json")
        found = hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()
        faults = () if recorded in (None, found) else ("its bytes are not those that were written",)
        return Checked(component=self.name, name="config.json", is_layer=False, faults=faults)

    def _layer(self, name: str, layout: Layout) -> Checked:
        made = Checked(component=self.name, name=name)
        stored = {f"{name}.{key}": each for key, each in layout.stored().items()}
        missing = [key for key in stored if key not in self.places]
        if missing:
            return attrs.evolve(made, faults=(f"{len(missing)} of its {len(stored)} tensors are missing",))
        tensors = {key: self._read(key) for key in stored}
        wrong = [
            key
            for key, each in stored.items()
            if (tuple(tensors[key].shape), str(tensors[key].dtype).removeprefix("torch.")) != (each.shape, each.dtype)
        ]
        if wrong:
            return attrs.evolve(made, faults=(f"'{wrong[0]}' is not of the shape and type that config.json says",))
        faults = self._digest_fault(name, stored)
        record = next(iter(self.recorded.records.get(name, ())), None)
        if record is None:
            return attrs.evolve(made, faults=faults)
        found, fault = self._error(name, layout, record)
        return attrs.evolve(
            made,
            faults=faults if fault is None else (*faults, fault),
            recorded_error=record.error_after,
            found_error=found,
        )

    def _read(self, tensor: str) -> Tensor:
        with safe_open(self.places[tensor], framework="pt") as file:
            found: Tensor = file.get_tensor(tensor)
            return found

    def _digest_fault(self, unit: str, tensors: Iterable[str]) -> tuple[str, ...]:
        recorded = self.recorded.digests.get(f"{self.name}:{unit}")
        if recorded is None:
            return ("there is no digest of it",) if self.recorded.digests else ()
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensor_bytes(self._read(name)))
        return () if digest.hexdigest() == recorded else ("its bytes are not those that were written",)

    def _error(self, name: str, layout: Layout, record: LayerRecord) -> tuple[float | None, str | None]:
        """The layer's error, taken anew from the source, and what is wrong with it."""
        component = None if self.against is None else self.against.component(self.name)
        if component is None:
            return None, None
        if f"{name}.weight" not in component.tensors:
            return None, f"the source {component.folder} has no such layer"
        weight = component.read(f"{name}.weight")
        if hashlib.sha256(tensor_bytes(weight)).hexdigest() != record.source_digest:
            return None, "the source's weight is not the one that was quantized"
        leader = self.shared.get(name, name)
        names = {key: f"{leader if key.startswith('down.') else name}.{key}" for key in layout.whole.stored()}
        if any(each not in self.places for each in names.values()):
            return None, f"the 'down' that it shares with '{leader}' is missing"
        found = error_of(weight.flatten(1), layout.whole, {key: self._read(each) for key, each in names.items()})
        if abs(found - record.error_after) <= _RELATIVE * record.error_after + _ABSOLUTE:
            return found, None
        return found, f"its error is {found:.4g}, recorded is {record.error_after:.4g}"


def error_of(weight: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> float:
    """`‖W̃ - Ŵ‖ / ‖W̃‖` of the (out, inn) `weight` and the layer stored in `tensors`, a shared `down` among them."""
    transformed = weight.float()
    for index, transform in enumerate(layout.transforms):
        online = {
            key: layout.packing.unpack(tensors[f"transform.{index}.{key}"], part)
            for key, part in transform.parts(layout.inn).items()
        }
        transformed = transform.weight(transformed, online)
    found = layout.coded("main", tensors).decode()
    if layout.rank:
        found = found + layout.coded("up", tensors).decode() @ layout.coded("down", tensors).decode()
    norm = float(transformed.double().norm())
    return float((transformed - found).double().norm()) / norm if norm > 0 else 0.0


def _copied(folder: Path, source: Source, packed: Iterable[str]) -> Iterator[Checked]:
    """The files that a run copies: each must be the source's."""
    if not source.is_pipeline:
        return
    made = {*packed, PROVENANCE}
    entries = [each for each in sorted(source.root.iterdir()) if each.name not in made and each.name[0] != "."]
    for entry in entries:
        for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            if path.is_file() and path.name != "samples.png":
                name = path.relative_to(source.root)
                faults = _copy_fault(path, folder / name)
                yield Checked(component="", name=str(name), is_layer=False, faults=faults)


def _copy_fault(original: Path, copy: Path) -> tuple[str, ...]:
    if not copy.is_file():
        return ("the copy is missing",)
    digests = []
    for path in (original, copy):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return () if digests[0] == digests[1] else ("it is not the source's any more",)
