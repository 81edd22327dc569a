"""Hypothesis strategies that several test files share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tinylm.config import ModelConfig, RopeScaling

rope_scalings = st.one_of(
    st.none(),
    st.builds(RopeScaling, st.just("linear"), st.sampled_from([1.0, 2.0, 7.5])),
    st.builds(
        RopeScaling,
        kind=st.just("llama3"),
        factor=st.sampled_from([1.0, 4.0, 8.0]),
        low_freq_factor=st.just(1.0),
        high_freq_factor=st.sampled_from([2.0, 4.0]),
        original_context=st.sampled_from([4, 16, 64]),
    ),
)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> ModelConfig:
    """Small models of every style: each norm, placement, MLP, position, grouping; `fixed` fields as given."""
    kv_heads = draw(st.integers(1, 3))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(2, 40)),
        "dim": draw(st.sampled_from([8, 12, 32])),
        "layers": draw(st.integers(1, 3)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 4, 8])),
        "d_ff": draw(st.integers(1, 24)),
        "context": 24,
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_placement": draw(st.sampled_from(["pre", "post"])),
        "mlp": draw(st.sampled_from(["swiglu", "gelu"])),
        "positions": draw(st.sampled_from(["rope", "learned", "none"])),
        "rope_scaling": draw(rope_scalings),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "init_std": 0.3,  # wide, so that a wrong mask or position shows in the logits
    }
    return ModelConfig(**{**fields, **fixed})


@st.composite
def splits(draw: st.DrawFn, total: int) -> list[int]:
    """Positive whole numbers that sum to `total`."""
    cuts = sorted(draw(st.sets(st.integers(1, total - 1)))) if total > 1 else []
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]
