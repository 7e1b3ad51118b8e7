"""The pipeline: stages in order, bound into what is done to a layer, and done to it.

Two phases. `bind` turns the stages of a recipe into one frozen `LayerRecipe`, before any weight is read, and refuses
what does not go together. `quantize_layer` then sends one weight through it:

    weight --transforms--> W̃ --before_fit--> --low_rank.fit--> Fit --after_fit--> --packing--> stored tensors, record

What a TOML recipe builds and what a Python user builds by hand are the same `Pipeline`, and both ways give the same
bytes: the only randomness comes from a generator that is seeded by (seed, layer name).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from loraq.activation import NONE
from loraq.blocks import norm, trim
from loraq.contracts import (
    AbstractCalibrated,
    AbstractConditional,
    AbstractLowRank,
    AbstractPacking,
    AbstractPreTransform,
    AbstractQuantizer,
    AbstractStage,
    AbstractStatistic,
)
from loraq.errors import InputError, LoraqError, ModelError
from loraq.factors import deviation, distance
from loraq.formats import row_local
from loraq.input_statistics import NOTHING, Gram, InputStatistics, TokenSample
from loraq.layer import Fit, LayerContext, LayerRecord

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from loraq.adapters import Lora
    from loraq.calibration import Calibration
    from loraq.layout import Layout
    from loraq.recipe import Override
    from loraq.report import Report
else:
    from loraq.lazy import torch


@attrs.frozen
class LayerRecipe:
    """What is done to one layer: all stages, bound.

    A third party's own stage adds itself to `before_fit`, functions of (W̃, context) that give a weight to fit instead,
    or to `after_fit`, functions of (fit, W̃, context) that give another fit of the same shapes.
    """

    transforms: tuple[AbstractPreTransform, ...] = ()
    main: AbstractQuantizer | None = None
    low_rank: AbstractLowRank | None = None
    rank: int | None = None
    budget: int | str | None = None
    share_down: bool = False
    branch: AbstractQuantizer | None = None
    packing: AbstractPacking | None = None
    before_fit: tuple[Callable[[Tensor, LayerContext], Tensor], ...] = ()
    after_fit: tuple[Callable[[Fit, Tensor, LayerContext], Fit], ...] = ()

    @property
    def strategies(self) -> tuple[object, ...]:
        """All strategies that are set, in the order in which they work."""
        rest = (self.main, self.low_rank, self.branch, self.packing)
        return (*self.transforms, *(each for each in rest if each is not None))

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        """What calibration must collect of the layer's input; empty for a data-free recipe."""
        asked = {kind for each in self.strategies if isinstance(each, AbstractCalibrated) for kind in each.statistics}
        if self.transforms and any(kind.needs_sample for kind in asked):
            asked.add(TokenSample)
        return frozenset(asked)

    def rank_for(self, out: int, inn: int) -> int:
        """The branch's rank in an (out, inn) layer."""
        return self._rank([out], inn)

    def _rank(self, outs: Sequence[int], inn: int) -> int:
        """The rank of the one branch of layers of these `outs` with one `down`: of the bytes that each would have."""
        from loraq.budget import budget_bytes, rank_within

        bound = _bound(self)
        if self.budget is not None:
            allowed = sum(budget_bytes(self.budget, out, inn) for out in outs)
            return rank_within(allowed, bound.branch, bound.packing, sum(outs), inn)
        return min(self.rank or 0, sum(outs), inn)

    def layout(self, out: int, inn: int) -> Layout:
        """The packed layer that this recipe makes of an (out, inn) weight, before any weight is read."""
        return self._layout(out, inn, self._rank([out], inn))

    def layouts(self, outs: Sequence[int], inn: int) -> list[Layout]:
        """The packed layers of a group that reads one input of width `inn`: the first stores the `down` of all."""
        rank = self._rank(outs, inn)
        made = [self._layout(out, inn, rank) for out in outs]
        return [made[0], *(attrs.evolve(each, stores_down=rank == 0) for each in made[1:])]

    def _layout(self, out: int, inn: int, rank: int) -> Layout:
        from loraq.budget import branch_storage
        from loraq.layout import Layout, Storage

        bound = _bound(self)
        down, up = branch_storage(bound.branch, rank, inn) if rank else (None, None)
        return Layout(
            out=out,
            inn=inn,
            rank=rank,
            main=Storage(bound.main.format, bound.main.group_for(inn)),
            activation=bound.main.activation,
            down=down,
            up=up,
            branch_activation=bound.branch.activation if rank else NONE,
            transforms=self.transforms,
            packing=bound.packing,
        )


