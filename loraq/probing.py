"""Probing: what error each choice of [allocate] leaves in each layer, and from that the choice for every layer.

    plans, one a choice for all layers -> units of layers that go together, each with its bytes by choice
    -> is the budget enough? (known from headers) -> every choice fitted in every layer, in parallel, journaled
    -> loraq/knapsack.py -> an Allocation, which becomes [[layers]] tables

A probe is the layer's own fit, with the recipe's probe options (fewer steps) laid over. Its error is that of the packed
layer's output, the rounding of activations included, on random tokens: with the covariance of the layer's input where
some choice's statistics hold its Gram matrix, else independent and of one size. The error of the weight would not do:
at 4-bit activations most of the error is theirs, and what passes through an 8-bit branch escapes it
(docs/notes/allocation.md). Squared errors of layers add up as the recipe's `compare` says.

Layers that share a `down` in some choice are one unit and get the same choice, as do layers of one name in several
components, which [[layers]] tables cannot tell apart.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from loraq import factors, ops
from loraq.allocation import Allocate, AllocatedLayer, Allocation, least_bits, recorded, replayed, resolved
from loraq.collection import Calibrator
from loraq.errors import CheckpointError, InputError, ModelError
from loraq.input_statistics import NOTHING, Gram
from loraq.journal import Journal, open_journal, work_folder
from loraq.knapsack import select
from loraq.match import MatchedLayer, grouped
from loraq.pipeline import layer_generator, quantize_group
from loraq.plan import Plan, make_plan
from loraq.progress import Progress
from loraq.recipe import Recipe
from loraq.source import Component, Source
from loraq.structure import plain
from loraq.workers import Workers, in_parallel

if TYPE_CHECKING:
    from rich.console import Console

Key = tuple[str, str]
"""A layer: its component's name and its own."""
_TOKENS = 128
"""Random tokens by which a layer's output is judged."""
_DAMPING = 1e-6
"""Added to a Gram matrix relative to its mean, so that it has a root."""


@attrs.frozen
class Unit:
    """Layers that get the same choice, and the bytes that they take together, by choice."""

    layers: tuple[Key, ...]
    bytes: tuple[int, ...]


@attrs.frozen
class Outlook:
    """What is known of an allocation from headers alone: `plans` and `probes` have one choice for all layers."""

    allocate: Allocate
    plans: tuple[Plan, ...]
    probes: tuple[Plan, ...]
    units: tuple[Unit, ...]
    budget: int | None

    @property
    def layers(self) -> dict[Key, tuple[MatchedLayer, ...]]:
        """The layers to choose for, each as the choices have it, by component and name."""
        wanted = [key for unit in self.units for key in unit.layers]
        by_plan = [{(name, layer.name): layer for name, layer in plan.named_layers} for plan in self.plans]
        return {key: tuple(found[key] for found in by_plan) for key in wanted}

    @property
    def least(self) -> int:
        """The bytes of the cheapest choices."""
        return sum(min(unit.bytes) for unit in self.units)

    @property
    def most(self) -> int:
        """The bytes of the dearest choices."""
        return sum(max(unit.bytes) for unit in self.units)

    @property
    def weights(self) -> int:
        """How many weights the layers have."""
        return sum(found[0].out * found[0].inn for found in self.layers.values())

    def print(self, console: Console) -> None:
        """What is known while the choice is not: what each choice would take, the range, and the budget."""
        for index, plan in enumerate(self.plans):
            told = f"choice {index} for all layers: {plan.packed_bytes:,} bytes, {self._bits(plan.packed_bytes)}"
            console.print(told, highlight=False)
        budget = "" if self.budget is None else f"; the budget is {self.budget:,} ({self._bits(self.budget)})"
        console.print(
            f"allocation: a run finds each layer's choice, between {self.least:,} bytes ({self._bits(self.least)}) and "
            f"{self.most:,} ({self._bits(self.most)}){budget}",
            highlight=False,
        )
        reading = [plan.calibration for plan in self.probes if plan.calibration is not None]
        if reading:
            console.print(max(reading, key=lambda each: each.bytes).told(), highlight=False)

    def _bits(self, bytes: int) -> str:
        return f"{8 * bytes / self.weights:.2f} bits a weight"

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "budget": self.budget,
            "least_bytes": self.least,
            "most_bytes": self.most,
            "quantized_weights": self.weights,
            "choices": [
                {"options": plain(options), "packed_bytes": plan.packed_bytes}
                for options, plan in zip(self.allocate.choice, self.plans, strict=True)
            ],
        }


