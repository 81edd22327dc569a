"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, over the last
dim.

Every backend is a callable `(x [..., hidden], weight [hidden], eps) -> y like x` that computes in fp32 (fp64
for fp64 input) and rounds once, on output.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RMSNorm = Callable[[Tensor, Tensor, float], Tensor]


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
    """`torch.nn.functional.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def compiled_rmsnorm(backend: str | Callable[..., object] = "inductor") -> RMSNorm:
    """RMSNorm through `torch.compile(fullgraph=True, dynamic=False)`; nothing is compiled before the first
    call.

    Each shape, dtype and device gets a compiled function of its own, so a loop over many shapes (such as
    decode without a cache, which grows by a token a step) compiles once for each.
    """
    compiled: dict[tuple[object, ...], RMSNorm] = {}

    def rmsnorm_compile(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if torch.compiler.is_compiling():  # an outer torch.compile fuses it by itself
            return rmsnorm_eager(x, weight, eps)
        key = (x.shape, x.dtype, x.device, weight.dtype)
        if key not in compiled:
            # Dynamo counts recompilations per code object and stops compiling at 8: a copy of the code has a
            # count of its own, so no shape is ever left uncompiled.
            fresh = types.FunctionType(rmsnorm_eager.__code__.replace(), rmsnorm_eager.__globals__)
            compiled[key] = torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend)
        return compiled[key](x, weight, eps)

    return rmsnorm_compile
