"""Run a recipe: read, quantize, write, from the first layer to the finished folder, and continue where it was killed.

open the source -> choose for each layer, where the recipe allocates -> plan every byte -> journal
-> calibrate, where a strategy reads statistics
-> layers in parallel, each: read, fit, pack, write, journal line
-> rename the shards -> configs and the other components -> loraq.json -> rename the folder -> pictures
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from loraq.allocation import Allocation
from loraq.calibration import digest_of, open_prompts
from loraq.calibration import fingerprint as calibration_fingerprint
from loraq.checkpoint import ShardWriter, index_text, sync_tree, write_text
from loraq.collection import Calibrator, Collected
from loraq.errors import CheckpointError, InputError, ModelError
from loraq.input_statistics import NOTHING
from loraq.journal import Journal, drop_leftovers, work_folder
from loraq.layer import LayerRecord
from loraq.match import MatchedLayer, grouped
from loraq.pipeline import Pipeline, QuantizedLayer, quantize_group, tensor_bytes
from loraq.plan import ComponentPlan, Plan, make_plan
from loraq.probing import allocated, plans_of
from loraq.progress import Progress
from loraq.provenance import PROVENANCE, record_of, report_of, versions, write_provenance
from loraq.quantize import in_parallel, resolved_device, resolved_workers
from loraq.recipe import Recipe
from loraq.report import Report
from loraq.source import WEIGHTS_NAME, Source, open_source
from loraq.statistics_cache import cache_folder

PICTURES = "samples.png"
_KEPT = "(kept)"
"""The journal's unit of the tensors that are only copied; no layer is called so."""


def run_recipe(recipe: Recipe, *, restart: bool = False) -> Report:
    """Quantize what the recipe names into its output folder. Returns the report; raises InputError in a sentence.

    A finished output of the same fingerprint is left as it is; an unfinished one is continued; one of another recipe is
    refused unless `restart` replaces it.
    """
    started = time.perf_counter()
    source = open_source(recipe.model)
    device = resolved_device(recipe.run.device)
    output = _checked_output(Path(recipe.run.output), source)
    recipe, allocation = allocated(
        recipe, source, device, calibrator_of=_calibrator, fingerprint_of=_fingerprint, output=output, restart=restart
    )
    pipeline = recipe.pipeline()
    plan = make_plan(source, pipeline, recipe.calibration)
    if not plan.layers:
        raise ModelError(
            f"{source.root}: no layer is left to quantize; look at model.skip, model.component and `plan`."
        )
    digests = source.digests()
    calibrator = _calibrator(recipe, plan, device, digests, work_folder(output) / "statistics")
    fingerprint = _fingerprint(recipe, plan, device, digests, calibrator)
    finished = None if restart else _finished(output, plan, fingerprint)
    if finished is not None:
        drop_leftovers(output)
        report = attrs.evolve(finished, output=recipe.run.output, already_done=True)
    else:
        try:
            with Journal(output, fingerprint, restart=restart) as journal:
                _check_room(plan, journal)
                records = _write_components(plan, pipeline, journal, device, calibrator)
                report = _report(plan, records, recipe.run.output, time.perf_counter() - started)
                _write_rest(plan, recipe, report, fingerprint, journal, allocation)
                journal.finish(output)
        except OSError as error:
            raise CheckpointError(
                f"run.output: {work_folder(output)} cannot be written ({_reason(error)}); mend that, and the same "
                "command continues."
            ) from error
    return _with_pictures(report, recipe, source, output)


