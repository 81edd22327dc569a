"""Runner `fused`: for which models it is, how its kernel shares out the work, and on a GPU what it decodes.

What holds for every runner in bf16 is in test_generate_reference.py; the tests here have what fp64 and several rows,
which this one does not do, prove of the others.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import DEVICE, RARE, chi_square, decoded, never_synchronizing, prompts_of
from torch import Tensor

from tinylm.config import ConfigError, preset
from tinylm.generate import Decoder, Noise, RunnerWarning, Sampling, complete, prefill
from tinylm.generate.loop import Loop
from tinylm.generate.runners.fused import Fused, shape_of, unsupported
from tinylm.model import Transformer
from tinylm.ops import native

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: the kernel runs nowhere else")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or os.environ.get("CXX")), reason="no C++ compiler here"
)
EPS = torch.finfo(torch.bfloat16).eps


# For which models it is


def loop_of(dtype: torch.dtype = torch.bfloat16, rows: int = 1, **more: Any) -> Loop:
    options: dict[str, Any] = {name: more.pop(name) for name in ("cache", "sampling") if name in more}
    model = Transformer.build(preset("nano", **{"context": 16, **more}), dtype=dtype)
    tokens = torch.zeros(rows, 3, dtype=torch.int64)
    asked = {"cache": "dense", "sampling": Sampling(), **options}
    return Loop(model, tokens, [3] * rows, 4, granularity=1, vocab_size=512, **asked)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"norm": "layernorm"}, "of norm 'rmsnorm', this one has 'layernorm'"),
        ({"norm_placement": "post"}, "of norm_placement 'pre', this one has 'post'"),
        ({"mlp": "gelu"}, "of mlp 'swiglu', this one has 'gelu'"),
        ({"bias": True}, "of bias False, this one has True"),
        ({"positions": "learned"}, "of positions rope or none, this one has 'learned'"),
        ({"dtype": torch.float32}, "all in bf16 or all in fp16, this one is in float32"),
        ({"cache": None}, "with a dense cache"),
        ({"rows": 2}, "one row, 2 are given"),
        ({"sampling": Sampling(1.0, top_p=0.9)}, "not with top_p"),
    ],
)
def test_what_it_is_not_for_is_told_in_one_line(more: dict[str, Any], words: str) -> None:
    reason = unsupported(loop_of(**more))
    assert reason is not None and words in reason and "\n" not in reason


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": torch.float16, "positions": "none", "tied": False},
        {"kv_heads": 1, "sampling": Sampling(1.0, top_k=5, top_p=1.0)},
        {"sampling": Sampling(0.0, top_p=0.9)},
    ],
)
def test_what_it_is_for(more: dict[str, Any]) -> None:
    assert unsupported(loop_of(**more)) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is here")
def test_on_a_cpu_the_others_are_named() -> None:
    model = Transformer(preset("nano", context=16))
    with pytest.raises(ConfigError, match=r"runner 'fused' with a model on cpu: it runs on cuda; .*use one of eager"):
        Decoder(model, prompts_of(model, 1, 3), 4, runner="fused")


# How the work is shared out

PRODUCTS = ("units", "rows", "run", "skip", "apart", "width", "parts", "columns", "stride", "each", "slot")
CARDS = st.sampled_from([(36, 65_536), (72, 65_536), (128, 101_376), (132, 232_448), (148, 232_448)])
CLUSTERS = st.sampled_from([1, 2, 4])


@st.composite
def shapes(draw: st.DrawFn) -> list[int]:
    """dim, layers, heads, kv_heads, head_dim, d_ff, vocab that the kernel takes."""
    head_dim, kv_heads = 8 * draw(st.integers(1, 16)), draw(st.integers(1, 8))
    group = draw(st.integers(1, max(1, min(16, 1024 // (head_dim * kv_heads)))))
    if head_dim * kv_heads * group > 1024:
        kv_heads = group = 1
    dims = [8 * draw(st.integers(1, 128)), draw(st.integers(1, 24)), kv_heads * group, kv_heads, head_dim]
    # With d_ff above 4,096 some shapes do not fit a Turing card's 64 KB.
    return [*dims, 8 * draw(st.integers(1, 512)), draw(st.integers(1, 60_000))]


@needs_compiler
@settings(max_examples=60)
@given(shapes(), st.booleans(), CARDS, CLUSTERS, st.integers(1, 40_000), st.integers(1, 16), st.integers(16, 512))
def test_every_number_of_every_row_is_one_warps_and_nothing_overlaps(
    shape: list[int], sampled: bool, card: tuple[int, int], cluster: int, end: int, few: int, target: int
) -> None:
    native.load()
    blocks, shared = card
    if shared < 200_000:  # an older card, without clusters
        cluster = 1
    blocks = blocks // cluster * cluster
    dim, _, heads, kv_heads, head_dim, d_ff, vocab = shape
    plan = torch.ops.tinylm.decode_plan(shape, sampled, blocks, cluster, shared, end, few, target)
    words, taken, tile, splits, span, results = plan[:6]
    # What runner `fused` asks for the size of the exchange.
    assert words <= torch.ops.tinylm.decode_plan(shape, sampled, card[0], 1, shared, end, few, target)[0]
    assert taken <= shared - 4096 and tile >= 8, "the kernel's own shared memory is 4 KB at most"
    runs = splits // results  # of a result, which some of the last one may lack
    assert (splits - runs) * span < end <= splits * span and splits * kv_heads <= blocks
    assert runs == cluster or runs == splits == 1
    rows_of = [(heads + 2 * kv_heads) * head_dim, dim, 2 * d_ff, dim, vocab + vocab % 2]
    places = []
    for n, total in enumerate(rows_of):
        m = dict(zip(PRODUCTS, plan[6 + n * len(PRODUCTS) :], strict=False))
        rows, most = [], 0
        for block in range(blocks):
            begin, stop = block * m["units"] // blocks, (block + 1) * m["units"] // blocks
            for first in range(m["stride"]):  # the warps that share a unit together
                units = range(begin + first, stop, m["stride"])
                assert len(units) <= m["each"]
                most = max(most, m["parts"] * (first + 1) if units else 0)
                for unit in units:
                    rows += [unit + unit // m["run"] * m["skip"] + r * m["apart"] for r in range(m["rows"])]
        assert sorted(rows) == list(range(total))
        assert m["parts"] * m["stride"] == 16 and m["columns"] % 256 == 0 and m["columns"] <= 1024
        assert m["parts"] * m["columns"] >= m["width"] == [dim, heads * head_dim, dim, d_ff, dim][n]
        if m["slot"] >= 0:
            size = most * m["each"] * m["rows"] * m["columns"] * 2
            places.append((m["slot"], m["slot"] + size))
    places.append((taken - 8 * tile * head_dim, taken))  # keys and values
    places.sort()
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))


@needs_compiler
@pytest.mark.parametrize(
    ("at", "value", "words"),
    [(0, 1032, "dim must be"), (0, 12, "dim must be"), (4, 136, "head_dim must be"), (2, 17, "at most 16"),
     (5, 12, "d_ff must be"), (5, 8200, "d_ff must be"), (1, 65, "64 layers")],
)  # fmt: skip
def test_a_shape_that_it_does_not_take_is_refused(at: int, value: int, words: str) -> None:
    native.load()
    shape = [64, 2, 4, 1, 16, 192, 512]
    shape[at] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.tinylm.decode_plan(shape, False, 132, 1, 232_448, 1, 4, 192)


def test_presets_that_it_is_for() -> None:
    assert shape_of(preset("tiny"), 4000) == [384, 6, 6, 6, 64, 1536, 4000]


# On a GPU


def lively(**more: Any) -> tuple[Transformer, Transformer]:
    """A random model in bf16 whose logits differ, and the same in fp32."""
    torch.manual_seed(0)
    model = Transformer(preset("nano", **{"context": 48, "init_std": 0.2, **more})).eval()
    model = model.to(DEVICE, torch.bfloat16)
    reference = Transformer.build(model.config, device=DEVICE)
    reference.load_state_dict(model.state_dict())
    return model, reference.eval()


@torch.inference_mode()
def assert_near_the_likeliest(reference: Transformer, text: Tensor, prompt: int) -> None:
    """Every token after the prompt is the fp32 reference's choice, but for what rounding can move.

    The bound is that of test_generate_reference.decided: 2 eps sqrt(2 layers) |w_a - w_b| |h|, h the normed stream, w_a
    and w_b the head's rows of the two tokens.
    """
    logits, h = reference(text[:, :-1])[0, prompt - 1 :], reference.hidden(text[:, :-1])[0, prompt - 1 :]
    chosen, likeliest = text[0, prompt:], logits.argmax(-1)
    gap = (logits.gather(1, likeliest[:, None]) - logits.gather(1, chosen[:, None]))[:, 0]
    apart = (reference.head_weight[likeliest] - reference.head_weight[chosen]).norm(dim=-1)
    bound = 2 * EPS * (2 * reference.config.layers) ** 0.5 * apart * h.norm(dim=-1)
    assert (gap <= bound).all(), (gap / bound.clamp(min=1e-30)).max()


SHAPES: list[dict[str, Any]] = [
    {},
    {"kv_heads": 1, "positions": "none", "tied": False, "vocab_size": 333},
    {"dim": 72, "heads": 3, "kv_heads": 3, "head_dim": 24, "d_ff": 1344, "layers": 1},
    {"dim": 1024, "heads": 8, "kv_heads": 2, "head_dim": 128, "d_ff": 2816, "init_std": 0.05},
    {"vocab_size": 3, "layers": 1},
    {"heads": 10, "kv_heads": 1, "head_dim": 72, "layers": 1},
    # Each product's rows in each number of passes, shared by warps, and where they do not fit shared memory.
    {"dim": 384, "heads": 6, "kv_heads": 6, "head_dim": 64, "d_ff": 512, "vocab_size": 333, "init_std": 0.05},
    {"dim": 768, "heads": 12, "kv_heads": 12, "head_dim": 64, "d_ff": 2048, "init_std": 0.05},
    {
        "dim": 1024, "heads": 8, "kv_heads": 2, "head_dim": 128, "d_ff": 8192, "vocab_size": 60_001, "layers": 1,
        "init_std": 0.05,
    },
]  # fmt: skip


@on_gpu
@pytest.mark.parametrize("more", SHAPES, ids=str)
def test_prefill_hands_over_at_every_position_and_the_cache_is_as_if_recomputed(more: dict[str, Any]) -> None:
    model, reference = lively(**more)
    context = model.config.context
    whole = prompts_of(model, 1, context).to(DEVICE)
    for length in range(1, context + 1):
        decoder = Decoder(model, whole[:, :length], context - length, runner="fused")
        assert decoder.runner == "fused"
        text = torch.cat((whole[:, :length], decoded(decoder)), 1)
        assert_near_the_likeliest(reference, text, length)
        expected = model.new_cache()
        prefill(model, text[:, :context], expected)
        assert decoder.cache is not None
        for name, content in expected.streams.items():  # type: ignore[attr-defined]
            found = decoder.cache.streams[name].float()  # type: ignore[attr-defined]
            # Both rounded the stream in each of up to 2 layers additions; a key sums dim products of it.
            limit = 4 * EPS * (2 * model.config.layers) ** 0.5 * content.float().abs().max()
            assert (found - content.float()).abs().max() <= limit


@on_gpu
@pytest.mark.parametrize(
    ("length", "few", "target"),
    [
        (100, 12, 192), (700, 12, 192), (3000, 12, 192), (3000, 1, 192), (1200, 12, 100_000), (9000, 12, 100),
        (9000, 12, 192),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (16, 1), (16, 16)])
def test_long_texts(
    monkeypatch: pytest.MonkeyPatch, length: int, few: int, target: int, heads: int, kv_heads: int
) -> None:
    """One run of positions, several, of clusters, added up by all or apart, more than shared memory has room for."""
    monkeypatch.setattr(Fused, "few_splits", few)
    monkeypatch.setattr(Fused, "split_tokens", target)
    model, reference = lively(heads=heads, kv_heads=kv_heads, head_dim=256 // heads, dim=256, context=9100)
    prompt = prompts_of(model, 1, length).to(DEVICE)
    text = torch.cat((prompt, decoded(Decoder(model, prompt, 20, runner="fused"))), 1)
    assert_near_the_likeliest(reference, text, length)


@on_gpu
@torch.inference_mode()
def test_later_positions_may_outweigh_earlier_ones_by_any_factor() -> None:
    """300 tokens, then 300 of another kind that weigh more than 2^126 times as much: fp32 has no normal 2^-127."""
    model, reference = lively(context=700, positions="none", layers=1, kv_heads=4)
    for each in (model, reference):
        q, k, _ = each.get_parameter("blocks.0.attention.qkv.weight").chunk(3)
        q.copy_(16 * k)  # a token attends to its own kind
    h = reference.get_submodule("blocks.0.attention_norm")(reference.embed(torch.tensor([5, 9], device=DEVICE)))
    early, late = (h @ reference.get_parameter("blocks.0.attention.qkv.weight")[64:128].T).view(2, 4, 16)
    assert ((late - early) * late).sum(-1).min() * 16 / 16**0.5 > 140 * math.log(2)
    prompt = torch.tensor([[5] * 300 + [9] * 300], device=DEVICE)
    text = torch.cat((prompt, decoded(Decoder(model, prompt, 8, runner="fused"))), 1)
    assert_near_the_likeliest(reference, text, 600)


@on_gpu
@pytest.mark.parametrize("vocab_size", [333, 2000, 20_000])
def test_all_of_as_many_equal_logits_may_be_drawn(vocab_size: int) -> None:
    """More than `top_k`, and than the kernel lists: whose noise is least is drawn, but for fp32's rounding."""
    model, _ = lively(vocab_size=vocab_size, tied=False)
    with torch.no_grad():
        model.head.weight.zero_()  # type: ignore[union-attr]
    prompt, sampling = prompts_of(model, 1, 4).to(DEVICE), Sampling(0.9, top_k=7, seed=5)
    drawn = decoded(Decoder(model, prompt, 40, runner="fused", sampling=sampling))[0]
    noise = Noise([5], vocab_size, DEVICE).at(torch.arange(4, 45, device=DEVICE)[:, None])
    own = noise.gather(1, drawn[:, None].to(DEVICE))[:, 0]
    # A logarithm of |x| <= 17 is rounded by 17 eps / 2 at most, and noise by as much of itself.
    assert (own <= noise.min(-1).values * (1 + 32 * torch.finfo(torch.float32).eps)).all()


