"""What a run reads: the prepared text, batches that are ready before their step, and the validation split."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.config import ConfigError
from tinylm.data import Sampler, Tokens, eval_windows, prepare
from tinylm.data.corpus import SOURCES, STDLIB
from tinylm.data.tokens import is_prepared
from tinylm.data.windows import IGNORED
from tinylm.train.config import TrainConfig

AHEAD = 4  # batches that are ready before their step


def batches(sampler: Sampler, steps: range, *, batch: int, first: int, count: int, pin: bool) -> Generator[Tensor]:
    """A rank's rows of each step's batch, (count, context + 1) int64 on the host, prepared by a thread.

    Step s has the global samples s * batch to (s + 1) * batch - 1, of which a rank takes `count` from `first`
    on. pin: in page-locked memory, from which a copy to a GPU does not wait.
    """

    def load(step: int) -> Tensor:
        rows = sampler.samples(step * batch + first, count)
        return rows.pin_memory() if pin else rows

    with ThreadPoolExecutor(1) as pool:
        ready = deque(pool.submit(load, step) for step in steps[:AHEAD])
        for step in steps:
            if step + AHEAD in steps:
                ready.append(pool.submit(load, step + AHEAD))
            yield ready.popleft().result()


def evaluate(
    score: Callable[[Tensor, Tensor], Tensor],
    tokens: Tokens,
    token_bytes: Tensor,
    *,
    context: int,
    batch: int,
    limit: int,
    device: torch.device,
) -> tuple[float, float]:
    """(mean loss in nats a token, bits per byte) of a split, every position but the first scored once.

    score: mean loss of tokens and targets (batch, context). token_bytes: (vocab_size,) int64. limit: stop when
    so many tokens are scored, whatever the batch; 0: the whole split.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    scored = stood_for = 0
    for inputs, targets in eval_windows(tokens, context, batch):
        if limit:
            beyond = (targets != IGNORED).flatten().cumsum(0).view_as(targets) > limit - scored
            targets = targets.masked_fill(beyond, IGNORED)
        wanted = targets[targets != IGNORED]
        scored += len(wanted)
        stood_for += int(token_bytes[wanted].sum())
        total += score(inputs.to(device), targets.to(device)).double() * len(wanted)
        if limit and scored >= limit:
            break
    nats = float(total)
    return nats / scored, nats / math.log(2) / max(stood_for, 1)


def check_long_enough(validation: Tokens, context: int) -> None:
    """Raises ConfigError now, rather than at the first validation, for a split shorter than one window."""
    try:
        next(eval_windows(validation, context, 1))
    except ConfigError as error:
        raise ConfigError(f"validation split: {error}") from None


def prepared(config: TrainConfig) -> Path:
    """The folder of config.data's tokens, made if it is not there yet. Raises ConfigError."""
    path = Path(config.data)
    if is_prepared(path):
        return path
    settings: dict[str, Any] = {
        "tokenizer": None if config.tokenizer == "auto" else config.tokenizer,
        "vocab_size": config.vocab_size or None,
        "progress": sys.stderr.isatty(),
    }
    sources = (*SOURCES, STDLIB)
    if config.data in sources:
        return prepare(config.data, **settings)
    if path.exists():
        return prepare(text=path, **settings)
    raise ConfigError(f"data {config.data!r} is no file or folder and no source: give one, or {', '.join(sources)}")
