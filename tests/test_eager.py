"""Calls past torch's dispatcher: the same output, and never where something looks at the operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraq import eager, ops
from loraq.linear import PackedLinear
from test_ops import packed


@pytest.fixture
def module() -> PackedLinear:
    layer = packed()
    return PackedLinear(layer.layout, layer.tensors, torch.randn(24))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was found unwatched."""
    found: list[bool] = []

    def noted(input: Tensor, bias: Tensor | None) -> bool:
        found.append(eager.unwatched(input, bias))
        return found[-1]

    monkeypatch.setattr(ops, "unwatched", noted)
    return found


class Watching(TorchDispatchMode):
    """The names of the operations that pass through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


class Subclass(Tensor):
    """A tensor of its own class."""


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.device("cpu")])
def test_a_plain_call_is_direct(
    module: PackedLinear, direct: list[bool], around: Callable[[], AbstractContextManager[Any]]
) -> None:
    input = torch.randn(2, 3, 70)
    with around():
        output = module(input)
    assert direct == [True]
    assert torch.equal(output, torch.ops.loraq.linear(input, module._tensors(), module.bias, module._key))


def test_a_dispatch_mode_sees_the_operation(module: PackedLinear) -> None:
    input = torch.randn(3, 70)
    with Watching() as mode:
        module(input)
    assert mode.names[0] == "loraq.linear.default"


def test_the_profiler_sees_the_operation(module: PackedLinear) -> None:
    with torch.profiler.profile() as profile:
        module(torch.randn(3, 70))
    assert "loraq::linear" in [each.key for each in profile.key_averages()]


def test_a_trace_has_the_operation(module: PackedLinear) -> None:
    traced = torch.jit.trace(module, torch.randn(3, 70))
    assert "loraq::linear" in str(traced.inlined_graph)


def test_a_compiled_graph_has_the_operation(module: PackedLinear) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(3, 70))
    assert "loraq.linear" in graphs[0].code
    exported = torch.export.export(module, (torch.randn(3, 70),))
    assert "loraq.linear" in exported.graph_module.code


def test_a_backward_pass_is_refused(module: PackedLinear, direct: list[bool]) -> None:
    input = torch.randn(3, 70, requires_grad=True)
    with pytest.raises(RuntimeError, match="autograd formula"):
        module(input).sum().backward()
    module.bias.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="autograd formula"):
        module(torch.randn(3, 70)).sum().backward()
    assert direct == [False, False]
    with torch.no_grad():
        module(input)
    assert direct[-1], "nothing is recorded"


def test_transforms_and_subclasses_are_the_dispatcher_s(module: PackedLinear, direct: list[bool]) -> None:
    with pytest.raises(RuntimeError, match="Batching rule not implemented for loraq::linear"):
        torch.vmap(module)(torch.randn(2, 3, 70))
    module(torch.randn(3, 70).as_subclass(Subclass))
    assert direct == [False] * 2


def test_a_torch_that_cannot_be_asked_is_watched(module: PackedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_KNOWN", False)
    assert not eager.unwatched(torch.randn(3, 70), None)


@pytest.mark.parametrize("shape", [(3, 71), (70, 3), (35,), (2, 2, 35), (0, 71), ()])
def test_an_input_of_another_width_is_refused(module: PackedLinear, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes inputs \(\.\.\., 70\), got \("):
        module(torch.randn(shape))
