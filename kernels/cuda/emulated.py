"""A device that runs kernels in the emulator, on tensors in ordinary memory: for tests and for looking into a kernel.

Tensors that it hands out are poisoned, and their bytes count as written only once a kernel has written them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy
import torch

from . import emulator
from .device import AbstractDevice, AbstractLaunch
from .emulated_memory import Memory
from .program import AbstractProgram

if TYPE_CHECKING:
    from torch import Tensor

    from .device import Argument

_POISON = 0x7F


class _EmulatedLaunch(AbstractLaunch):
    def __init__(self, program: AbstractProgram, arguments: Sequence[Argument], device: EmulatedDevice) -> None:
        self._program = program
        self._kernel: Callable[..., None] = program.make(device.machine)
        self._arguments: list[tuple[Argument, int]] = [(each, 0) for each in arguments]
        self._device = device

    def set(self, place: int, argument: Argument, offset: int = 0) -> None:
        self._arguments[place] = (argument, offset)

    def set_parts(self, parts: Sequence[tuple[int, int]], memory: Tensor, rows: int) -> None:
        for place, offset in parts:
            self.set(place, memory, offset * rows)

    def start(self, grid_x: int, grid_y: int) -> None:
        program, plain, memories = self._program, [], []
        for argument, offset in self._arguments:
            if isinstance(argument, torch.Tensor):
                memory = self._device.memory(argument)
                memories.append(memory)
                plain.append(memory.start + offset)
            else:
                plain.append(argument)
        emulator.run(self._kernel, (grid_x, grid_y), program.threads, program.shared_bytes, plain, memories)


@attrs.frozen(eq=False)
class EmulatedDevice(AbstractDevice):
    """The emulator as a device of this architecture.

    `programs` lists what was launched, in order of first use; `machine` may be the emulator with a fault in it.
    """

    architecture: str = "90"
    machine: Any = attrs.field(default=emulator.GPU, repr=False)
    programs: list[AbstractProgram] = attrs.field(factory=list)
    outputs: list[Memory] = attrs.field(factory=list)

    def launch(self, program: AbstractProgram, arguments: Sequence[Argument]) -> AbstractLaunch:
        if program not in self.programs:
            self.programs.append(program)
        return _EmulatedLaunch(program, arguments, self)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        memory = Memory.of(made, "what a kernel should have filled", written=False)
        memory.data[:] = _POISON
        self.outputs.append(memory)
        return made

    def memory(self, tensor: Tensor) -> Memory:
        """What the emulator knows of a tensor: which bytes are written, if this device made it."""
        for memory in self.outputs:
            if memory.keeper is tensor:
                return memory
        return Memory.of(tensor, f"an input {tuple(tensor.shape)}")

    def unwritten(self, tensor: Tensor) -> int:
        """How many bytes of a tensor of this device no kernel has written."""
        return int(numpy.count_nonzero(~self.memory(tensor).present))

    def forget(self) -> None:
        """Let go of the tensors made so far."""
        self.outputs.clear()