def _reason(error: OSError) -> str:
    """What the system says, in a few words; shutil.copytree gives a list."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][0][-1])
    return error.strerror or str(error)


def _check_room(plan: Plan, journal: Journal) -> None:
    """Raise CheckpointError where the disk has no room for what is still to be written."""
    rest = sum(path.stat().st_size for entry in _other_entries(plan) for path in (entry, *entry.rglob("*")))
    lying = sum(path.stat().st_blocks * 512 for path in journal.result.rglob("*") if path.is_file())
    needed, free = plan.written_bytes + rest - lying, shutil.disk_usage(journal.folder).free
    if needed > free:
        raise CheckpointError(
            f"run.output: {journal.folder} needs {needed:,} more bytes, but its disk has {free:,}; free some, or set "
            "run.output to another disk."
        )


def calibrate_recipe(recipe: Recipe, part: int | None = None) -> Collected | None:
    """Collect what the recipe's strategies read, of all parts or of one (counted from 0), into the cache.

    Returns what was done, None for a recipe that needs no data. Raises InputError where there is no such part.
    """
    source = open_source(recipe.model)
    plans = plans_of(recipe, source)
    reading = next((plan for plan in plans if plan.calibration is not None), None)
    if recipe.calibration is None or reading is None:
        return None
    if recipe.calibration.cache is False:
        raise InputError("calibration.cache: is false, so nothing would be kept; name a folder, or leave it out.")
    if part is not None and not 0 <= part < recipe.calibration.parts:
        raise InputError(f"--part {part + 1}: calibration.parts is {recipe.calibration.parts}; there is no such part.")
    device = resolved_device(recipe.run.device)
    calibrator = _calibrator(recipe, reading, device, source.digests(), Path())
    assert calibrator is not None, "the plan says that there is something to collect"
    return calibrator.collect([each for plan in plans for each in plan.named_layers], part)


def _calibrator(
    recipe: Recipe, plan: Plan, device: torch.device, digests: Mapping[str, str], uncached: Path
) -> Calibrator | None:
    """What gives the layers their statistics, kept in `uncached` where there is no cache; None for data-free plans."""
    calibration = recipe.calibration
    if calibration is None or plan.calibration is None:
        return None
    prompts = open_prompts(calibration)
    threads = 0 if device.type == "cuda" else calibration.threads or len(os.sched_getaffinity(0))
    return Calibrator(
        root=plan.source.root,
        calibration=calibration,
        prompts=prompts,
        fingerprint=calibration_fingerprint(calibration, prompts, plan.source, digests, _name_of(device), threads),
        device=device,
        threads=threads or torch.get_num_threads(),
        home=uncached if calibration.cache is False else cache_folder(calibration),
    )


def try_layers(recipe: Recipe, pattern: str) -> Report:
    """Quantize the layers whose names match `pattern` and write nothing: the report is all."""
    started = time.perf_counter()
    source = open_source(recipe.model)
    device = resolved_device(recipe.run.device)
    recipe, _ = allocated(
        recipe, source, device, calibrator_of=_calibrator, fingerprint_of=_fingerprint, pattern=pattern
    )
    pipeline = recipe.pipeline()
    plan = make_plan(source, pipeline, recipe.calibration)
    chosen = [  # a group whole, if one of its layers is meant
        (component, group)
        for component in plan.components
        for group in grouped(component.layers)
        if any(fnmatch.fnmatchcase(layer.name, pattern) for layer in group)
    ]
    if not chosen:
        first = next(iter(plan.layers), None)
        raise ModelError(f"--only {pattern}: no layer matches; the first layer is '{first.name if first else ''}'.")
    records: dict[tuple[str, str], LayerRecord] = {}
    workers = resolved_workers(pipeline.workers, pipeline.threads)
    with tempfile.TemporaryDirectory(prefix="loraq-") as uncached:
        asked = any(group[0].recipe.statistics for _, group in chosen)
        digests = source.digests() if asked else {}
        calibrator = _calibrator(recipe, plan, device, digests, Path(uncached)) if asked else None
        if calibrator is not None:
            calibrator.collect([(component.component.name, group[0]) for component, group in chosen])
        with Progress("quantizing", sum(_weights(group) for _, group in chosen)) as progress:
            fits = in_parallel(
                lambda item: _fit(item[0], item[1], pipeline, device, calibrator),
                chosen,
                workers=workers,
                threads=pipeline.threads,
            )
            for (component, group), results in fits:
                for name, result in results.items():
                    records[component.component.name, name] = result.record
                progress.advance(_weights(group), group[0].name)
    ordered = tuple(
        records[component.component.name, layer.name]
        for component in plan.components
        for layer in component.layers
        if (component.component.name, layer.name) in records
    )
    return Report(layers=ordered, seconds=time.perf_counter() - started)


def _weights(group: Sequence[MatchedLayer]) -> int:
    """How many weights the layers have."""
    return sum(layer.out * layer.inn for layer in group)


def _fit(
    component: ComponentPlan,
    group: Sequence[MatchedLayer],
    pipeline: Pipeline,
    device: torch.device,
    calibrator: Calibrator | None,
) -> dict[str, QuantizedLayer]:
    weights = {
        layer.name: component.component.read(component.weight_name(layer)).flatten(1).to(device) for layer in group
    }
    first = group[0]
    known = NOTHING if calibrator is None else calibrator.statistics(component.component.name, first, device)
    return quantize_group(weights, first.recipe, seed=pipeline.seed, statistics=known)


def _checked_output(output: Path, source: Source) -> Path:
    """`output` with links followed, if it may be written: not the source or a part of it, not somebody's folder."""
    resolved, root = output.resolve(), source.root.resolve()
    if resolved == root or root in resolved.parents or resolved in root.parents:
        raise CheckpointError(f"run.output: {output} and the model's folder {source.root} lie in one another.")
    if output.is_dir() and any(output.iterdir()) and not (output / PROVENANCE).exists():
        raise CheckpointError(f"run.output: {output} is not empty and was not made by LoRaQ; choose another folder.")
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"run.output: {output} is a file; choose a folder.")
    if resolved.is_mount() or resolved == Path.cwd():  # the finished folder is renamed to this name
        raise CheckpointError(f"run.output: {output} is a mount point or the working folder; choose a folder in it.")
    return resolved