def look_ahead(recipe: Recipe, source: Source, pattern: str = "*") -> Outlook:
    """What is known before anything is probed, of the layers that match. Raises InputError for too small a budget."""
    allocate = recipe.allocate
    assert allocate is not None, "only a recipe with [allocate] is allocated"

    def planned(index: int, *, probing: bool) -> Plan:
        first, rest = allocate.overrides(index), allocate.overrides(index, probing=probing)[1:]
        layers = (*first, *recipe.layers, *rest)
        return make_plan(source, attrs.evolve(recipe, layers=layers, allocate=None).pipeline(), recipe.calibration)

    plans = tuple(planned(index, probing=False) for index in range(len(allocate.choice)))
    probes = tuple(planned(index, probing=True) for index in range(len(plans))) if allocate.probe else plans
    if not plans[0].layers:
        raise ModelError(f"{source.root}: no layer is left to quantize; look at model.skip and model.component.")
    every = _units((*plans, *probes), len(plans))
    units = tuple(unit for unit in every if any(fnmatch.fnmatchcase(name, pattern) for _, name in unit.layers))
    if not units:
        raise ModelError(f"--only {pattern}: no layer matches; the first layer is '{every[0].layers[0][1]}'.")
    outlook = Outlook(allocate, plans, probes, units, None)
    base = plans[0]
    if allocate.like_a_branch:  # beside the main codes of the recipe without choices
        base = make_plan(source, attrs.evolve(recipe, allocate=None).pipeline(), recipe.calibration)
    wanted = [layer for name, layer in base.named_layers if (name, layer.name) in outlook.layers]
    budget = allocate.budget_within(wanted, share=outlook.weights / base.weights)
    if budget is not None and budget < outlook.least:
        raise InputError(
            f"allocate.budget: {allocate.budget} is {budget:,} bytes, but the cheapest choices take {outlook.least:,}; "
            f"allow that many ('{least_bits(outlook.least, outlook.weights):.2f} bits'), or add a cheaper choice."
        )
    return attrs.evolve(outlook, budget=budget)


def _units(plans: Sequence[Plan], choices: int) -> list[Unit]:
    """The layers in units, in the model's order; `bytes` are those of the first `choices` plans."""
    keys = [(name, layer.name) for name, layer in plans[0].named_layers]
    parent = {key: key for key in keys}

    def root(key: Key) -> Key:
        while parent[key] != key:
            key = parent[key]
        return key

    first: dict[str, Key] = {}
    for key in keys:
        parent[root(key)] = root(first.setdefault(key[1], key))
    for plan in plans:
        for name, layer in plan.named_layers:
            parent[root((name, layer.name))] = root((name, layer.leader))
    members: dict[Key, list[Key]] = {}
    for key in keys:
        members.setdefault(root(key), []).append(key)
    stored = [{(name, each.name): each.layout.stored_bytes for name, each in plan.named_layers} for plan in plans]
    return [
        Unit(tuple(layers), tuple(sum(found[key] for key in layers) for found in stored[:choices]))
        for layers in members.values()
    ]


@attrs.frozen
class Probed:
    """What a choice leaves of a layer: the output's relative error, and the output's root mean square norm by token."""

    error: float
    norm: float

    def squared(self, compare: str) -> float:
        """The squared error that counts."""
        return (self.error * self.norm) ** 2 if compare == "absolute" else self.error**2


@attrs.frozen
class _Job:
    """A group of layers to fit by one choice."""

    choice: int
    component: Component
    group: tuple[MatchedLayer, ...]

    @property
    def unit(self) -> str:
        """The journal's name for it."""
        return f"{self.component.name}:{self.group[0].name}:{self.choice}"

    @property
    def names(self) -> set[str]:
        return {layer.name for layer in self.group}

    @property
    def weights(self) -> int:
        return sum(layer.out * layer.inn for layer in self.group)


