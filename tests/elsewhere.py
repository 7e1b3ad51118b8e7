"""A device that is not the CPU, made of the CPU's numbers: for what would run on a GPU, where there is none.

`with elsewhere.device():` tensors may be on "elsewhere:0". They hold a tensor of the CPU, and every operation of torch
computes with those, but as strictly as a GPU: an operation on tensors of both devices raises RuntimeError, but for
copies, numbers (tensors of no dimension) and indices; and there is no `.numpy()`, and no address that the CPU could
read. So code that forgets a `device=`, or hands a GPU's tensor to code for the CPU, fails here as it would there. What
a GPU computes otherwise than the CPU does not show, except for division by Python numbers, which is by the reciprocal.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

from loraq import lazy

NAME = "elsewhere"
_MAY_MIX = ("aten.copy_", "aten._to_copy", "aten.index", "aten.index_put_", "aten.set_")


def there_is() -> bool:
    """Whether this torch can have such a device: from 2.9 on; and makes it."""
    make = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if make is None:
        return False
    if torch._C._get_privateuse1_backend_name() != NAME:
        make(NAME)
    return True


class Elsewhere(Tensor):
    """A tensor on the device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}({self.held!r})"

    def tolist(self) -> Any:
        """Torch has it for its own classes alone."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on tensors of '{NAME}' outside `with elsewhere.device()`")


class Generator(torch.Generator):
    """Random numbers of the device, for tensors that are made there."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(f"{NAME}:0")


_REAL_GENERATOR = torch.Generator


class _Made(type(torch.Generator)):  # type: ignore[misc]
    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return Generator() if torch.device(device).type == NAME else _REAL_GENERATOR(device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _REAL_GENERATOR)


class _GeneratorOfAny(torch.Generator, metaclass=_Made):
    """What torch.Generator is meanwhile."""


@contextlib.contextmanager
def device() -> Iterator[None]:
    """While it is entered, operations know the device, in threads that begin meanwhile as well."""
    assert there_is()
    begin = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with _Operations(), _Functions():
            begin(thread)

    with pytest.MonkeyPatch.context() as patch, _Operations(), _Functions():
        patch.setattr(torch, "Generator", _GeneratorOfAny)
        patch.setitem(lazy.torch.__dict__, "Generator", _GeneratorOfAny)  # it may have the real one already
        patch.setattr(threading.Thread, "run", run)
        yield


class _Functions(TorchFunctionMode):
    """One thread's calls, which still have their generators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            made = torch.device(kwargs.get("device") or (args[0].device if isinstance(args[0], Tensor) else "cpu"))
            if kwargs["generator"].device.type != made.type:
                raise RuntimeError(f"{func}: a generator of {kwargs['generator'].device} for a tensor on {made}")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """One thread's operations."""

    def __enter__(self) -> Any:
        # torch.tensor(..., device=) makes its tensor on the CPU and copies it by an operation that is seen here.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        tree_map(lambda each: tensors.append(each) if isinstance(each, Tensor) else None, (args, kwargs))
        there = any(isinstance(each, Elsewhere) for each in tensors)
        name = str(func).rsplit(".", 1)[0]
        if there and name not in _MAY_MIX:
            strangers = [each for each in tensors if not isinstance(each, Elsewhere) and each.dim() > 0]
            if strangers:
                raise RuntimeError(f"{func}: tensors on {NAME} and on {strangers[0].device}")
        wanted = kwargs.get("device")
        if wanted is not None:
            there = torch.device(wanted).type == NAME
            if there:
                kwargs["device"] = torch.device("cpu")
        if name == "aten.copy_":
            there = isinstance(args[0], Elsewhere)
        args_held, kwargs_held = tree_map(_held, (args, kwargs))
        if name in ("aten.div", "aten.div_") and there and not isinstance(args[1], Tensor) and len(args) == 2:
            args_held = (args_held[0], torch.tensor(args[1], dtype=torch.float64).reciprocal().to(args_held[0].dtype))
            func = torch.ops.aten.mul.Tensor if name == "aten.div" else torch.ops.aten.mul_.Tensor
        result = func(*args_held, **kwargs_held)
        if not there:
            return result
        wrapped = tree_map(lambda each: Elsewhere(each) if isinstance(each, Tensor) else each, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value
