"""Whether a call is plain eager torch that nobody looks into, so that it need not pass through torch's dispatcher.

An operation of torch.library costs 5 to 10 us a call, as much as a small layer with one token. What it is for is to be
seen: by torch.compile and export, tracing, transforms such as vmap, dispatch modes, tensor subclasses, the profiler,
and autograd, which refuses the backward pass. Where none of them is about, calling the operation's own function is the
same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Functions of torch's own Python code, looked up once; a torch that has them no more sends every call to the operation.
_C: Any = torch._C
_WATCHERS: tuple[Any, ...] = tuple(
    getattr(owner, name, None)
    for owner, name in (
        (_C, "_len_torch_dispatch_stack"),
        (_C, "_get_tracing_state"),
        (torch.autograd, "_profiler_enabled"),
        (getattr(_C, "_functorch", None), "is_functorch_wrapped_tensor"),
    )
)
_modes, _traced, _profiled, _transformed = _WATCHERS
_KNOWN = all(_WATCHERS)


def unwatched(input: Tensor, bias: Tensor | None) -> bool:
    """Whether an operation on `input`, with a `bias` that may be trained, can be called as a plain function."""
    if torch.compiler.is_compiling() or not _KNOWN or type(input) is not torch.Tensor:
        return False
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not (_modes() or _traced() is not None or _profiled() or _transformed(input))
