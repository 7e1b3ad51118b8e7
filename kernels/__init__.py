"""Faster versions of the packed operations, a folder a device; found through the entry point group `loraq.kernel`.

To add one: (1) write a final class that implements `loraq.contracts.AbstractKernel` in a module of its own, with no
compilation at import; (2) name it under `[project.entry-points."loraq.kernel"]`; (3) run the kernel suite of
tests/contracts.py against it: `loraq.ops.reference` is the truth, bit for bit where the arithmetic is integer.
"""
