"""Every setting of a training run, as one frozen dataclass; the flags of `python -m tinylm.train` are its fields."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinylm.config import PRESETS, ConfigError, ModelConfig, preset
from tinylm.ops import DEFAULTS, OPS
from tinylm.optim import schedule


@dataclass(frozen=True)
class TrainConfig:
    """One training run: a text in, a checkpoint and a loss curve out. Raises ConfigError for what cannot work."""

    data: str = "stdlib"
    """A source (stdlib, tinyshakespeare, tinystories), a text file or folder, or a folder that tinylm.data prepared."""
    out: str = ""
    """The run's folder, for log.csv and checkpoints; by default runs/<data>-<preset>."""
    resume: bool = False
    """Go on from the newest checkpoint in the run's folder, or start where there is none."""

    tokenizer: Literal["auto", "bpe", "char"] = "auto"
    """For data that is not prepared yet; auto: char for tinyshakespeare, else bpe."""
    vocab_size: int = 0
    """Of a bpe tokenizer, for data that is not prepared yet; 0: as many as are usual for the source."""

    preset: str = "nano"
    """The model; its vocabulary follows the tokenizer."""
    model: str = ""
    """Fields of ModelConfig to replace in the preset, such as dim=192,layers=4,tied=false."""
    context: int = 256
    """Tokens of a training sequence, and the model's context."""
    dropout: float = 0.0
    """Probability, in training only."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch: int = 16
    """Sequences of one optimizer step, over all ranks and passes."""
    micro_batch: int = 0
    """Sequences of one forward and backward pass on one rank; gradients add up over the passes of a step. 0: all."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the blocks' matrices, with adamw for embeddings, head and gains."""
    lr: float = 1e-3
    """Peak learning rate."""
    muon_lr: float = 0.0
    """Peak learning rate of muon's matrices; 0: as lr."""
    schedule: Literal["cosine", "wsd", "wsd-sqrt", "constant"] = "cosine"
    """Of the learning rate after warm-up; wsd: stable, then decay."""
    warmup: float = 0.02
    """Steps of linear warm-up; below 1, a share of all steps."""
    decay: float = 0.2
    """Last steps, in which wsd falls; below 1, a share of all steps."""
    final_lr: float = 0.1
    """The last learning rate, as a share of the peak."""
    weight_decay: float = 0.1
    """Of matrices."""
    beta1: float = 0.9
    """Of adamw: decay of the gradient's mean."""
    beta2: float = 0.95
    """Of adamw: decay of the squared gradient's mean."""
    clip: float = 1.0
    """Most that the gradient's norm may be; 0: not clipped."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of matrix products; parameters are fp32. auto: bf16 or fp16 as the GPU computes it, fp32 on the CPU."""
    compile: bool = False
    """Compile the model's loss with torch.compile, before the clock starts."""
    graph: bool = False
    """Capture the whole step as one CUDA graph: one GPU, bf16 or fp32."""
    rmsnorm: str = DEFAULTS["rmsnorm"]
    """Backend of RMSNorm."""
    linear_cross_entropy: str = DEFAULTS["linear_cross_entropy"]
    """Backend of the head and its loss."""

    seed: int = 0
    """Of weights, order of samples, and dropout."""
    log_every: int = 20
    """Steps between rows of the log. The losses are read from the device then, and NaN is noticed."""
    eval_every: int = 200
    """Steps between validation losses; the last step always has one. 0: only that."""
    eval_tokens: int = 0
    """Tokens of the validation split to score; 0: all."""
    save_every: int = 0
    """Steps between checkpoints besides the best and the last; 0: at every validation."""
    keep: int = 2
    """Last checkpoints to keep, besides the best."""

    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """Over the ranks that torchrun started."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    peak_flops: float = 0.0
    """Floating-point operations a second that count as MFU 1; 0: the card's published rate, or measured."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "keep", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in (
            "micro_batch", "warmup", "decay", "weight_decay", "clip", "eval_every", "eval_tokens", "save_every",
            "peak_flops", "vocab_size", "final_lr", "seed", "muon_lr",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected 0 or more")
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isinf(value):
                raise ConfigError(f"{name} is {value}: expected a finite number")
            if isinstance(value, int) and value >= 2**63:
                raise ConfigError(f"{name} is {value}: expected less than 2**63")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}: expected a positive number")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected a number from 0 up to, not including, 1")
        for op in ("rmsnorm", "linear_cross_entropy"):
            if getattr(self, op) not in OPS[op]:
                raise ConfigError(f"unknown backend {getattr(self, op)!r} of {op}: use one of {', '.join(OPS[op])}")
        self.lr_share(0)
        self.shape()

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.out or f"runs/{Path(self.data).stem or 'data'}-{self.preset}")

    def lr_share(self, index: int) -> float:
        """The learning rate of step `index`, counted from 0, as a share of the peak."""
        warmup, decay = (round(n * self.steps if n < 1 else n) for n in (self.warmup, self.decay))
        if not self.schedule.startswith("wsd"):
            decay = 0
        return schedule(self.schedule, index, self.steps, warmup=warmup, decay=decay, final=self.final_lr)

    def shape(self, vocab_size: int | None = None) -> ModelConfig:
        """The model's config, for a tokenizer of that many ids. Raises ConfigError."""
        changed = {"dropout": self.dropout, "context": self.context, **_overrides(self.model)}
        if vocab_size is not None and changed.setdefault("vocab_size", vocab_size) < vocab_size:
            raise ConfigError(
                f"vocab_size={changed['vocab_size']} is less than the tokenizer's {vocab_size} ids: give at least that"
            )
        config = preset(self.preset, **changed)
        longest = PRESETS[self.preset].context
        if config.positions == "learned" and config.context > longest:
            raise ConfigError(
                f"context {config.context} is longer than the {longest} learned positions of {self.preset}: "
                f"give at most {longest}, or a preset with rope"
            )
        return config


def _overrides(text: str) -> dict[str, Any]:
    """ModelConfig's fields in "dim=192,tied=false"; a name that it has not, for `preset` to refuse, stays text."""
    types = typing.get_type_hints(ModelConfig)
    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError(f"model override {item!r}: expected name=value, such as dim=192")
        if (kind := types.get(name, str)) not in VALUES:
            raise ConfigError(f"{name} cannot be given here: leave it out")
        expected, read = VALUES[kind]
        try:
            found[name] = read(value)
        except (KeyError, ValueError):
            raise ConfigError(f"{name} is {value!r}: expected {expected}") from None
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


# What an override's value may be, and how it is read, by the type of ModelConfig's field.
VALUES: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", _finite),
    bool: ("true or false", {"true": True, "True": True, "false": False, "False": False}.__getitem__),
    str: ("a name", str),
}