def _name_of(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _fingerprint(
    recipe: Recipe, plan: Plan, device: torch.device, digests: Mapping[str, str], calibrator: Calibrator | None
) -> dict[str, Any]:
    """What the result's bytes depend on: equal fingerprints, equal bytes. Calibration only where it shapes them."""
    return {
        "recipe": recipe.digest,
        "model": dict(digests),
        "versions": versions(recipe, plan),
        "device": _name_of(device),
    } | ({} if calibrator is None else {"calibration": _told_calibration(calibrator)})


def _told_calibration(calibrator: Calibrator) -> dict[str, Any]:
    """What shaped the statistics, for people and for comparing: the digest holds the model and the versions as well."""
    told = {key: calibrator.fingerprint[key] for key in ("prompts", "settings", "threads")}
    told["digest"] = digest_of(calibrator.fingerprint)
    return dict(json.loads(json.dumps(told)))


def _finished(output: Path, plan: Plan, fingerprint: Mapping[str, Any]) -> Report | None:
    """The report of a finished output with this fingerprint, None where there is work to do."""
    path = output / PROVENANCE
    if not path.exists():
        return None
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
        made = provenance["fingerprint"]
        report = report_of(provenance)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); replace the folder with --restart.") from None
    changed = [key for key in sorted(fingerprint) if made.get(key) != fingerprint[key]]
    if changed:
        raise CheckpointError(
            f"{output} is finished and was made with another {', '.join(changed)}; choose another run.output, or "
            "replace it with --restart."
        )
    for component in plan.components:
        for file in component.files:
            shard = output / component.component.name / file.name
            if not shard.is_file() or shard.stat().st_size != file.size:
                raise CheckpointError(f"{shard} is missing or cut off; make the folder anew with --restart.")
    return report


def _write_components(
    plan: Plan, pipeline: Pipeline, journal: Journal, device: torch.device, calibrator: Calibrator | None
) -> dict[str, dict[str, LayerRecord]]:
    """All components' shards, written or taken up. Returns the layers' records by component and name."""
    records: dict[str, dict[str, LayerRecord]] = {}
    workers = resolved_workers(pipeline.workers, pipeline.threads)
    if calibrator is not None:
        _calibrate(plan, calibrator, journal)
    for component in plan.components:
        name = component.component.name
        with ShardWriter(journal.result / name, component.files) as writer:
            found = records.setdefault(name, _taken_up(component, writer, journal))
            if _unit(component, _KEPT) not in journal.entries:
                _copy_kept(component, writer, journal)
            waiting = _waiting(component, found)
            if calibrator is not None:  # collects nothing but for layers whose bytes were spoilt
                calibrator.collect([(name, group[0]) for group in waiting])
            # Largest first: the last fits in flight are short, and the workers end together.
            waiting.sort(key=lambda group: -_weights(group))

            def finished(
                group: list[MatchedLayer], component: ComponentPlan = component, writer: ShardWriter = writer
            ) -> dict[str, LayerRecord]:
                results = _fit(component, group, pipeline, device, calibrator)
                for name, result in results.items():
                    tensors = {f"{name}.{key}": tensor_bytes(tensor) for key, tensor in result.tensors.items()}
                    writer.write(tensors)
                    digest = _digest(sorted(tensors.items()))
                    journal.add(_unit(component, name), digest, attrs.asdict(result.record))
                return {name: result.record for name, result in results.items()}

            total = _weights(component.layers)
            done = total - sum(_weights(group) for group in waiting)
            with Progress(f"quantizing {name}".strip(), total, done=done) as progress:
                for group, made in in_parallel(finished, waiting, workers=workers, threads=pipeline.threads):
                    found.update(made)
                    progress.advance(_weights(group), group[0].name)
            writer.finish()
    return records


def _waiting(component: ComponentPlan, done: Container[str]) -> list[list[MatchedLayer]]:
    """The groups that are not whole: of one that was cut off in the middle all layers are fitted again."""
    return [group for group in grouped(component.layers) if not all(layer.name in done for layer in group)]


