"""The benchmarks' decode loops: what their context is, and that their check takes right tokens and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import inputs
from tinylm.bench.proof import CheckFailed
from tinylm.config import PRESETS, preset
from tinylm.generate import Decoder, Noise, Sampling, select
from tinylm.generate.loop import Loop
from tinylm.model import Transformer

DRAWN = inputs.SAMPLINGS["sample"]


def model_of(**more: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(preset("nano", **{"context": 64, "init_std": 0.3, **more})).eval()


@pytest.mark.parametrize("device", inputs.DECODED)
@pytest.mark.parametrize("context", [128, 129, 1024, 32_768])
def test_the_context_is_the_mean_over_the_passes(context: int, device: str) -> None:
    facts = inputs.loop_facts(context, device)
    prompt, count = inputs.prompt_tokens(context, device), inputs.DECODED[device]
    read = [prompt + n for n in range(1, count + 1)]  # by each pass: what the ones before it chose, too
    assert facts == {"decoded_tokens": count, "mean_context": sum(read) / count}
    # Shorter would need less than one token of prompt.
    assert 0 < facts["mean_context"] - context <= (0.5 if prompt > 1 else 1.5)
    assert inputs.shape("tiny", context + count).context >= read[-1]


def test_the_passes_read_as_much_as_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    step = Loop.step

    def spy(loop: Loop, span: int, exact: bool = False) -> None:
        read.append(int(loop.position.max()) + 1)
        step(loop, span, exact)

    monkeypatch.setattr(Loop, "step", spy)
    found = inputs.decode(inputs.decoder(model_of(), 2, 20, impl="eager"))
    assert found.device.type == "cpu" and found.shape == (2, inputs.DECODED["cpu"])
    assert sum(read) / len(read) == inputs.loop_facts(20, "cpu")["mean_context"]


def test_at_least_256_tokens_are_decoded_on_a_gpu_at_every_context_that_is_taken() -> None:
    assert inputs.DECODED["cuda"] >= 256
    assert inputs.refuse({"preset": "tiny", "context": 128}) is None
    assert "at least 128" in str(inputs.refuse({"preset": "tiny", "context": 127}))
    for name, config in PRESETS.items():
        context = config.context - inputs.DECODED["cuda"]
        if config.positions != "rope":
            assert inputs.refuse({"preset": name, "context": context}) is None
            assert f"at most {context}" in str(inputs.refuse({"preset": name, "context": context + 1}))


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_the_check_takes_the_tokens_that_are_due_and_no_others(sampling: Sampling) -> None:
    net = model_of()
    loop = inputs.decoder(net, 2, 20, impl="eager", sampling=sampling)
    chosen = inputs.decode(loop)
    check = inputs.decode_check(net, sampling)
    assert check(chosen, loop) <= 4 * torch.finfo(net.dtype).eps * 2
    with pytest.raises(CheckFailed, match="not those in the text"):
        check(chosen.flip(0), loop)
    place = loop.prompt_tokens + 3
    with torch.inference_mode():
        loop.ids[1, place] = (loop.ids[1, place] + 1) % 512
    with pytest.raises(CheckFailed, match="deviations below the one due"):
        check(loop.ids[:, loop.prompt_tokens + 1 :][:, : chosen.shape[1]], loop)


@pytest.mark.parametrize("other", [Sampling(), Sampling(1.0, seed=0), Sampling(1.0, top_k=200, seed=1)])
def test_the_check_of_draws_refuses_another_choice(other: Sampling) -> None:
    """The likeliest, one of all tokens, one by another seed: of logits so flat that all tokens are about as likely."""
    net = model_of(init_std=0.02)
    loop = Decoder(net, inputs.tokens(net.config, 4, 9, "cpu"), 40, sampling=other)
    with pytest.raises(CheckFailed, match="deviations below the one due"):
        inputs.decode_check(net, DRAWN)(inputs.decode(loop), loop)


def test_a_token_at_the_edge_of_the_likeliest_may_be_in_or_out_by_rounding() -> None:
    """Three tokens, two likely ones within the tolerance of each other, top_k 1: either may be drawn."""
    logits, tolerance = torch.tensor([[1.0, 1.0 - 1e-4, -3.0]]), 1e-3
    sampling, noise = Sampling(1.0, top_k=1), torch.tensor([[1.0, 1.0, 1e-9]])
    for token, near in ((0, True), (1, True), (2, False)):
        short = inputs.shortfall(logits, torch.tensor([[token]]), tolerance, sampling, noise)
        assert (short <= tolerance) == near


def test_the_shortfall_of_the_samplers_own_choice_is_none() -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    noise = Noise([0] * 200, 50, "cpu").at(torch.arange(200)[:, None])
    for sampling in (
        Sampling(),
        Sampling(0.7, seed=0),
        Sampling(1.3, top_k=7, seed=0),
        Sampling(1.0, top_k=90, seed=0),
    ):
        chosen = select(logits, sampling, noise)[:, None]
        drawn = noise if sampling.temperature else None
        assert inputs.shortfall(logits, chosen, 1e-6, sampling, drawn) <= 1e-6
        worst = inputs.shortfall(logits, logits.argmin(-1, keepdim=True), 1e-6, sampling, drawn)
        assert worst > 1
