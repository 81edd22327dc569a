"""Kernels as they are below the op: they write into outputs that they are handed, so that a guard band can be checked.

`Raw` is the interface, `norms_of` makes differentiable callables of it; `Compiled` is csrc's own, built with a plain
compiler and called through ctypes, with patches if wanted.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rmsnorm_properties import NormCase, Norms, bits, wide
from torch import Tensor
from torch.autograd.function import once_differentiable

CSRC = Path(__file__).parents[1] / "csrc"


class Raw(Protocol):
    """x, residual, dy, h, dsum [..., hidden] of any strides; y, total, dx, rstd [rows], dweight are written."""

    def forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, rstd: Tensor
    ) -> None: ...

    def backward(
        self, dy: Tensor, h: Tensor, dsum: Tensor | None, weight: Tensor, rstd: Tensor, dx: Tensor, dweight: Tensor
    ) -> None: ...


def norms_of(raw: Raw) -> Norms:
    def empty(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def rstd_of(x: Tensor) -> Tensor:
        return torch.empty(x.shape[:-1], dtype=wide(x.dtype), device=x.device)

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
            y, rstd = empty(x), rstd_of(x)
            raw.forward(x, None, weight, eps, y, y, rstd)
            ctx.save_for_backward(x, weight, rstd)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
            x, weight, rstd = ctx.saved_tensors
            dx, dweight = empty(x), empty(weight)
            raw.backward(dy, x, None, weight, rstd, dx, dweight)
            return dx, dweight, None

    class AddNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
            y, total, rstd = empty(x), empty(x), rstd_of(x)
            raw.forward(x, residual, weight, eps, y, total, rstd)
            ctx.save_for_backward(total, weight, rstd)
            return y, total

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
            h, weight, rstd = ctx.saved_tensors
            dx, dweight = empty(h), empty(weight)
            raw.backward(dy, h, dsum, weight, rstd, dx, dweight)
            return dx, dx.clone(), dweight, None

    return Norms(Norm.apply, AddNorm.apply)


# Elements on both sides: 128 bytes of fp16, more than the widest vector. Bytes that make 8e37 in fp32 and bf16, 1e301
# in fp64 and NaN in fp16: nothing that is computed here.
GUARD, PATTERN = 64, 0x7E


class Banded(NamedTuple):
    """An output amid a pattern."""

    band: Tensor
    output: Tensor

    @staticmethod
    def like(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Banded:
        count = math.prod(shape)
        band = torch.empty(count + 2 * GUARD, dtype=dtype, device=device)
        band.view(torch.uint8).fill_(PATTERN)
        return Banded(band, band[GUARD : GUARD + count].view(shape))

    def holds(self, name: str) -> None:
        outside = torch.cat([self.band[:GUARD], self.band[-GUARD:]]).view(torch.uint8)
        assert (outside == PATTERN).all(), f"{name}: written beyond its {'begin' if outside[0] != PATTERN else 'end'}"
        inside = bits(self.output)
        pattern = bits(torch.full((1,), PATTERN, dtype=torch.uint8).expand(8).contiguous().view(self.output.dtype)[:1])
        left = inside == pattern.to(inside.device)
        assert not left.any(), f"{name}: {int(left.sum())} of {left.numel()} were never written"


def guards_stay(raw: Raw, case: NormCase, device: str) -> None:
    """Forward and backward, with a residual and without, write all of their outputs and nothing else."""
    given = case.inputs(device)
    x = given.x
    for residual, dsum in ((None, None), (given.residual, given.dsum)):
        y, total, dx = (Banded.like(x.shape, x.dtype, x.device) for _ in range(3))
        rstd = Banded.like(x.shape[:-1], wide(x.dtype), x.device)
        dweight = Banded.like(given.weight.shape, given.weight.dtype, x.device)
        raw.forward(x, residual, given.weight, case.eps, y.output, total.output, rstd.output)
        h = x if residual is None else total.output
        raw.backward(given.dy, h, dsum, given.weight, rstd.output, dx.output, dweight.output)
        written = {"y": y, "rstd": rstd, "dx": dx, "dweight": dweight} | ({} if residual is None else {"sum": total})
        for name, banded in written.items():
            banded.holds(name)


# --- csrc, compiled --------------------------------------------------------------------------------------------------


class Patch(NamedTuple):
    """`old`, which a file of csrc has once, becomes `new`."""

    file: str
    old: str
    new: str


# What is called: csrc/rmsnorm.h in C's names.
HOOKS = """
#include "rmsnorm.h"
using namespace tinylm;
extern "C" int64_t sizes[] = {sizeof(Rows), sizeof(RmsNorm), sizeof(RmsNormGrad)};
#ifdef TINYLM_CUDA
extern "C" const char* forward(const RmsNorm* p, void* stream) { return rmsnorm_cuda(*p, stream); }
extern "C" const char* backward(const RmsNormGrad* p, void* stream) { return rmsnorm_grad_cuda(*p, stream); }
extern "C" const char* partials(const RmsNormGrad* p, int64_t* count) { return rmsnorm_partials(*p, count); }
#else
extern "C" const char* forward(const RmsNorm* p, void*) { return rmsnorm_cpu(*p), nullptr; }
extern "C" const char* backward(const RmsNormGrad* p, void*) { return rmsnorm_grad_cpu(*p), nullptr; }
#endif
"""


class Rows(ctypes.Structure):
    _fields_ = (("dims", ctypes.c_int32), ("size", ctypes.c_int64 * 6), ("stride", ctypes.c_int64 * 6))


POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64


class Forward(ctypes.Structure):
    _fields_ = (
        *(("x", POINTER), ("x_rows", Rows), ("residual", POINTER), ("residual_rows", Rows), ("weight", POINTER)),
        *(("y", POINTER), ("sum", POINTER), ("rstd", POINTER), ("rows", INT64), ("hidden", INT64)),
        *(("eps", ctypes.c_double), ("dtype", ctypes.c_int32), ("weight_f32", ctypes.c_bool)),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        *(("dy", POINTER), ("dy_rows", Rows), ("h", POINTER), ("h_rows", Rows), ("dsum", POINTER), ("dsum_rows", Rows)),
        *(("weight", POINTER), ("rstd", POINTER), ("dx", POINTER), ("dweight", POINTER), ("partials", POINTER)),
        *(("rows", INT64), ("hidden", INT64), ("dtype", ctypes.c_int32), ("weight_f32", ctypes.c_bool)),
    )


TAGS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def compiler(device: str) -> str | None:
    """Why csrc cannot be compiled here for a device; None if it can."""
    if device == "cpu":
        return None if shutil.which("g++") else "no g++ here"
    if not torch.cuda.is_available():
        return "no CUDA device here"
    return None if shutil.which("nvcc") else "no nvcc here"


class Compiled:
    """csrc's kernels for a device, with patches; built into `folder`, once for each content."""

    def __init__(self, folder: Path, device: str, patches: Sequence[Patch] = (), quick: bool = True) -> None:
        sources = {
            path.name: path.read_text() for path in CSRC.iterdir() if path.suffix in (".cpp", ".cu", ".cuh", ".h")
        }
        for patch in patches:
            assert sources[patch.file].count(patch.old) == 1, f"{patch.file} has not once: {patch.old}"
            sources[patch.file] = sources[patch.file].replace(patch.old, patch.new)
        if quick and device == "cpu":  # one width of vectors, of which a third compiles in a third of the time
            simd = "#if defined(__x86_64__) && ("
            assert simd in sources["rmsnorm_cpu.cpp"]
            sources["rmsnorm_cpu.cpp"] = sources["rmsnorm_cpu.cpp"].replace(simd, "#if 0 && (")
        digest = hashlib.sha256(repr((sorted(sources.items()), device)).encode()).hexdigest()[:16]
        library = folder / digest / f"kernels_{digest}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            for name, text in (sources | {"hooks.cpp": HOOKS}).items():
                (library.parent / name).write_text(text)
            self._compile(library, device, [name for name in sources if name.endswith(".cu")])
        self.device, self.library = device, ctypes.CDLL(str(library))
        for name in ("forward", "backward") + (("partials",) if device == "cuda" else ()):
            getattr(self.library, name).restype = ctypes.c_char_p
        sizes = (INT64 * 3).in_dll(self.library, "sizes")
        assert list(sizes) == [ctypes.sizeof(each) for each in (Rows, Forward, Backward)], "rmsnorm.h has changed"

    @staticmethod
    def _compile(library: Path, device: str, kernels: list[str]) -> None:
        torch_home = Path(torch.__file__).parent
        if device == "cpu":
            command = [
                "g++",
                "-std=c++20",
                "-O1",
                "-fPIC",
                "-shared",
                "-w",
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
            ]
            command += [f"-I{torch_home / 'include'}", f"-L{torch_home / 'lib'}", "rmsnorm_cpu.cpp", "hooks.cpp"]
            command += ["-ltorch_cpu"]  # already loaded, and found by its name
        else:
            command = [
                "nvcc",
                "-std=c++20",
                "-O3",
                "-Xcompiler=-fPIC",
                "-shared",
                "-arch=native",
                "-DTINYLM_CUDA",
                "-w",
            ]
            command += [*kernels, "hooks.cpp"]
        built = subprocess.run([*command, "-o", library.name], cwd=library.parent, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-2000:]

    def _call(self, name: str, arguments: ctypes.Structure) -> None:
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        error = getattr(self.library, name)(ctypes.byref(arguments), ctypes.c_void_p(stream))
        assert error is None, error

    def forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, rstd: Tensor
    ) -> None:
        p, kept = Forward(), []
        for name, tensor in (("x", x), ("residual", residual)):
            kept.append(place(p, name, tensor))
        weight = weight.contiguous()
        for name, tensor in (("weight", weight), ("y", y), ("sum", total), ("rstd", rstd)):
            setattr(p, name, tensor.data_ptr())
        p.eps = eps
        self._call("forward", sized(p, x, weight))

    def backward(
        self, dy: Tensor, h: Tensor, dsum: Tensor | None, weight: Tensor, rstd: Tensor, dx: Tensor, dweight: Tensor
    ) -> None:
        p, kept = Backward(), []
        for name, tensor in (("dy", dy), ("h", h), ("dsum", dsum)):
            kept.append(place(p, name, tensor))
        weight = weight.contiguous()
        for name, tensor in (("weight", weight), ("rstd", rstd), ("dx", dx), ("dweight", dweight)):
            setattr(p, name, tensor.data_ptr())
        sized(p, h, weight)
        if self.device == "cuda":
            count = INT64()
            error = self.library.partials(ctypes.byref(p), ctypes.byref(count))
            assert error is None, error
            partials = Banded.like((count.value, p.hidden), torch.float32, h.device)
            p.partials = partials.output.data_ptr()
            self._call("backward", p)
            outside = torch.cat([partials.band[:GUARD], partials.band[-GUARD:]]).view(torch.uint8)
            assert (outside == PATTERN).all(), "written beyond the partial sums"
        else:
            self._call("backward", p)


def place(p: Any, name: str, tensor: Tensor | None) -> Tensor | None:
    """Points `name` and its rows at a tensor, or at the copy that is returned."""
    if tensor is None:
        return None
    if tensor.dim() > 7 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        tensor = tensor.contiguous().view(-1, tensor.shape[-1])
    lead = list(zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)) or [(1, 0)]
    rows = Rows(dims=len(lead))
    for d, (size, stride) in enumerate(lead):
        rows.size[d], rows.stride[d] = size, stride
    setattr(p, name, tensor.data_ptr())
    setattr(p, f"{name}_rows", rows)
    return tensor


def sized(p: Any, x: Tensor, weight: Tensor) -> Any:
    p.hidden, p.rows = x.shape[-1], x.numel() // x.shape[-1]
    p.dtype, p.weight_f32 = TAGS[x.dtype], weight.dtype == torch.float32
    return p
