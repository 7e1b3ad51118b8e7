"""What every kernel is to the rest: a program with its configuration, made for a GPU or the emulator.

A kernel's module holds one frozen class derived from AbstractProgram. Its fields are the configuration, constants to
the compiler; `make(gpu)` gives the function whose source runs on either machine (instructions.py).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import attrs


class AbstractProgram(ABC):
    """A kernel and its configuration."""

    @property
    @abstractmethod
    def operands(self) -> str:
        """The type of each argument: U an address, s a signed 32-bit number."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads a block."""

    @property
    @abstractmethod
    def resident(self) -> int:
        """Blocks that should find room on a multiprocessor at once; it limits a thread's registers."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Bytes of shared memory a block."""

    @abstractmethod
    def make(self, gpu: ModuleType) -> Callable[..., None]:
        """The kernel's function for this machine, ptx or emulator."""


def name(program: AbstractProgram) -> str:
    """A name for files and logs: the class, then the configuration's values; at most 100 characters."""
    words = [type(program).__name__.lower()]
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(cast("Any", type(program)))
    for field in fields:
        value: Any = getattr(program, field.name)
        words.append(f"{field.name}{int(value) if isinstance(value, bool) else value}".replace("_", ""))
    text = "-".join(words)
    return text if len(text) <= 100 else text[:91] + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
