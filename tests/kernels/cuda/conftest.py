"""What the tests of the CUDA kernels share: random layers, as the CPU kernel's tests have them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "cpu"))  # random_layers
