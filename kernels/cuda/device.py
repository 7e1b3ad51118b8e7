"""What runs kernels: a GPU through the driver (driver.py) or the emulator (emulated.py).

A `Launch` is a kernel with its arguments, made once a layer: what changes from call to call is set by place. Arguments
are tensors, whose addresses are meant, and numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from .first_use import FirstUses
    from .program import AbstractProgram

    Argument = Tensor | int


class AbstractLaunch(ABC):
    """A kernel ready to start. Not to be used by two threads at once."""

    @abstractmethod
    def set(self, place: int, argument: Argument, offset: int = 0) -> None:
        """Change an argument: a number, or the address `offset` bytes into a tensor that the caller keeps alive."""

    @abstractmethod
    def set_parts(self, parts: Sequence[tuple[int, int]], memory: Tensor, rows: int) -> None:
        """Change several arguments to addresses in `memory`: (place, offset), offsets in bytes a row of `rows`."""

    @abstractmethod
    def start(self, grid_x: int, grid_y: int) -> None:
        """Start that many blocks on torch's current stream."""


class AbstractDevice(ABC):
    """Somewhere kernels run."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """What code it runs, such as "90a": compute capability without the point."""

    @property
    def first_uses(self) -> FirstUses | None:
        """What is known of programs' first use here; None where nobody looks."""
        return None

    @abstractmethod
    def launch(self, program: AbstractProgram, arguments: Sequence[Argument]) -> AbstractLaunch:
        """The kernel of `program` with these arguments, compiled or loaded where it was not yet."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor for kernels to fill."""


def native_int4(architecture: str) -> bool:
    """Whether the tensor cores multiply 4-bit integers themselves; later ones take some 200 instructions for it."""
    return architecture in ("80", "86", "87", "88", "89")


_SHARED_KILOBYTES = {"80": 164, "86": 100, "89": 100, "90": 228, "90a": 228, "100": 228, "120": 100}
_BLOCK_BYTES = 1024
"""What the system takes of it for each block."""


def blocks_by_shared(architecture: str, shared_bytes: int) -> int:
    """How many blocks with so much shared memory find room on a multiprocessor.

    Source: CUDA C++ programming guide, table "Technical specifications per compute capability".
    """
    return _SHARED_KILOBYTES[architecture] * 1024 // (shared_bytes + _BLOCK_BYTES)
