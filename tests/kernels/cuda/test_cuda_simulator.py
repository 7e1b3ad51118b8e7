"""The plain kernel in Numba's own simulator, which knows nothing of ours: a thread of Python for each CUDA thread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from numba import cuda
from loraq.kernels.cuda import fallback, simulator
from loraq.kernels.cuda.device import AbstractDevice, AbstractLaunch
from random_layers import inputs_of, layout_of, same, tensors_of
from loraq import ops

class Launch(AbstractLaunch):
    def __init__(self, program, arguments):
        self.program, self.kernel = program, cuda.jit(program.make(simulator))
        self.arguments = [each if isinstance(each, int) else each.data_ptr() for each in arguments]
    def set(self, place, argument, offset=0):
        raise AssertionError("a plain product sets nothing later")
    def set_parts(self, parts, memory, rows):
        raise AssertionError("a plain product sets nothing later")
    def start(self, grid_x, grid_y):
        self.kernel[(grid_x, grid_y), self.program.threads](*self.arguments)

class Device(AbstractDevice):
    architecture = "90"
    def launch(self, program, arguments):
        return Launch(program, arguments)
    def empty(self, shape, dtype, device):
        return torch.full(shape, torch.nan, dtype=dtype)

for weight in ("int4", "int8", "int8_asymmetric"):
    layout = layout_of(7, 45, weight=weight, group=16, activation="int8")
    tensors, input = tensors_of(layout), inputs_of(3, 45)
    output = fallback.PlainLayer.of(layout, tensors)(input, None, Device())
    assert same(output, ops.reference(input, tensors, None, layout)), weight
print("agree")
"""


def test_the_plain_kernel_agrees() -> None:
    pytest.importorskip("numba")
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agree", done.stderr
