"""Where keys and values live. A layout is one file here and one row of `LAYOUTS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tinylm.cache.dense import DenseCache
from tinylm.cache.protocol import Batch, Cache, Kernel, Stream
from tinylm.config import ConfigError

__all__ = ["LAYOUTS", "Batch", "Cache", "DenseCache", "Kernel", "Stream", "make_cache"]

LAYOUTS: dict[str, Callable[..., Cache]] = {"dense": DenseCache}


def make_cache(
    layout: str,
    streams: Sequence[Stream],
    *,
    layers: int,
    batch: int,
    context: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Cache:
    """An empty cache for `batch` rows of `context` tokens. Raises ConfigError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown cache layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    if batch < 1 or context < 1:
        raise ConfigError(f"a cache of batch {batch} and context {context}: give at least 1 of each")
    return LAYOUTS[layout](streams, layers=layers, batch=batch, context=context, device=device, dtype=dtype)
