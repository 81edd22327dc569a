"""Attention: RoPE, grouped-query attention, and the one place that calls SDPA.

Shapes: B rows, T new tokens, S entries that are attended to, H query heads, H_kv key and value heads, D
head_dim.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from tinylm import ops
from tinylm.cache.protocol import Cache, Stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tinylm.config import ModelConfig, RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each rotated pair i, (D / 2,) fp64: theta^(-2i / D) (arXiv:2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_context * frequencies / (2 * math.pi)  # made within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates pair (i, i + D/2) of x (B, H, T, D): the split-half convention, as in Hugging Face's Llama.

    rotation (2, B or 1, 1, T, D) holds (cos, cos) and (-sin, sin) of each pair's angle, from `Rope`.
    """
    first, second = x.chunk(2, dim=-1)
    # Three kernels; the textbook form with half-width tables takes seven.
    return torch.addcmul(x * rotation[0], torch.cat((second, first), dim=-1), rotation[1])


class Rope(nn.Module):
    """Positions as rotations of queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not buffers: a model built on `meta`, or loaded with assign=True, would keep empty tables.
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def tables(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(2, context, D) in `dtype`, rounded once from fp64; made when first used on a device."""
        if (device, dtype) not in self._tables:
            config = self.config
            with torch.inference_mode(False):  # else training after a generation would meet inference tensors
                frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
                places = torch.arange(config.context, dtype=torch.float64, device="cpu")
                angles = torch.outer(places, frequencies)
                cos, sin = angles.cos(), angles.sin()
                tables = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
                self._tables[device, dtype] = tables.to(dtype).to(device)
        return self._tables[device, dtype]

    def forward(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, T, dim) unchanged, and the rotation of positions (B, T); None: positions are 0..T."""
        tables = self.tables(x.device, x.dtype)
        if positions is None:
            return x, tables[:, None, None, : x.shape[1]]
        return x, tables[:, positions].unsqueeze(2)


def _arrange(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(q, k, v, enable_gqa) such that grouped queries do not send SDPA to its math path."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads == kv_heads:
        return q, k, v, False
    if q.shape[2] == 1:
        # The queries of a group attend to the same entries: they are as good as T = group queries of one
        # head.
        return q.view(q.shape[0], kv_heads, heads // kv_heads, q.shape[3]), k, v, False
    if _gqa_is_fused(q, mask):
        return q, k, v, True
    group = heads // kv_heads
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), False


def _gqa_is_fused(q: Tensor, mask: Tensor | None) -> bool:
    if q.device.type == "cpu":
        return True
    # Of SDPA's CUDA kernels, flash alone takes grouped queries wherever it runs, and it takes no mask.
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type != "cuda" or mask is not None or not half or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D).

    mask: bool, broadcastable to (B, 1, T, S), True where a query attends. is_causal: query t sees entries
    0..t, so for T == S only. Query heads share key heads in groups of H / H_kv neighbours.
    """
    shape = q.shape
    q, k, v, enable_gqa = _arrange(q, k, v, mask)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=enable_gqa
    )
    return y.reshape(shape)


BACKEND_NAMES = {
    SDPBackend.MATH.value: "math",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
}


def sdpa_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> str:
    """Which of SDPA's backends `sdpa` uses for these arguments: flash, efficient, cudnn, math, cpu-flash or
    unknown.

    Asks torch's own choice, the function that SDPA calls, so that its order of preference (cuDNN first on
    some cards and versions) and what `torch.nn.attention.sdpa_kernel` allows are respected.
    """
    q, k, v, enable_gqa = _arrange(q, k, v, mask)
    choice = getattr(torch, "_fused_sdp_choice", None)  # not public: may go away
    if choice is None:
        return "unknown"
    name = BACKEND_NAMES.get(choice(q, k, v, mask, dropout, is_causal, enable_gqa=enable_gqa), "unknown")
    return "cpu-flash" if q.device.type == "cpu" and name == "flash" else name


# Of which tokens the last layer's work is wanted: all (None), each row's last (-1), or token last[b] of row b, (B,).
Last = Tensor | int | None


def pick(x: Tensor, last: Last, dim: int = 1) -> Tensor:
    """Those tokens of x (B, ...), which lie along `dim`: with no copy to the host, and a view where it can be."""
    if last is None:
        return x
    if isinstance(last, int):
        return x.narrow(dim, last, 1)
    shape = list(x.shape)
    shape[dim] = 1
    return x.gather(dim, last.view(-1, *[1] * (x.dim() - 1)).expand(shape))


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose query heads share key and value heads in groups (Ainslie et al.,
    arXiv:2305.13245).

    `qkv` is one matrix: its rows are the queries' heads, then the keys', then the values'. `reduce` is where
    partial sums over heads meet: tensor parallelism replaces it from outside.
    """

    def __init__(self, config: ModelConfig, backends: Mapping[str, str]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        linear = ops.get("linear", backends["linear"])
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = ops.Linear(config.dim, width, config.bias, linear)
        self.out = ops.Linear(self.heads * self.head_dim, config.dim, config.bias, linear)
        self.reduce = nn.Identity()

    @staticmethod
    def streams(config: ModelConfig) -> tuple[Stream, ...]:
        """What a cache stores per token and layer."""
        return (Stream("k", config.kv_heads, config.head_dim), Stream("v", config.kv_heads, config.head_dim))

    @staticmethod
    def flops_per_pair(config: ModelConfig) -> int:
        """Of one query token with one entry, over all heads: 2 D for the score and 2 D for the value."""
        return 4 * config.heads * config.head_dim

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None,
        cache: Cache | None = None,
        layer: int = 0,
        plan: Any = None,
        *,
        last: Last = None,
    ) -> Tensor:
        """x (B, T, dim) -> (B, T, dim), of last -> (B, 1, dim): over itself, or over a cache's entries too, given its
        plan."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        q = pick(q, last, dim=2)
        if cache is not None:
            y = cache.attend(layer, q, k, v, plan, sdpa)
        else:
            seen = (
                (torch.arange(k.shape[2], device=x.device) <= last[:, None])[:, None, None]
                if isinstance(last, Tensor)
                else None
            )
            y = sdpa(q, k, v, mask=seen, is_causal=last is None, dropout=self.dropout if self.training else 0.0)
        return self.reduce(self.out(y.transpose(1, 2).flatten(2)))


ATTENTIONS: dict[str, type[GroupedQueryAttention]] = {"gqa": GroupedQueryAttention}
