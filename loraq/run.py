"""Run a recipe: read, quantize, write, from the first layer to the finished folder, and continue where it was killed.

open the source -> choose for each layer, where the recipe allocates -> plan every byte -> journal
-> calibrate, where a strategy reads statistics
-> layers in parallel, each: read, fit, pack, write, journal line (loraq/fitting.py)
-> rename the shards -> configs and the other components -> loraq.json -> rename the folder -> pictures

Started by torchrun, all processes come here with one recipe (loraq/team.py). The first one makes what is made once, the
source's digests, the journal, the finished folder; calibration's passes and the layers are shared out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from loraq.allocation import Allocation
from loraq.calibration import digest_of, open_prompts, pipeline_digests
from loraq.calibration import fingerprint as calibration_fingerprint
from loraq.checkpoint import index_text, sync_tree, write_text
from loraq.collection import Calibrator, Collected
from loraq.errors import CheckpointError, InputError, ModelError
from loraq.fitting import Fitter, Job, jobs_of, largest_first, write_layers
from loraq.journal import Journal, drop_leftovers, open_journal, work_folder
from loraq.layer import LayerRecord
from loraq.pipeline import QuantizedLayer
from loraq.plan import Plan, make_plan
from loraq.probing import allocated, plans_of
from loraq.progress import Progress
from loraq.provenance import PROVENANCE, record_of, report_of, versions, write_provenance
from loraq.recipe import Recipe
from loraq.report import Report
from loraq.source import WEIGHTS_NAME, Source, open_source
from loraq.statistics_cache import cache_folder
from loraq.team import Team, join
from loraq.workers import Workers, in_parallel, name_of, resolved_devices

PICTURES = "samples.png"


def run_recipe(recipe: Recipe, *, restart: bool = False, team: Team | None = None) -> Report:
    """Quantize what the recipe names into its output folder. Returns the report; raises InputError in a sentence.

    A finished output of the same fingerprint is left as it is; an unfinished one is continued; one of another recipe is
    refused unless `restart` replaces it. Where torchrun started several processes, all must call this: they do it
    together, in `team` or, without one, in the team that the environment names.
    """
    with join() if team is None else contextlib.nullcontext(team) as together:
        report = _run(recipe, together, restart=restart)
        return report if together.alone else report_of({"report": together.share(report.to_plain)})


def _run(recipe: Recipe, team: Team, *, restart: bool) -> Report:
    """See `run_recipe`; but for the first process's, the report may be without pictures."""
    started = time.perf_counter()
    source = open_source(recipe.model)
    workers = _workers(recipe, team)
    output = _checked_output(Path(recipe.run.output), source)
    team.see_alike(output.parent, "run.output")
    _refuse_difference(team, _told_source(recipe, source))
    digests = functools.cache(lambda: team.share(source.digests))
    recipe, allocation = allocated(
        recipe,
        source,
        workers,
        digests,
        calibrator_of=_calibrator,
        fingerprint_of=_fingerprint,
        output=output,
        restart=restart,
    )
    pipeline = recipe.pipeline()
    plan = make_plan(source, pipeline, recipe.calibration)
    if not plan.layers:
        raise ModelError(
            f"{source.root}: no layer is left to quantize; look at model.skip, model.component and `plan`."
        )
    calibrator = _calibrator(recipe, plan, workers, digests(), work_folder(output) / "statistics")
    fingerprint = _fingerprint(recipe, plan, workers.device, digests(), calibrator)
    _refuse_difference(team, fingerprint)
    finished = None if restart or not team.first else _finished(output, plan, fingerprint)
    if team.share(lambda: finished is not None):
        if finished is None:
            return Report(layers=(), already_done=True)
        drop_leftovers(output)
        report = attrs.evolve(finished, output=recipe.run.output, already_done=True)
    else:
        try:
            with open_journal(output, fingerprint, team, restart=restart) as journal:
                if team.first:
                    _check_room(plan, journal)
                written = write_layers(plan, Fitter(pipeline.seed, calibrator), journal, workers)
                report = _report(plan, written, recipe.run.output, time.perf_counter() - started)
                if team.first:
                    _write_rest(plan, recipe, report, fingerprint, journal, allocation, written)
                    team.meet()  # the others have closed their journals
                    journal.finish(output)
            if not team.first:
                team.meet()
        except OSError as error:
            raise CheckpointError(
                f"run.output: {work_folder(output)} cannot be written ({_reason(error)}); mend that, and the same "
                "command continues."
            ) from error
    return _with_pictures(report, recipe, source, output) if team.first else report


