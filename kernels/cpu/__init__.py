"""The packed linear on the CPU: Numba and llvmlite, compiled for the processor at hand at first use.

    backend.py      CpuKernel, what the entry point names: one call of a layer
    prepared.py     which layouts are taken; a layer made ready: repacked matrices and C structures
    repack.py       the kernel's layout of weights, from the checkpoint's
    compiled.py     which processor this is; compiled functions, kept on disk
    threads.py      running a compiled worker in torch's threads
    records.py      the C structures
    layer.py        compiled: one worker, all operations of a layer in one parallel region
    products.py     compiled: the product of one panel, a function a machine and width of weights
    tile.py         the LLVM code of a micro-tile, for each machine
    memory.py       the LLVM code of the rounding's and rotation's vector loops

The arithmetic is that of loraq/ops.py bit for bit: integer sums are exact in any order, and every floating point
operation happens in the same precision and order as there.
"""