@attrs.frozen
class _Bound:
    """A LayerRecipe's parts once all are there."""

    main: AbstractQuantizer
    low_rank: AbstractLowRank
    branch: AbstractQuantizer
    packing: AbstractPacking


def _bound(recipe: LayerRecipe) -> _Bound:
    if recipe.main is None or recipe.low_rank is None or recipe.branch is None or recipe.packing is None:
        raise LoraqError(
            "this LayerRecipe has no main quantizer, low-rank fit, branch quantizer or packing: use bind()."
        )
    return _Bound(recipe.main, recipe.low_rank, recipe.branch, recipe.packing)


_LARGE = 2**20
"""Weights from which a fit leaves enough behind to clear up."""
_DEFAULTS = {"low_rank": "none", "branch_quantizer": "none", "packing": "rows"}


def bind(stages: Sequence[AbstractStage]) -> LayerRecipe:
    """The stages as one LayerRecipe. Raises InputError where they do not go together.

    `main_quantizer` is required. Left out, `low_rank` is "none", `branch_quantizer` "none" (16 bits), `packing` "rows".
    """
    seen: dict[str, int] = {}
    recipe = LayerRecipe()
    for stage in stages:
        seen[stage.kind] = seen.get(stage.kind, 0) + 1
        if seen[stage.kind] == 2 and not stage.repeatable:
            raise InputError(f"stage '{stage.kind}' is listed twice; only one is possible")
        recipe = stage.bind(recipe)
    if recipe.main is None:
        raise InputError("there is no stage 'main_quantizer'; add one, such as strategy \"rtn\"")
    for kind, name in _DEFAULTS.items():
        if kind not in seen:
            recipe = make_stage(kind, name).bind(recipe)
    for strategy in recipe.strategies:
        objection = strategy.objection(recipe) if isinstance(strategy, AbstractConditional) else None
        if objection is not None:
            raise InputError(objection)
    if recipe.share_down:
        for quantizer in (recipe.main, recipe.branch):
            if quantizer is not None and not row_local(quantizer.format):
                raise InputError(
                    f"'share_down' cuts one fit into its layers' rows, which {quantizer.format.name} does not allow; "
                    "leave it out, or choose another format"
                )
    return recipe


def make_stage(kind: str, strategy: str | None = None, **options: Any) -> AbstractStage:
    """A stage by its registered names, with the options a recipe would write: `stage("low_rank", "loraq", rank=32)`.

    Raises RecipeError for unknown names, unknown options and wrong values, all at once.
    """
    from loraq.recipe import structure_stage

    table = {"kind": kind} | ({} if strategy is None else {"strategy": strategy}) | options
    return structure_stage(table, f"stage '{kind}'")


@attrs.frozen(eq=False)
class QuantizedLayer:
    """A layer that went through the pipeline: its layout, its stored tensors (on the CPU), and the record."""

    layout: Layout
    tensors: Mapping[str, Tensor]
    record: LayerRecord


def layer_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of a layer's randomness: seeded by the recipe's seed and the layer's name, nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an array is a buffer


def quantize_layer(
    name: str, weight: Tensor, recipe: LayerRecipe, *, seed: int, statistics: InputStatistics = NOTHING
) -> QuantizedLayer:
    """One layer through the pipeline: `quantize_group` of one."""
    return quantize_group({name: weight}, recipe, seed=seed, statistics=statistics)[name]


