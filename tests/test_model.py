from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tinylm import model as model_module
from tinylm import ops
from tinylm.cache import Batch
from tinylm.config import PRESETS, ConfigError, ModelConfig, preset
from tinylm.model import MLPS, NORMS, POSITIONS, Transformer

# Each preset's style, small enough for a CPU; 768 wide, where a head of std 0.02 would start 0.15 too high.
STYLES = {
    name: dataclasses.replace(
        preset(name, heads=12, kv_heads=4, dim=768, head_dim=64),
        layers=2,
        d_ff=512,
        vocab_size=4096,
        context=256,
    )
    for name in PRESETS
}


def manual(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of one text (T,), from the definitions, in the dtype of the weights."""

    def linear(x: Tensor, name: str) -> Tensor:
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return y * weights[f"{name}.weight"] + weights.get(f"{name}.bias", torch.tensor(0.0))

    def turn(x: Tensor) -> Tensor:
        if config.positions != "rope":
            return x
        half = config.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float64) / half
        angles = torch.arange(len(x))[:, None] / config.rope_theta**exponents
        pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), -1)

    def attend(x: Tensor, name: str) -> Tensor:
        vectors = linear(x, f"{name}.qkv").split(config.head_dim, -1)
        heads = []
        for head in range(config.heads):
            shared = config.heads + head // (config.heads // config.kv_heads)
            q, k, v = turn(vectors[head]), turn(vectors[shared]), vectors[shared + config.kv_heads]
            scores = (q @ k.T / math.sqrt(config.head_dim)).masked_fill(
                torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf
            )
            heads.append(scores.softmax(-1) @ v)
        return linear(torch.cat(heads, -1), f"{name}.out")

    def mlp(x: Tensor, name: str) -> Tensor:
        if config.mlp == "swiglu":
            gate, up = linear(x, f"{name}.gate_up").split(config.d_ff, -1)
            return linear(gate * gate.sigmoid() * up, f"{name}.down")
        return linear(F.gelu(linear(x, f"{name}.up"), approximate="tanh"), f"{name}.down")

    x = weights["embed.weight"][tokens]
    if config.positions == "learned":
        x = x + weights["positions.weight"][: len(x)]
    for layer in range(config.layers):
        for branch, name in ((attend, "attention"), (mlp, "mlp")):
            path = f"blocks.{layer}.{name}"
            if config.norm_placement == "pre":
                x = x + branch(norm(x, f"{path}_norm"), path)
            else:
                x = norm(x + branch(x, path), f"{path}_norm")
    if config.norm_placement == "pre":
        x = norm(x, "norm")
    return x @ weights["embed.weight" if config.tied else "head.weight"].T


@settings(max_examples=40)
@given(configs(rope_scaling=None), st.integers(1, 9), st.integers(0, 2**31))
@torch.no_grad()
def test_the_model_is_its_definition(config: ModelConfig, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Transformer(config).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # else norms and biases are all ones and zeros
            parameter.normal_()
    tokens = torch.randint(config.vocab_size, (2, length))
    logits = model(tokens)
    for row in range(2):
        expected = manual(config, model.state_dict(), tokens[row])
        # fp64, a few thousand roundings; logits are of size 100 at most.
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)


def sums_then_norms(model: Any, tokens: Tensor, stream: torch.dtype | None = None) -> Tensor:
    """Logits of tokens (B, T) with each sum at the end of its branch, and each norm by itself."""
    x, rotation = model.positions(model.embed(tokens), None)
    x = x.to(stream)
    drop = functools.partial(F.dropout, p=model.config.dropout, training=model.training)
    x = drop(x)
    for block in model.blocks:
        for norm, branch in (
            (block.attention_norm, lambda x, block=block: block.attention(x, rotation)),
            (block.mlp_norm, block.mlp),
        ):
            x = x + drop(branch(norm(x))) if block.pre else norm(x + drop(branch(x)))
    return F.linear(model.norm(x), model.head_weight)


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "placement"), [("rmsnorm", "pre"), ("rmsnorm", "post"), ("layernorm", "pre")])
def test_a_fused_sum_and_norm_change_no_bit(norm: str, placement: str, dtype: torch.dtype, backend: str) -> None:
    config = preset("nano", norm=norm, norm_placement=placement, tied=False, dropout=0.1)
    model = Transformer(config, ops={"rmsnorm": backend}).to(dtype)
    tokens = torch.randint(512, (2, 9))
    for training in (True, False):
        model.train(training)
        found = []
        for logits in (model, functools.partial(sums_then_norms, model)):
            torch.manual_seed(0)  # the same dropout
            model.zero_grad()
            found.append(logits(tokens))
            found[-1].float().logsumexp(-1).sum().backward()
            found += [parameter.grad for parameter in model.parameters()]
        half = len(found) // 2
        assert all(map(torch.equal, found[:half], found[half:])), training


@settings(max_examples=40)
@given(configs(), st.data())
@torch.no_grad()
def test_the_future_does_not_change_the_past(config: ModelConfig, data: st.DataObject) -> None:
    model, tokens = Transformer(config).double(), torch.randint(config.vocab_size, (1, 8))
    at = data.draw(st.integers(0, 7))
    other = tokens.clone()
    other[:, at:] = torch.randint(config.vocab_size, (1, 8 - at))
    torch.testing.assert_close(model(tokens)[:, :at], model(other)[:, :at], rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(configs(), st.data())
@torch.no_grad()
def test_projecting_some_positions_is_projecting_all_and_choosing(config: ModelConfig, data: st.DataObject) -> None:
    model, tokens = Transformer(config).double(), torch.randint(config.vocab_size, (3, 6))
    whole = model(tokens)
    torch.testing.assert_close(model(tokens, last_only=True), whole[:, -1:], rtol=0, atol=1e-12)
    index = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=3, max_size=3)))
    torch.testing.assert_close(
        model(tokens, last_index=index), whole[torch.arange(3), index][:, None], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_loss_starts_at_ln_vocab(name: str, tied: bool, placement: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(STYLES[name], tied=tied, norm_placement=placement)
    tokens = torch.randint(config.vocab_size, (4, 129))
    loss = F.cross_entropy(Transformer(config)(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(loss) - math.log(config.vocab_size)) < 0.1


@pytest.mark.parametrize("name", ["nano", "tiny", "stories-17m"])
@torch.no_grad()
def test_loss_starts_at_ln_vocab_for_whole_presets(name: str) -> None:
    config = PRESETS[name]
    tokens = torch.randint(config.vocab_size, (1, 129))
    loss = F.cross_entropy(Transformer(config)(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    # The variance of logits, 0.04 at most, makes the mean of 128 losses vary by 0.02.
    assert abs(float(loss) - math.log(config.vocab_size)) < 0.1


def test_what_ends_a_residual_branch_starts_narrower() -> None:
    config = STYLES["gpt2-124m"]
    model = Transformer(config)
    ends = 0.02 / math.sqrt(2 * config.layers)
    for name, std in (("attention.qkv", 0.02), ("attention.out", ends), ("mlp.up", 0.02), ("mlp.down", ends)):
        for layer in range(config.layers):
            weight = model.state_dict()[f"blocks.{layer}.{name}.weight"]
            # The std of n normal numbers errs by 1 / sqrt(2 n): 5 of those.
            assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * weight.numel()), (layer, name)


# Tied weights


def same_storage(model: Transformer) -> bool:
    return model.head_weight.untyped_storage().data_ptr() == model.embed.weight.untyped_storage().data_ptr()


def test_a_tied_head_shares_storage_after_every_kind_of_load_move_and_copy() -> None:
    model = Transformer(preset("nano"))
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        assert same_storage(model) and torch.equal(model.head_weight, state["embed.weight"])
    for other in (copy.deepcopy(model), model.to(torch.bfloat16), Transformer.build(preset("nano"))):
        assert same_storage(other)
    logits = model(torch.zeros(1, 1, dtype=torch.int64))
    with torch.no_grad():
        model.embed.weight.mul_(2)
    assert not torch.equal(model(torch.zeros(1, 1, dtype=torch.int64)), logits)
    assert not same_storage(Transformer(preset("nano", tied=False)))


def test_a_meta_model_that_is_given_weights_works_like_any_other() -> None:
    """Rotations are not state: nothing that `meta` left empty may enter."""
    source = Transformer(preset("nano"))
    with torch.device("meta"):
        model = Transformer(preset("nano"))
    model.load_state_dict(source.state_dict(), assign=True)
    tokens = torch.randint(512, (1, 9))
    assert torch.equal(model(tokens), source(tokens))
    built = Transformer.build(preset("nano"), dtype=torch.bfloat16)
    assert built.dtype == torch.bfloat16 and built(tokens).dtype == torch.bfloat16
    assert built(tokens).isfinite().all()


# Counts


def test_parameter_counts_are_the_published_ones() -> None:
    count = {n: Transformer.build(PRESETS[n], device="meta").param_count() for n in PRESETS}
    assert count["llama-3-8b"] == 8_030_261_248  # the 8.03 B of its model card
    assert count["gpt2-124m"] == 124_439_808 + (50_304 - 50_257) * 768  # GPT-2's, with its vocabulary padded
    assert count["stories-17m"] == 17_576_448 + 10_000 * 512  # 17 M without the embedding


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_come_from_storage(config: ModelConfig, dtype: torch.dtype) -> None:
    model = Transformer(config).to(dtype)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert model.weight_bytes() == sum(held.values()) == model.param_count() * dtype.itemsize
    assert Transformer.build(config, device="meta", dtype=dtype).weight_bytes() == model.weight_bytes()
    assert model.kv_bytes(1, 1, torch.int8) == 2 * config.layers * config.kv_heads * config.head_dim


@settings(max_examples=30)
@given(configs(), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_flops_are_those_that_torch_counts(config: ModelConfig, rows: int, tokens: int, last_only: bool) -> None:
    """On `meta`, where torch counts every matrix product and the whole square of attention."""
    model = Transformer.build(config, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(rows, tokens, dtype=torch.int64, device="meta"), last_only=last_only)
    assert model.flops(rows, tokens, last_only=last_only, causal=False) == counter.get_total_flops()


@settings(max_examples=30)
@given(configs(), st.integers(1, 3), st.integers(1, 9), st.integers(0, 9))
def test_flops_of_a_prefill_and_its_decode_steps_are_those_of_the_whole(
    config: ModelConfig, rows: int, tokens: int, context: int
) -> None:
    model = Transformer.build(config, device="meta")
    whole = model.flops(rows, context + tokens)
    assert whole == model.flops(rows, context) + model.flops(rows, tokens, context)
    assert model.flops(rows, tokens, context) == sum(model.flops(rows, 1, context + t) for t in range(tokens))
    # Where there is one token a step, causality leaves nothing out.
    assert model.flops(rows, 1, context) == model.flops(rows, 1, context, causal=False)


def test_flops_of_a_published_model() -> None:
    """111.7 MFLOP a token in training, as published: the whole square of attention, 3 times forward."""
    model = Transformer.build(PRESETS["stories-17m"], device="meta")
    assert round(3 * model.flops(1, 256, causal=False) / 256 / 1e6, 1) == 111.7
    assert model.flops(1, 256) < model.flops(1, 256, causal=False)


# Choices


def test_dropout_acts_in_training_alone() -> None:
    model, tokens = Transformer(preset("nano", dropout=0.5)), torch.randint(512, (2, 16))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    plain = Transformer(preset("nano"))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens), model(tokens))


@given(config=configs(), backend=st.sampled_from(["eager", "chunked"]), seed=st.integers(0, 2**16))
def test_the_loss_is_that_of_the_logits(config: ModelConfig, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Transformer(config, ops={"linear_cross_entropy": backend}).double()
    tokens = torch.randint(config.vocab_size, (2, 8))
    targets = tokens[:, 1:].masked_fill(torch.rand(2, 7) < 0.3, -100)
    targets[0, 0] = 0
    logits = model(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    found = model.loss(tokens[:, :-1], targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # fp64
    torch.testing.assert_close(model.hidden(tokens[:, :-1]) @ model.head_weight.T, logits, rtol=1e-12, atol=1e-12)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_training_step_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model, tokens = Transformer(STYLES["llama-3-8b"]), torch.randint(4096, (1, 17))

    def loss() -> Tensor:
        return model.loss(tokens[:, :-1], tokens[:, 1:])

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            parameter.sub_(parameter.grad, alpha=0.1)
    assert loss() < before


@pytest.mark.parametrize(
    ("field", "table"), [("norm", NORMS), ("mlp", MLPS), ("positions", POSITIONS), ("attention", {"gqa": 0})]
)
def test_an_unknown_part_is_named_with_the_known(field: str, table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{field} 'nosuch': use one of {', '.join(table)}") as error:
        Transformer(preset("nano", **{field: "nosuch"}))
    assert "\n" not in str(error.value)


def test_an_unknown_backend_is_an_error_even_where_no_module_asks_for_it() -> None:
    with pytest.raises(ValueError, match="cuda2"):
        Transformer(preset("gpt2-124m", layers=1), ops={"rmsnorm": "cuda2"})
    with pytest.raises(ValueError, match="rmsnrom"):
        Transformer(preset("nano"), ops={"rmsnrom": "eager"})


def test_a_new_part_is_a_class_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shift(nn.Module):
        def __init__(self, config: ModelConfig, backends: dict[str, str]) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x - 1

    monkeypatch.setitem(model_module.NORMS, "shift", Shift)
    Transformer(preset("nano", norm="shift"))(torch.zeros(1, 2, dtype=torch.int64))


def counting(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """Rows `counting` of these ops, and how often each was called."""
    calls = dict.fromkeys(names, 0)

    def row(op: str) -> Any:
        def call(*arguments: Any) -> Any:
            calls[op] += 1
            return default(*arguments)

        default = ops.get(op, ops.DEFAULTS[op])
        return call

    for op in names:
        monkeypatch.setitem(ops.OPS[op], "counting", row(op))
    return calls


@pytest.mark.parametrize(("placement", "alone"), [("pre", 1), ("post", 0)])
def test_the_chosen_backends_are_the_ones_that_run(placement: str, alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of rmsnorm is that of add_rmsnorm too; a norm has no sum before it only where the model begins."""
    calls = counting(monkeypatch, *ops.OPS)
    config = preset("nano", tied=False, norm_placement=placement)
    model = Transformer(config, ops={op: "counting" for op in ops.OPS if op != "add_rmsnorm"})
    assert model.ops == dict.fromkeys(ops.OPS, "counting")
    model(torch.zeros(1, 2, dtype=torch.int64))
    passes = {"rmsnorm": alone, "add_rmsnorm": 4, "linear": 4 * 2 + 1, "linear_cross_entropy": 0}
    assert calls == passes
    batch = Batch.at(torch.zeros(1, 2, dtype=torch.int64), 0)
    model.step(batch, model.new_cache())
    assert calls == {op: 2 * count for op, count in passes.items()}
    model.loss(batch.tokens, batch.tokens)
    # The head is the loss's own.
    assert calls == {"rmsnorm": 3 * alone, "add_rmsnorm": 12, "linear": 3 * 4 * 2 + 2, "linear_cross_entropy": 1}


def test_a_backend_of_add_rmsnorm_is_a_choice_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(monkeypatch, "rmsnorm", "add_rmsnorm")
    model = Transformer(preset("nano"), ops={"rmsnorm": "counting", "add_rmsnorm": "eager"})
    model(torch.zeros(1, 2, dtype=torch.int64))
    assert calls == {"rmsnorm": 1, "add_rmsnorm": 0}
    with pytest.raises(ValueError, match="cuda2"):
        Transformer(preset("nano"), ops={"add_rmsnorm": "cuda2"})


def test_a_backend_of_rmsnorm_alone_adds_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(monkeypatch, "rmsnorm")
    model, tokens = Transformer(preset("nano"), ops={"rmsnorm": "counting"}), torch.randint(512, (1, 5))
    assert torch.equal(model(tokens), sums_then_norms(model, tokens))
    assert calls == {"rmsnorm": 2 * (2 * 2 + 1)}


@pytest.mark.parametrize(
    ("autocast", "stream"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=["bf16", "fp16"]
)
def test_under_autocast_the_stream_is_bf16_where_products_are(autocast: torch.dtype, stream: torch.dtype) -> None:
    model, tokens = Transformer(preset("nano"), ops={"rmsnorm": "eager"}), torch.randint(512, (1, 5))
    with torch.autocast("cpu", autocast):
        assert torch.equal(model(tokens), sums_then_norms(model, tokens, stream))
        assert not torch.equal(
            model(tokens), sums_then_norms(model, tokens, torch.float32 if stream == torch.bfloat16 else torch.bfloat16)
        )


def test_reductions_act_from_outside() -> None:
    """As tensor parallelism will: what passes the named places is all that a block adds to its residual."""
    model = Transformer(preset("nano"))

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    for block in model.blocks:
        block.attention.reduce = block.mlp.reduce = Nothing()  # type: ignore[union-attr]
    tokens = torch.randint(512, (1, 5))
    expected = F.linear(model.norm(model.embed(tokens)), model.embed.weight)
    assert torch.equal(model(tokens), expected)


def test_context_past_the_models_is_an_error_in_one_line() -> None:
    model = Transformer(preset("nano", context=8))
    long = torch.zeros(1, 9, dtype=torch.int64)
    for call in (lambda: model(long), lambda: model.step(Batch.at(long, 0), model.new_cache())):
        with pytest.raises(ConfigError, match=r"9 tokens pass the model's context of 8") as error:
            call()
        assert "\n" not in str(error.value)


def test_the_sdpa_backend_is_told_for_the_record() -> None:
    model = Transformer(preset("nano"))
    assert {
        model.sdpa_backend(1, 8),
        model.sdpa_backend(2, 1, 7),
        model.sdpa_backend(2, 1, 7, masked=True),
    } <= {
        "cpu-flash",
        "math",
    }


# torch.compile imports parts of torch that warn of their own deprecations.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@compiles
@pytest.mark.parametrize("backend", [name for name in ops.OPS["rmsnorm"] if name != "compile"])  # which takes 30 s
def test_any_backend_is_the_same_model(backend: str) -> None:
    """With and without a cache, as one compiled graph, and in its gradients."""
    for op in ("rmsnorm", "add_rmsnorm"):
        if reason := ops.probe(op, backend, "cpu", torch.float32):
            pytest.skip(f"{op}/{backend}: {reason}")
    config, tokens = preset("nano", layers=1), torch.randint(512, (2, 8))
    model = Transformer(config, ops={"rmsnorm": backend})
    other = Transformer(config, ops={"rmsnorm": "eager"})
    other.load_state_dict(model.state_dict())
    expected = other(tokens)
    # One layer's few dozen roundings, of logits of 0.2 and gradients that sum 16 tokens'.
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(model(tokens), expected)
    for net in (model, other):
        net(tokens).logsumexp(-1).sum().backward()
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        close(parameter.grad, same.grad)
    with torch.inference_mode():
        close(model.step(Batch.at(tokens, 0), model.new_cache(batch=2), last_only=False), expected)
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, tokens = Transformer(STYLES["tiny"]), torch.randint(4096, (2, 32))
    exact = model(tokens)
    logits = model.to(dtype)(tokens)
    assert logits.dtype == dtype
    # Two layers of about ten roundings, of a normed state of size 1, projected to logits of std 0.2: errors
    # add up as independent ones. Five times that for the largest of 262,144.
    bound = 5 * math.sqrt(2 * 10) * torch.finfo(dtype).eps * float(exact.std())
    assert (logits.float() - exact).abs().max() < bound
