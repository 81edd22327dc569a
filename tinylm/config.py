"""What a model is, as data: `ModelConfig`, and `PRESETS`, complete to the last field.

Names of modules (norm, mlp, positions, attention) are checked where their tables are, in `model.py`, so that
a new one is a class and a table row there and nothing here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: what was given, what was expected, what to do."""


class CheckpointError(ValueError):
    """The files of a checkpoint do not make up what they should. One line: which file, what is wrong, what to do."""


def first_line(error: Exception) -> str:
    """Of another library's error, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


ROPE_SCALINGS = ("llama3", "linear")


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched for contexts longer than the one trained on.

    `linear` divides every frequency by `factor` (Chen et al., 2023, arXiv:2306.15595). `llama3` divides those
    whose wavelength is above `original_context / low_freq_factor`, keeps those below `original_context /
    high_freq_factor`, and blends in between (the Llama 3.1 release). Raises ConfigError for values that
    cannot work.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # the context, in tokens, that the model was trained with before stretching

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise ConfigError(f"unknown rope scaling {self.kind!r}: use one of {', '.join(ROPE_SCALINGS)}")
        if self.factor < 1:
            raise ConfigError(f"rope scaling factor {self.factor} stretches nothing: give at least 1")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope scaling with low_freq_factor {self.low_freq_factor}, high_freq_factor "
                f"{self.high_freq_factor}: the first must be above 0 and below the second"
            )
        if self.original_context < 1:
            raise ConfigError(f"rope scaling original_context {self.original_context}: give at least 1 token")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer's shape. Raises ConfigError for a shape that cannot be built."""

    vocab_size: int
    dim: int  # width of the residual stream
    layers: int
    heads: int  # query heads
    d_ff: int  # width inside the MLP
    context: int  # the most tokens that a sequence may have
    kv_heads: int = 0  # key and value heads, each shared by heads / kv_heads query heads; 0: as many as heads
    head_dim: int = 0  # 0: dim / heads
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"  # "pre": x + f(norm(x)); "post": norm(x + f(x))
    mlp: str = "swiglu"
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    attention: str = "gqa"
    bias: bool = False  # in the linear layers of the blocks, and in LayerNorm
    tied: bool = True  # the head is the token embedding
    dropout: float = 0.0  # in training only: embedding, attention weights, both residual branches
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "d_ff", "context"):
            _positive(name, getattr(self, name))
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim == 0:
            if self.dim % self.heads:
                raise ConfigError(
                    f"heads {self.heads} does not divide dim {self.dim}: choose a divisor, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        _positive("kv_heads", self.kv_heads)
        _positive("head_dim", self.head_dim)
        if self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}: give a divisor")
        if self.positions == "rope" and self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd: rope rotates pairs, choose an even head_dim")
        if self.norm_placement not in ("pre", "post"):
            raise ConfigError(f"unknown norm_placement {self.norm_placement!r}: use one of pre, post")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}: expected a number from 0 up to, not including, 1")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected a positive number")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}: expected a positive whole number")


PRESETS: dict[str, ModelConfig] = {
    # Seconds on a CPU.
    "nano": ModelConfig(
        vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, d_ff=192, context=4096,
        norm="rmsnorm", norm_eps=1e-5, norm_placement="pre", mlp="swiglu", positions="rope",
        rope_theta=10_000.0, rope_scaling=None, attention="gqa",
        bias=False, tied=True, dropout=0.0, init_std=0.02,
    ),
    "tiny": ModelConfig(
        vocab_size=4096, dim=384, layers=6, heads=6, kv_heads=6, head_dim=64, d_ff=1536, context=16_384,
        norm="rmsnorm", norm_eps=1e-5, norm_placement="pre", mlp="swiglu", positions="rope",
        rope_theta=10_000.0, rope_scaling=None, attention="gqa",
        bias=False, tied=True, dropout=0.0, init_std=0.02,
    ),
    "small": ModelConfig(
        vocab_size=32_000, dim=768, layers=12, heads=12, kv_heads=12, head_dim=64, d_ff=2048, context=16_384,
        norm="rmsnorm", norm_eps=1e-5, norm_placement="pre", mlp="swiglu", positions="rope",
        rope_theta=10_000.0, rope_scaling=None, attention="gqa",
        bias=False, tied=True, dropout=0.0, init_std=0.02,
    ),
    # Of the size of nanoGPT's model for TinyShakespeare's characters, but in the LLaMA style.
    "shakespeare-10m": ModelConfig(
        vocab_size=65, dim=384, layers=6, heads=6, kv_heads=6, head_dim=64, d_ff=1024, context=256,
        norm="rmsnorm", norm_eps=1e-5, norm_placement="pre", mlp="swiglu", positions="rope",
        rope_theta=10_000.0, rope_scaling=None, attention="gqa",
        bias=False, tied=True, dropout=0.0, init_std=0.02,
    ),
    # The 17 M-parameter model trained on TinyStories: 17 M without the embedding's lookup table.
    "stories-17m": ModelConfig(
        vocab_size=10_000, dim=512, layers=4, heads=16, kv_heads=16, head_dim=32, d_ff=1344, context=256,
        norm="rmsnorm", norm_eps=1e-5, norm_placement="pre", mlp="swiglu", positions="rope",
        rope_theta=10_000.0, rope_scaling=None, attention="gqa",
        bias=False, tied=False, dropout=0.0, init_std=0.02,
    ),
    # GPT-2's smallest; its 50,257 tokens are padded to a multiple of 128.
    "gpt2-124m": ModelConfig(
        vocab_size=50_304, dim=768, layers=12, heads=12, kv_heads=12, head_dim=64, d_ff=3072, context=1024,
        norm="layernorm", norm_eps=1e-5, norm_placement="pre", mlp="gelu", positions="learned",
        rope_theta=10_000.0, rope_scaling=None, attention="gqa",
        bias=True, tied=True, dropout=0.0, init_std=0.02,
    ),
    # Meta's Llama 3 8B, as published.
    "llama-3-8b": ModelConfig(
        vocab_size=128_256, dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, d_ff=14_336,
        context=8192,
        norm="rmsnorm", norm_eps=1e-5, norm_placement="pre", mlp="swiglu", positions="rope",
        rope_theta=500_000.0, rope_scaling=None, attention="gqa",
        bias=False, tied=False, dropout=0.0, init_std=0.02,
    ),
}  # fmt: skip


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The preset `name` with some fields replaced: `preset("llama-3-8b", context=16_384)`.

    A kv_heads or head_dim that the preset has only because of its heads and dim follows them when those are
    replaced. Raises ConfigError for an unknown preset or field, and for a shape that cannot be built.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
    found = PRESETS[name]
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ConfigError(f"ModelConfig has no {', '.join(unknown)}: its fields are {', '.join(fields)}")
    if "heads" in overrides and found.kv_heads == found.heads:
        overrides.setdefault("kv_heads", 0)
    if overrides.keys() & {"heads", "dim"} and found.head_dim * found.heads == found.dim:
        overrides.setdefault("head_dim", 0)
    return dataclasses.replace(found, **overrides)
