"""The Transformer: embedding, blocks, head, and its own FLOP and byte counts.

Shapes: B rows, T new tokens, S entries of a cache's row, V vocab_size, C config.dim, H heads, D head_dim.
Parameters: embed.weight (V, C), positions.weight (context, C) if learned, blocks.N.{attention_norm,
mlp_norm}.weight (C,), blocks.N.attention.qkv.weight ((H + 2 H_kv) D, C), blocks.N.attention.out.weight (C, H
D), blocks.N.mlp.gate_up.weight (2 d_ff, C) or up.weight (d_ff, C), blocks.N.mlp.down.weight (C, d_ff),
norm.weight (C,) if pre-norm, head.weight (V, C) if untied; and a .bias beside each weight of a block's linear
and of a LayerNorm if config.bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm import ops as op_table
from tinylm.attention import ATTENTIONS, Last, Rope, pick, sdpa_backend
from tinylm.cache import Batch, Cache, Stream, make_cache
from tinylm.config import ConfigError, ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by their names in flags

Choice = TypeVar("Choice")
# The residual stream: (x,), or (x, branch) where the sum is left to the norm that comes next.
Residual = tuple[Tensor, ...]


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig, backends: Mapping[str, str]) -> None:
        super().__init__()
        self.eps, self.op = config.norm_eps, op_table.get("rmsnorm", backends["rmsnorm"])
        self.fused = op_table.OPS["add_rmsnorm"].get(backends["add_rmsnorm"])  # None: the backend has RMSNorm alone
        self.weight = nn.Parameter(torch.empty(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, config: ModelConfig, backends: Mapping[str, str]) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.dim))
        self.bias = nn.Parameter(torch.empty(config.dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202); `gate_up` is one matrix, gate's rows first."""

    def __init__(self, config: ModelConfig, backends: Mapping[str, str]) -> None:
        super().__init__()
        linear = op_table.get("linear", backends["linear"])
        self.gate_up = op_table.Linear(config.dim, 2 * config.d_ff, config.bias, linear)
        self.down = op_table.Linear(config.d_ff, config.dim, config.bias, linear)
        self.reduce = nn.Identity()  # partial sums over d_ff meet here: tensor parallelism replaces it

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.reduce(self.down(F.silu(gate) * up))


class GELU(nn.Module):
    """down(gelu(up(x))), with the tanh form of GELU, as in GPT-2."""

    def __init__(self, config: ModelConfig, backends: Mapping[str, str]) -> None:
        super().__init__()
        linear = op_table.get("linear", backends["linear"])
        self.up = op_table.Linear(config.dim, config.d_ff, config.bias, linear)
        self.down = op_table.Linear(config.d_ff, config.dim, config.bias, linear)
        self.reduce = nn.Identity()  # partial sums over d_ff meet here: tensor parallelism replaces it

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.down(F.gelu(self.up(x), approximate="tanh")))


class LearnedPositions(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.context, config.dim))

    def forward(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, T, C) plus the rows of positions (B, T) (None: 0..T); no rotation."""
        return x + (self.weight[: x.shape[1]] if positions is None else self.weight[positions]), None


class NoPositions(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return x, None


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
MLPS: dict[str, type[SwiGLU] | type[GELU]] = {"swiglu": SwiGLU, "gelu": GELU}
POSITIONS: dict[str, type[Rope] | type[LearnedPositions] | type[NoPositions]] = {
    "rope": Rope,
    "learned": LearnedPositions,
    "none": NoPositions,
}


def choose(table: Mapping[str, Choice], field: str, name: str) -> Choice:
    """The row `name` of a table. Raises ConfigError, which names the known ones."""
    if name not in table:
        raise ConfigError(f"unknown {field} {name!r}: use one of {', '.join(table)}")
    return table[name]


def normed(norm: Any, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The norm of a residual stream, and the stream summed: one op where the norm has such a one."""
    fused = getattr(norm, "fused", None)
    if branch is not None and fused is not None:
        # Under autocast to fp16 a branch, which ends in a linear, is narrower than the stream.
        return fused(branch.to(x.dtype), x, norm.weight, norm.eps)
    x = x if branch is None else x + branch
    return norm(x), x


