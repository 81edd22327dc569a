"""What several experiments share: dtypes by name, models of random weights, decode loops, and their checks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from benchmarks.peers import HuggingFace
from tinylm.bench.proof import CheckFailed
from tinylm.config import PRESETS, ModelConfig, preset
from tinylm.generate import RUNNERS, Decoder, RunnerWarning
from tinylm.model import DTYPES, Transformer

CHOICES: dict[str, Collection[str]] = {
    "dtype": DTYPES,
    "preset": PRESETS,
    "cache": ["dense", "none"],
    "impl": RUNNERS,
}

# Tokens decoded by one timed call: enough on a GPU that the synchronization at its end is below 1%, few on a CPU.
DECODED = {"cuda": 64, "cpu": 8}


def shape(name: str, tokens: int) -> ModelConfig:
    """The preset, with room for `tokens`: RoPE has no table that ends. Learned positions do: see `refuse`."""
    config = preset(name)
    return config if tokens <= config.context else preset(name, context=tokens)


def refuse(cell: dict[str, Any]) -> str | None:
    """Why a cell cannot be decoded at its context: too little room before it, or behind it in learned positions."""
    context, half = cell["context"], DECODED["cuda"] // 2
    config = preset(cell["preset"])
    if context <= half:
        return f"--contexts {context}: the context is the mean over {2 * half} tokens, give more than {half}"
    if config.positions != "rope" and context + 2 * half > config.context:
        return (
            f"--contexts {context}: {cell['preset']} has learned positions for {config.context} tokens, give at most "
            f"{config.context - 2 * half}, or a preset with rotary positions"
        )
    return None


@functools.lru_cache(maxsize=1)  # the cells of one model follow each other; a large one is not kept beside the next
def model(config: ModelConfig, dtype: str, device: str) -> Transformer:
    """A model of random weights in `dtype`, evaluating."""
    return Transformer.build(config, device=device, dtype=DTYPES[dtype]).eval()


def tokens(config: ModelConfig, batch: int, length: int, device: str) -> torch.Tensor:
    """(batch, length) int64: random ids."""
    return torch.randint(config.vocab_size, (batch, length), device=device)


def decoder(net: Transformer, batch: int, context: int, *, impl: str, cache: str = "dense") -> Decoder:
    """A prefilled decode loop whose passes have a mean context of `context`, to half a token, by runner `impl`.

    Graphs are captured per length (granularity 1), so that neither side computes on padding; `compile` pads.
    """
    device = net.device.type
    if device not in RUNNERS[impl].devices:
        pytest.skip(f"runner {impl} does not run on {device}")
    count = DECODED[device]
    prompt = tokens(net.config, batch, max(1, context - count // 2), device)
    layout = None if cache == "none" else cache
    granularity = 1 if impl == "graph" else None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunnerWarning)  # a runner is measured, or not, but never its fallback
        try:
            return Decoder(net, prompt, count, cache=layout, runner=impl, granularity=granularity)
        except RunnerWarning as reason:
            pytest.skip(str(reason))


def decode(loop: Decoder | HuggingFace) -> torch.Tensor:
    """The work of one call: DECODED tokens from the state right after prefill."""
    loop.rewind()
    return loop.run(loop.max_new)


def decode_check(net: Transformer) -> Callable[[torch.Tensor, Decoder | HuggingFace], float]:
    """Every token decoded is the likeliest by a plain forward over the same text, up to rounding.

    The error is how far a chosen token's logit lies below the largest, over the logits' standard deviation. Each of
    2 x layers residual additions rounds by up to eps, of a walk that is eps * sqrt(2 layers) of the stream; two
    passes differ by twice that, and a gap is a difference of two logits, so 4 eps sqrt(2 layers). The cache one
    token off chooses tokens that lie several deviations below.
    """
    tolerance = 4 * torch.finfo(net.dtype).eps * (2 * net.config.layers) ** 0.5

    def check(chosen: torch.Tensor, loop: Decoder | HuggingFace) -> float:
        count = chosen.shape[1]
        text = loop.ids[:, : loop.prompt_tokens + 1 + count]
        if not torch.equal(text[:, -count:], chosen):
            raise CheckFailed("the tokens returned are not those in the text")
        worst = 0.0
        for row in text:  # one at a time: the logits of a whole batch can be larger than the model
            with torch.inference_mode():
                logits = net(row[None, :-1])[0, -count:].float()
            gap = logits.max(-1).values - logits.gather(1, row[-count:, None])[:, 0]
            worst = max(worst, (gap / logits.std(-1)).max().item())
        if not worst <= tolerance:
            raise CheckFailed(
                f"a decoded token lies {worst:.3g} deviations below the likeliest, tolerance {tolerance:.3g}"
            )
        return worst

    return check


def weight_bytes_read(net: Transformer) -> int:
    """Bytes of the weights that a pass must read: all, but of an untied embedding only the rows looked up."""
    table = 0 if net.config.tied else net.embed.weight.numel() * net.embed.weight.element_size()
    return net.weight_bytes() - table


def step_work(net: Transformer, batch: int, context: int, cache: str) -> dict[str, Any]:
    """Declared work of one decode step at a prefix of `context` tokens."""
    weights = weight_bytes_read(net)
    if cache == "none":
        return {"tokens": batch, "flops": net.flops(batch, context, last_only=True), "bytes": weights}
    return {
        "tokens": batch,
        "flops": net.flops(batch, 1, context - 1, last_only=True),
        "bytes": weights + net.kv_bytes(batch, context),
    }
