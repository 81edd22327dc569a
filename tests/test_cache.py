from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from strategies import configs, splits
from torch import Tensor

from tinylm.cache import LAYOUTS, Batch, DenseCache, Stream, make_cache
from tinylm.cache.dense import DensePlan
from tinylm.config import ConfigError, ModelConfig, preset
from tinylm.model import Transformer

STREAMS = (Stream("k", 2, 4), Stream("v", 2, 4))
# fp64, logits of size 10, thousands of roundings at most; a wrong mask is off by far more.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-9}


def dense(context: int = 16, batch: int = 2, **more: Any) -> DenseCache:
    cache = make_cache(
        "dense",
        STREAMS,
        layers=1,
        batch=batch,
        context=context,
        device="cpu",
        dtype=more.get("dtype", torch.float64),
    )
    assert isinstance(cache, DenseCache)
    return cache


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).double().eval()


@settings(max_examples=40)
@given(st.data(), configs(), st.integers(1, 3), st.integers(1, 10), st.integers(0, 2**31))
@torch.no_grad()
def test_any_split_into_steps_is_the_whole(
    data: st.DataObject, config: ModelConfig, rows: int, total: int, seed: int
) -> None:
    """Prefill, chunks of a prefill, decode: causal attention, positions and masks agree with one pass."""
    model = model_of(config, seed)
    tokens = torch.randint(config.vocab_size, (rows, total))
    whole, cache, start = model(tokens), model.new_cache(batch=rows), 0
    for new in data.draw(splits(total)):
        logits = model.step(Batch.at(tokens[:, start : start + new], start), cache, last_only=False)
        torch.testing.assert_close(logits, whole[:, start : start + new], **CLOSE)
        start += new


@settings(max_examples=30)
@given(st.data(), configs(), st.integers(0, 2**31))
@torch.no_grad()
def test_ragged_rows_do_not_see_each_other_or_their_padding(
    data: st.DataObject, config: ModelConfig, seed: int
) -> None:
    """Rows of different lengths in one batch: each gets what it would get alone."""
    model = model_of(config, seed)
    targets = data.draw(st.lists(st.integers(2, 8), min_size=1, max_size=3))
    texts = [torch.randint(config.vocab_size, (1, length)) for length in targets]
    whole = [model(text)[0] for text in texts]
    cache, starts = model.new_cache(batch=len(texts)), [0] * len(texts)
    while min(start - target for start, target in zip(starts, targets, strict=True)) < 0:
        if any(start == target for start, target in zip(starts, targets, strict=True)):
            break  # a row that has ended has no next token; the others are as good as a smaller batch
        counts = [data.draw(st.integers(1, target - start)) for start, target in zip(starts, targets, strict=True)]
        new = max(counts) + data.draw(st.integers(0, 2))
        padded = torch.randint(config.vocab_size, (len(texts), new))  # padding is any token
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            padded[row, :count] = texts[row][0, start : start + count]
        batch = Batch.ragged(padded, starts, counts)
        before = {name: stream.clone() for name, stream in cache.streams.items()}  # type: ignore[attr-defined]
        last = model.step(batch, cache)
        for name, stream in before.items():  # the same step again, for all its logits
            cache.streams[name].copy_(stream)  # type: ignore[attr-defined]
        every = model.step(batch, cache, last_only=False)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            torch.testing.assert_close(every[row, :count], whole[row][start : start + count], **CLOSE)
            torch.testing.assert_close(last[row, 0], whole[row][start + count - 1], **CLOSE)
            starts[row] += count


def test_one_query_against_a_longer_cache_has_no_mask_and_is_not_causal() -> None:
    """is_causal aligns top left, so the one query would see entry 0 only; a mask would keep flash away."""
    plan = dense().plan(Batch.at(torch.zeros(2, 1, dtype=torch.int64), 9))
    assert plan == DensePlan(slice(9, 10), 10, None, is_causal=False)


def test_the_first_chunk_is_causal_and_the_second_has_a_mask_aligned_bottom_right() -> None:
    cache = dense()
    assert cache.plan(Batch.at(torch.zeros(2, 4, dtype=torch.int64), 0)) == DensePlan(slice(0, 4), 4, None, True)
    plan = cache.plan(Batch.at(torch.zeros(2, 2, dtype=torch.int64), 4))
    assert not plan.is_causal and plan.mask is not None
    assert plan.mask.tolist() == [[True] * 5 + [False], [True] * 6]


def test_ragged_rows_and_buckets_get_a_mask_from_the_lengths_on_the_device() -> None:
    batch = Batch(
        torch.zeros(2, 1, dtype=torch.int64),
        torch.tensor([[2], [5]]),
        torch.tensor([3, 6]),
        span=8,
        uniform=False,
    )
    plan = dense().plan(batch)
    assert not plan.is_causal and plan.mask is not None
    assert plan.mask.shape == (2, 1, 1, 8) and plan.mask.sum(-1).flatten().tolist() == [3, 6]


