"""Kernels of known kind, to measure the measuring with: from 2 us to 5 ms on an H200."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20
# Each kernel that Nsight Compute runs alone pays for its own start and end, which overlap when they are queued.
ALONE = "Nsight Compute runs each of these short kernels alone: the sum is more than the call takes"


@dataclass(frozen=True)
class Kernel:
    """build(torch, gpu) makes the inputs and gives the work; gpu is a `Gpu` or None.

    bound: by memory, compute or latency. cpu: whether a CPU runs it in reasonable time. steady: one of those that
    fresh processes are compared by. energy: one of those whose energy is measured. note: why it cannot be compared
    with Nsight Compute.
    """

    name: str
    bound: str
    build: Callable[[Any, Any], Callable[[], Any]]
    cpu: bool = False
    steady: bool = False
    energy: bool = False
    note: str = ""


def _device(gpu: Any) -> str:
    return "cuda" if gpu else "cpu"


def _add(kib: int, times: int = 1) -> Callable[[Any, Any], Callable[[], Any]]:
    def build(torch: Any, gpu: Any) -> Callable[[], Any]:
        x = torch.randn(kib * 256, device=_device(gpu))
        return lambda: [x + 1.0 for _ in range(times)]

    return build


def _matmul(n: int) -> Callable[[Any, Any], Callable[[], Any]]:
    def build(torch: Any, gpu: Any) -> Callable[[], Any]:
        kind = torch.bfloat16 if gpu else torch.float32
        a, b = (torch.randn(n, n, device=_device(gpu)).to(kind) for _ in range(2))
        return lambda: a @ b

    return build


def _norm(rows: int, eager: bool = False) -> Callable[[Any, Any], Callable[[], Any]]:
    def build(torch: Any, gpu: Any) -> Callable[[], Any]:
        x, w = (torch.randn(*size, device=_device(gpu)).to(torch.bfloat16) for size in ((rows, 4096), (4096,)))
        if not eager:
            return lambda: torch.nn.functional.rms_norm(x, (4096,), w, 1e-5)

        def compose() -> Any:
            high = x.float()
            return (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w

        return compose

    return build


def _chase(loads: int) -> Callable[[Any, Any], Callable[[], Any]]:
    def build(torch: Any, gpu: Any) -> Callable[[], Any]:
        # Within one page of memory, so that no walk of the page tables is part of it.
        return gpu.chase(torch.randint(1 << 30, (MIB // 2,), dtype=torch.int32, device="cuda"), loads)

    return build


def _lgamma(mib: int) -> Callable[[Any, Any], Callable[[], Any]]:
    def build(torch: Any, gpu: Any) -> Callable[[], Any]:
        x = torch.rand(mib * MIB // 8, device=_device(gpu), dtype=torch.float64) + 0.5
        return lambda: torch.lgamma(x)

    return build


def _negate(gib: int) -> Callable[[Any, Any], Callable[[], Any]]:
    def build(torch: Any, gpu: Any) -> Callable[[], Any]:
        x = torch.randint(1 << 62, (gib << 27,), device=_device(gpu))
        return lambda: -x

    return build


KERNELS = (
    Kernel("add 4 KiB", "latency", _add(4)),
    Kernel("matmul bf16 256", "compute", _matmul(256)),
    Kernel("add 4 MiB", "memory", _add(4096), cpu=True, steady=True),
    Kernel("chase 8 loads", "latency", _chase(8)),
    Kernel("matmul bf16 512", "compute", _matmul(512), cpu=True, steady=True),
    Kernel("rms_norm bf16 128 rows", "latency", _norm(128)),
    Kernel("add 16 MiB", "memory", _add(16384)),
    Kernel("chase 64 loads", "latency", _chase(64), steady=True),
    Kernel("chase 256 loads", "latency", _chase(256), steady=True),
    Kernel("matmul bf16 2048", "compute", _matmul(2048), steady=True),
    Kernel("add 64 MiB", "memory", _add(65536), steady=True),
    Kernel("add 64 MiB, twice", "memory", _add(65536, 2), steady=True),
    Kernel("eager rms_norm 16 rows", "latency", _norm(16, eager=True), steady=True, note=ALONE),
    Kernel("lgamma fp64 64 MiB", "compute", _lgamma(64), steady=True),
    Kernel("matmul bf16 4096", "compute", _matmul(4096), energy=True),
    Kernel("add 512 MiB", "memory", _add(524288), steady=True, energy=True),
    Kernel("rms_norm bf16 512 MiB", "memory", _norm(65536), steady=True),
    Kernel("matmul bf16 8192", "compute", _matmul(8192)),
    Kernel("eager rms_norm 512 MiB", "memory", _norm(65536, eager=True), steady=True),
    Kernel("negate int64 10 GiB", "memory", _negate(10), steady=True),
)
