"""Compiled prefill: what `prefill` gives and leaves in the cache, run after run, without compiling again.

On a GPU, if there is one, each is captured. Compiled as far as the compiler proper, but for one test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from launched import DEVICE, prompts_of
from strategies import configs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tinylm.cache import Batch, Cache
from tinylm.config import ConfigError, ModelConfig, preset
from tinylm.generate import CompiledPrefill, Decoder, filling, generate, prefill
from tinylm.model import Transformer
from tinylm.ops.compiling import compiler

# fp64, numbers of size 10, thousands of roundings at most
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(autouse=True, scope="module")
def traced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "_compile", compiler("aot_eager"))
        yield


def random_model(seed: int = 0, **more: Any) -> Transformer:
    """In fp64, where no two candidates are so close that the order of additions decides."""
    return model_of(preset("nano", **{"context": 32, "init_std": 0.3, **more}), seed)


def model_of(config: ModelConfig, seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).double().eval().to(DEVICE)


def streams(cache: Cache) -> dict[str, Tensor]:
    return cache.streams  # type: ignore[attr-defined]


def assert_same(logits: Tensor, cache: Cache, expected: Tensor, reference: Cache) -> None:
    torch.testing.assert_close(logits, expected, **CLOSE)
    for name, stream in streams(cache).items():
        torch.testing.assert_close(stream, streams(reference)[name], **CLOSE)


@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink is to compile for minutes
@given(configs(), st.integers(1, 3), st.integers(1, 8), st.integers(0, 3), st.integers(0, 2**31))
def test_each_run_fills_as_prefill_does_whatever_there_was(
    config: ModelConfig, rows: int, length: int, more: int, seed: int
) -> None:
    model = model_of(config, seed)
    cache, reference = (model.new_cache(batch=rows, context=length + more) for _ in range(2))
    for stream in streams(cache).values():
        stream.fill_(3)
    compiled = CompiledPrefill(model, cache, rows, length)
    assert not any(stream.any() for stream in streams(cache).values()), "it is empty before the first run"
    first, second = (prompts_of(model, rows, length, seed=n) for n in range(2))
    for prompts in (first, second.to(DEVICE), first):
        logits = compiled.run(prompts)
        assert_same(logits, cache, prefill(model, prompts, reference), reference)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_compiled_when_it_is_made_and_once_a_shape_whichever_the_weights(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(filling, "_compile", compiler(counter))
    shapes = [(2, 7)] if backend == "inductor" else [(2, 7), (2, 3), (1, 7)]
    models = [random_model(seed, layers=1) for seed in range(2)]
    for index, (rows, length) in enumerate(shapes):
        for model in (*models, *models):
            cache, reference = (model.new_cache(batch=rows, context=9) for _ in range(2))
            compiled = CompiledPrefill(model, cache, rows, length)
            assert counter.frame_count == index + 1
            for seed in range(2):
                prompts = prompts_of(model, rows, length, seed)
                logits = compiled.run(prompts)
                assert_same(logits, cache, prefill(model, prompts, reference), reference)
            assert counter.frame_count == index + 1


def test_decoding_goes_on_from_it_and_neither_disturbs_the_other() -> None:
    """Prompts of two lengths and eager ones into one cache in turn, each with what it gets alone, beside a Decoder."""
    model = random_model()
    cache = model.new_cache(batch=2, context=14)
    decoder = Decoder(model, prompts_of(model, 2, 5), 12)
    fills: dict[int, Callable[[Tensor], Tensor]] = {n: CompiledPrefill(model, cache, 2, n).run for n in (9, 4)}
    fills[6] = lambda prompts: prefill(model, prompts, cache)
    parts = [decoder.first]
    for turn in range(3):
        for length, fill in fills.items():
            prompts = prompts_of(model, 2, length, seed=turn)
            assert torch.equal(continued(model, fill(prompts), cache, length, 5), generate(model, prompts, 5)[:, -5:])
        parts.append(decoder.run(4))
    assert torch.equal(torch.cat(parts, 1), generate(model, prompts_of(model, 2, 5), 13)[:, 5:])


@torch.inference_mode()
def continued(model: Transformer, logits: Tensor, cache: Cache, length: int, new: int) -> Tensor:
    """Greedy, of the logits of a prompt's last token and what the cache has of it: (B, new)."""
    chosen = [logits.argmax(-1)]
    for place in range(length, length + new - 1):
        chosen.append(model.step(Batch.at(chosen[-1], place), cache).argmax(-1))
    return torch.cat(chosen, 1)


@pytest.mark.parametrize("training", [True, False])
def test_it_has_no_dropout_and_leaves_the_model_as_it_was(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(filling, "_compile", compiler(counter))
    model = random_model(dropout=0.5)
    cache, reference = (model.new_cache(batch=2, context=7) for _ in range(2))
    prompts = prompts_of(model, 2, 7)
    expected = prefill(model, prompts, reference)
    model.train(training)
    compiled = CompiledPrefill(model, cache, 2, 7)
    for _ in range(2):
        assert_same(compiled.run(prompts), cache, expected, reference)
        assert model.training == training
    assert counter.frame_count == 1


def test_what_cannot_be_is_one_clear_error_that_leaves_the_cache_as_it_was() -> None:
    model = random_model()
    cache, prompts = model.new_cache(batch=2, context=12), prompts_of(model, 2, 10)
    compiled = CompiledPrefill(model, cache, 2, 10)
    expected = compiled.run(prompts).clone()
    before = {name: stream.clone() for name, stream in streams(cache).items()}
    other = random_model(kv_heads=4)
    elsewhere = Transformer.build(model.config, device="meta").new_cache(batch=2)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: CompiledPrefill(model, cache, 2, 0), "2 rows of 0 tokens"),
        (lambda: CompiledPrefill(model, cache, -1, 10), "-1 rows of 10 tokens"),
        (lambda: CompiledPrefill(model, cache, 2, 33), "prompt of 33 tokens .* context of 32"),
        (lambda: CompiledPrefill(model, cache, 2, 13), "13 tokens a row are more than the 12"),
        (lambda: CompiledPrefill(model, cache, 1, 10), "1 rows given, the cache has 2"),
        (lambda: CompiledPrefill(other, cache, 2, 10), r"k of 2 x 16, v of 2 x 16 .* k of 4 x 16.*new_cache\(\)"),
        (lambda: CompiledPrefill(model, elsewhere, 2, 10), f"on meta, the model has .* on {DEVICE}"),
        (lambda: compiled.run(prompts[:, :9]), r"a prompt of \(2, 9\) where \(2, 10\) is compiled"),
        (lambda: compiled.run(prompts[:1]), r"a prompt of \(1, 10\)"),
        (lambda: compiled.run(prompts[0]), r"a prompt of \(10,\)"),
        (lambda: compiled.run(prompts.float()), "expected int64"),
        (lambda: compiled.run(prompts + 512), "token ids run from .*: expected 0 to 511"),
        (lambda: compiled.run(prompts - 512), "token ids run from -"),
    ]
    for call, words in calls:
        with pytest.raises(ConfigError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
        assert all(torch.equal(stream, before[name]) for name, stream in streams(cache).items())
    assert torch.equal(compiled.run(prompts), expected)