@on_gpu
def test_launches_runs_and_another_decoder_between_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lively()
    first, second = prompts_of(model, 1, 3), prompts_of(model, 1, 7, seed=2)
    sampling = Sampling(1.0, top_k=50, seed=1)
    alone = Decoder(model, first, 40, runner="fused", sampling=sampling).run(40)
    monkeypatch.setattr(Fused, "tokens_per_launch", 5)
    one = Decoder(model, first, 40, runner="fused", sampling=sampling)
    two = Decoder(model, second, 30, runner="fused")
    parts, other = [], []
    for count in (1, 7, 2, 14):
        parts.append(one.run(count))
        other.append(two.run(count))
    parts.append(one.run(16))
    assert torch.equal(torch.cat(parts, 1), alone)
    two.rewind()
    assert torch.equal(torch.cat(other, 1), two.run(24))
    assert two.loop.position.item() == 7 + 24


@on_gpu
def test_a_full_context_is_full_and_one_more_is_an_error_that_overwrites_nothing() -> None:
    model, _ = lively(context=32)
    decoder = Decoder(model, prompts_of(model, 1, 20), 12, runner="fused")
    decoder.run(12)
    assert decoder.cache is not None
    state = [decoder.ids, decoder.loop.position, *decoder.cache.streams.values()]  # type: ignore[attr-defined]
    before = [tensor.clone() for tensor in state]
    with pytest.raises(ConfigError, match=r"run\(1\) after 12 of max_new=12 tokens"):
        decoder.run(1)
    assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True))


