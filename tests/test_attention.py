from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import rope_scalings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinylm import attention
from tinylm.attention import Rope, rope_frequencies, rotate, sdpa, sdpa_backend
from tinylm.config import ModelConfig, RopeScaling

EPS64 = torch.finfo(torch.float64).eps


def rope(head_dim: int = 8, context: int = 64, scaling: RopeScaling | None = None) -> Rope:
    config = ModelConfig(
        vocab_size=2,
        dim=8,
        layers=1,
        heads=1,
        head_dim=head_dim,
        d_ff=8,
        context=context,
        rope_scaling=scaling,
    )
    return Rope(config)


def rotated(module: Rope, vector: Tensor, position: int) -> Tensor:
    """vector (D,) at a position."""
    x = vector.view(1, 1, 1, -1)
    _, rotation = module(x[:, 0], torch.tensor([[position]]))
    assert rotation is not None
    return rotate(x, rotation).flatten()


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Query by query, from the definition."""
    heads, kv_heads, new, span = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    allowed = torch.ones(q.shape[0], 1, new, span, dtype=torch.bool) if mask is None else mask
    allowed = allowed.expand(q.shape[0], 1, new, span)
    y = torch.empty_like(q)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        for row in range(q.shape[0]):
            for t in range(new):
                seen = [s for s in range(span) if allowed[row, 0, t, s] and (not is_causal or s <= t)]
                scores = torch.stack([q[row, head, t] @ k[row, kv, s] for s in seen]) / math.sqrt(q.shape[3])
                y[row, head, t] = scores.softmax(0) @ v[row, kv, seen]
    return y


# RoPE


@given(
    half=st.integers(1, 8),
    scaling=rope_scalings,
    a=st.integers(0, 31),
    b=st.integers(0, 31),
    shift=st.integers(0, 32),
    seed=st.integers(0, 2**31),
)
def test_a_score_depends_on_the_distance_alone(
    half: int, scaling: RopeScaling | None, a: int, b: int, shift: int, seed: int
) -> None:
    """Fails for tables of one convention and a rotation of the other, which looks fine: it keeps lengths."""
    torch.manual_seed(seed)
    module = rope(2 * half, 64, scaling)
    q, k = torch.randn(2, 2 * half, dtype=torch.float64)
    near = rotated(module, q, a) @ rotated(module, k, b)
    far = rotated(module, q, a + shift) @ rotated(module, k, b + shift)
    # Angles reach 64 radians, so they and their sines err by 64 roundings, in each of the four.
    torch.testing.assert_close(near, far, rtol=0, atol=256 * EPS64 * float(q.norm() * k.norm()))


@given(half=st.integers(1, 8), position=st.integers(0, 63), seed=st.integers(0, 2**31))
def test_pairs_are_split_half_and_turn_by_their_angle(half: int, position: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2 * half, dtype=torch.float64)
    angles = position * rope_frequencies(2 * half, 10_000.0)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag))
    torch.testing.assert_close(rotated(rope(2 * half), x, position), expected, rtol=0, atol=1e-12)


def test_forward_without_positions_counts_from_zero() -> None:
    module, x = rope(), torch.randn(2, 5, 8)
    _, counted = module(x, None)
    _, given_ = module(x, torch.arange(5).expand(2, 5))
    assert counted is not None and given_ is not None
    assert torch.equal(counted.expand_as(given_), given_)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tables_have_the_models_dtype_and_are_rounded_once(dtype: torch.dtype) -> None:
    module = rope(64, 4096)
    tables = module.tables(torch.device("cpu"), dtype)
    exact = module.tables(torch.device("cpu"), torch.float64)
    assert tables.dtype == dtype and tables.shape == (2, 4096, 64)
    assert torch.equal(tables, exact.to(dtype))
    assert module.tables(torch.device("cpu"), dtype) is tables, "made once"
    _, rotation = module(torch.zeros(1, 3, 8, dtype=dtype), None)
    assert rotation is not None
    x = torch.randn(1, 1, 3, 64).to(dtype)
    assert rotate(x, rotation).dtype == dtype
    # Two products of a table's entry and a sum, each rounded, of numbers no larger than |pair|.
    exact_turn = rotate(x.double(), exact[:, None, None, :3])
    assert (rotate(x, rotation) - exact_turn).abs().max() <= 4 * torch.finfo(dtype).eps * x.double().abs().max() * 2


def test_tables_made_in_inference_mode_serve_training() -> None:
    module = rope()
    with torch.inference_mode():
        module.tables(torch.device("cpu"), torch.float32)
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    _, rotation = module(torch.zeros(1, 4, 8), None)
    assert rotation is not None
    rotate(x, rotation).sum().backward()


def test_linear_scaling_divides_and_llama3_keeps_the_fast_and_divides_the_slow() -> None:
    plain = rope_frequencies(128, 5e5)
    assert torch.equal(rope_frequencies(128, 5e5, RopeScaling("linear", 4.0)), plain / 4)
    scaling = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    scaled = rope_frequencies(128, 5e5, scaling)
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192
    assert fast.any() and slow.any() and (~fast & ~slow).any()
    assert torch.equal(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8, rtol=1e-15, atol=0)
    assert (scaled.diff() < 0).all(), "blended without a jump: still falling"


# SDPA


@given(
    rows=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    new=st.integers(1, 4),
    past=st.integers(0, 4),
    style=st.sampled_from(["all", "causal", "mask"]),
    seed=st.integers(0, 2**31),
    force=st.booleans(),
)
def test_sdpa_is_its_definition(
    rows: int, kv_heads: int, group: int, new: int, past: int, style: str, seed: int, force: bool
) -> None:
    """`force`: keys and values expanded, as on cards whose fused kernels take no grouped queries."""
    torch.manual_seed(seed)
    span = new if style == "causal" else new + past
    q = torch.randn(rows, new, kv_heads * group, 4, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(2, rows, kv_heads, span, 4, dtype=torch.float64)
    mask = None
    if style == "mask":
        mask = torch.rand(rows, 1, new, span) < 0.5
        mask[..., 0] = True  # as in a cache: the first entry is seen by all
    with pytest.MonkeyPatch.context() as patch:
        if force:
            patch.setattr(attention, "_gqa_is_fused", lambda q, mask: False)
        y = sdpa(q, k, v, mask=mask, is_causal=style == "causal")
    assert y.shape == q.shape
    # fp64: a few dozen roundings of numbers of size 5 at most.
    torch.testing.assert_close(y, attention_reference(q, k, v, mask, style == "causal"), rtol=0, atol=1000 * EPS64)


@pytest.mark.parametrize("new", [1, 5])
def test_gradients_flow_through_grouped_queries(new: int) -> None:
    q = torch.randn(2, 6, new, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, new, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *qkv: sdpa(*qkv, is_causal=new > 1), (q, k, v))


def test_no_path_but_cpu_and_flash_gets_grouped_queries() -> None:
    """Elsewhere SDPA would fall to its math path: keys and values are expanded there."""

    class Card:
        """Enough of a query on a CUDA device."""

        def __init__(self, dtype: torch.dtype, head_dim: int = 64) -> None:
            self.device, self.dtype, self.shape = torch.device("cuda"), dtype, (1, 8, 4, head_dim)

    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        for capability, fused in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
            patch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
            assert attention._gqa_is_fused(Card(torch.float16), None) == fused  # type: ignore[arg-type]
        assert not attention._gqa_is_fused(Card(torch.float16), mask)  # type: ignore[arg-type]
        assert not attention._gqa_is_fused(Card(torch.float32), None)  # type: ignore[arg-type]
        assert not attention._gqa_is_fused(Card(torch.float16, 512), None)  # type: ignore[arg-type]


def test_one_query_folds_its_group_instead_of_expanding() -> None:
    q, k = torch.randn(2, 6, 1, 4), torch.randn(2, 2, 9, 4)
    folded, keys, values, enable_gqa = attention._arrange(q, k, k, None)
    assert folded.shape == (2, 2, 3, 4) and keys is k and values is k and not enable_gqa


FUSED_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("allowed", [None, SDPBackend.MATH])
def test_the_named_backend_is_the_one_that_runs(new: int, kv_heads: int, allowed: SDPBackend | None) -> None:
    q, k = torch.randn(1, 4, new, 8), torch.randn(1, kv_heads, 6, 8)
    with sdpa_kernel(allowed or [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        name = sdpa_backend(q, k, k, is_causal=new > 1)
        with torch.profiler.profile() as profile:
            sdpa(q, k, k, is_causal=new > 1)
    ran = {event.key for event in profile.key_averages()}
    assert name == ("cpu-flash" if FUSED_CPU in ran else "math")
    assert name == "math" or allowed is None


def test_a_torch_that_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    q = torch.randn(1, 2, 3, 4)
    assert sdpa_backend(q, q, q) == "unknown"
