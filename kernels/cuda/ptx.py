"""The instructions as inline PTX for Numba: the `gpu` with which a kernel is compiled.

Each instruction of instructions.py becomes a function for Numba whose code is one `asm` of its text. So kernels need no
CUDA C++, nothing is linked, everything is inlined, and a kernel compiles where there is neither a GPU nor a driver.
Importing this module needs numba-cuda.
"""

# mypy: disable-error-code="no-untyped-call, attr-defined, untyped-decorator"
# Numba's types are its own.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cuda, types
from numba.core import cgutils
from numba.cuda import cudadecl, cudaimpl
from numba.cuda.extending import intrinsic
from numba.cuda.typing.templates import ConcreteTemplate

from .instructions import INSTRUCTIONS, MAGIC, Instruction

_TYPES: dict[str, Any] = {"u": types.uint32, "s": types.int32, "f": types.float32, "U": types.uint64}
_LLVM = {"u": ir.IntType(32), "s": ir.IntType(32), "f": ir.FloatType(), "U": ir.IntType(64)}
_CONSTRAINTS = {"u": "r", "s": "r", "f": "f", "U": "l"}


def _result(outs: str) -> Any:
    if not outs:
        return types.void
    return _TYPES[outs] if len(outs) == 1 else types.UniTuple(_TYPES[outs[0]], len(outs))


def _function_type(outs: str, ins: str) -> ir.FunctionType:
    members = [_LLVM[letter] for letter in outs]
    returned = ir.VoidType() if not outs else members[0] if len(outs) == 1 else ir.LiteralStructType(members)
    return ir.FunctionType(returned, [_LLVM[letter] for letter in ins])


def _intrinsic(instruction: Instruction) -> Any:
    """The function by which kernels call an instruction, made known to Numba's typing and to its code generation."""
    outs, ins = instruction.outs, instruction.ins
    # `&`: an output may be written before an input is read, where the text has several steps.
    early = "=&" if instruction.text.count(";") > 1 else "="
    free = ins[: len(ins) - len(outs)] if instruction.tied else ins
    tied = [str(place) for place in range(len(outs))] if instruction.tied else []
    made = [early + _CONSTRAINTS[letter] for letter in outs] + [_CONSTRAINTS[letter] for letter in free] + tied
    constraints = ",".join(made)
    if instruction.memory:
        constraints += ",~{memory}" if constraints else "~{memory}"
    signature = _result(outs)(*(_TYPES[letter] for letter in ins))
    text = instruction.text

    def generate(context: Any, builder: Any, found: Any, arguments: Any) -> Any:
        del found
        code = ir.InlineAsm(_function_type(outs, ins), text, constraints, side_effect=instruction.effect)
        returned = builder.call(code, arguments)
        if not outs:
            return context.get_dummy_value()
        if len(outs) == 1:
            return returned
        parts = [builder.extract_value(returned, place) for place in range(len(outs))]
        return context.make_tuple(builder, signature.return_type, parts)

    def called(*operands: int | float) -> None:
        raise NotImplementedError(f"{instruction.name} is for compiled kernels")

    called.__name__ = called.__qualname__ = instruction.name
    template = type(f"{instruction.name}_template", (ConcreteTemplate,), {"key": called, "cases": [signature]})
    cudadecl.register_global(called, types.Function(template))
    cudaimpl.lower(called, *signature.args)(generate)
    return called


@intrinsic
def shared(context: Any) -> Any:
    """The 32-bit address of the block's dynamic shared memory."""
    del context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature, arguments
        name = "loraq_shared"
        memory = builder.module.globals.get(name)
        if memory is None:
            memory = cgutils.add_global_variable(builder.module, ir.ArrayType(ir.IntType(8), 0), name, addrspace=3)
            memory.linkage = "external"
            memory.align = 128
        return builder.ptrtoint(memory, ir.IntType(32))

    return types.int32(), generate


def device(function: Any) -> Any:
    """A function that kernels call; inlined before anything is compiled, since compiling one alone needs a driver."""
    return cuda.jit(device=True, inline="always")(function)


def _many(value: int) -> Any:
    """A function without arguments that gives 64 times the same signed number."""

    def same(context: Any) -> Any:
        del context
        kind = types.UniTuple(types.int32, 64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del signature, arguments
            return context.make_tuple(builder, kind, [ir.Constant(ir.IntType(32), value)] * 64)

        return kind(), generate

    return intrinsic(same)


zeros, magic_zeros = _many(0), _many(MAGIC)
u32, u64, s32, f32 = types.uint32, types.uint64, types.int32, types.float32
number = types.int32
registers = cuda.local.array
cudadecl.register_global(
    registers, types.Function(cudadecl.Cuda_local_array)
)  # Numba knows it as `cuda.local.array` only

globals().update({instruction.name: _intrinsic(instruction) for instruction in INSTRUCTIONS})