@on_gpu
def test_a_launch_ends_at_a_stop_token() -> None:
    model, _ = lively()
    prompt = prompts_of(model, 1, 4)
    ids = Decoder(model, prompt, 20, runner="fused").run(20)[0].tolist()
    decoder = Decoder(model, prompt, 20, runner="fused", stop={ids[8]})
    assert decoder.stops
    end = ids.index(ids[8])
    assert decoder.run(20)[0].tolist() == ids[: end + 1] + [ids[8]] * (19 - end)
    whole = complete(model, prompt.tolist(), 20, runner="fused")
    assert complete(model, prompt.tolist(), 20, runner="fused", stop={ids[8]})[0] == whole[0][: whole[0].index(ids[8])]


@on_gpu
@pytest.mark.parametrize("top_k", [None, 3])
def test_draws_follow_the_models_probabilities(top_k: int | None) -> None:
    """Chi-square of 4000 tokens of a model for which every place is the same: all its tokens have one embedding."""
    torch.manual_seed(0)
    config = preset("nano", vocab_size=6, context=4096, tied=False, positions="none", layers=1)
    model = Transformer(config).eval().to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand(6, -1).clone())
        model.head.weight.normal_(std=0.1)  # type: ignore[union-attr]
        logits = model.float()(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))[0, 0] / 0.8
    model.bfloat16()
    sampling = Sampling(0.8, top_k=top_k, seed=1)
    drawn = decoded(Decoder(model, torch.zeros(1, 1, dtype=torch.int64), 3999, runner="fused", sampling=sampling))
    expected = logits.masked_fill(logits < logits.topk(top_k or 6).values[-1], -torch.inf).softmax(-1).cpu() * 4000
    found = torch.bincount(drawn[0].cpu(), minlength=6)
    assert not found[expected == 0].any()
    assert chi_square(found[expected > 0], expected[expected > 0]) > RARE