def _workers(recipe: Recipe, team: Team | None = None) -> Workers:
    return Workers.of(recipe.run.device, recipe.run.workers, recipe.run.threads, team)


def _told_source(recipe: Recipe, source: Source) -> dict[str, Any]:
    """What can be known of a run without reading a weight, to compare between processes."""
    sizes: dict[str, Any] = {}
    for component in source.components:
        config = component.folder / "config.json"
        sizes[source.label(config)] = hashlib.sha256(config.read_bytes()).hexdigest()
        sizes |= {source.label(path): path.stat().st_size for path in component.files}
    return {"recipe": recipe.digest, "model": sizes}


def _refuse_difference(team: Team, told: Mapping[str, Any]) -> None:
    """Raise InputError where this process was told something else than the first one."""
    first, here = team.share(lambda: told), json.loads(json.dumps(told))
    other = [key for key in sorted({*first, *here}) if first.get(key) != here.get(key)]
    if other:
        raise InputError(
            f"its {' and '.join(other)} differ from the first process's; give all processes the same recipe, model, "
            "versions and kind of device."
        )


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


def calibrate_recipe(recipe: Recipe, part: int | None = None, *, team: Team | None = None) -> Collected | None:
    """Collect what the recipe's strategies read, of all parts or of one (counted from 0), into the cache.

    Returns what was done, None for a recipe that needs no data. Raises InputError where there is no such part. The
    processes that torchrun started share the passes out, as in `run_recipe`.
    """
    with join() if team is None else contextlib.nullcontext(team) as together:
        return _calibrate(recipe, part, together)


def _calibrate(recipe: Recipe, part: int | None, team: Team) -> Collected | None:
    """See `calibrate_recipe`."""
    source = open_source(recipe.model)
    plans = plans_of(recipe, source)
    reading = next((plan for plan in plans if plan.calibration is not None), None)
    if recipe.calibration is None or reading is None:
        return None
    if recipe.calibration.cache is False:
        raise InputError("calibration.cache: is false, so nothing would be kept; name a folder, or leave it out.")
    if part is not None and not 0 <= part < recipe.calibration.parts:
        raise InputError(f"--part {part + 1}: calibration.parts is {recipe.calibration.parts}; there is no such part.")
    _refuse_difference(team, _told_source(recipe, source))
    calibrator = _calibrator(recipe, reading, _workers(recipe, team), team.share(source.digests), Path())
    assert calibrator is not None, "the plan says that there is something to collect"
    _refuse_difference(team, _told_calibration(calibrator))
    return calibrator.collect([each for plan in plans for each in plan.named_layers], part, team=team)


def _calibrator(
    recipe: Recipe, plan: Plan, workers: Workers, digests: Mapping[str, str], uncached: Path
) -> Calibrator | None:
    """What gives the layers their statistics, kept in `uncached` where there is no cache; None for data-free plans."""
    calibration = recipe.calibration
    if calibration is None or plan.calibration is None:
        return None
    device = workers.device
    prompts = open_prompts(calibration)
    threads = 0 if device.type == "cuda" else calibration.threads or len(os.sched_getaffinity(0))
    every = workers.team.share(lambda: pipeline_digests(plan.source, digests))
    return Calibrator(
        source=plan.source,
        calibration=calibration,
        prompts=prompts,
        fingerprint=calibration_fingerprint(calibration, prompts, every, name_of(device), threads),
        device=device,
        threads=threads or torch.get_num_threads(),
        home=uncached if calibration.cache is False else cache_folder(calibration),
    )