def quantize_group(
    weights: Mapping[str, Tensor], recipe: LayerRecipe, *, seed: int, statistics: InputStatistics = NOTHING
) -> dict[str, QuantizedLayer]:
    """Layers that read one input, by name, through the pipeline, as one weight of all their output channels.

    Each weight is (out, inn), any float dtype, on the device of the run. The layers get the transforms' online parts
    and one `down`, which the first of them stores; main codes and `up` are cut by rows. `statistics` is what
    calibration found of the input: at least what `recipe.statistics` names. Raises ModelError for a weight that is not
    finite or statistics that are missing, LoraqError for a strategy that breaks its contract.
    """
    started = time.perf_counter()
    first, names = next(iter(weights)), list(weights)
    digests = [hashlib.sha256(tensor_bytes(weight)).hexdigest() for weight in weights.values()]
    checked = [_checked(name, weight) for name, weight in weights.items()]
    transformed = checked[0] if len(checked) == 1 else torch.cat(checked)
    del checked  # every matrix of the layer's size counts, here and below
    missing = sorted(kind.__name__ for kind in recipe.statistics if statistics.get(kind) is None)
    if missing:
        raise ModelError(
            f"layer '{first}': its strategies read {', '.join(missing)} of its input, and nothing was calibrated; "
            "give prompts in [calibration], or a callable to `Pipeline.quantize(..., calibrate=...)`."
        )
    bound = _bound(recipe)
    layouts = recipe.layouts([len(weight) for weight in weights.values()], transformed.shape[1])
    with torch.no_grad():
        context = LayerContext(first, layer_generator(seed, first, transformed.device), statistics)
        online: dict[str, Tensor] = {}
        for index, transform in enumerate(recipe.transforms):
            prepared = transform.prepare(transformed, context)
            online |= {f"transform.{index}.{key}": tensor for key, tensor in prepared.items()}
            transformed = transform.weight(transformed, prepared)
            moved = context.statistics.transformed(functools.partial(transform.input, tensors=prepared))
            context = attrs.evolve(context, statistics=moved)
        for before in recipe.before_fit:
            transformed = before(transformed, context)
        cuts = list(itertools.accumulate((layout.out for layout in layouts), initial=0))
        rows = [slice(*each) for each in itertools.pairwise(cuts)]
        before_branch = _errors(transformed, Fit(bound.main.encode(transformed, context)), rows, context)
        fit = bound.low_rank.fit(transformed, bound.main, bound.branch, layouts[0].rank, context)
        for after in recipe.after_fit:
            fit = after(fit, transformed, context)
        _check_fit(first, fit, attrs.evolve(layouts[0], out=len(transformed)))
        with_branch = _errors(transformed, fit, rows, context)
        tensors = []
        for layout, part in zip(layouts, rows, strict=True):
            parts = online | _parts(fit if len(layouts) == 1 else fit.rows(part.start, part.stop))
            tensors.append({key: tensor.cpu() for key, tensor in layout.pack(parts).items()})
    results = {}
    seconds = time.perf_counter() - started
    for index, (name, layout) in enumerate(zip(names, layouts, strict=True)):
        record = LayerRecord(
            name=name,
            out=layout.out,
            inn=layout.inn,
            rank=layout.rank,
            error_before=before_branch[index][0],
            error_after=with_branch[index][0],
            stored_bytes=layout.stored_bytes,
            seconds=seconds * layout.out / len(transformed),
            source_digest=digests[index],
            output_error_before=before_branch[index][1],
            output_error_after=with_branch[index][1],
        )
        results[name] = QuantizedLayer(layout, tensors[index], record)
    if transformed.numel() >= _LARGE:
        trim()
    return results


def _checked(name: str, weight: Tensor) -> Tensor:
    """The weight in float32. Raises ModelError where it is no 16-bit model's, or not finite."""
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ModelError(f"layer '{name}': its weight is {weight.dtype}, quantized already; give the 16-bit model.")
    values = weight.detach().float()
    if values.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(values)):  # NaN is both ends
        kind = "NaN" if bool(torch.isnan(values).any()) else "an infinite value"
        raise ModelError(f"layer '{name}': its weight has {kind}; mend the model, or skip the layer with model.skip.")
    return values


def _parts(fit: Fit) -> dict[str, Tensor]:
    """The tensors of all coded matrices of a fit, by stored name."""
    matrices = (("main", fit.main), ("down", fit.down), ("up", fit.up))
    return {
        f"{matrix}.{key}": tensor
        for matrix, coded in matrices
        if coded is not None
        for key, tensor in coded.parts.items()
    }


def _errors(weight: Tensor, fit: Fit, rows: Sequence[slice], context: LayerContext) -> list[tuple[float, float | None]]:
    """What `fit` leaves of the weight, and of the output where the input is known, relative, for each lot of `rows`."""
    found = []
    for part in rows:
        own = fit if len(rows) == 1 else fit.rows(part.start, part.stop)
        size = norm(weight[part])
        share = distance(weight[part], own) / size if size > 0 else 0.0
        found.append((share, _relative_output_error(weight[part], own, context)))
    return found


def _relative_output_error(weight: Tensor, fit: Fit, context: LayerContext) -> float | None:
    """`||x (weight - fit)ᵀ|| / ||x weightᵀ||` where the input's Gram matrix is known."""
    if context.statistics.get(Gram) is None:
        return None
    size = deviation(weight, context)
    return deviation(weight - fit.decode(), context) / size if size > 0 else 0.0


