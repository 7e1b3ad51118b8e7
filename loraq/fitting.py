"""A run's layers: read, fitted, written to their places and journaled, by all workers of all processes.

The first process opens the shards and judges what an earlier start left; what is still to do follows from that for all
alike. Every process writes what it fitted, and says so in its own journal; all learn what was written, and before the
shards get their names the first one reads back what the others wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from loraq.checkpoint import ShardWriter
from loraq.collection import Calibrator
from loraq.errors import CheckpointError, InputError
from loraq.input_statistics import NOTHING
from loraq.journal import Journal
from loraq.layer import LayerRecord
from loraq.match import MatchedLayer, grouped
from loraq.pipeline import QuantizedLayer, quantize_group, tensor_bytes
from loraq.plan import ComponentPlan, Plan
from loraq.progress import Progress
from loraq.provenance import record_of
from loraq.team import Team
from loraq.workers import Workers, in_parallel

_KEPT = "(kept)"
"""The journal's unit of the tensors that are only copied; no layer is called so."""


@attrs.frozen(eq=False)
class Job:
    """A piece of work: layers of a component that are fitted as one or, without layers, the tensors that are copied."""

    component: ComponentPlan
    group: tuple[MatchedLayer, ...] = ()

    @property
    def weights(self) -> int:
        """How many weights the layers have."""
        return sum(layer.out * layer.inn for layer in self.group)

    @property
    def name(self) -> str:
        """For people."""
        return self.group[0].name if self.group else ""


def jobs_of(plan: Plan) -> list[Job]:
    """All layers of a plan, in its order."""
    return [Job(component, tuple(group)) for component in plan.components for group in grouped(component.layers)]


def largest_first(jobs: Iterable[Job]) -> list[Job]:
    """In the order to fit them: the last in flight are short, and the workers end together."""
    return sorted(jobs, key=lambda job: -job.weights)


@attrs.frozen(eq=False)
class Fitter:
    """How a job's layers are read and fitted; `calibrator` is None where no strategy reads statistics."""

    seed: int
    calibrator: Calibrator | None

    def collect(self, jobs: Sequence[Job], team: Team) -> None:
        """See to it that the statistics that the jobs' layers read are there."""
        if self.calibrator is not None:
            self.calibrator.collect([(job.component.component.name, job.group[0]) for job in jobs], team=team)

    def read(self, job: Job) -> dict[str, torch.Tensor]:
        """The weights (out, inn) of a job's layers, in memory."""
        component = job.component
        return {
            layer.name: component.component.read(component.weight_name(layer)).flatten(1).clone() for layer in job.group
        }

    def fit(self, job: Job, weights: dict[str, torch.Tensor], device: torch.device) -> dict[str, QuantizedLayer]:
        """The job's layers, packed."""
        if not job.group:
            return {}
        here = {name: weight.to(device) for name, weight in weights.items()}
        weights.clear()  # on another device, the copy in memory has served
        first, known = job.group[0], NOTHING
        if self.calibrator is not None:
            known = self.calibrator.statistics(job.component.component.name, first, device)
        return quantize_group(here, first.recipe, seed=self.seed, statistics=known)


@attrs.frozen(eq=False)
class Shards:
    """The open shards of all components, and the journal that says what is in them."""

    writers: Mapping[str, ShardWriter]
    journal: Journal

    def keep(self, job: Job, results: Mapping[str, QuantizedLayer]) -> list[dict[str, Any]]:
        """Write what a job made, and journal it. Returns the journal's lines."""
        writer = self.writers[job.component.component.name]
        if not job.group:
            return [self._copied(job.component, writer)]
        lines = []
        for name, result in results.items():
            tensors = {f"{name}.{key}": tensor_bytes(tensor) for key, tensor in result.tensors.items()}
            writer.write(tensors)
            lines.append(self._journaled(_unit(job.component, name), _digest(sorted(tensors.items())), result.record))
        return lines

    def _journaled(self, unit: str, digest: str, record: LayerRecord | None) -> dict[str, Any]:
        self.journal.add(unit, digest, None if record is None else attrs.asdict(record))
        return self.journal.entries[unit]

    def _copied(self, component: ComponentPlan, writer: ShardWriter) -> dict[str, Any]:
        """Copy the tensors that stay as they are, bit for bit, one at a time."""
        digest = hashlib.sha256()

        def copied() -> Iterator[tuple[str, memoryview]]:
            for name in sorted(component.kept):
                data = tensor_bytes(component.component.read(name))
                _add(digest, name, data)
                yield name, data

        writer.write_each(copied())
        return self._journaled(_unit(component, _KEPT), digest.hexdigest(), None)

    def taken_up(self, components: Iterable[ComponentPlan]) -> list[dict[str, Any]]:
        """The journal's lines whose bytes are still what they were; the others are forgotten."""
        found = []
        for component in components:
            for name, tensors in _units(component).items():
                unit = _unit(component, name)
                line = self.journal.entries.get(unit)
                if line is None:
                    continue
                sound = _is_record(line["record"], name) and self.digest(component, tensors) == line["digest"]
                if sound:
                    found.append(line)
                else:
                    del self.journal.entries[unit]
        return found

    def digest(self, component: ComponentPlan, tensors: Iterable[str]) -> str:
        """The digest of what lies at these tensors' places."""
        writer = self.writers[component.component.name]
        return _digest((tensor, writer.read(tensor)) for tensor in sorted(tensors))


