"""The packed linear on CUDA GPUs: kernels in Python, compiled by Numba, launched through the driver.

Kernels, one a file, written for the instructions of instructions.py:

    quantizer.py    activations: transformed, rounded, multiplied with `down`, the thin rows rounded
    thin.py         the thin rows of few tokens
    matmul.py       the product for many tokens, branch and bias in it
    skinny.py       the product for at most 16 tokens
    hopper.py       the product of 4-bit weights by Hopper's own instruction
    plain.py        the product of any integers, one thread an output
    codes.py        rounding to codes; rows.py reading and writing rows: what several of them share

What stands behind the instructions: ptx.py inline PTX for Numba, emulator.py numpy with checks (its memory is
emulated_memory.py), simulator.py Numba's own simulator (plain.py only). A kernel with its configuration is a program
(program.py).

From a layer to launches:

    backend.py      CudaKernel, what the entry point names: one call of a layer
    plan.py         which layouts are taken, and what programs must know of a layer
    prepared.py     a layer's matrices in the kernels' order, which is layouts.py's
    fallback.py     layers for the plain kernel
    runner.py       which programs a call runs; scratch memory and launches
    device.py       what launches: driver.py a GPU, emulated.py the emulator
    toolchain.py    from a program to a cubin; cache.py cubins on disk; build.py cubins beforehand

The arithmetic is that of loraq/ops.py bit for bit: integer sums are exact in any order, and every floating point
operation happens in the same precision and order as there.
"""
