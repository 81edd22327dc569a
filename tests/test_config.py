from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs

from tinylm.config import PRESETS, ConfigError, ModelConfig, RopeScaling, preset

SMALL: dict[str, Any] = {"vocab_size": 8, "dim": 12, "layers": 1, "heads": 4, "d_ff": 8, "context": 16}


def one_line(error: pytest.ExceptionInfo[ConfigError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


@given(configs())
def test_a_valid_config_is_frozen_and_survives_a_copy(config: ModelConfig) -> None:
    assert ModelConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 1  # type: ignore[misc]


def test_heads_and_head_dim_follow_from_the_others() -> None:
    config = ModelConfig(**{**SMALL, "dim": 16})
    assert (config.kv_heads, config.head_dim) == (4, 4)


@given(
    st.sampled_from(["vocab_size", "dim", "layers", "heads", "d_ff", "context", "kv_heads", "head_dim"]),
    st.sampled_from([-1, -8, 2.0, "8", True]),
)
def test_a_size_that_is_no_positive_whole_number_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(**{**SMALL, "head_dim": 4, field: value})
    one_line(error, field, repr(value))


@given(dim=st.integers(1, 200), heads=st.integers(1, 20))
def test_heads_must_divide_the_width(dim: int, heads: int) -> None:
    if dim % heads == 0:
        assert ModelConfig(**{**SMALL, "dim": dim, "heads": heads}, positions="none").head_dim == dim // heads
        return
    with pytest.raises(ConfigError) as error:
        ModelConfig(**{**SMALL, "dim": dim, "heads": heads}, positions="none")
    one_line(error, str(dim), str(heads), "divisor")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kv_heads": 3}, ["kv_heads 3", "heads 4"]),
        ({"head_dim": 3}, ["head_dim 3", "even"]),
        ({"norm_placement": "sandwich"}, ["sandwich", "pre, post"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"dropout": -0.1}, ["dropout"]),
        ({"norm_eps": 0.0}, ["norm_eps"]),
        ({"rope_theta": -1.0}, ["rope_theta"]),
        ({"init_std": float("nan")}, ["init_std"]),
    ],
)
def test_what_cannot_be_built_says_so_in_one_line(wrong: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(**{**SMALL, "head_dim": 4, **wrong})
    one_line(error, *words)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"kind": "yarn"}, "yarn"),
        ({"factor": 0.5}, "0.5"),
        ({"low_freq_factor": 4.0}, "high_freq_factor"),
        ({"original_context": 0}, "original_context"),
    ],
)
def test_rope_scaling_that_cannot_be(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as error:
        RopeScaling(**{"kind": "llama3", "factor": 8.0, **wrong})
    one_line(error, word)


def test_presets_are_as_published() -> None:
    shapes = {name: (p.dim, p.layers, p.heads, p.kv_heads, p.d_ff, p.vocab_size, p.tied) for name, p in PRESETS.items()}
    assert shapes["tiny"] == (384, 6, 6, 6, 1536, 4096, True)
    assert shapes["small"] == (768, 12, 12, 12, 2048, 32_000, True)
    assert shapes["stories-17m"] == (512, 4, 16, 16, 1344, 10_000, False)
    assert shapes["gpt2-124m"] == (768, 12, 12, 12, 3072, 50_304, True)
    assert shapes["llama-3-8b"] == (4096, 32, 32, 8, 14_336, 128_256, False)
    assert [PRESETS[n].context for n in ("stories-17m", "gpt2-124m", "llama-3-8b")] == [256, 1024, 8192]
    assert PRESETS["llama-3-8b"].rope_theta == 5e5
    for name in ("tiny", "small"):  # the sweep of contexts ends at 8192, with some tokens decoded after it
        assert PRESETS[name].context >= 8192 + 64


def test_an_unknown_preset_or_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        preset("tinny")
    one_line(error, "tinny", *PRESETS)
    with pytest.raises(ConfigError) as error:
        preset("tiny", width=3)
    one_line(error, "width", "dim")


def test_overrides_carry_what_followed_from_them() -> None:
    assert preset("llama-3-8b", context=16_384).context == 16_384
    assert preset("tiny", heads=12).head_dim == 32 and preset("tiny", heads=12).kv_heads == 12
    assert preset("tiny", dim=96).head_dim == 16
    assert preset("nano", heads=8).kv_heads == 2, "grouping that was chosen stays"
    with pytest.raises(ConfigError, match="heads 5 does not divide dim 384"):
        preset("tiny", heads=5)