@on_gpu
@pytest.mark.parametrize("vocab_size", [333, 2000, 20_000])
@pytest.mark.parametrize("top_k", [None, 1, 7, 200, 333, 600])
@pytest.mark.parametrize("target", [192, 4], ids=["alone", "clusters"])
def test_draws_are_those_of_the_same_noise(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, top_k: int | None, target: int
) -> None:
    """argmax(p / noise) by the fp32 reference's p, but for what rounding can move: as in the greedy test, over 0.9.

    The sampler lies where attention's sums do, which come from other blocks where clusters have many runs.
    """
    monkeypatch.setattr(Fused, "split_tokens", target)
    model, reference = lively(vocab_size=vocab_size)
    sampling = Sampling(0.9, top_k=top_k, seed=5)
    prompt = prompts_of(model, 1, 4).to(DEVICE)
    text = torch.cat((prompt, decoded(Decoder(model, prompt, 40, runner="fused", sampling=sampling))), 1)
    with torch.inference_mode():
        logits, h = reference(text[:, :-1])[0, 3:], reference.hidden(text[:, :-1])[0, 3:]
    far = 4 * EPS * (2 * model.config.layers) ** 0.5 * reference.head_weight.norm(dim=-1).max() * h.norm(dim=-1)
    noise = Noise([5], vocab_size, DEVICE).at(torch.arange(4, 45, device=DEVICE)[:, None])
    least = logits.topk(min(top_k or vocab_size, vocab_size)).values[:, -1]
    chosen = text[0, 4:, None]
    own = logits.gather(1, chosen)[:, 0]
    assert (own >= least - far).all(), "among the top k"
    keys = logits / 0.9 - noise.log()
    best = keys.masked_fill(logits < (least + far)[:, None], -torch.inf).max(-1).values  # surely among the top k
    assert (keys.gather(1, chosen)[:, 0] >= best - far / 0.9).all()


