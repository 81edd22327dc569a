from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import RARE, chi_square
from scipy import stats
from torch import Tensor

from tinylm.config import ConfigError
from tinylm.generate import Noise, Sampling, select
from tinylm.generate.sampling import splitmix

MASK = (1 << 64) - 1


def noise_of(count: int, tokens: int, seed: int = 0) -> Tensor:
    """Noise of one row at places 0..count: (count, tokens)."""
    return Noise([seed] * count, tokens, "cpu").at(torch.arange(count)[:, None])


# Noise


def reference(state: int, number: int) -> int:
    """SplitMix64 as its authors wrote it, in whole numbers of Python: output `number` from 0, of `state`."""
    z = (state + number * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_splitmix_is_its_definition(states: list[int]) -> None:
    assert [value & MASK for value in splitmix(torch.tensor(states)).tolist()] == [reference(s, 0) for s in states]


def test_splitmix_gives_the_published_outputs() -> None:
    """Of seed 1234567, as other implementations print them; the first is that of one step."""
    outputs = [reference(1234567, number) for number in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seed=st.integers(-(2**70), 2**70), tokens=st.integers(1, 300), place=st.integers(0, 2**31), token=st.integers(0))
def test_noise_is_the_stream_of_the_rows_seed(seed: int, tokens: int, place: int, token: int) -> None:
    token %= tokens
    bits = reference(reference(seed & MASK, 0), place * tokens + token) & (MASK >> 1)
    expected = -math.log1p(-min(max(bits / 2**63, 2**-63), 1 - 2**-24))
    actual = Noise([seed], tokens, "cpu").at(torch.tensor([place]))[0, token].item()
    # fp32 rounds u to 2^-24 of itself, or next to 1 of 1; an exponential e of u moves by (e^e - 1) 2^-25 then.
    assert actual == pytest.approx(expected, rel=1e-6, abs=math.expm1(expected) * 2**-24)


@given(
    seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    places=st.lists(st.integers(0, 1000), min_size=4, max_size=4),
)
def test_a_rows_noise_is_its_own(seeds: list[int], places: list[int]) -> None:
    at = torch.tensor(places[: len(seeds)])[:, None]
    together = Noise(seeds, 37, "cpu").at(at)
    assert together.shape == (len(seeds), 37) and together.dtype == torch.float32
    for row, seed in enumerate(seeds):
        assert torch.equal(together[row : row + 1], Noise([seed], 37, "cpu").at(at[row]))


def test_noise_is_exponential() -> None:
    sample = noise_of(400, 1000).flatten().double().numpy()
    assert stats.kstest(sample, "expon").pvalue > RARE
    assert sample.min() > 0 and math.isfinite(sample.max())
    # Near 0, where the choice is made: the smallest of n is Exponential(n).
    smallest = noise_of(1000, 1000, seed=1).min(1).values.double().numpy()
    assert stats.kstest(smallest * 1000, "expon").pvalue > RARE


@pytest.mark.parametrize("along", ["tokens", "places", "rows"])
def test_neighbours_in_noise_are_independent(along: str) -> None:
    """Chi-square of pairs of neighbours, in 16 x 16 cells; rows have seeds in sequence."""
    sample = Noise(range(500), 200, "cpu").at(torch.tensor([3])) if along == "rows" else noise_of(500, 200)
    if along == "tokens":
        sample = sample.T
    cells = (sample.neg().expm1().neg() * 16).long().clamp(max=15)  # uniform, in 16 cells
    counts = torch.bincount((cells[::2] * 16 + cells[1::2]).flatten(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > RARE


@pytest.mark.parametrize("bits", [0, MASK >> 1])
def test_the_ends_of_the_range_choose_nothing_impossible(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 / 0 and 1 / infinity: a token of probability 0 would win, or tie, once in 2^24 or 2^63 draws."""
    noise = Noise([0], 3, "cpu")
    monkeypatch.setattr("tinylm.generate.sampling.splitmix", lambda x: torch.full_like(x, bits))
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert select(logits, Sampling(1.0, top_k=1), noise.at(torch.tensor([0]))).tolist() == [1]


# The choice


@given(
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_nothing_outside_top_k_and_top_p_is_chosen(
    temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(temperature, top_k, top_p)
    chosen = set(select(logits.expand(500, 10), sampling, noise_of(500, 10, seed)).tolist())
    order = logits[0].argsort(descending=True).tolist()
    allowed = order[: top_k or 10]
    probabilities = (logits[0].double() / temperature)[allowed].softmax(0).tolist()
    nucleus, total = [], 0.0
    for token, probability in zip(allowed, probabilities, strict=True):
        nucleus.append(token)
        total += probability
        # At a tie of the sum with p, fp32 and fp64 may differ by one token.
        if total >= (1.0 if top_p is None else top_p) + 1e-5:
            break
    assert chosen <= set(nucleus)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("over", ["places", "rows"])
def test_sampling_follows_the_probabilities(temperature: float, over: str) -> None:
    """Over the places of one row, and over the rows of a batch, whose seeds follow each other."""
    logits, count = torch.tensor([[2.0, 1.0, 0.0, -1.0, -6.0, -torch.inf]]), 20_000
    noise = noise_of(count, 6) if over == "places" else Noise(range(count), 6, "cpu").at(torch.tensor([7]))
    chosen = torch.bincount(select(logits.expand(count, 6), Sampling(temperature), noise), minlength=6)
    assert chosen[5] == 0
    expected = (logits[0, :5].double() / temperature).softmax(0) * count
    assert chi_square(chosen[:5], expected) > RARE


def test_no_temperature_is_greedy_and_the_likeliest_always_stays() -> None:
    logits, noise = torch.randn(50, 30), noise_of(50, 30)
    assert torch.equal(select(logits, Sampling(0.0, top_k=3)), logits.argmax(-1))
    assert torch.equal(select(logits, Sampling(5.0, top_k=1), noise), logits.argmax(-1))
    assert torch.equal(select(logits, Sampling(5.0, top_p=1e-9), noise), logits.argmax(-1))
    assert torch.equal(select(logits * 1e6, Sampling(1e-5), noise), logits.argmax(-1)), "no infinity, no NaN"


def test_values_that_cannot_work_are_errors_in_one_line() -> None:
    for values, words in (
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1e-30}, "temperature is 1e-30"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            Sampling(**values)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no noise"):
        select(torch.zeros(1, 2), Sampling(1.0))


def test_rows_have_seeds_in_sequence_and_without_a_seed_another_one_each_time() -> None:
    assert Sampling(seed=-1).seeds(3) == [-1, 0, 1]
    first, second = Sampling().seeds(2), Sampling().seeds(2)
    assert first != second and first[1] == first[0] + 1
