"""A token as five kernels a layer, csrc/matvec.cu, in one CUDA graph: for large models, bound by memory's bandwidth.

Of LLaMA-style models in bf16 or fp16, one row at a time, with a dense cache, which any other runner may continue. The
kernels read the position from memory, so that one graph serves all lengths; each begins to read its matrix while the
one before it ends. Products, norms and logits are added up in fp32, so tokens are other runners' to rounding. The last
kernel chooses the token, but with top_p, and looks its embedding up.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tinylm.attention import Rope
from tinylm.cache import DenseCache
from tinylm.generate.loop import Loop
from tinylm.generate.runners import kernels
from tinylm.generate.runners.graph import capture
from tinylm.generate.runners.protocol import Unable

# What csrc/matvec.h can: rows of matrices behind a norm, and of the others; a head.
MOST_NORMED, MOST_COLUMNS, MOST_HEAD_DIM = 8192, 16_384, 256
STANDING_WORDS = 4 + (1 << 12) // 2  # of 8 bytes: `Standing`


class MatVec:
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    granularity: ClassVar[int | None] = None  # the graph serves all lengths; this is for `graph`, its fallback
    fallback: ClassVar[dict[str, str]] = {"cuda": "graph"}
    stops = False

    blocks: ClassVar[int] = 2  # of a matrix on a multiprocessor

    def __init__(self, loop: Loop) -> None:
        if (why := unsupported(loop)) is not None:
            raise Unable(why)
        kernels.need_library()
        self._loop, model, config = loop, loop.model, loop.model.config
        assert isinstance(model.positions, Rope)

        def empty(*size: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=model.device)

        self._layers = [[block.get_parameter(f"{name}.weight") for name in kernels.WEIGHTS] for block in model.blocks]
        self._norm, self._head = model.norm.get_parameter("weight"), model.head_weight[: loop.vocab_size]
        self._rope = model.positions.tables(model.device, model.dtype)
        self._x, self._hidden = empty(config.dim), empty(config.d_ff)
        self._qkv = empty((config.heads + 2 * config.kv_heads) * config.head_dim)
        self._attended = empty(config.heads, config.head_dim)
        self._logits = empty(loop.vocab_size, dtype=torch.float32)
        self._standing = torch.zeros(STANDING_WORDS + loop.vocab_size, dtype=torch.int64, device=model.device)
        self._noise = (int(loop.noise.starts), loop.noise.stride) if loop.noise is not None else (0, 0)
        multiprocessors = torch.cuda.get_device_properties(model.device).multi_processor_count
        self._splits = splits(config.heads, config.kv_heads, multiprocessors)
        self._partials = empty(config.heads * self._splits * (config.head_dim + 2), dtype=torch.float32)
        self._arrived = torch.zeros(config.heads, dtype=torch.int32, device=model.device)
        if loop.max_new:
            self._embed()
            self._graph = capture(model.device, [self._step], loop.rewind)[0]

    def advance(self, known: int, tokens: int) -> None:
        self._embed()  # a step embeds what it chose; another one may have moved the loop since
        for _ in range(tokens):
            self._graph.replay()

    def _embed(self) -> None:
        loop = self._loop
        torch.ops.tinylm.matvec_embed(loop.ids.view(-1), loop.position.view(-1), loop.model.embed.weight, self._x)

    def _step(self) -> None:
        """`Loop.step` with a cache, of x.

        Each kernel starts before the one before it has ended, but for the first: attention reads the position, which
        the last one moves, before it waits.
        """
        loop, ops, x, eps = self._loop, torch.ops.tinylm, self._x, self._loop.model.config.norm_eps
        position, how, sampling = loop.position.view(-1), (True, self.blocks), loop.sampling
        assert isinstance(loop.cache, DenseCache)
        keys, values = loop.cache.streams["k"], loop.cache.streams["v"]
        for layer, (attention_norm, qkv, out, mlp_norm, gate_up, down) in enumerate(self._layers):
            ops.matvec_norm(x, attention_norm, eps, qkv, self._qkv, False, layer > 0, self.blocks)
            ops.matvec_attention(
                self._qkv, self._rope, position, keys[layer, 0], values[layer, 0], self._attended, self._partials,
                self._arrived, self._splits, True,
            )  # fmt: skip
            ops.matvec_add(self._attended.view(-1), out, x, *how)
            ops.matvec_norm(x, mlp_norm, eps, gate_up, self._hidden, True, *how)
            ops.matvec_add(self._hidden, down, x, *how)
        nucleus = sampling.temperature > 0 and (sampling.top_p or 1) < 1
        top_k = sampling.top_k or 0 if sampling.temperature and (sampling.top_k or 0) < loop.vocab_size else 0
        count = top_k > 0 and not nucleus
        ops.matvec_logits(x, self._norm, eps, self._head, self._logits, self._standing, count, *how)
        if nucleus:
            loop.take(self._logits.view(1, 1, -1))
            self._standing[:1].zero_()
            self._embed()
        else:
            ops.matvec_choose(
                self._logits, self._standing, sampling.temperature, top_k, *self._noise, loop.ids.view(-1), position,
                loop.model.embed.weight, x, True,
            )  # fmt: skip


def splits(heads: int, kv_heads: int, multiprocessors: int) -> int:
    """Runs of positions that attention is shared out to: two blocks a multiprocessor, at most 128 a head.

    A block has four heads of a group at most.
    """
    blocks = kv_heads * -(-heads // kv_heads // 4)
    return max(1, min(2 * multiprocessors // blocks, 128))


def unsupported(loop: Loop) -> str | None:
    """Why the kernels are not for this loop, in one line; None if they are."""
    if (why := kernels.unsupported(loop, ("rope",))) is not None:
        return why
    config = loop.model.config
    sizes = {
        "dim": (config.dim, MOST_NORMED), "d_ff": (config.d_ff, MOST_COLUMNS),
        "head_dim": (config.head_dim, MOST_HEAD_DIM),
        "heads x head_dim": (config.heads * config.head_dim, MOST_COLUMNS),
    }  # fmt: skip
    for name, (size, most) in sizes.items():
        if size % 8 or size > most:
            return f"{name} is {size}: it needs a multiple of 8, at most {most}"
    return None