def try_layers(recipe: Recipe, pattern: str) -> Report:
    """Quantize the layers whose names match `pattern` and write nothing: the report is all."""
    started = time.perf_counter()
    source = open_source(recipe.model)
    workers = _workers(recipe)
    digests = functools.cache(source.digests)
    recipe, _ = allocated(
        recipe, source, workers, digests, calibrator_of=_calibrator, fingerprint_of=_fingerprint, pattern=pattern
    )
    plan = make_plan(source, recipe.pipeline(), recipe.calibration)
    chosen = [  # a group whole, if one of its layers is meant
        job for job in jobs_of(plan) if any(fnmatch.fnmatchcase(layer.name, pattern) for layer in job.group)
    ]
    if not chosen:
        first = next(iter(plan.layers), None)
        raise ModelError(f"--only {pattern}: no layer matches; the first layer is '{first.name if first else ''}'.")
    with tempfile.TemporaryDirectory(prefix="loraq-") as uncached:
        asked = any(job.group[0].recipe.statistics for job in chosen)
        calibrator = _calibrator(recipe, plan, workers, digests(), Path(uncached)) if asked else None
        records = _tried(chosen, Fitter(recipe.run.seed, calibrator), workers)
    ordered = tuple(records[name, layer.name] for name, layer in plan.named_layers if (name, layer.name) in records)
    return Report(layers=ordered, seconds=time.perf_counter() - started, warnings=plan.warnings)


def _tried(jobs: list[Job], fitter: Fitter, workers: Workers) -> dict[tuple[str, str], LayerRecord]:
    """The records of the jobs' layers, by component and name."""

    def recorded(job: Job, results: Mapping[str, QuantizedLayer]) -> dict[tuple[str, str], LayerRecord]:
        return {(job.component.component.name, name): result.record for name, result in results.items()}

    fitter.collect(jobs, workers.team)
    records: dict[tuple[str, str], LayerRecord] = {}
    with Progress("quantizing", sum(job.weights for job in jobs)) as progress:
        for job, found in in_parallel(
            fitter.fit, largest_first(jobs), workers=workers, read=fitter.read, keep=recorded
        ):
            records |= found
            progress.advance(job.weights, job.name)
    return records


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


def _fingerprint(
    recipe: Recipe, plan: Plan, device: torch.device, digests: Mapping[str, str], calibrator: Calibrator | None
) -> dict[str, Any]:
    """What the result's bytes depend on: equal fingerprints, equal bytes. Calibration only where it shapes them."""
    return {
        "recipe": recipe.digest,
        "model": dict(digests),
        "versions": versions(recipe, plan),
        "device": name_of(device),
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


def _report(plan: Plan, written: Mapping[str, Mapping[str, Any]], output: str, seconds: float) -> Report:
    return Report(
        layers=tuple(record_of(written[f"{name}:{layer.name}"]["record"]) for name, layer in plan.named_layers),
        skipped=tuple(skip for component in plan.components for skip in component.skipped),
        warnings=plan.warnings,
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
    written: Mapping[str, Mapping[str, Any]],
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
    digests = {unit: line["digest"] for unit, line in written.items()}
    for name, component in quantized.items():
        digests[f"{name}:config.json"] = hashlib.sha256(component.config_text.encode()).hexdigest()
    write_provenance(journal.result, recipe, report, fingerprint, allocation, digests)
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
        draw_comparison(source, output, recipe.samples, partial, resolved_devices(recipe.run.device)[0])
        partial.rename(path)
    return attrs.evolve(report, pictures=str(Path(recipe.run.output) / PICTURES))