def _units(component: ComponentPlan) -> dict[str, tuple[str, ...]]:
    """A component's units, each with its tensors."""
    units = {_KEPT: component.kept}
    return units | {
        layer.name: tuple(f"{layer.name}.{stored}" for stored in layer.layout.stored()) for layer in component.layers
    }


def _unit(component: ComponentPlan, name: str) -> str:
    return f"{component.component.name}:{name}"


def _is_record(found: Mapping[str, Any] | None, name: str) -> bool:
    """Whether a journal's record is one of this unit."""
    if found is None or name == _KEPT:
        return found is None and name == _KEPT
    try:
        return record_of(found).name == name
    except TypeError:
        return False


def _add(digest: Any, name: str, data: bytes | memoryview) -> None:
    digest.update(name.encode())
    digest.update(data)


def _digest(tensors: Iterable[tuple[str, bytes | memoryview]]) -> str:
    """The digest of tensors that come one at a time, in order of their names."""
    digest = hashlib.sha256()
    for name, data in tensors:
        _add(digest, name, data)
    return digest.hexdigest()


def _opened(plan: Plan, journal: Journal, stack: contextlib.ExitStack, team: Team, *, joining: bool) -> Shards:
    writers = {}
    for component in plan.components:
        name = component.component.name
        writer = ShardWriter(journal.result / name, component.files, shared=not team.alone, joining=joining)
        writers[name] = stack.enter_context(writer)
    return Shards(writers, journal)


def write_layers(plan: Plan, fitter: Fitter, journal: Journal, workers: Workers) -> dict[str, dict[str, Any]]:
    """All components' shards, written or taken up, by all processes of the team. Returns all journal lines by unit."""
    team = workers.team
    with contextlib.ExitStack() as stack:
        shards = _opened(plan, journal, stack, team, joining=False) if team.first else None
        lines = team.share(lambda: [] if shards is None else shards.taken_up(plan.components))
        if shards is None:
            shards = _opened(plan, journal, stack, team, joining=True)
        written = {line["unit"]: line for line in lines}
        jobs = _waiting(plan, written)
        try:
            fitter.collect([job for job in jobs if job.group], team)
        except InputError:
            if team.first and not journal.entries:  # the recipe will be mended: leave no other run in its way
                shutil.rmtree(journal.folder)
            raise
        done = plan.weights - sum(job.weights for job in jobs)
        flow = in_parallel(fitter.fit, jobs, workers=workers, read=fitter.read, keep=shards.keep)
        with Progress("quantizing", plan.weights, done=done, shown=team.first) as progress:
            for job, made in flow:
                written |= {line["unit"]: line for line in made}
                progress.advance(job.weights, job.name)
    if team.first:
        _finish(plan, journal, team, written)
    return written


def _waiting(plan: Plan, written: Mapping[str, object]) -> list[Job]:
    """What is still to do: of layers that are fitted as one, all where one is missing. What is copied comes first."""
    copied = [Job(component) for component in plan.components if _unit(component, _KEPT) not in written]
    return copied + largest_first(
        job for job in jobs_of(plan) if not all(_unit(job.component, layer.name) in written for layer in job.group)
    )


def _finish(plan: Plan, journal: Journal, team: Team, written: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the shards their names, once what other processes wrote has been found there."""
    with contextlib.ExitStack() as stack:
        shards = _opened(plan, journal, stack, team, joining=True)
        for component in plan.components:
            for name, tensors in _units(component).items():
                unit = _unit(component, name)
                if unit not in journal.entries and shards.digest(component, tensors) != written[unit]["digest"]:
                    raise CheckpointError(
                        f"run.output: {journal.folder} does not hold what another process wrote of '{name}'; put it on "
                        "a file system that all machines share."
                    )
        for writer in shards.writers.values():
            writer.finish()
