"""Prompts of different lengths in one batch: each row gets what it gets alone, until its text ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import rows as rows
from strategies import configs
from torch import Tensor

from tinylm.config import ConfigError, ModelConfig, preset
from tinylm.generate import Decoder, Sampling, complete, prefill, stream
from tinylm.generate.prompts import pad
from tinylm.model import Transformer

pytestmark = pytest.mark.usefixtures("rows")
CONTEXT = 24  # of what `configs` draws
samplings = st.just(Sampling()) | st.builds(
    Sampling,
    temperature=st.sampled_from([0.7, 1.5]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.1, 1),
    seed=st.integers(0, 2**40),
)
paths: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "cache": st.sampled_from(["dense", None]),
        "runner": st.sampled_from(["eager", "uncaptured"]),
        "granularity": st.integers(1, 7),
        "chunk": st.none() | st.integers(1, 4),
    }
)


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).double().eval()


def nano(**more: Any) -> Transformer:
    return model_of(preset("nano", **{"context": 32, "init_std": 0.3, **more}))


def prompts_of(model: Transformer, lengths: list[int]) -> list[list[int]]:
    return [torch.randint(model.config.vocab_size, (length,)).tolist() for length in lengths]


@torch.no_grad()
def naive(model: Transformer, prompt: list[int], new: int) -> list[int]:
    """Greedy, from the definition."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def alone(model: Transformer, prompt: list[int], new: int, sampling: Sampling, row: int) -> list[int]:
    """Of a batch of one, by the plainest path, with the seed of that row."""
    seed = None if sampling.seed is None else sampling.seed + row
    own = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
    decoder = Decoder(model, torch.tensor([prompt]), new - 1, cache=None, sampling=own)
    return [*decoder.first[0].tolist(), *decoder.run(new - 1)[0].tolist()]


@settings(max_examples=40)
@given(
    config=configs(),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=4),
    new=st.integers(1, 10),
    path=paths,
    sampling=samplings,
    seed=st.integers(0, 2**31),
)
def test_a_row_of_a_batch_is_what_it_is_alone(
    config: ModelConfig, lengths: list[int], new: int, path: dict[str, Any], sampling: Sampling, seed: int
) -> None:
    """In fp64, where no two candidates are so close that the order of additions decides."""
    model = model_of(config, seed)
    prompts = prompts_of(model, lengths)
    tokens, _ = pad(prompts)
    for row, length in enumerate(lengths):  # padding is any token
        tokens[row, length:] = torch.randint(config.vocab_size, (tokens.shape[1] - length,))
    decoder = Decoder(model, tokens, new - 1, lengths=lengths, sampling=sampling, **path)
    rows = torch.cat((decoder.first, decoder.run(new - 1)), 1).tolist()
    for row, prompt in enumerate(prompts):
        assert rows[row] == alone(model, prompt, new, sampling, row)
        if sampling.temperature == 0:
            assert rows[row] == naive(model, prompt, new)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cache", ["dense", None])
def test_the_same_in_fp32(positions: str, kv_heads: int, cache: str | None) -> None:
    model = nano(positions=positions, kv_heads=kv_heads).float()
    prompts = prompts_of(model, [3, 11, 1, 7])
    for sampling in (Sampling(), Sampling(1.0, top_p=0.9, seed=5)):
        rows = complete(model, prompts, 20, cache=cache, sampling=sampling)
        for row, prompt in enumerate(prompts):
            assert rows[row] == alone(model, prompt, 20, sampling, row)


@given(st.data(), configs(), st.lists(st.integers(1, 10), min_size=1, max_size=4), st.integers(1, 12))
@torch.no_grad()
def test_prefill_of_ragged_prompts_gives_each_rows_last_logits(
    data: st.DataObject, config: ModelConfig, lengths: list[int], chunk: int
) -> None:
    model = model_of(config, data.draw(st.integers(0, 2**31)))
    prompts = prompts_of(model, lengths)
    tokens, _ = pad(prompts)
    cache = model.new_cache(batch=len(prompts), context=max(lengths))
    logits = prefill(model, tokens, cache, lengths=lengths, chunk=chunk)
    for row, prompt in enumerate(prompts):  # fp64, logits of size 10, thousands of roundings at most
        torch.testing.assert_close(logits[row], model(torch.tensor([prompt]))[0, -1:], rtol=0, atol=1e-9)


def test_rewind_repeats_a_ragged_batch_and_runs_may_be_split() -> None:
    model = nano()
    prompts = prompts_of(model, [5, 2])
    tokens, lengths = pad(prompts)
    decoder = Decoder(model, tokens, 12, lengths=lengths, sampling=Sampling(1.0, seed=1))
    whole = decoder.run(12)
    decoder.rewind()
    assert torch.equal(torch.cat([decoder.run(part) for part in (1, 7, 0, 4)], 1), whole)


def test_a_text_goes_on_where_another_run_of_the_same_seed_left_it() -> None:
    """Noise belongs to a token's place in its text, not to the count of what was drawn."""
    model, sampling = nano(), Sampling(1.0, seed=3)
    (prompt,) = prompts_of(model, [4])
    (whole,) = complete(model, [prompt], 20, sampling=sampling)
    (rest,) = complete(model, [prompt + whole[:9]], 11, sampling=sampling)
    assert whole[9:] == rest


