"""The packed model beside the 16-bit one: each layer's output error, and the time of a denoising step.

While the 16-bit pipeline draws some prompts, tokens of every linear layer's input are kept. A packed layer is then
judged on those of its own place, `‖y - ŷ‖ / ‖y‖` without the bias, twice: by its weights alone, and as it runs,
activations rounded. Errors of earlier layers do not reach it, so the figures say which layer does harm.

A step is one call of the denoising model with the arguments that its pipeline gave it first. Both models take it by
turns in one process, so that whatever else the machine does meets both, and the best of several counts.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loraq import ops
from loraq.collection import Collector
from loraq.input_statistics import TokenSample
from loraq.layer import Coded
from loraq.linear import PackedLinear
from loraq.match import linear_weight
from loraq.samples import check_call, draw_together, load_pipeline, load_source
from loraq.source import Source
from loraq.statistics_cache import Layer

FIRST_SEED = 2**31
"""The first prompt's seed: not one of the pictures that are judged."""


@attrs.frozen(kw_only=True)
class Beside:
    """What was measured of one packed model; times are None where they were not asked for.

    Errors by layer, stage by stage: `output_errors` by the weights alone, `main_run_errors` with the main matrix's
    input rounded as well, `run_errors` as the layer runs, the branch's inputs rounded too.
    """

    output_errors: Mapping[str, float] = attrs.field(factory=dict)
    main_run_errors: Mapping[str, float] = attrs.field(factory=dict)
    run_errors: Mapping[str, float] = attrs.field(factory=dict)
    step_seconds: float | None = None
    original_step_seconds: float | None = None


class _FirstStepError(Exception):
    """Ends a pipeline's call at its first step."""


class Original:
    """A 16-bit pipeline, loaded for comparison, its layers' inputs, and the arguments of its first step.

    `components` are those that the recipes quantize. `tokens` are kept of each layer's input, None where no errors are
    asked for; `repeats` is how often a step is timed, 0 for not at all.
    """

    def __init__(
        self,
        source: Source,
        components: Sequence[str],
        prompts: Sequence[str],
        call: Mapping[str, Any],
        device: torch.device,
        *,
        tokens: int | None,
        repeats: int,
    ) -> None:
        self._device = device
        self._repeats = repeats
        self._pipeline = load_source(source, device)
        check_call(self._pipeline, call, "pictures.call")
        self._models = {name: getattr(self._pipeline, name) for name in components}
        self._inputs = {} if tokens is None else self._collected(prompts, call, tokens)
        self._arguments = self._first_step(prompts[0], call) if repeats else ((), {})

    def _collected(self, prompts: Sequence[str], call: Mapping[str, Any], tokens: int) -> dict[Layer, Tensor]:
        """Tokens (tokens, inn) float32 of the input of each layer that ran."""
        modules: dict[Layer, nn.Module] = {}
        for component, model in self._models.items():
            for name, module in model.named_modules():
                weight = linear_weight(module)
                if weight is not None:
                    modules[Layer(component, name, weight.shape[1])] = module
        wanted = {layer: [TokenSample] for layer in modules}
        with Collector(modules, wanted, sample=tokens, seed=0) as collector:
            for place, prompt in enumerate(prompts):
                collector.begin(place)
                draw_together(self._pipeline, [prompt], [FIRST_SEED + place], call)
        samples = {layer: found[TokenSample] for layer, found in collector.found.items() if collector.tokens[layer]}
        return {layer: each.tokens for layer, each in samples.items() if isinstance(each, TokenSample)}

    def _first_step(self, prompt: str, call: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the pipeline gives the first component in its first step, for one picture."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            del module
            found.append((arguments, named))
            raise _FirstStepError

        handle = next(iter(self._models.values())).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            draw_together(self._pipeline, [prompt], [FIRST_SEED], call)
        except _FirstStepError:
            pass
        finally:
            handle.remove()
        return found[0] if found else ((), {})

    def beside(self, folder: Path) -> Beside:
        """What the packed pipeline in `folder` does, measured beside this one."""
        packed = load_pipeline(folder, self._device)
        try:
            with torch.inference_mode():
                output, main, run = self._errors(packed)
                times = self._times(packed)
        finally:
            del packed
            gc.collect()
        return Beside(
            output_errors=output,
            main_run_errors=main,
            run_errors=run,
            original_step_seconds=times[0] if times else None,
            step_seconds=times[1] if times else None,
        )

    def _errors(self, packed: Any) -> list[dict[str, float]]:
        """By layer, for each stage in which its output is rounded further."""
        stages: list[dict[str, float]] = [{}, {}, {}]
        for layer, tokens in self._inputs.items():
            module = getattr(packed, layer.component).get_submodule(layer.name)
            if not isinstance(module, PackedLinear):
                continue
            weight = linear_weight(self._models[layer.component].get_submodule(layer.name))
            assert weight is not None, "only linear layers were watched"
            wanted = tokens @ weight.float().T
            for errors, output in zip(stages, _outputs(module, tokens), strict=True):
                errors[layer.name] = _relative(wanted, output)
        return stages

    def _times(self, packed: Any) -> list[float]:
        """Seconds of a step of this model and of `packed`."""
        if not self._repeats or not any(self._arguments):
            return []
        arguments, named = self._arguments
        name, original = next(iter(self._models.items()))
        models: list[nn.Module] = [original, getattr(packed, name)]
        steps = [functools.partial(model, *arguments, **named) for model in models]
        return best_of(steps, self._repeats, self._device)


def _outputs(packed: PackedLinear, tokens: Tensor) -> list[Tensor]:
    """What a packed layer makes of `tokens`, bias left out: no input rounded, the main matrix's, all, as it runs."""
    stored, layout = packed.stored(), packed.layout.whole
    transformed = layout.transformed(tokens, stored)
    main = layout.coded("main", stored).decode()
    branch = torch.zeros((), dtype=torch.float32, device=tokens.device)
    if layout.rank:
        down, up = (layout.coded(name, stored).decode() for name in ("down", "up"))
        branch = transformed @ down.T @ up.T
    rounded = ops.quantize_activation(transformed, layout.activation)
    rounded = rounded.decode() if isinstance(rounded, Coded) else rounded
    ran = ops.linear(tokens, list(stored.values()), None, ops.layout_key(layout))
    return [transformed @ main.T + branch, rounded @ main.T + branch, ran]


def _relative(wanted: Tensor, found: Tensor) -> float:
    norm = float(wanted.double().norm())
    return float((wanted - found).double().norm()) / norm if norm > 0 else 0.0


def best_of(functions: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """The least seconds that each function took in `repeats` rounds of all, after one round that is not counted."""
    best = [math.inf] * len(functions)
    for round_ in range(repeats + 1):  # the first compiles kernels and repacks weights
        for place, function in enumerate(functions):
            started = _now(device)
            function()
            if round_:
                best[place] = min(best[place], _now(device) - started)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