@attrs.frozen
class Prober:
    """Fits every choice in every layer; `calibrator` gives the layers their statistics, None where nothing is read."""

    recipe: Recipe
    workers: Workers
    calibrator: Calibrator | None

    def errors(self, outlook: Outlook, journal: Journal | None = None) -> dict[Key, list[Probed]]:
        """What each choice leaves, by layer; what the journal holds is not done again."""
        jobs, same = _jobs(outlook)
        entries = {} if journal is None else journal.entries
        team = self.workers.team
        done = team.share(lambda: {unit: entry["record"] for unit, entry in entries.items()})
        waiting = [job for job in jobs if job.unit not in done]
        if self.calibrator is not None:
            self.calibrator.collect([(job.component.name, job.group[0]) for job in waiting], team=team)
        waiting.sort(key=lambda job: -job.weights)  # the last fits in flight are short, and the workers end together

        def probed(job: _Job, _: None, device: torch.device) -> tuple[dict[str, Any], str]:
            names = {layer.name for layer in job.group}
            others = [each for each in jobs if each.component is job.component and names & each.names]
            known = next((each.group[0] for each in others if Gram in each.group[0].recipe.statistics), None)
            found, digest = self._probe(job, known, device)
            return {name: attrs.asdict(each) for name, each in found.items()}, digest

        def kept(job: _Job, found: tuple[dict[str, Any], str]) -> dict[str, Any]:
            if journal is not None:
                journal.add(job.unit, found[1], found[0])
            return found[0]

        total = sum(job.weights for job in jobs)
        begun = total - sum(job.weights for job in waiting)
        with Progress("probing choices", total, done=begun, shown=team.first) as progress:
            for job, record in in_parallel(probed, waiting, workers=self.workers, keep=kept):
                done[job.unit] = record
                progress.advance(job.weights, f"{job.group[0].name}, choice {job.choice}")
        by_choice: dict[tuple[int, Key], Probed] = {
            (job.choice, (job.component.name, name)): Probed(**record)
            for job in jobs
            for name, record in done[job.unit].items()
        }
        return {
            key: [by_choice[same[choice, key], key] for choice in range(len(outlook.plans))] for key in outlook.layers
        }

    def _probe(self, job: _Job, alike: MatchedLayer | None, device: torch.device) -> tuple[dict[str, Probed], str]:
        """What the job's choice leaves of its layers, and the digest of their weights.

        `alike` is a layer of the same input whose statistics hold a Gram matrix.
        """
        first = job.group[0]
        weights = {layer.name: job.component.read(f"{layer.name}.weight").flatten(1).to(device) for layer in job.group}
        known = NOTHING if self.calibrator is None else self.calibrator.statistics(job.component.name, first, device)
        seed = self.recipe.run.seed
        results = quantize_group(weights, first.recipe, seed=seed, statistics=known)
        gram = None
        if self.calibrator is not None and alike is not None:
            gram = self.calibrator.statistics(job.component.name, alike, device)[Gram].mean
        tokens = random_tokens(first.inn, gram, layer_generator(seed, f"{job.component.name}:{first.inn}"), device)
        shared = {name: tensor for name, tensor in results[first.name].tensors.items() if name.startswith("down.")}
        found = {}
        for name, result in results.items():
            tensors = {key: tensor.to(device) for key, tensor in (shared | dict(result.tensors)).items()}
            wanted = tokens @ weights[name].float().T
            output = ops.reference(tokens, tensors, None, result.layout.whole)
            norm = float(wanted.double().norm()) / math.sqrt(len(tokens))
            left = float((output - wanted).double().norm()) / math.sqrt(len(tokens))
            found[name] = Probed(left / norm if norm > 0 else 0.0, norm)
        return found, " ".join(result.record.source_digest for result in results.values())


def random_tokens(inn: int, gram: Tensor | None, generator: torch.Generator, device: torch.device) -> Tensor:
    """Normally distributed tokens (tokens, inn) float32 with E[x xᵀ] = `gram`, or the identity where there is none."""
    tokens = torch.randn(_TOKENS, inn, generator=generator, dtype=torch.float32).to(device)
    if gram is None:
        return tokens
    lower = factors.root(gram, _DAMPING) * float(gram.double().diagonal().mean().clamp(min=0)) ** 0.5
    shaped: Tensor = (tokens.double() @ lower.T).float()
    return shaped