def _check_fit(name: str, fit: Fit, layout: Layout) -> None:
    """What the fit made must be what the layout promised: its bytes are already spoken for."""
    made = {"main": fit.main, "down": fit.down, "up": fit.up}
    for matrix, storage, rows, columns in layout.matrices():
        coded = made.pop(matrix)
        if coded is None or (coded.format, coded.group, coded.shape) != (
            storage.format,
            storage.group,
            (rows, columns),
        ):
            raise LoraqError(
                f"layer '{name}': the fit made {matrix} = {coded!r}, but a {rows} x {columns} matrix in "
                f"{storage.format.name} with groups of {storage.group} was announced; the strategy breaks its contract."
            )
    for matrix, coded in made.items():
        if coded is not None:
            raise LoraqError(f"layer '{name}': the fit made '{matrix}' for rank 0; the strategy breaks its contract.")


@attrs.frozen
class Pipeline:
    """Stages in order, overrides for some layers, and a seed: `Pipeline([...]).quantize(module)`.

    `skip` and `keep` are fnmatch patterns over full dotted names: layers left in 16 bits beside the model family's own,
    and layers quantized although the family would leave them. `threads` is the number of threads of one fit (part of
    the result: sums round differently), `workers` how many fits run at once (not part of it); 0 takes one a core.
    `device` is one, or several of one model that layers are spread over; "auto" fits each layer of a module where it
    lies, and those of a folder on all GPUs of the first one's model, or the CPU.
    """

    stages: Sequence[AbstractStage] = attrs.field()
    overrides: Sequence[Override] = attrs.field(default=(), kw_only=True)
    skip: Sequence[str] = attrs.field(default=(), kw_only=True)
    keep: Sequence[str] = attrs.field(default=(), kw_only=True)
    seed: int = attrs.field(default=0, kw_only=True)
    threads: int = attrs.field(default=1, kw_only=True)
    workers: int = attrs.field(default=0, kw_only=True)
    device: str | Sequence[str] = attrs.field(default="auto", kw_only=True)

    def __attrs_post_init__(self) -> None:
        bind(self.stages)

    def layer_recipe(self, name: str, defaults: Sequence[Override] = ()) -> LayerRecipe | None:
        """What is done to the layer called `name`: None where an override skips it.

        `defaults` are the model family's overrides, which the pipeline's own come after.
        """
        from loraq.recipe import overridden

        matching = [each for each in (*defaults, *self.overrides) if each.matches(name)]
        skips = [each.skip for each in matching if each.skip is not None]
        if skips and skips[-1]:
            return None
        return bind(overridden(self.stages, matching))

    def quantize(
        self,
        module: torch.nn.Module,
        *,
        family: str | None = None,
        calibrate: Callable[..., Any] | None = None,
        sample: int = 512,
        memory: int | str = "4 GiB",
    ) -> Report:
        """Quantize `module` in place: each linear layer becomes a PackedLinear. Returns the report.

        `family` names a model family whose defaults apply (loraq/families.py); None takes the module's class name, and
        for an unknown class every linear layer is quantized. `calibrate`, a callable that takes nothing or the module,
        runs data through the module, for strategies that read their layers' inputs (it may be a generator, which yields
        after each prompt); it is not called where none does, and again for each lot of layers whose statistics fit into
        `memory`. `sample` tokens are kept a layer where tokens are read. Raises ModelError before anything is changed.
        """
        from loraq.quantize import quantize_module

        return quantize_module(self, module, family=family, calibrate=calibrate, sample=sample, memory=memory)

    def run(
        self,
        folder: str | Path,
        output: str | Path,
        *,
        component: Sequence[str] = ("transformer",),
        calibration: Calibration | None = None,
        file: str | Path | None = None,
        lora: Sequence[Lora] = (),
    ) -> Report:
        """Quantize the pipeline or component in `folder` into `output`, as `loraq run` does. Returns the report.

        `calibration` says what runs for strategies that read their layers' inputs: `Calibration(prompts=[...])`.
        `file` is a single file with the weights, `lora` adapters to merge first: `[loraq.Lora(path=..., weight=0.8)]`.
        """
        from loraq.recipe import ModelSource, Recipe, RunOptions
        from loraq.run import run_recipe

        source = ModelSource(
            folder=str(folder),
            file=None if file is None else str(file),
            lora=tuple(lora),
            component=tuple(component),
            skip=tuple(self.skip),
            keep=tuple(self.keep),
        )
        options = RunOptions(
            output=str(output), seed=self.seed, threads=self.threads, workers=self.workers, device=self.device
        )
        stages, layers = tuple(self.stages), tuple(self.overrides)
        return run_recipe(Recipe(model=source, run=options, stage=stages, layers=layers, calibration=calibration))
