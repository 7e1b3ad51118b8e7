"""What the compiler makes of the kernels, without a GPU: no spills, the instructions that were meant, small enough."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from loraq.kernels.cuda import build, cache, toolchain
from loraq.kernels.cuda.device import blocks_by_shared, native_int4
from loraq.kernels.cuda.hopper import Hopper
from loraq.kernels.cuda.matmul import WIDE_ARCHITECTURES, Matmul
from loraq.kernels.cuda.plain import Plain
from loraq.kernels.cuda.program import AbstractProgram, name
from loraq.kernels.cuda.quantizer import Quantizer
from loraq.kernels.cuda.skinny import Skinny
from loraq.kernels.cuda.thin import Thin

_MISSING = toolchain.missing()
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

REGISTERS = 65536
"""On a multiprocessor, of every architecture."""


def matmul(**changes: object) -> Matmul:
    plain: dict[str, object] = {"weight_bits": 4, "native": False, "branch": True, "bias": True, "output": "bfloat16"}
    return Matmul(**(plain | {"aligned": True} | changes))  # type: ignore[arg-type]


def quantizer(**changes: object) -> Quantizer:
    plain: dict[str, object] = {"input": "bfloat16", "aligned": True, "factors": "multiply", "block": 128, "top": 7}
    plain |= {"native": False, "whole": False, "rank_groups": 2, "branch_top": 127, "branch_whole": False}
    return Quantizer(**(plain | {"thin_whole": False} | changes))  # type: ignore[arg-type]


COMMON: list[AbstractProgram] = [
    matmul(),
    matmul(stages=3),
    matmul(branch=False),
    matmul(weight_bits=8, branch=False, bias=False, output="float32", aligned=False),
    matmul(integers=True, branch=True),
    matmul(wide=True),
    matmul(wide=True, branch=False),
    matmul(span=2, up_span=2),
    matmul(span=2, weight_bits=8, bias=False),
    quantizer(),
    quantizer(rank_groups=0),
    quantizer(top=127, rank_groups=0, block=1, factors="none"),
    quantizer(top=127, rank_groups=1, branch_top=127, factors="divide"),
    quantizer(rank_groups=2, input="float32", aligned=False, whole=True, thin_whole=True),
    quantizer(rank_groups=6, split=True),
    quantizer(span=2, branch_span=2, down_span=2),
    quantizer(span=2, branch_span=2, down_span=2, thin_span=2, rank_groups=6, split=True),
    Thin(rank_groups=2, top=127, whole=False),
    Thin(rank_groups=6, top=127, whole=True),
    Thin(rank_groups=6, top=127, whole=False, span=2),
    Skinny(weight_bits=4, native=False, branch=True, bias=True, output="bfloat16"),
    Skinny(weight_bits=8, native=False, branch=False, bias=False, output="float32"),
    Skinny(weight_bits=4, native=False, branch=True, bias=True, output="bfloat16", span=2, up_span=2),
    Plain(8, 4),
    Plain(16, 16),
]
NATIVE: list[AbstractProgram] = [
    matmul(native=True),
    matmul(native=True, integers=True),
    matmul(native=True, wide=True),
    matmul(native=True, span=2),
    quantizer(native=True),
    Skinny(weight_bits=4, native=True, branch=True, bias=True, output="bfloat16"),
]
HOPPER: list[AbstractProgram] = [
    Hopper(integers=True, branch=False, bias=True, output="bfloat16", aligned=True),
    Hopper(integers=True, branch=True, bias=True, output="bfloat16", aligned=True),
    Hopper(integers=False, branch=False, bias=True, output="bfloat16", aligned=True),
    Hopper(integers=False, branch=True, bias=True, output="bfloat16", aligned=True),
    Hopper(integers=False, branch=True, bias=False, output="float32", aligned=False),
]
CASES = [pytest.param(each, "90a", id=f"Hopper{place}-sm_90a") for place, each in enumerate(HOPPER)] + [
    pytest.param(program, architecture, id=f"{type(program).__name__}{place}-sm_{architecture}")
    for architecture in ("80", "86", "89", "90", "100", "120")
    for place, program in enumerate(COMMON + (NATIVE if native_int4(architecture) else []))
    if architecture in WIDE_ARCHITECTURES or not getattr(program, "wide", False)
]


@functools.cache
def built(program: AbstractProgram, architecture: str) -> toolchain.Built:
    return toolchain.build(program, architecture)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "architecture"), CASES)
def test_everything_stays_in_registers(program: AbstractProgram, architecture: str) -> None:
    found = built(program, architecture)
    assert (found.stack_bytes, found.spilled_bytes) == (0, 0)
    assert found.registers * program.threads * program.resident <= REGISTERS
    if isinstance(program, Matmul):
        assert ("m16n8k64.row.col.s32.s4" in found.ptx) == program.native
    if isinstance(program, Matmul | Skinny) or (isinstance(program, Quantizer) and program.rank_groups):
        assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in found.ptx
    # What must round by itself is not fused by the compiler: every fma is one of ours.
    assert not re.search(
        r"^\s*fma\.rn\.f32", re.sub(r"// begin inline asm.*?// end inline asm", "", found.ptx, flags=re.S)
    )


@pytest.mark.parametrize("architecture", toolchain.ARCHITECTURES)
def test_shared_memory_leaves_room_for_as_many_blocks(architecture: str) -> None:
    """As registers do. The quantizer's branch is the exception where a multiprocessor has 100 KB."""
    for program in build.standard_programs(architecture):
        room = blocks_by_shared(architecture, program.shared_bytes)
        if isinstance(program, Quantizer) and architecture in ("86", "89", "120"):
            assert room >= 1
        else:
            assert room >= program.resident, name(program)