def _jobs(outlook: Outlook) -> tuple[list[_Job], dict[tuple[int, Key], int]]:
    """What to fit; and by choice and layer the choice whose fit it is: of equal recipes the first one is fitted."""
    wanted = outlook.layers
    jobs: list[_Job] = []
    same: dict[tuple[int, Key], int] = {}
    for choice, plan in enumerate(outlook.probes):
        for component in plan.components:
            for group in grouped(component.layers):
                keys = [(component.component.name, layer.name) for layer in group]
                if keys[0] not in wanted:
                    continue
                earlier = [job for job in jobs if job.component is component.component and _alike(job.group, group)]
                for key in keys:
                    same[choice, key] = earlier[0].choice if earlier else choice
                if not earlier:
                    jobs.append(_Job(choice, component.component, tuple(group)))
    return jobs, same


def _alike(one: Sequence[MatchedLayer], other: Sequence[MatchedLayer]) -> bool:
    return [layer.name for layer in one] == [layer.name for layer in other] and one[0].recipe == other[0].recipe


def chosen(outlook: Outlook, errors: Mapping[Key, Sequence[Probed]], fingerprint: Mapping[str, Any]) -> Allocation:
    """The allocation of least total error within the budget."""
    compare = outlook.allocate.compare
    options = [
        [
            (taken, sum(errors[key][choice].squared(compare) for key in unit.layers))
            for choice, taken in enumerate(unit.bytes)
        ]
        for unit in outlook.units
    ]
    assert outlook.budget is not None, "without a budget there is a replay"
    selection = select(options, outlook.budget)
    picks = {key: pick for unit, pick in zip(outlook.units, selection.picks, strict=True) for key in unit.layers}
    layers = tuple(
        AllocatedLayer(
            component=key[0],
            name=key[1],
            out=found[0].out,
            inn=found[0].inn,
            choice=picks[key],
            bytes=found[picks[key]].layout.stored_bytes,
            error=errors[key][picks[key]].error,
        )
        for key, found in outlook.layers.items()
    )
    return Allocation(
        table=plain(outlook.allocate),
        budget=outlook.budget,
        bytes=selection.bytes,
        error=selection.error,
        bound=selection.bound,
        layers=layers,
        fingerprint=dict(fingerprint),
    )


def checked(outlook: Outlook, allocation: Allocation, path: str) -> Allocation:
    """An earlier run's allocation, if it is one of this recipe's. Raises InputError where it is not."""
    where = f"allocate.replay: {path}"
    if allocation.table.get("choice") != plain(outlook.allocate)["choice"]:
        raise InputError(f"{where} chose among other choices than this recipe's; give the [[allocate.choice]] of then.")
    layers = outlook.layers
    there = {(layer.component, layer.name): layer for layer in allocation.layers}
    for key in [*layers, *there]:
        named = f"layer '{key[1]}'"
        if key not in there or key not in layers:
            has, lacks = ("this model", "it") if key not in there else ("it", "this model")
            raise InputError(f"{where}: {has} has {named} and {lacks} has not; replay on the model of then.")
        found, here = there[key], layers[key]
        if (found.out, found.inn) != (here[0].out, here[0].inn) or not 0 <= found.choice < len(here):
            raise InputError(f"{where}: {named} is of another shape or choice there; replay on the model of then.")
        if found.bytes != here[found.choice].layout.stored_bytes:
            raise InputError(
                f"{where}: {named} took {found.bytes:,} bytes and here takes "
                f"{here[found.choice].layout.stored_bytes:,}; give the [[stage]] and [[layers]] tables of then."
            )
    for unit in outlook.units:
        if len({there[key].choice for key in unit.layers}) > 1:
            raise InputError(f"{where}: layers that go together, as '{unit.layers[0][1]}', have several choices there.")
    if outlook.budget is not None and allocation.bytes > outlook.budget:
        raise InputError(
            f"{where} takes {allocation.bytes:,} bytes, more than allocate.budget's {outlook.budget:,}; leave one out."
        )
    return allocation


def plans_of(recipe: Recipe, source: Source) -> tuple[Plan, ...]:
    """The recipe's plan; one with [allocate] has one for each choice, and one for each probe."""
    if recipe.allocate is None:
        return (make_plan(source, recipe.pipeline(), recipe.calibration),)
    outlook = look_ahead(recipe, source)
    return (*outlook.plans, *outlook.probes)


