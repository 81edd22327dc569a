"""RMSNorm of Liger Kernel (https://github.com/linkedin/Liger-Kernel), a peer to be measured against: Triton, on a GPU.

Its casting mode `gemma` computes as every backend here does, in fp32 with one rounding at the end; `llama`, the usual
one, rounds before the product with the weight as well. in_place=False: gradients go into memory of their own, as
everywhere here, and not over dy. Liger then fills dx of RMSNorm with zeros first: a part of what it costs.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

CASTING = "gemma"


def rmsnorm_liger(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`LigerRMSNormFunction`. Raises RuntimeError where it cannot run."""
    _on_a_gpu(x)
    return _functions()[0].apply(x, weight, eps, 0.0, CASTING, False)


def add_rmsnorm_liger(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`LigerFusedAddRMSNormFunction`. Raises RuntimeError where it cannot run."""
    _on_a_gpu(x)
    return _functions()[1].apply(x, residual, weight, eps, 0.0, CASTING, False)


def _on_a_gpu(x: Tensor) -> None:
    if not x.is_cuda:
        raise RuntimeError(f"liger runs on a CUDA device, and x is on {x.device}: use another backend")


@functools.cache
def _functions() -> tuple[Any, Any]:
    try:
        # From the files: their package may put another implementation in place of Triton's.
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError as error:
        raise RuntimeError(
            f"liger-kernel is not installed ({error}): pip install 'liger-kernel>=0.6.1', or use another backend"
        ) from None
    return LigerRMSNormFunction, LigerFusedAddRMSNormFunction