def test_rows_of_the_same_prompt_differ() -> None:
    rows = complete(nano(), [[1, 2, 3]] * 3, 20, sampling=Sampling(1.0, seed=0))
    assert len({tuple(row) for row in rows}) == 3


# Where a row ends


@settings(max_examples=40)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=4),
    new=st.integers(1, 14),
    sampling=samplings.filter(lambda s: s.seed is not None),
    every=st.integers(1, 20),
)
def test_a_row_ends_before_its_first_stop_and_the_others_go_on(
    data: st.DataObject, lengths: list[int], new: int, sampling: Sampling, every: int
) -> None:
    model = model_of(preset("nano", layers=1, vocab_size=12, context=CONTEXT, init_std=0.3))
    stop = data.draw(st.sets(st.integers(0, 11), max_size=4))
    prompts = prompts_of(model, lengths)
    tokens, _ = pad(prompts)
    decoder = Decoder(model, tokens, new - 1, lengths=lengths, sampling=sampling)
    rows: list[list[int]] = [[] for _ in prompts]
    for chosen in stream(decoder, stop=stop, every=every):
        for row, ids in enumerate(chosen):
            rows[row] += ids
    assert rows == complete(model, prompts, new, stop=stop, sampling=sampling)
    for row, prompt in enumerate(prompts):
        ids = alone(model, prompt, new, sampling, row)
        assert rows[row] == ids[: next((at for at, id in enumerate(ids) if id in stop), new)]


@pytest.mark.parametrize(
    "path", [{}, {"cache": None}, {"runner": "uncaptured"}, {"runner": "uncaptured", "granularity": 1}]
)
@pytest.mark.parametrize("every", [1, 5, 100])
def test_each_row_fills_the_context_and_then_keeps_quiet(path: dict[str, Any], every: int) -> None:
    """The longer rows stop at the context; the shortest goes on to it with unspoilt tokens."""
    model = nano(context=16)
    prompts = prompts_of(model, [3, 16, 12, 15])
    tokens, lengths = pad(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    for chosen in stream(Decoder(model, tokens, 13, lengths=lengths, **path), every=every):
        for row, ids in enumerate(chosen):
            rows[row] += ids
    assert [len(row) for row in rows] == [13, 0, 4, 1]
    for row, prompt in enumerate(prompts):
        assert rows[row] == naive(model, prompt, 16 - len(prompt))


class Counted(Decoder):
    decoded = 0

    def run(self, tokens: int) -> Tensor:
        self.decoded += tokens
        return super().run(tokens)


def test_decoding_ends_when_all_rows_ended_and_looks_only_now_and_then() -> None:
    model = nano()
    prompts = prompts_of(model, [5, 2])
    whole = complete(model, prompts, 25)
    stop = {whole[0][4], whole[1][11]}
    ends = [next(at for at, id in enumerate(row) if id in stop) for row in whole]
    tokens, lengths = pad(prompts)
    decoder = Counted(model, tokens, 24, lengths=lengths)
    parts = list(stream(decoder, stop=stop, every=8))
    assert decoder.decoded == -(-max(ends) // 8) * 8, "of whole looks, up to the one that met the last end"
    assert len(parts) == 1 + decoder.decoded // 8
    assert list(stream(decoder, stop=stop, every=8)) == parts, "it rewinds"
    assert [sum(len(part[row]) for part in parts) for row in (0, 1)] == ends


def test_padding_of_the_vocabulary_is_never_chosen() -> None:
    model = nano(vocab_size=40)
    for sampling in (Sampling(), Sampling(3.0, seed=0)):
        (free,), (bound,) = (complete(model, [[1, 2, 3]], 28, sampling=sampling, vocab_size=size) for size in (None, 7))
        assert max(free) >= 7 > max(bound)


def test_what_cannot_be_is_an_error_in_one_line() -> None:
    model = nano(context=16)
    calls: list[tuple[Any, str]] = [
        (lambda: complete(model, [], 1), "at least one prompt"),
        (lambda: complete(model, [[1], []], 1), r"prompts of \[1, 0\] tokens"),
        (lambda: complete(model, [[1]], 0), "max_new_tokens is 0"),
        (lambda: complete(model, [[1], [1] * 10], 7), "10 prompt tokens and 7 new.*context of 16"),
        (lambda: complete(model, [[1], [600]], 2), "600: expected 0 to 511"),
    ]
    for call, words in calls:
        with pytest.raises(ConfigError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["dense", None])
@pytest.mark.parametrize("granularity", [1, 16])
def test_graphs_on_a_gpu_give_ragged_rows_the_tokens_of_the_cpu(cache: str | None, granularity: int) -> None:
    model = nano(context=64)
    prompts = prompts_of(model, [5, 17, 1])
    tokens, lengths = pad(prompts)
    for sampling in (Sampling(), Sampling(1.0, top_k=50, top_p=0.9, seed=1)):
        expected = list(stream(Decoder(model.cpu(), tokens, 58, lengths=lengths, sampling=sampling), every=8))
        options: dict[str, Any] = {"cache": cache, "runner": "graph", "granularity": granularity, "sampling": sampling}
        decoder = Decoder(model.cuda(), tokens.cuda(), 58, lengths=lengths, **options)
        for _ in range(2):
            assert list(stream(decoder, every=8)) == expected
