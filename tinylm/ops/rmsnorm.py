"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, over the last
dim.

Every backend is a callable `(x [..., hidden], weight [hidden], eps) -> y like x` that computes in fp32 (fp64
for fp64 input) and rounds once, on output. One of add_rmsnorm is `(x, residual, weight, eps) -> (y, new_residual)`:
new_residual = x + residual, rounded to their dtype, and y = rmsnorm(new_residual).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.ops.compiling import compiler

RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
AddRMSNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification: RMSNorm in fp64, returned in fp64 whatever the inputs' dtypes; differentiable."""
    x64 = x.double()
    return x64 / torch.sqrt(x64.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def rmsnorm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The unfused compose, a kernel per operation."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


def rmsnorm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm`, which warns of two dtypes and then composes it: they become the wider."""
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def add_rmsnorm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification: the sum rounded to the inputs' dtype, and returned in it; its RMSNorm in fp64."""
    new_residual = x + residual
    return rmsnorm_reference(new_residual, weight, eps), new_residual


def add_rmsnorm_eager(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The unfused compose, a kernel per operation."""
    new_residual = x + residual
    return rmsnorm_eager(new_residual, weight, eps), new_residual


def add_rmsnorm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """An addition and `torch.nn.functional.rms_norm`."""
    new_residual = x + residual
    return rmsnorm_torch(new_residual, weight, eps), new_residual


def compiled_rmsnorm(backend: str | Callable[..., object] = "inductor") -> RMSNorm:
    """RMSNorm through `torch.compile(fullgraph=True, dynamic=False)`; nothing is compiled before the first
    call.

    Each shape, dtype and device gets a compiled function of its own, so a loop over many shapes (such as
    decode without a cache, which grows by a token a step) compiles once for each.
    """
    compile_for = compiler(backend)

    def rmsnorm_compile(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if torch.compiler.is_compiling():  # an outer torch.compile fuses it by itself
            return rmsnorm_eager(x, weight, eps)
        return compile_for(rmsnorm_eager, x.shape, x.dtype, x.device, weight.dtype)(x, weight, eps)

    return rmsnorm_compile


def compiled_add_rmsnorm(backend: str | Callable[..., object] = "inductor") -> AddRMSNorm:
    """The addition and RMSNorm in one, as `compiled_rmsnorm`."""
    compile_for = compiler(backend)

    def add_rmsnorm_compile(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return add_rmsnorm_eager(x, residual, weight, eps)
        key = x.shape, x.dtype, x.device, residual.shape, residual.dtype, weight.dtype
        return compile_for(add_rmsnorm_eager, *key)(x, residual, weight, eps)

    return add_rmsnorm_compile
