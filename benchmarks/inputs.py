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
from tinylm.generate import RUNNERS, Decoder, Noise, RunnerWarning, Sampling
from tinylm.model import DTYPES, Transformer

CHOICES: dict[str, Collection[str]] = {
    "dtype": DTYPES,
    "preset": PRESETS,
    "cache": ["dense", "none"],
    "impl": RUNNERS,
}

# What the published figures of training a preset were made with: nanoGPT's benchmark has no biases.
ALIKE: dict[str, dict[str, Any]] = {"gpt2-124m": {"bias": False}}

# Tokens decoded by one timed call, few on a CPU.
DECODED = {"cuda": 256, "cpu": 8}
SAMPLINGS = {"decode": Sampling(), "sample": Sampling(1.0, top_k=200, seed=0)}  # by their phase


def shape(name: str, tokens: int) -> ModelConfig:
    """The preset, with room for `tokens`: RoPE has no table that ends. Learned positions do: see `refuse`."""
    config = preset(name)
    return config if tokens <= config.context else preset(name, context=tokens)


def refuse(cell: dict[str, Any]) -> str | None:
    """Why a cell cannot be decoded at its context: too little room before it, or behind it in learned positions."""
    context, half = cell["context"], DECODED["cuda"] // 2
    config = preset(cell["preset"])
    if context < half:
        return f"--contexts {context}: the context is the mean over {2 * half} tokens, give at least {half}"
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


def prompt_tokens(context: int, device: str) -> int:
    """Of a loop whose passes have a mean context of `context`, to half a token; 1.5 where no prompt would be left."""
    return max(1, context - DECODED[device] // 2)


def loop_facts(context: int, device: str) -> dict[str, float]:
    """For the record: how many tokens a call decodes, and the mean over its passes of the tokens they attend to."""
    count = DECODED[device]
    return {"decoded_tokens": count, "mean_context": prompt_tokens(context, device) + (count + 1) / 2}


def decoder(
    net: Transformer, batch: int, context: int, *, impl: str, cache: str = "dense", sampling: Sampling | None = None
) -> Decoder:
    """A prefilled decode loop whose passes have a mean context of `context`, as `prompt_tokens` says, by runner `impl`.

    Graphs are captured per length (granularity 1), so that neither side computes on padding; `compile` pads.
    """
    device = net.device.type
    if device not in RUNNERS[impl].devices:
        pytest.skip(f"runner {impl} does not run on {device}")
    prompt = tokens(net.config, batch, prompt_tokens(context, device), device)
    layout = None if cache == "none" else cache
    granularity = 1 if impl == "graph" else None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunnerWarning)  # a runner is measured, or not, but never its fallback
        try:
            return Decoder(
                net, prompt, DECODED[device], cache=layout, runner=impl, granularity=granularity, sampling=sampling
            )
        except RunnerWarning as reason:
            pytest.skip(str(reason))


def decode(loop: Decoder | HuggingFace) -> torch.Tensor:
    """The work of one call: DECODED tokens from the state right after prefill, their ids on the host."""
    loop.rewind()
    return loop.run(loop.max_new).cpu()


def decode_check(
    net: Transformer, sampling: Sampling | None = None
) -> Callable[[torch.Tensor, Decoder | HuggingFace], float]:
    """Every token decoded is the one due by a plain forward over the same text, up to rounding: see `shortfall`.

    Each of 2 x layers residual additions rounds by up to eps, a walk of eps * sqrt(2 layers) of the stream. Random
    models of 32 layers in bf16 have logits that deviate from those in fp32 by .3 (width 1,024) to .9 (4,096) of that.
    In a gap are two logits of two passes, so twice that; and the worst of the thousands that are judged is 4 times what
    is usual: 8 eps sqrt(2 layers). The cache one token off chooses tokens that lie several deviations below.
    """
    sampling = sampling or Sampling()
    tolerance = 8 * torch.finfo(net.dtype).eps * (2 * net.config.layers) ** 0.5

    def check(chosen: torch.Tensor, loop: Decoder | HuggingFace) -> float:
        count = chosen.shape[1]
        text = loop.ids[:, : loop.prompt_tokens + 1 + count]
        if not torch.equal(text[:, -count:].cpu(), chosen.cpu()):
            raise CheckFailed("the tokens returned are not those in the text")
        places = torch.arange(text.shape[1] - count, text.shape[1], device=net.device)
        worst = 0.0
        for row, seed in zip(text, sampling.seeds(len(text)), strict=True):  # of all, logits could outgrow the model
            with torch.inference_mode():
                logits = net(row[None, :-1])[0, -count:].float()
            noise = Noise([seed], logits.shape[1], net.device).at(places[:, None]) if sampling.temperature else None
            worst = max(worst, shortfall(logits, row[-count:, None], tolerance, sampling, noise))
        if not worst <= tolerance:
            raise CheckFailed(
                f"a decoded token lies {worst:.3g} deviations below the one due, tolerance {tolerance:.3g}"
            )
        return worst

    return check


def shortfall(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    tolerance: float,
    sampling: Sampling,
    noise: torch.Tensor | None,
) -> float:
    """How far the worst of the chosen tokens (N, 1) lies below the one due by logits (N, V), over their deviation.

    Greedy: below the likeliest. Else below the last of top_k, or, by logits / temperature - log(noise), below the best
    of those that are among the top_k by more than the tolerance.
    """
    deviation, own = logits.std(-1, keepdim=True), logits.gather(1, chosen)
    size = logits.shape[1]
    least = logits.topk(min(sampling.top_k or size, size) if sampling.temperature else 1).values[:, -1:]
    gap = least - own
    if noise is not None:
        score = logits - sampling.temperature * noise.log()
        allowed = score.masked_fill(logits < least + tolerance * deviation, -torch.inf)
        gap = gap.maximum(allowed.max(-1, keepdim=True).values - score.gather(1, chosen))
    return (gap / deviation).max().item()


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