def test_padding_tokens_see_their_rows_entries_and_nothing_stale() -> None:
    plan = dense().plan(Batch.ragged(torch.zeros(2, 3, dtype=torch.int64), [0, 3], [1, 2]))
    assert plan.mask is not None
    assert plan.mask[:, 0].sum(-1).tolist() == [[1, 1, 1], [4, 5, 5]]
    assert plan.mask[:, 0].long().diff(dim=-1).le(0).all(), "a prefix of the row each"


@pytest.mark.parametrize("uniform", [True, False])
def test_attention_reads_the_span_alone(uniform: bool) -> None:
    """Not the whole capacity: that would be the time of the longest context for every token."""
    cache, seen = dense(context=1000), []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool) -> Tensor:
        seen.append((k, v))
        return q

    new = torch.randn(2, 2, 1, 4, dtype=torch.float64)
    batch = Batch(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[6], [6]]), torch.tensor([7, 7]), 7, uniform)
    cache.attend(0, new, new, new, cache.plan(batch), kernel)
    ((k, v),) = seen
    assert k.shape == v.shape == (2, 2, 7, 4)
    assert k.data_ptr() == cache.streams["k"].data_ptr(), "a view, no copy"
    assert torch.equal(k[:, :, 6:], new) and k[:, :, :6].eq(0).all()


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_caches_dtype_is_the_models_unless_declared(dtype: torch.dtype) -> None:
    model = Transformer(preset("nano", layers=1)).to(dtype)
    assert model.new_cache(context=4).dtype == dtype
    assert model.new_cache(context=4).streams["k"].dtype == dtype  # type: ignore[attr-defined]
    assert model.new_cache(context=4, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_a_declared_dtype_rounds_what_is_stored_and_nothing_else(ragged: bool) -> None:
    model = model_of(preset("nano", layers=1))
    tokens = torch.randint(512, (2, 6))
    cache = model.new_cache(batch=2, context=8, dtype=torch.bfloat16)
    batch = Batch.ragged(tokens, [0, 0], [6, 6]) if ragged else Batch.at(tokens, 0)
    logits = model.step(batch, cache, last_only=False)
    assert logits.dtype == torch.float64
    error = (logits - model(tokens)).abs().max()
    assert 0 < error < 0.05


def test_fresh_room_is_zero_since_a_mask_does_not_stop_nan() -> None:
    """What is hidden still enters as 0 * value, and 0 * NaN is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
        try:
            cache = dense()
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(stream.eq(0).all() for stream in cache.streams.values())
    cache.streams["v"].fill_(torch.nan)
    cache.reset()
    assert all(stream.eq(0).all() for stream in cache.streams.values())


@given(configs(), st.integers(1, 4), st.integers(1, 24))
def test_bytes_are_what_is_allocated(config: ModelConfig, rows: int, context: int) -> None:
    model = Transformer(config)
    for dtype in (None, torch.bfloat16):
        cache = model.new_cache(batch=rows, context=context, dtype=dtype)
        assert cache.nbytes == model.kv_bytes(rows, context, dtype)
        streams = cache.streams.values()  # type: ignore[attr-defined]
        assert cache.nbytes == sum(stream.untyped_storage().nbytes() for stream in streams)


def test_what_does_not_fit_is_an_error_in_one_line() -> None:
    zeros = torch.zeros(2, 5, dtype=torch.int64)
    for call, words in (
        (lambda: dense(context=4).plan(Batch.at(zeros, 0)), "5 tokens.*context=5"),
        (lambda: dense(batch=3).plan(Batch.at(zeros, 0)), "2 rows.*batch=2"),
        (lambda: Transformer(preset("nano")).new_cache(context=5000), "5000 tokens.*4096"),
        (lambda: Transformer(preset("nano")).new_cache("pagd"), f"pagd.*{', '.join(LAYOUTS)}"),
        (lambda: dense(batch=0), "batch 0"),
        (lambda: Batch.ragged(zeros, [0, 0], [0, 6]), "counts"),
        (lambda: Batch.ragged(zeros, [0], [1]), "give 2"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


class DenseAgainstAList(RuleBasedStateMachine):
    """Rows that grow at their own pace, against lists of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.rows = dense(context=12, batch=2), [[], []]  # type: tuple[DenseCache, list[list[float]]]
        self.next = 0.0

    @rule(counts=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.integers(0, 1))
    def append(self, counts: tuple[int, int], padding: int) -> None:
        starts, new = [len(row) for row in self.rows], max(counts) + padding
        assume(max(starts) + new <= 12)
        batch = Batch.ragged(torch.zeros(2, new, dtype=torch.int64), starts, list(counts))
        values = torch.full((2, 2, new, 4), -1.0, dtype=torch.float64)
        for row, count in enumerate(counts):
            for t in range(count):
                self.next += 1
                values[row, :, t] = self.next
                self.rows[row].append(self.next)
        self.cache.attend(0, values, values, values, self.cache.plan(batch), lambda q, k, v, **_: q)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.rows = [[], []]

    @invariant()
    def holds_what_it_was_given(self) -> None:
        for row, expected in enumerate(self.rows):
            for stream in self.cache.streams.values():
                assert stream[0, row, 1, : len(expected), 2].tolist() == expected


TestDenseAgainstAList = DenseAgainstAList.TestCase
TestDenseAgainstAList.settings = settings(max_examples=20, stateful_step_count=10, deadline=None)