class Block(nn.Module):
    """Attention, then MLP, each on a residual branch; a norm before it (pre) or after the sum (post)."""

    def __init__(self, config: ModelConfig, backends: Mapping[str, str]) -> None:
        super().__init__()
        norm = choose(NORMS, "norm", config.norm)
        self.pre = config.norm_placement == "pre"
        self.dropout = config.dropout
        self.attention_norm = norm(config, backends)
        self.attention = choose(ATTENTIONS, "attention", config.attention)(config, backends)
        self.mlp_norm = norm(config, backends)
        self.mlp = choose(MLPS, "mlp", config.mlp)(config, backends)

    def forward(self, residual: Residual, rotation: Tensor | None, *past: Any, last: Last = None) -> Residual:
        """residual (B, T, C) -> the same, or (B, 1, C) of `last`; past: nothing, or the cache, the layer's number and
        the cache's plan."""
        if self.pre:
            y, x = normed(self.attention_norm, *residual)
            branch = self._drop(self.attention(y, rotation, *past, last=last))
            y, x = normed(self.mlp_norm, pick(x, last), branch)
            return x, self._drop(self.mlp(y))
        (x,) = residual
        x, _ = normed(self.attention_norm, pick(x, last), self._drop(self.attention(x, rotation, *past, last=last)))
        x, _ = normed(self.mlp_norm, x, self._drop(self.mlp(x)))
        return (x,)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer(nn.Module):
    """A decoder-only language model, made and initialized from its config.

    ops: backends by op, such as {"rmsnorm": "compile"}; the others are `tinylm.ops.DEFAULTS`, and add_rmsnorm
    has the backend of rmsnorm. Raises ConfigError for a norm, mlp, positions or attention that no table has,
    ValueError for an unknown op or backend.
    """

    def __init__(self, config: ModelConfig, *, ops: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops = {**op_table.DEFAULTS, **(ops or {})}
        for op, backend in self.ops.items():
            op_table.get(op, backend)
        if "add_rmsnorm" not in (ops or {}):
            self.ops["add_rmsnorm"] = self.ops["rmsnorm"]
        linear = op_table.get("linear", self.ops["linear"])
        self.cross_entropy = op_table.get("linear_cross_entropy", self.ops["linear_cross_entropy"])
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.positions = choose(POSITIONS, "positions", config.positions)(config)
        self.blocks = nn.ModuleList(Block(config, self.ops) for _ in range(config.layers))
        pre = config.norm_placement == "pre"
        self.norm = choose(NORMS, "norm", config.norm)(config, self.ops) if pre else nn.Identity()
        # A tied head is no parameter of its own: no load, move or copy can part it from the embedding.
        self.head = None if config.tied else op_table.Linear(config.dim, config.vocab_size, False, linear)
        self._linear = linear
        self.init_weights()

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        *,
        ops: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Transformer:
        """A model whose weights are only ever allocated on `device` in `dtype` ("meta": not at all)."""
        with torch.device("meta"):
            model = cls(config, ops=ops).to(dtype)
        if torch.device(device).type != "meta":
            model.to_empty(device=device).init_weights()
        return model

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of config.init_std, as GPT-2; what ends a residual branch is scaled by 1 / sqrt(2
        layers).

        The head is drawn so narrow that logits have a variance of 0.04 at most, whatever the width (a std of
        0.02 gives 0.31 at dim 768): loss then starts at ln(V) + 0.02, and a tied head's preference for the
        token it just read, at most sqrt(0.04 dim) where nothing is added to the embedding, stays small beside
        ln(V).
        """
        std, config = self.config.init_std, self.config
        if self.embed.weight.is_meta:
            return  # nothing to draw; and drawing it would load torch's compiler, which takes seconds
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif parameter is self.head_weight:
                nn.init.normal_(parameter, std=min(std, 0.2 / config.dim**0.5))
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=std / (2 * config.layers) ** 0.5)
            else:
                nn.init.normal_(parameter, std=std)

    @property
    def head_weight(self) -> Tensor:
        """(V, C); the embedding's own tensor if the head is tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        *,
        last_only: bool = False,
        last_index: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) int64, causal, without a cache.

        last_only: of the last token alone, (B, 1, V). last_index: of token last_index[b] of each row, (B, 1,
        V), for rows padded on the right. targets: no logits but what `loss` gives, for wrappers such as DDP,
        which know a module's forward alone. Raises ConfigError if T passes the model's context.
        """
        if targets is not None:
            return self.cross_entropy(self.hidden(tokens).flatten(0, 1), self.head_weight, targets.flatten())
        last = -1 if last_only else last_index
        return self._project(self._normed(self._through(tokens, last)))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, () fp32, in nats a token, of predicting targets (B, T) int64 after tokens (B, T) int64.

        A target of -100 does not count. By the op linear_cross_entropy, which need not hold the logits.
        """
        return self(tokens, targets=targets)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads, (B, T, C), of tokens (B, T) int64."""
        return self._normed(self._through(tokens))

    def step(self, batch: Batch, cache: Cache, *, last_only: bool = True) -> Tensor:
        """Logits of a batch's new tokens over what the cache holds, which they join: (B, T, V).

        last_only: of each row's last token (that is not padding) alone, (B, 1, V). Raises ConfigError if the
        batch passes the model's context or the cache's room, and for a cache of another model or device.
        """
        self._check_span(batch.span)
        self.check_cache(cache)
        plan = cache.plan(batch)
        residual, rotation = self._enter(batch.tokens, batch.positions)
        last: Last = None
        if last_only and batch.tokens.shape[1] > 1:
            last = -1 if batch.uniform else batch.lengths - 1 - batch.positions[:, 0]
        return self._project(self._normed(self._blocks(residual, rotation, last, cache, plan)))

    def check_cache(self, cache: Cache) -> None:
        """Raises ConfigError for a cache of another model or device."""
        if cache.made_for != (self.streams(), self.config.layers, self.device):
            raise ConfigError(
                f"the cache is for {_listed(*cache.made_for)}, the model has "
                f"{_listed(self.streams(), self.config.layers, self.device)}: make the cache with model.new_cache()"
            )

    def _check_span(self, span: int) -> None:
        if span > self.config.context:
            raise ConfigError(
                f"{span} tokens pass the model's context of {self.config.context}: give fewer, "
                "or a config with a larger context"
            )

    def _enter(self, tokens: Tensor, positions: Tensor | None) -> tuple[Residual, Tensor | None]:
        x, rotation = self.positions(self.embed(tokens), positions)
        # The stream is as wide as what autocast adds to it (on an H200 a step of gpt2-124m takes 5% less time, one of
        # stories-17m 6%), but for fp16, whose 65,504 a stream may pass.
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            x = x.bfloat16()
        return (F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x,), rotation

    def _through(self, tokens: Tensor, last: Last = None) -> Residual:
        self._check_span(tokens.shape[1])
        return self._blocks(*self._enter(tokens, None), last)

    def _blocks(
        self, residual: Residual, rotation: Tensor | None, last: Last, cache: Cache | None = None, plan: Any = None
    ) -> Residual:
        """The last block needs all tokens' keys and values, and the rest of its work for those of `last` alone."""
        final = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            residual = block(residual, rotation, cache, layer, plan, last=last if layer == final else None)
        return residual

    def _normed(self, residual: Residual) -> Tensor:
        return normed(self.norm, *residual)[0]

    def _project(self, x: Tensor) -> Tensor:
        return self._linear(x, self.embed.weight, None) if self.head is None else self.head(x)

    def streams(self) -> tuple[Stream, ...]:
        """What a cache stores per token and layer."""
        return choose(ATTENTIONS, "attention", self.config.attention).streams(self.config)

    def new_cache(
        self,
        layout: str = "dense",
        *,
        batch: int = 1,
        context: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """An empty cache on the model's device; by default for its whole context, in its dtype."""
        context = self.config.context if context is None else context
        self._check_span(context)
        return make_cache(
            layout,
            self.streams(),
            layers=self.config.layers,
            batch=batch,
            context=context,
            device=self.device,
            dtype=dtype or self.dtype,
        )

    def param_count(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored, a tied head counted once; works on `meta` too."""
        stored = [*self.parameters(), *self.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def kv_bytes(self, batch: int, context: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of a dense cache for `batch` rows of `context` tokens; by default in the model's dtype."""
        per_token = sum(stream.heads * stream.width for stream in self.streams()) * self.config.layers
        return per_token * batch * context * (dtype or self.dtype).itemsize

    def flops(self, batch: int, tokens: int, context: int = 0, *, last_only: bool = False, causal: bool = True) -> int:
        """Floating-point operations of a forward pass over `tokens` new tokens a row after `context` cached
        ones.

        Matrix products and attention only, 2 m n k each: norms, softmax, rotations and the embedding's lookup
        count nothing; the head counts, for one token a row if last_only, and so does what follows the last
        layer's keys and values. Attention counts the pairs that causality needs: new token t (from 1) meets
        context + t entries; causal=False counts the whole square, context + tokens entries each, as published
        figures often do. A training step (forward and backward) is 3 times this.
        """
        config, final = self.config, self.blocks[-1]
        ends = 1 if last_only else tokens
        after = _products(final) - _products(final.get_submodule("attention.qkv"))
        linears = tokens * (_products(self.blocks) - after) + ends * after
        pairs = tokens * context + (tokens * (tokens + 1) // 2 if causal else tokens * tokens)
        pairs = pairs * (config.layers - 1) + (context + tokens if last_only else pairs)
        per_pair = choose(ATTENTIONS, "attention", config.attention).flops_per_pair(config)
        return batch * (linears + pairs * per_pair + ends * 2 * config.dim * config.vocab_size)

    @torch.no_grad()
    def sdpa_backend(self, batch: int, tokens: int, context: int = 0, *, masked: bool = False) -> str:
        """Which SDPA backend (see `tinylm.attention.sdpa_backend`) a forward of these shapes uses on this
        device.

        masked: as in a step of ragged rows or of a graph's bucket. A second chunk (tokens > 1 after a
        context) is masked in any case. For the record beside a measurement: allocates one layer's q, k and v
        for a moment.
        """
        config, span = self.config, tokens + context
        q = torch.empty(batch, tokens, config.heads, config.head_dim, device=self.device, dtype=self.dtype)
        kv = torch.empty(batch, config.kv_heads, span, config.head_dim, device=self.device, dtype=self.dtype)
        masked = masked or (tokens > 1 and context > 0)
        mask = torch.ones(batch, 1, tokens, span, dtype=torch.bool, device=self.device) if masked else None
        return sdpa_backend(q.transpose(1, 2), kv, kv, mask=mask, is_causal=not masked and tokens > 1)


def _listed(streams: tuple[Stream, ...], layers: int, device: torch.device) -> str:
    widths = ", ".join(f"{stream.name} of {stream.heads} x {stream.width}" for stream in streams)
    return f"{layers} layers with {widths} on {device}"


def _products(module: nn.Module) -> int:
    """Floating-point operations a token of the linears in it."""
    return sum(2 * m.in_features * m.out_features for m in module.modules() if isinstance(m, op_table.Linear))