def foretold(recipe: Recipe, source: Source) -> tuple[Outlook, Allocation | None]:
    """What `plan` can say: the choice as well where it is replayed, or a run of the recipe is done."""
    outlook = look_ahead(recipe, source)
    if outlook.allocate.replay is not None:
        return outlook, checked(outlook, replayed(outlook.allocate.replay), outlook.allocate.replay)
    path = Path(recipe.run.output) / "loraq.json"
    found = recorded(path) if path.is_file() else None
    if found is None or found.fingerprint.get("recipe") != recipe.digest:
        return outlook, None
    with contextlib.suppress(InputError):  # of another model in the same folder
        return outlook, checked(outlook, found, str(path))
    return outlook, None


def allocated(
    recipe: Recipe,
    source: Source,
    workers: Workers,
    digests: Callable[[], Mapping[str, str]],
    *,
    calibrator_of: Callable[[Recipe, Plan, Workers, Mapping[str, str], Path], Calibrator | None],
    fingerprint_of: Callable[[Recipe, Plan, torch.device, Mapping[str, str], Calibrator | None], dict[str, Any]],
    output: Path | None = None,
    pattern: str = "*",
    restart: bool = False,
) -> tuple[Recipe, Allocation | None]:
    """The recipe with the choices made as [[layers]] tables, and the allocation; unchanged without [allocate].

    Probes in the unfinished folder of `output`, where a killed run left off, unless a finished result or a replay holds
    the choices. Without an output only the layers that match `pattern` are probed, and nothing is kept: a budget in
    bytes is then their share.
    """
    if recipe.allocate is None:
        return recipe, None
    outlook = look_ahead(recipe, source, "*" if recipe.allocate.replay is not None else pattern)
    if recipe.allocate.replay is not None:
        found = checked(outlook, replayed(recipe.allocate.replay), recipe.allocate.replay)
        return resolved(recipe, found), found
    reading = next((plan for plan in outlook.probes if plan.calibration is not None), outlook.probes[0])
    if output is None:
        with tempfile.TemporaryDirectory(prefix="loraq-") as uncached:
            calibrator = calibrator_of(recipe, reading, workers, digests(), Path(uncached))
            found = chosen(outlook, Prober(recipe, workers, calibrator).errors(outlook), {})
        return resolved(recipe, found), found
    calibrator = calibrator_of(recipe, reading, workers, digests(), work_folder(output) / "statistics")
    plans = (*outlook.plans, *outlook.probes)
    told = [fingerprint_of(recipe, plan, workers.device, digests(), calibrator) for plan in plans]
    fingerprint = told[0] | {"versions": {name: version for each in told for name, version in each["versions"].items()}}
    earlier = None if restart else _finished(output, fingerprint)
    found = earlier or _probed_in(output, outlook, Prober(recipe, workers, calibrator), fingerprint, restart=restart)
    return resolved(recipe, found), found


def _finished(output: Path, fingerprint: Mapping[str, Any]) -> Allocation | None:
    """The allocation of a finished output with this fingerprint, None where there is no output."""
    path = output / "loraq.json"
    if not path.exists():
        return None
    found = recorded(path)
    made = {} if found is None else found.fingerprint
    changed = [key for key in sorted(fingerprint) if made.get(key) != fingerprint[key]]
    if changed:
        named = ", ".join(changed) if found is not None else "recipe"
        raise CheckpointError(
            f"{output} is finished and was made with another {named}; choose another run.output, or replace it with "
            "--restart."
        )
    return found


def _probed_in(
    output: Path, outlook: Outlook, prober: Prober, fingerprint: Mapping[str, Any], *, restart: bool
) -> Allocation:
    """The allocation, its probes journaled in the output's unfinished folder."""
    home = work_folder(output) / "allocation"
    folder = work_folder(output)
    team = prober.workers.team
    if team.first and (folder / "journal.jsonl").exists() and not work_folder(home).exists() and not restart:
        raise CheckpointError(
            f"{folder} holds an unfinished run with another recipe; run that one to its end, choose another "
            "run.output, or discard it with --restart."
        )
    try:
        with open_journal(home, fingerprint, team, restart=restart) as journal:
            try:
                return chosen(outlook, prober.errors(outlook, journal), fingerprint)
            except InputError:
                if (
                    team.first and not journal.entries
                ):  # the recipe will be mended: leave no run of another fingerprint in its way
                    shutil.rmtree(journal.folder)
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                raise
    except OSError as error:
        raise CheckpointError(
            f"run.output: {folder} cannot be written ({error.strerror or error}); mend that, and the same command "
            "continues."
        ) from error
