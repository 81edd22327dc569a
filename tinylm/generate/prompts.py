"""Prompts of different lengths as one tensor, and whether a model takes them.

Shapes: B rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.config import ConfigError
from tinylm.model import Transformer


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Prompts as (B, T) int64 for `Decoder`, padded on the right, and their lengths. Raises ConfigError."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ConfigError(f"prompts of {lengths} tokens: give at least one prompt, each of at least 1 token")
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return tokens, lengths


def check_prompts(model: Transformer, tokens: Tensor, lengths: Sequence[int] | None = None) -> None:
    """Raises ConfigError unless tokens (B, T), of which row b uses lengths[b], are prompts for the model."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype != torch.int64:
        raise ConfigError(
            f"a prompt of {tuple(tokens.shape)}, {tokens.dtype}: expected int64 (rows, tokens), not empty"
        )
    rows, width = tokens.shape
    if lengths is not None and not (len(lengths) == rows and all(1 <= length <= width for length in lengths)):
        raise ConfigError(f"lengths {list(lengths)} of {rows} prompts: give {rows}, each from 1 to {width}")
    longest = width if lengths is None else max(lengths)
    if longest > model.config.context:
        raise ConfigError(
            f"a prompt of {longest} tokens does not fit the model's context of {model.config.context}: shorten it"
        )
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise ConfigError(f"token ids run from {low} to {high}: expected 0 to {model.config.vocab_size - 1}")


def check_room(model: Transformer, prompt: int, new: int) -> None:
    """Raises ConfigError unless so many tokens of a prompt and so many new ones fit the model's context."""
    if new < 0 or prompt + new > model.config.context:
        raise ConfigError(
            f"{prompt} prompt tokens and {new} new ones do not fit the model's context of "
            f"{model.config.context}: give fewer, or a config with a larger context"
        )
