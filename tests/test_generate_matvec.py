"""Runner `matvec`: for which models it is, its kernels against fp64, and on a GPU what it decodes.

What holds for every runner in bf16 is in test_generate_reference.py; sanitize_decode.py is for compute-sanitizer.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from launched import DEVICE, RARE, chi_square, decoded, never_synchronizing, prompts_of
from torch import Tensor

from tinylm.attention import rotate
from tinylm.config import preset
from tinylm.generate import Decoder, RunnerWarning, Sampling, prefill
from tinylm.generate.loop import Loop
from tinylm.generate.runners import kernels, matvec
from tinylm.generate.runners.matvec import splits, unsupported
from tinylm.generate.sampling import Noise, select
from tinylm.model import Transformer
from tinylm.ops import native

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: the kernels run nowhere else")
half = st.sampled_from(kernels.DTYPES)
ULP = 2.0**-24  # half a unit in the last place of fp32: the relative error of one rounding


# For which models it is


def loop_of(dtype: torch.dtype = torch.bfloat16, rows: int = 1, cache: str | None = "dense", **more: Any) -> Loop:
    ops = more.pop("ops", None)
    model = Transformer.build(preset("nano", **{"context": 16, **more}), dtype=dtype, ops=ops)
    tokens = torch.zeros(rows, 3, dtype=torch.int64)
    return Loop(model, tokens, [3] * rows, 4, cache=cache, granularity=1, sampling=Sampling(), vocab_size=512)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"norm": "layernorm"}, "of norm 'rmsnorm', this one has 'layernorm'"),
        ({"norm_placement": "post"}, "of norm_placement 'pre', this one has 'post'"),
        ({"mlp": "gelu"}, "of mlp 'swiglu', this one has 'gelu'"),
        ({"positions": "learned"}, "of positions rope, this one has 'learned'"),
        ({"bias": True}, "of bias False, this one has True"),
        ({"dtype": torch.float32}, "all in bf16 or all in fp16, this one is in float32"),
        ({"cache": None}, "a dense cache"),
        ({"rows": 2}, "one row, 2 are given"),
        ({"dim": 60, "heads": 4, "kv_heads": 4, "head_dim": 16}, "dim is 60: it needs a multiple of 8, at most 8192"),
        ({"head_dim": 12}, "head_dim is 12"),
        ({"heads": 66, "kv_heads": 1, "head_dim": 256}, "heads x head_dim is 16896: it needs a multiple of 8, at most"),
        ({"head_dim": 264}, "head_dim is 264: it needs a multiple of 8, at most 256"),
        ({"d_ff": 16_392}, "d_ff is 16392: it needs a multiple of 8, at most 16384"),
    ],
)
def test_what_it_is_not_for_is_told_in_one_line(more: dict[str, Any], words: str) -> None:
    reason = unsupported(loop_of(**more))
    assert reason is not None and words in reason and "\n" not in reason


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": torch.float16, "tied": False, "kv_heads": 1},
        {"ops": {"rmsnorm": "eager"}, "dim": 72, "heads": 3, "kv_heads": 3, "head_dim": 8, "d_ff": 8},
    ],
)
def test_what_it_is_for(more: dict[str, Any]) -> None:
    assert unsupported(loop_of(**more)) is None


def test_a_linear_of_another_kind_is_told() -> None:
    loop = loop_of()
    loop.model.ops = {**loop.model.ops, "linear": "other"}
    assert "of linear 'torch', this one has 'other'" in str(unsupported(loop))


def test_weights_that_it_cannot_read_are_told() -> None:
    loop = loop_of()
    down: Any = loop.model.blocks[1].get_submodule("mlp.down")
    shape = down.weight.shape
    down.weight = torch.nn.Parameter(torch.empty(shape[0] * shape[1] + 1, dtype=torch.bfloat16)[1:].view(shape))
    assert "aligned" in str(unsupported(loop))
    down.weight = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32))
    assert "in bfloat16, float32" in str(unsupported(loop))


def test_its_limits_are_those_of_the_kernels() -> None:
    header = (Path(__file__).parents[1] / "csrc" / "matvec.h").read_text()
    most = {name: int(value) for name, value in re.findall(r"(k\w+) = (\d+)", header)}
    assert most["kMostNormed"] == matvec.MOST_NORMED and most["kMostColumns"] == matvec.MOST_COLUMNS
    assert most["kMostHeadDim"] == matvec.MOST_HEAD_DIM
    assert splits(1, 1, 10_000) == most["kMostSplits"]
    assert 4 + (1 << most["kCountBits"]) // 2 == matvec.STANDING_WORDS


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 264))
def test_attention_is_shared_out_to_two_blocks_a_multiprocessor(
    kv_heads: int, group: int, multiprocessors: int
) -> None:
    count, blocks = splits(kv_heads * group, kv_heads, multiprocessors), kv_heads * math.ceil(group / 4)
    assert 1 <= count <= 128
    assert count == 1 or count * blocks <= 2 * multiprocessors
    assert count == 128 or (count + 1) * blocks > 2 * multiprocessors


@on_gpu
def test_another_runner_decodes_what_it_is_not_for() -> None:
    model = Transformer.build(preset("nano", context=16), device=DEVICE).eval()
    with pytest.warns(RunnerWarning, match="runner 'matvec' cannot run: .*float32.*; 'graph' decodes instead"):
        decoder = Decoder(model, prompts_of(model, 1, 5), 4, runner="matvec")
    assert decoder.runner == "graph" and decoder.run(4).shape == (1, 4)


# Its kernels


@pytest.fixture(scope="module", autouse=DEVICE == "cuda")
def library() -> None:
    missing = native.cuda_missing()
    if missing is not None:
        pytest.skip(missing)


def values(*size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal ones, rounded to dtype, amid NaN: what is read beyond them shows."""
    count = math.prod(size)
    storage = torch.full((count + 128,), math.nan, dtype=dtype, device=DEVICE)
    within = storage[64 : 64 + count].view(size)
    return within.copy_(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def wrote_only(within: Tensor) -> bool:
    storage = torch.empty(0, dtype=within.dtype, device=within.device).set_(within.untyped_storage())
    return bool(within.isfinite().all() and storage[:64].isnan().all() and storage[-64:].isnan().all())


def columns_up_to(most: int) -> st.SearchStrategy[int]:
    """Multiples of 8: small ones, and around those where a thread has one pack more."""
    edges = [8 * packs + more for packs in (256, 512, 1024, 1792, 2048) for more in (-8, 0, 8)]
    edges = [columns for columns in edges if columns <= most]
    return st.integers(1, 64).map(lambda n: 8 * n) | st.sampled_from(edges)


@st.composite
def sizes(draw: st.DrawFn, most: int) -> tuple[int, int]:
    """(columns, outputs): few rows of any length, or more to a block than it has on their way and adds up at once."""
    if draw(st.booleans()):
        return draw(columns_up_to(most)), draw(st.integers(1, 700))
    return draw(st.sampled_from([8, 264, 2056])), draw(st.integers(15_000, 15_100))


def standing_of(logits: Tensor, count: bool) -> Tensor:
    """What `matvec_logits` finds out of logits (V,) fp32, in int64 words; see `Standing` in csrc/matvec.h."""
    bits = (logits + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    ordered = torch.where(bits >> 31 == 1, ~bits & 0xFFFFFFFF, bits | 1 << 31)
    best = int(logits.argmax())
    standing = torch.zeros(matvec.STANDING_WORDS + len(logits), dtype=torch.int64, device=logits.device)
    key = int(ordered[best]) << 32 | 0xFFFFFFFF - best
    standing[0] = key - (key >> 63 << 64)
    if count:
        standing.view(torch.int32)[8 : 8 + 4096] = torch.bincount(ordered >> 20, minlength=4096).int()
    return standing


def rounding(columns: int) -> float:
    """Of a sum of so many products, relative to the sum of their sizes.

    Products of two halves are exact in fp32, and times a norm's weight rounded once. A thread adds up 8 to 64, a warp
    5 times, its block 3 times. The sum of squares is one like it, of which the root has half the error; what makes a
    scale of it has 5 roundings, each of half an ulp, and rsqrt, of two.
    """
    return (1.5 * (math.ceil(columns / 2048) * 8 + 5 + 3) + 1 + 5 + 4) * ULP


@on_gpu
@given(half, sizes(matvec.MOST_COLUMNS), st.booleans(), st.integers(1, 4))
def test_a_product_that_is_added(dtype: torch.dtype, size: tuple[int, int], overlap: bool, blocks: int) -> None:
    columns, outputs = size
    x, weight = values(columns, seed=1, dtype=dtype), values(outputs, columns, seed=2, dtype=dtype)
    out = values(outputs, seed=3, dtype=dtype)
    expected = out.double() + weight.double() @ x.double()
    torch.ops.tinylm.matvec_add(x, weight, out, overlap, blocks)
    terms = weight.double().abs() @ x.double().abs()
    bound = rounding(columns) * terms + (torch.finfo(dtype).eps / 2 + 2 * ULP) * expected.abs() + 2.0**-25
    assert wrote_only(out) and ((out.double() - expected).abs() <= bound).all()


@on_gpu
@given(half, sizes(matvec.MOST_NORMED), st.sampled_from(["half", "fp32", "swiglu"]), st.booleans(), st.integers(1, 4))
def test_a_product_behind_a_norm(
    dtype: torch.dtype, size: tuple[int, int], ending: str, overlap: bool, blocks: int
) -> None:
    (columns, outputs), swiglu, how = size, ending == "swiglu", (overlap, blocks)
    x, norm = values(columns, seed=1, dtype=dtype), values(columns, seed=2, dtype=dtype)
    weight = values(outputs * (2 if swiglu else 1), columns, seed=3, dtype=dtype)
    weight /= columns**0.5  # so that SwiGLU is neither 0 nor linear
    kind = torch.float32 if ending == "fp32" else dtype
    out = values(outputs, seed=4, dtype=kind)
    if ending == "fp32":
        standing = torch.zeros(matvec.STANDING_WORDS + outputs, dtype=torch.int64, device=DEVICE)
        torch.ops.tinylm.matvec_logits(x, norm, 1e-5, weight, out, standing, True, *how)
        assert torch.equal(standing, standing_of(out, True))
    else:
        torch.ops.tinylm.matvec_norm(x, norm, 1e-5, weight, out, swiglu, *how)
    normed = x.double() * (x.double().square().mean() + 1e-5).rsqrt() * norm.double()
    y, error = weight.double() @ normed, rounding(columns) * (weight.double().abs() @ normed.abs())
    expected, bound = y, error
    if swiglu:
        gate, up = y.chunk(2)
        expected = torch.nn.functional.silu(gate) * up
        # silu has a slope of at most 1.1; __expf is off by 2 + 1.16 |gate| ulp (CUDA programming guide).
        error_gate, error_up = error.chunk(2)
        bound = 1.1 * up.abs() * error_gate + torch.nn.functional.silu(gate).abs() * error_up + error_gate * error_up
        bound = bound + (10 + 4 * gate.abs()) * ULP * expected.abs()
    bound = bound + torch.finfo(kind).eps / 2 * expected.abs() * 1.01 + 2.0**-25
    assert wrote_only(out) and ((out.double() - expected).abs() <= bound).all()


@on_gpu
@settings(max_examples=200)
@given(
    st.data(), half, st.integers(1, 4), st.integers(1, 18), st.integers(1, 32).map(lambda n: 8 * n),
    st.integers(1, 20) | st.sampled_from([33, 128]), st.integers(0, 3),
)  # fmt: skip
def test_attention_at_any_length(
    data: st.DataObject, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, runs: int, spare: int
) -> None:
    """Every position a step can be at, borders of teams, turns and runs among them; twice, with the same bits."""
    turn = 4 * 256 // (8 if head_dim <= 64 else 16 if head_dim <= 128 else 32)  # positions of a block at once
    border = st.integers(1, 3 * min(runs, 44)).map(lambda n: n * turn) | st.sampled_from([8, 16, 32])
    length = data.draw(st.integers(1, 80) | st.tuples(border, st.integers(-1, 1)).map(sum))
    assume(length >= 1)
    heads, capacity, position = kv_heads * group, length + spare, length - 1
    keys = values(kv_heads, capacity, head_dim, seed=1, dtype=dtype)
    cached = values(kv_heads, capacity, head_dim, seed=2, dtype=dtype)
    keys[:, position:], cached[:, position:] = math.nan, math.nan
    before = keys.clone(), cached.clone()
    qkv = values((heads + 2 * kv_heads) * head_dim, seed=3, dtype=dtype)
    angles = torch.randn(capacity, head_dim // 2, generator=torch.Generator().manual_seed(4)) * 3
    cos, sin = angles.cos(), angles.sin()
    rope = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(dtype).to(DEVICE)
    place = torch.tensor([position], device=DEVICE)
    partials = torch.full((heads * runs * (head_dim + 2),), math.nan, device=DEVICE)
    arrived = torch.zeros(heads, dtype=torch.int32, device=DEVICE)
    outs = [values(heads, head_dim, seed=5, dtype=dtype) for _ in range(2)]
    for out in outs:
        torch.ops.tinylm.matvec_attention(qkv, rope, place, keys, cached, out, partials, arrived, runs, True)
    assert torch.equal(outs[0], outs[1]) and not arrived.any() and wrote_only(outs[0])
    for stream, then in ((keys, before[0]), (cached, before[1])):
        assert torch.equal(stream[:, :position], then[:, :position]) and stream[:, length:].isnan().all()
    q, k, v = qkv.view(-1, head_dim).double().split((heads, kv_heads, kv_heads))
    turned = rotate(torch.cat((q, k))[None, :, None], rope.double()[:, None, None, position : position + 1])[0, :, 0]
    q, k = turned.split((heads, kv_heads))
    eps = torch.finfo(dtype).eps
    # Two products, each rounded to fp32, and their sum, then to the cache's dtype.
    torch.testing.assert_close(keys[:, position].double(), k, rtol=eps / 2 * 1.01, atol=2.0**-20)
    assert torch.equal(cached[:, position].double(), v)
    k, v = (stream[:, :length].double().repeat_interleave(group, 0) for stream in (keys, cached))
    scores = (k * q[:, None]).sum(-1) / head_dim**0.5
    expected = (scores.softmax(-1)[:, None] @ v)[:, 0]
    # A score is a sum of head_dim products; of its error e a weight gets e, relatively; and so does the sum of weights.
    # Then a team's positions are added up one by one, and the parts, each rounded and shrunk.
    sizes = (k.abs() * q.abs()[:, None]).sum(-1) / head_dim**0.5
    off = (head_dim / 4 + 16) * ULP * sizes.amax() + 8 * ULP * scores.abs().amax()
    bound = (2 * off + (length / 8 + runs + 60) * 2 * ULP) * v.abs().amax() + eps / 2 * 1.01 * expected.abs()
    bound = bound + 2.0**-25
    assert ((outs[0].double() - expected).abs() <= bound).all()


def chosen(logits: Tensor, sampling: Sampling, place: int, noise: Noise) -> int:
    """By the kernel; that it leaves all as the next token needs it is seen to."""
    vocab = len(logits)
    top_k = sampling.top_k or 0 if sampling.temperature and (sampling.top_k or 0) < vocab else 0
    standing = standing_of(logits, top_k > 0)
    ids, position = torch.zeros(place + 3, dtype=torch.int64, device=DEVICE), torch.tensor([place - 1], device=DEVICE)
    table = torch.arange(vocab * 8, device=DEVICE).view(vocab, 8).to(torch.bfloat16)
    x = values(8, seed=0, dtype=torch.bfloat16)
    torch.ops.tinylm.matvec_choose(
        logits, standing, sampling.temperature, top_k, int(noise.starts), noise.stride, ids, position, table, x, False
    )
    token = int(ids[place])
    assert not standing[: matvec.STANDING_WORDS].any() and int(position) == place and torch.equal(x, table[token])
    assert ids.count_nonzero() == (token != 0)
    return token


def some_logits(kind: str, vocab: int, seed: int) -> Tensor:
    normal = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return {
        "normal": normal * 3, "few values": (normal * 2).round(), "all the same": torch.full_like(normal, -2.5),
        "near one another": 1 + normal * 2**-20, "zeros of both signs": (normal * 0).copysign(normal),
    }[kind]  # fmt: skip


KINDS = st.sampled_from(["normal", "few values", "all the same", "near one another", "zeros of both signs"])


@on_gpu
@given(KINDS, st.integers(1, 1500) | st.sampled_from([4097, 128_256]), st.integers(1, 9))
def test_the_likeliest_is_the_first_of_those(kind: str, vocab: int, place: int) -> None:
    logits = some_logits(kind, vocab, place)
    assert chosen(logits, Sampling(), place, Noise([0], vocab, DEVICE)) == int((logits + 0.0).argmax())


@on_gpu
@given(
    st.data(), KINDS, st.integers(1, 1500) | st.sampled_from([4097, 128_256]), st.integers(1, 9),
    st.sampled_from([1e-5, 0.3, 1.0, 50.0]), st.integers(0, 1 << 48),
)  # fmt: skip
def test_a_draw_is_that_of_any_runner(
    data: st.DataObject, kind: str, vocab: int, place: int, temperature: float, seed: int
) -> None:
    """For any k; but where two tokens are as good as one another to the rounding of either."""
    top_k = data.draw(st.none() | st.integers(1, vocab) | st.sampled_from([1, vocab, vocab + 1]))
    logits, sampling = some_logits(kind, vocab, place), Sampling(temperature, top_k=top_k, seed=seed)
    noise = Noise([seed], vocab, DEVICE)
    at = noise.at(torch.tensor([[place]], device=DEVICE))
    found, expected = chosen(logits, sampling, place, noise), int(select(logits[None], sampling, at))
    if found != expected:
        assert logits[found] >= logits.topk(min(top_k or vocab, vocab)).values[-1]
        ranks = logits.double() / temperature - at[0].double().log()
        # Of p and the noise each a few ulp; a quotient by the temperature, half an ulp of its own size.
        limit = 32 * ULP * (1 + ranks.abs().amax() + logits.abs().amax() / temperature)
        assert (ranks[found] - ranks[expected]).abs() <= limit


@on_gpu
def test_draws_have_the_distribution_of_the_eager_sampler() -> None:
    sampling = Sampling(0.8, top_k=5, seed=0)
    vocab, kept = 8, [7, 2, 5, 1, 4]  # the five likeliest, and what probability each has among them
    logits = torch.full((vocab,), -1.0, device=DEVICE)
    logits[kept] = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0], device=DEVICE)
    counts = torch.zeros(vocab, dtype=torch.int64)
    noise = Noise([0], vocab, DEVICE)
    for place in range(1, 1501):
        counts[chosen(logits, sampling, place, noise)] += 1
    masked = torch.full((vocab,), -torch.inf, dtype=torch.float64)
    masked[kept] = logits[kept].double().cpu() / 0.8
    expected = masked.softmax(0)
    assert int(counts.sum()) == int(counts[kept].sum()) and chi_square(counts[kept], expected[kept]) > RARE


@on_gpu
def test_what_would_make_a_kernel_wrong_is_an_error() -> None:
    x, weight, out = (torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for size in ((16,), (8, 16), (8,)))
    add = torch.ops.tinylm.matvec_add
    with pytest.raises(RuntimeError, match="x has the wrong shape"):
        add(x[:8], weight, out, False, 1)
    with pytest.raises(RuntimeError, match="out has the wrong dtype"):
        add(x, weight, out.float(), False, 1)
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        add(x[:8], weight.T[:8], out, False, 1)
    with pytest.raises(RuntimeError, match="12 columns"):
        add(x[:12], weight[:, :12].contiguous(), out, False, 1)
    with pytest.raises(RuntimeError, match="bf16 or fp16"):
        add(x.float(), weight.float(), out.float(), False, 1)
    with pytest.raises(RuntimeError, match="0 blocks"):
        add(x, weight, out, False, 0)


# What it decodes


def random_model(**more: Any) -> Transformer:
    torch.manual_seed(0)
    config = preset("nano", **{"context": 160, "init_std": 0.1, **more})
    return Transformer.build(config, dtype=torch.bfloat16, device=DEVICE).eval()


@on_gpu
@pytest.mark.parametrize(
    "more", [{}, {"kv_heads": 1, "tied": False, "layers": 3}, {"heads": 6, "kv_heads": 6, "head_dim": 24, "d_ff": 40}]
)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(1.0, top_k=50, seed=3), Sampling(1.0, top_p=0.9, seed=3)],
    ids=["greedy", "top k", "top p"],
)
def test_the_cache_is_as_if_recomputed_and_a_context_is_filled(more: dict[str, Any], sampling: Sampling) -> None:
    """Of the text it decodes itself, by an fp32 model of the same weights; rewound, the same tokens to the last."""
    model = random_model(**more)
    decoder = Decoder(model, prompts_of(model, 1, 3), 157, runner="matvec", sampling=sampling)
    assert decoder.runner == "matvec"
    found = decoded(decoder)
    decoder.rewind()
    parts = torch.cat((decoder.first, decoder.run(50), decoder.run(107)), 1)
    assert torch.equal(parts, found)
    reference = Transformer.build(model.config, device=DEVICE).eval()
    reference.load_state_dict(model.state_dict())
    cache = reference.new_cache()
    prefill(reference, torch.cat((prompts_of(model, 1, 3).to(DEVICE), found[:, :-1]), 1), cache)
    assert decoder.cache is not None
    for stream, content in cache.streams.items():  # type: ignore[attr-defined]
        # Layer n has seen 2 n additions to the stream, each rounded to bf16, and its own entries are rounded twice; a
        # walk of that many steps, of the size of the largest entry, and three times that for the largest of thousands.
        own = decoder.cache.streams[stream][..., : content.shape[3], :]  # type: ignore[attr-defined]
        eps = torch.finfo(torch.bfloat16).eps
        for layer, (here, there) in enumerate(zip(own, content, strict=True)):
            limit = 3 * eps * (2 * layer + 2) ** 0.5 * float(there.abs().max())
            torch.testing.assert_close(here.float(), there, rtol=0, atol=limit)


@on_gpu
def test_two_generations_in_turns_do_not_disturb_one_another() -> None:
    models = [random_model(), random_model(kv_heads=4)]
    models.append(models[0])
    make = [lambda m=m, n=n: Decoder(m, prompts_of(m, 1, n), 24, runner="matvec") for n, m in enumerate(models, 2)]
    alone = [decoder().run(24) for decoder in make]
    decoders = [decoder() for decoder in make]
    turns = [[decoder.run(count) for decoder in decoders] for count in (1, 7, 2, 14)]
    for parts, run in zip(zip(*turns, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(parts, 1), run)


@on_gpu
def test_it_never_waits_for_the_gpu() -> None:
    model = random_model()
    decoder = Decoder(model, prompts_of(model, 1, 5), 8, runner="matvec", sampling=Sampling(1.0, top_k=5, seed=0))
    decoder.run(4)
    with never_synchronizing():
        decoder.run(4)
