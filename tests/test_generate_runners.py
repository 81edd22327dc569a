"""Every runner: the tokens of the reference, what it leaves in the cache, where it ends, and what it refuses.

On a GPU if there is one, else on the CPU with the runners that it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import DEVICE, EACH, Traced
from launched import rows as rows
from runs import text
from scipy import stats
from spoken import own
from torch import Tensor

from tinylm import checkpoint, data
from tinylm.config import ConfigError, preset
from tinylm.generate import RUNNERS, Decoder, RunnerWarning, Sampling, complete, prefill, runners
from tinylm.generate.__main__ import main
from tinylm.generate.loop import Loop
from tinylm.model import Transformer
from tinylm.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("rows")
CONTEXT = 64  # of the trained model
RARE = 1e-6  # a sound sampler fails a test at this level once in a million seeds; the seeds are fixed


def random_model(**more: Any) -> Transformer:
    """In fp64, where no two candidates are so close that the order of additions decides."""
    torch.manual_seed(0)
    return Transformer(preset("nano", **{"context": 32, "init_std": 0.3, **more})).double().eval().to(DEVICE)


def prompts_of(model: Transformer, rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def naive(model: Transformer, tokens: Tensor, new: int) -> Tensor:
    """Greedy, from the definition: the prompt and what follows it."""
    tokens = tokens.to(DEVICE)
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


def decoded(decoder: Decoder) -> Tensor:
    return torch.cat((decoder.first, decoder.run(decoder.max_new)), 1)


# The tokens of the reference


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tensor]:
    """A model that has learned a text of 40 words, over and over, and a piece of the text, (1, CONTEXT).

    A letter follows from the letters before it; the context's first few do not yet tell where in the text it is.
    """
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(" ".join([text(40)] * 100))
    tokens = data.prepare(text=folder / "text.txt", folder=folder / "data", tokenizer="char")
    train(
        TrainConfig(
            data=str(tokens), out=str(folder / "run"), context=CONTEXT, batch=8, steps=200, lr=5e-3, device="cpu",
            eval_every=0, eval_tokens=64, peak_flops=1e9,
        )
    )  # fmt: skip
    model, _ = checkpoint.load_model(folder / "run", "cpu", torch.float32)
    start = torch.zeros(1, dtype=torch.int64).numpy()
    return model.eval(), torch.from_numpy(data.Tokens(tokens, "train").read(start, CONTEXT))


@torch.inference_mode()
def decided(reference: Transformer, ids: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The likeliest token after each of ids (1, T) by the reference, and where rounding cannot make it another.

    The gap of the two likeliest, a and b, is (w_a - w_b) h, with h the normed stream and w rows of the head. Each of
    2 x layers residual additions rounds the stream by up to eps of it, a walk of eps sqrt(2 layers), and two passes
    differ by twice that; so the gap moves by at most 2 eps sqrt(2 layers) |w_a - w_b| |h|. That h moves straight
    along w_a - w_b is the worst of its `dim` directions: a random one moves the gap by 1 / sqrt(dim) of that, an
    eighth here, and what is left over is for the roundings inside the branches. (In bf16 the gap of this model moves
    by half of the bound at most.)
    """
    logits, h = reference(ids)[0], reference.hidden(ids)[0]
    (first, second), (a, b) = (part.unbind(-1) for part in logits.topk(2))
    apart = (reference.head_weight[a] - reference.head_weight[b]).norm(dim=-1)
    bound = 2 * eps * (2 * reference.config.layers) ** 0.5 * apart * h.norm(dim=-1)
    return a, first - second > bound


