"""The packed linear on the CPU: Numba and llvmlite, compiled for the processor at hand at first use.

    backend.py      CpuKernel, what the entry point names: one call of a layer
    prepared.py     which layouts are taken; a layer made ready: repacked matrices and C structures
    repack.py       the kernel's layout of weights, from the checkpoint's; float_repack.py for products in float32
    pages.py        advice to the system about memory
    threads.py      running a compiled worker in torch's threads
    records.py      the C structures
    compiled.py     compiled functions, kept on disk
    layer.py        compiled: one worker, all operations of a layer in one parallel region; float_panel.py beside it
    products.py     compiled: products and decoders of one panel, a function a machine and width of weights

What is compiled is written in LLVM's instructions:

    machines.py     the machines: which vectors, which products; which of them this processor is
    dot.py          how a machine sums products of bytes
    tile.py         a micro-tile of an integer product; float_tile.py of one in float32
    code_values.py  how a machine looks codes up in a table; decode.py decodes a panel by it
    memory.py       the vector loops of rounding and rotation; small intrinsics
    vectors.py      what all of these say again and again

The arithmetic is that of loraq/ops.py bit for bit: integer sums are exact in any order, and every floating point
operation happens in the same precision and order as there.
"""