def _disassembler() -> str | None:
    import sys

    beside = Path(sys.prefix) / "lib"
    found = [*beside.glob("python*/site-packages/nvidia/*/bin/nvdisasm")]
    return str(found[0]) if found else shutil.which("nvdisasm")


@pytest.mark.skipif(_disassembler() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize(
    ("program", "architecture", "wanted"),
    [
        (matmul(), "90", ("IMMA.16832.S8.S8", 32)),
        (matmul(native=True), "86", ("IMMA.16864.S4.S4", 8)),
        (HOPPER[0], "90a", ("IGMMA.64x128x32.S8.S8", 2)),
        (Skinny(weight_bits=4, native=True, branch=False, bias=True, output="bfloat16"), "80", ("IMMA.16864.S4.S4", 4)),
    ],
    ids=["int8 on sm_90", "int4 on sm_86", "wgmma on sm_90a", "few tokens on sm_80"],
)
def test_machine_code(program: AbstractProgram, architecture: str, wanted: tuple[str, int], tmp_path: Path) -> None:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(built(program, architecture).code)
    text = subprocess.run([str(_disassembler()), str(path)], capture_output=True, text=True, check=True).stdout
    assert text.count(wanted[0]) >= wanted[1]
    assert ("LDGSTS" in text) == isinstance(program, Matmul | Hopper)  # copies to shared memory that pass no register
    assert not re.search(r"\b(LDL|STL)\b", text)


class TestCache:
    """Cubins on disk."""

    program = Plain(8, 8)

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LORAQ_CUDA_CACHE", str(tmp_path / "kept"))
        monkeypatch.delenv("LORAQ_CUDA_PREBUILT", raising=False)
        return tmp_path / "kept"

    def test_compiled_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = cache.cubin(self.program, "86")
        assert code[:4] == b"\x7fELF"
        assert cache.entry(self.program).encode() in code
        monkeypatch.setattr(toolchain, "build", None)  # called again it would fail
        assert cache.cubin(self.program, "86") == code
        assert [path.name for path in folder.iterdir()] == [cache.file_name(self.program, "86")]

    def test_other_source_is_other_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.cubin(self.program, "86")
        monkeypatch.setattr(cache, "source_digest", lambda: "0" * 10)
        calls = []
        real = toolchain.build
        monkeypatch.setattr(toolchain, "build", lambda *given: calls.append(given) or real(*given))
        cache.cubin(self.program, "86")
        assert len(calls) == 1

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_cannot_be_written(self, folder: Path) -> None:
        folder.mkdir()
        folder.chmod(0o500)
        assert cache.cubin(self.program, "86")[:4] == b"\x7fELF"

    def test_prebuilt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "prebuilt" / cache.file_name(self.program, "86")
        code = cache.build(self.program, "86", path)
        monkeypatch.setenv("LORAQ_CUDA_PREBUILT", str(path.parent))
        monkeypatch.setattr(cache, "_tools", lambda: None)
        monkeypatch.setattr(toolchain, "missing", lambda: "no compiler here")
        assert cache.usable() is None
        assert cache.cubin(self.program, "86") == code
        with pytest.raises(cache.NoCubinError, match=r"has no 'plain-.*sm_90.*', so it is of another version"):
            cache.cubin(self.program, "90")


def test_build_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "standard_programs", lambda architecture: [Plain(8, 4)])
    assert build.main(["--arch", "86", "--output", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [cache.file_name(Plain(8, 4), "86")]
    assert name(Plain(8, 4)) in capsys.readouterr().out