@on_gpu
def test_a_launch_without_a_token_to_start_from_fails_and_says_so() -> None:
    model, _ = lively()
    decoder = Decoder(model, prompts_of(model, 1, 4), 20, runner="fused")
    runner = decoder._runner
    assert isinstance(runner, Fused)
    with torch.inference_mode():
        decoder.loop.ids[0, 4] = -1
    assert (decoder.run(8) == -1).all()
    with pytest.raises(RuntimeError, match="met no token to start from"):
        runner.check()
    with pytest.raises(RuntimeError, match="met no token to start from"):
        decoder.run(1)


@on_gpu
def test_run_never_waits_for_the_gpu() -> None:
    model, _ = lively()
    decoder = Decoder(model, prompts_of(model, 1, 5), 8, runner="fused", sampling=Sampling(1.0, top_k=5, seed=0))
    decoder.run(4)
    with never_synchronizing():
        decoder.run(4)


@on_gpu
@pytest.mark.parametrize("more", [{"dim": 1088, "head_dim": 16}, {"norm": "layernorm"}], ids=str)
def test_what_it_cannot_decode_graph_does(more: dict[str, Any]) -> None:
    model, _ = lively(**more)
    with pytest.warns(RunnerWarning, match="runner 'fused' cannot run: .*'graph' decodes instead"):
        decoder = Decoder(model, prompts_of(model, 1, 5), 8, runner="fused")
    assert decoder.runner == "graph"
    decoded(decoder)