@pytest.mark.parametrize("name", [*EACH, "compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_greedy_tokens_are_those_of_the_fp32_reference(
    name: str, dtype: torch.dtype, trained: tuple[Transformer, Tensor]
) -> None:
    """After prompts of 1 token to the whole context, wherever the reference's choice is beyond rounding."""
    model, known = trained
    model = Transformer.build(model.config, dtype=dtype)
    model.load_state_dict(trained[0].state_dict())
    reference = Transformer.build(model.config)
    reference.load_state_dict(model.state_dict())  # the same weights: those that dtype can hold
    model, reference = model.eval().to(DEVICE), reference.eval().to(DEVICE)
    sure = total = 0
    for length in range(1, CONTEXT + 1):
        decoder = Decoder(model, known[:, :length], min(7, CONTEXT - length), runner=name)
        assert decoder.runner == name
        chosen = decoded(decoder)
        ids = torch.cat((known[:, :length].to(DEVICE), chosen[:, :-1]), 1)
        likeliest, certain = decided(reference, ids, torch.finfo(dtype).eps)
        likeliest, certain = likeliest[length - 1 :], certain[length - 1 :]
        assert torch.equal(chosen[0][certain], likeliest[certain]), f"after {length} tokens"
        sure, total = sure + int(certain.sum()), total + len(certain)
    assert sure >= 0.9 * total, f"{sure} of {total} positions are decided: too few to prove anything"


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_prefill_hands_over_at_every_position_and_the_cache_is_as_if_recomputed(name: str, kv_heads: int) -> None:
    """Up to the context's last entry."""
    model, context = random_model(kv_heads=kv_heads), 32
    whole = naive(model, prompts_of(model, 2, 1), context)
    expected = model.new_cache(batch=2)
    prefill(model, whole[:, :context], expected)
    for length in range(1, context + 1):
        decoder = Decoder(model, whole[:, :length], context - length, runner=name)
        assert torch.equal(decoded(decoder), whole[:, length:])
        assert decoder.cache is not None
        for stream, content in expected.streams.items():  # type: ignore[attr-defined]
            # fp64, numbers of size 10, thousands of roundings at most
            found = decoder.cache.streams[stream][..., :context, :]  # type: ignore[attr-defined]
            torch.testing.assert_close(found, content, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EACH)
def test_batches_of_1_to_16_rows(name: str) -> None:
    """Of the same length and of several, with what each row gets alone; `traced` compiles anew for each."""
    model = random_model(layers=1)
    tokens = prompts_of(model, 16, 9)
    lengths = [1 + 5 * row % 9 for row in range(16)]
    same = naive(model, tokens, 6)[:, 9:]
    alone = torch.cat([naive(model, tokens[row : row + 1, :n], 6)[:, n:] for row, n in enumerate(lengths)])
    for batch in (1, 2, 3, 8, 16) if name == "traced" else range(1, 17):
        decoder = Decoder(model, tokens[:batch], 5, runner=name)
        assert torch.equal(decoded(decoder), same[:batch])
        ragged = Decoder(model, tokens[:batch], 5, lengths=lengths[:batch], runner=name)
        assert torch.equal(decoded(ragged), alone[:batch])


@pytest.mark.parametrize("name", EACH)
def test_two_generations_at_once_do_not_disturb_one_another(name: str) -> None:
    """Of one model and of two, in turns of several lengths."""
    models = [random_model(), random_model(), random_model(dim=48)]
    models[1] = models[0]
    samplings = [Sampling(1.0, seed=3), Sampling(), Sampling(1.0, seed=4)]
    make = [
        functools.partial(Decoder, model, prompts_of(model, 2, 3 + row, seed=row), 24, runner=name, sampling=sampling)
        for row, (model, sampling) in enumerate(zip(models, samplings, strict=True))
    ]
    alone = [decoder().run(24) for decoder in make]
    decoders = [decoder() for decoder in make]
    parts: list[list[Tensor]] = [[] for _ in decoders]
    for count in (1, 7, 2, 14):
        for part, decoder in zip(parts, decoders, strict=True):
            part.append(decoder.run(count))
    assert all(torch.equal(torch.cat(part, 1), run) for part, run in zip(parts, alone, strict=True))


@given(st.integers(1, 60_000), st.integers(1, 60_000))
def test_default_padding_of_graphs_is_an_eighth_at_most_in_a_few_dozen_steps(start: int, new: int) -> None:
    model = Transformer.build(preset("nano", context=131_072), device="meta")
    loop = Loop(
        model, torch.empty(1, start, device="meta", dtype=torch.int64), [start], new, cache=None,
        granularity=runners.Graph.granularity, sampling=Sampling(), vocab_size=512,
    )  # fmt: skip
    lengths = range(start + 1, start + new + 1)
    assert all(0 <= loop.padded(n) - n < max(16, n / 8) for n in (lengths[0], lengths[-1], lengths[new // 2]))
    assert len(loop.spans) <= 16 + 8 * 9, "16 of 16 tokens to 256, then 8 for each doubling"
    assert all(loop.padded(span) == span for span in loop.spans)


# Where it ends


@pytest.mark.parametrize("name", EACH)
def test_a_full_context_is_full_and_one_more_is_an_error_that_overwrites_nothing(name: str) -> None:
    model = random_model()
    tokens = prompts_of(model, 1, 20)
    with pytest.raises(ConfigError, match="20 prompt tokens and 13 new ones do not fit the model's context of 32"):
        Decoder(model, tokens, 13, runner=name)
    decoder = Decoder(model, tokens, 12, runner=name)
    assert torch.equal(decoded(decoder), naive(model, tokens, 13)[:, 20:])
    assert decoder.cache is not None
    state = [decoder.ids, decoder.loop.position, *decoder.cache.streams.values()]  # type: ignore[attr-defined]
    before = [tensor.clone() for tensor in state]
    with pytest.raises(ConfigError, match=r"run\(1\) after 12 of max_new=12 tokens"):
        decoder.run(1)
    assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True))
    decoder.rewind()
    assert torch.equal(decoded(decoder), naive(model, tokens, 13)[:, 20:])


@pytest.mark.parametrize("name", EACH)
def test_a_row_ends_before_a_stop_token(name: str) -> None:
    model = random_model()
    prompts = prompts_of(model, 3, 4).tolist()
    whole = complete(model, prompts, 20)
    stop = {whole[0][0], whole[1][8], 511}
    ended = [row[: next((at for at, id in enumerate(row) if id in stop), 20)] for row in whole]
    assert complete(model, prompts, 20, stop=stop, runner=name) == ended
    assert [len(row) for row in ended[:2]] != [20, 20]


# The choice


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("top_k", [None, 3])
def test_samples_follow_the_models_probabilities(name: str, top_k: int | None) -> None:
    """Chi-square of the pairs of tokens that 4000 rows of one prompt draw, and with a seed the tokens of `eager`."""
    model, count = random_model(layers=1, vocab_size=6, init_std=0.1), 4000
    prompt = prompts_of(model, 1, 5)
    sampling = Sampling(temperature=0.8, top_k=top_k, seed=1)
    pairs = decoded(Decoder(model, prompt.expand(count, -1), 1, runner=name, sampling=sampling))
    eager = decoded(Decoder(model, prompt.expand(count, -1), 1, sampling=sampling))
    assert torch.equal(pairs, eager)

    @torch.no_grad()
    def probabilities(text: Tensor) -> Tensor:
        logits = model(text.to(DEVICE))[:, -1] / 0.8
        least = logits.topk(top_k or 6).values[:, -1:]
        return logits.masked_fill(logits < least, -torch.inf).softmax(-1).cpu()

    follow = torch.cat((prompt.expand(6, -1), torch.arange(6)[:, None]), 1)
    expected = (probabilities(prompt)[0][:, None] * probabilities(follow)).flatten() * count
    found = torch.bincount((pairs[:, 0] * 6 + pairs[:, 1]).cpu(), minlength=36)
    assert not found[expected == 0].any()
    likely = expected >= 5  # chi-square is for cells that are expected to be met; the others are one cell
    cells = [torch.cat((part[likely].double(), part[~likely].sum()[None].double())) for part in (found, expected)]
    cells = [part if expected[~likely].sum() > 0 else part[:-1] for part in cells]
    assert stats.chisquare(*cells, sum_check=False).pvalue > RARE


# What a runner does beside


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=5, top_p=0.9, seed=0)])
def test_run_never_waits_for_the_gpu(name: str, sampling: Sampling) -> None:
    model = random_model()
    decoder = Decoder(model, prompts_of(model, 2, 5), 8, runner=name, sampling=sampling)
    decoder.run(4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.run(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiling_is_over_when_the_decoder_is_made_and_is_not_repeated_for_its_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[list[torch.Size]] = []

    def count(graph: Any, examples: Any) -> Callable[..., Any]:
        compiled.append([value.shape for value in examples if isinstance(value, Tensor)])
        return graph.forward

    monkeypatch.setattr(Traced, "backend", staticmethod(count))
    for _ in range(10):  # past torch's limit of recompilations
        model = random_model(layers=1)
        decoder = Decoder(model, prompts_of(model, 1, 5), 20, runner="traced")
        made = len(compiled)
        assert torch.equal(decoded(decoder), naive(model, prompts_of(model, 1, 5), 21)[:, 5:])
        assert len(compiled) == made == 1
    decoder = Decoder(random_model(layers=2), prompts_of(model, 1, 5), 20, runner="traced")
    assert decoder.cache is not None
    for stream in decoder.cache.streams.values():  # type: ignore[attr-defined]
        # Of a layer's own tensor a compiler knows that it may be written in place; else it copies all of it.
        assert compiled[1].count(stream[0].shape) == 2 * len(stream) and stream.shape not in compiled[1]
    for batch in range(1, 11):
        Decoder(model, prompts_of(model, batch, 5), 20, runner="traced")
    assert len(compiled) == 11, "of batch 1 there was one already"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def none(graph: Any, examples: Any) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler is here\nand more about it")

    monkeypatch.setattr(runners.Compile, "backend", staticmethod(none))
    yield


def test_without_a_compiler_another_runner_decodes_and_says_so(no_compiler: None) -> None:
    model = random_model()
    tokens = prompts_of(model, 2, 5)
    with pytest.warns(RunnerWarning, match="runner 'compile' cannot run: .*no C.. compiler is here") as told:
        decoder = Decoder(model, tokens, 8, runner="compile")
    assert decoder.runner == {"cpu": "eager", "cuda": "graph"}[DEVICE]
    assert "\n" not in str(told[0].message) and f"{decoder.runner!r} decodes instead" in str(told[0].message)
    assert torch.equal(decoded(decoder), naive(model, tokens, 9)[:, 5:])


def test_the_command_tells_it_in_one_line(
    no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own(tmp_path)
    asked = ["--checkpoint", str(tmp_path), "--prompt", "a", "--max-new-tokens", "5", "--runner", "compile"]
    assert main(asked) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum("cannot run" in line for line in lines) == 1 and len(lines) == 2


# What it refuses


class Launched(Transformer):
    """A model that nothing may be asked of."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("launched")

    def _enter(self, *arguments: Any) -> Any:
        raise AssertionError("launched")


@pytest.mark.parametrize("name", EACH)
def test_bad_input_is_one_clear_error_before_anything_is_launched(name: str) -> None:
    model = Launched(preset("nano", context=16)).eval().to(DEVICE)
    prompt = prompts_of(model, 1, 10)
    decode = functools.partial(Decoder, model, runner=name)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: decode(prompts_of(model, 1, 17), 0), "prompt of 17 tokens does not fit the model's context of 16"),
        (lambda: decode(prompt, 7), "10 prompt tokens and 7 new ones do not fit"),
        (lambda: decode(prompt[:, :0], 1), "not empty"),
        (lambda: decode(prompt + 512, 1), "token ids run from .*: expected 0 to 511"),
        (lambda: decode(prompt - 512, 1), "token ids run from -"),
        (lambda: decode(prompt.float(), 1), "expected int64"),
        (lambda: decode(prompt, 1, cache="pagd"), "unknown cache layout 'pagd': use one of dense"),
        (lambda: decode(prompt, 1, granularity=0), "granularity is 0"),
        (lambda: Decoder(model, prompt, 1, runner="grahp"), "unknown runner 'grahp': use one of eager, graph"),
        (lambda: complete(model, [[1], []], 2, runner=name), r"prompts of \[1, 0\] tokens"),
    ]
    for call, words in calls:
        refused(call, words)


def test_prefill_refuses_what_is_no_prompt_and_the_cache_of_another_model_or_device() -> None:
    model = Launched(preset("nano", context=16)).eval().to(DEVICE)
    cache, prompt = model.new_cache(), prompts_of(model, 1, 10)

    def of(**more: Any) -> Any:
        return Transformer(preset("nano", context=16, **more)).to(DEVICE).new_cache()

    elsewhere = Transformer.build(model.config, device="meta").new_cache()
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: prefill(model, prompts_of(model, 1, 17), cache), "prompt of 17 tokens"),
        (lambda: prefill(model, prompt[:, :0], cache), "not empty"),
        (lambda: prefill(model, prompt + 512, cache), "token ids"),
        (
            lambda: prefill(model, prompt, of(layers=3)),
            r"cache is for 3 layers .*the model has 2 layers .*new_cache\(\)",
        ),
        (lambda: prefill(model, prompt, of(kv_heads=4)), "k of 4 x 16, v of 4 x 16 .* k of 2 x 16"),
        (lambda: prefill(model, prompt, of(head_dim=32)), "k of 2 x 32"),
        (lambda: prefill(model, prompt, elsewhere), f"on meta, the model has .* on {DEVICE}"),
        (lambda: prefill(model, prompt, model.new_cache(context=9)), "10 tokens a row are more than the 9"),
        (lambda: prefill(model, prompt, model.new_cache(batch=2)), "1 rows given, the cache has 2"),
    ]
    for call, words in calls:
        refused(call, words)


@pytest.mark.parametrize("name", [name for name, row in RUNNERS.items() if "cpu" not in row.devices])
def test_a_runner_that_the_device_cannot_run_is_an_error(name: str) -> None:
    model = Launched(preset("nano", context=16)).eval()
    prompt = prompts_of(model, 1, 10)
    refused(lambda: Decoder(model, prompt, 1, runner=name), f"runner '{name}' with a model on cpu: .* cuda; .* eager")


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