def _calibrate(plan: Plan, calibrator: Calibrator, journal: Journal) -> None:
    """Collect what the layers ask for that the journal does not call written, of all components at once."""
    waiting = []
    for component in plan.components:
        name = component.component.name
        done = {layer.name for layer in component.layers if _unit(component, layer.name) in journal.entries}
        waiting += [(name, group[0]) for group in _waiting(component, done)]
    try:
        calibrator.collect(waiting)
    except InputError:
        if not journal.entries:  # the recipe will be mended: leave no run of another fingerprint in its way
            shutil.rmtree(journal.folder)
        raise


def _unit(component: ComponentPlan, name: str) -> str:
    return f"{component.component.name}:{name}"


def _digest(tensors: Iterable[tuple[str, bytes | memoryview]]) -> str:
    """The digest of tensors that come one at a time, in order of their names."""
    digest = hashlib.sha256()
    for name, data in tensors:
        digest.update(name.encode())
        digest.update(data)
    return digest.hexdigest()


def _taken_up(component: ComponentPlan, writer: ShardWriter, journal: Journal) -> dict[str, LayerRecord]:
    """The layers that the journal calls written and whose bytes are still what they were; the others are forgotten."""
    records: dict[str, LayerRecord] = {}
    units = {_KEPT: component.kept}
    units |= {
        layer.name: tuple(f"{layer.name}.{stored}" for stored in layer.layout.stored()) for layer in component.layers
    }
    for name, tensors in units.items():
        entry = journal.entries.get(_unit(component, name))
        if entry is None:
            continue
        if _digest((tensor, writer.read(tensor)) for tensor in sorted(tensors)) != entry["digest"]:
            del journal.entries[_unit(component, name)]
        elif entry["record"] is not None:
            records[name] = record_of(entry["record"])
    return records


def _copy_kept(component: ComponentPlan, writer: ShardWriter, journal: Journal) -> None:
    """The tensors that stay as they are, bit for bit, one at a time."""

    def copied() -> Iterator[tuple[str, memoryview]]:
        for name in sorted(component.kept):
            data = tensor_bytes(component.component.read(name))
            writer.write({name: data})
            yield name, data

    journal.add(_unit(component, _KEPT), _digest(copied()), None)


def _report(plan: Plan, records: Mapping[str, Mapping[str, LayerRecord]], output: str, seconds: float) -> Report:
    return Report(
        layers=tuple(
            records[component.component.name][layer.name] for component in plan.components for layer in component.layers
        ),
        skipped=tuple(skip for component in plan.components for skip in component.skipped),
        output=output,
        source_bytes=plan.source_bytes,
        written_bytes=plan.written_bytes,
        seconds=seconds,
    )


def _write_rest(
    plan: Plan,
    recipe: Recipe,
    report: Report,
    fingerprint: Mapping[str, Any],
    journal: Journal,
    allocation: Allocation | None,
) -> None:
    """Everything but the shards: the components' configs and indices, the rest of the pipeline, loraq.json."""
    quantized = {component.component.name: component for component in plan.components}
    for name, component in quantized.items():
        folder = journal.result / name
        write_text(folder / "config.json", component.config_text)
        index = index_text(component.files)
        if index is not None:
            write_text(folder / f"{WEIGHTS_NAME}.index.json", index)
    for entry in _other_entries(plan):
        if entry.is_dir():
            shutil.copytree(entry, journal.result / entry.name, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, journal.result / entry.name)
    write_provenance(journal.result, recipe, report, fingerprint, allocation)
    sync_tree(journal.result)


def _other_entries(plan: Plan) -> list[Path]:
    """The files and folders of a pipeline that are copied as they are; none of a lone component."""
    if not plan.source.is_pipeline:
        return []
    made = {component.component.name for component in plan.components} | {PROVENANCE, PICTURES}
    entries = sorted(plan.source.root.iterdir())
    return [entry for entry in entries if entry.name not in made and not entry.name.startswith(".")]


def _with_pictures(report: Report, recipe: Recipe, source: Source, output: Path) -> Report:
    """The report with the samples' picture, drawn unless it is there."""
    if recipe.samples is None or not source.is_pipeline:
        return report
    path = output / PICTURES
    if not path.exists():
        from loraq.samples import draw_comparison

        partial = path.with_suffix(f".partial{path.suffix}")
        draw_comparison(source.root, output, recipe.samples, partial, resolved_device(recipe.run.device))
        partial.rename(path)
    return attrs.evolve(report, pictures=str(Path(recipe.run.output) / PICTURES))
