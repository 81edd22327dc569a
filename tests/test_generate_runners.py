"""Every runner: the tokens of the definition, what it leaves in the cache, where it ends, how it draws.

On a GPU if there is one, else on the CPU with the runners that it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import COMPILING, DEVICE, EACH, RARE, Traced, chi_square, decoded, never_synchronizing, prompts_of
from launched import rows as rows
from spoken import own
from torch import Tensor

from tinylm.config import ConfigError, preset
from tinylm.generate import Decoder, RunnerWarning, Sampling, complete, prefill, runners
from tinylm.generate.__main__ import main
from tinylm.generate.loop import Loop
from tinylm.model import Transformer

pytestmark = pytest.mark.usefixtures("rows")


def random_model(**more: Any) -> Transformer:
    """In fp64, where no two candidates are so close that the order of additions decides."""
    torch.manual_seed(0)
    return Transformer(preset("nano", **{"context": 32, "init_std": 0.3, **more})).double().eval().to(DEVICE)


@torch.no_grad()
def naive(model: Transformer, tokens: Tensor, new: int) -> Tensor:
    """Greedy, from the definition: the prompt and what follows it."""
    tokens = tokens.to(DEVICE)
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


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
    """Of the same length and of several, with what each row gets alone."""
    model = random_model(layers=1)
    tokens = prompts_of(model, 16, 9)
    lengths = [1 + 5 * row % 9 for row in range(16)]
    same = naive(model, tokens, 6)[:, 9:]
    alone = torch.cat([naive(model, tokens[row : row + 1, :n], 6)[:, n:] for row, n in enumerate(lengths)])
    for batch in (1, 2, 16) if name in COMPILING else range(1, 17):
        decoder = Decoder(model, tokens[:batch], 5, runner=name)
        assert torch.equal(decoded(decoder), same[:batch])
        ragged = Decoder(model, tokens[:batch], 5, lengths=lengths[:batch], runner=name)
        assert torch.equal(decoded(ragged), alone[:batch])


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("threads", [False, True], ids=["in turns", "in threads"])
def test_two_generations_at_once_do_not_disturb_one_another(name: str, threads: bool) -> None:
    """Of one model and of two, in turns of several lengths, or each by a thread of its own."""
    models = [random_model(), random_model(), random_model(dim=48)]
    models[1] = models[0]
    samplings = [Sampling(1.0, seed=3), Sampling(), Sampling(1.0, seed=4)]
    make = [
        functools.partial(Decoder, model, prompts_of(model, 2, 3 + row, seed=row), 24, runner=name, sampling=sampling)
        for row, (model, sampling) in enumerate(zip(models, samplings, strict=True))
    ]
    alone = [decoder().run(24) for decoder in make]
    decoders = [decoder() for decoder in make]
    counts = (1, 7, 2, 14)
    if threads:
        with ThreadPoolExecutor(len(decoders)) as pool:
            parts = list(pool.map(lambda decoder: [decoder.run(count) for count in counts], decoders))
    else:
        turns = [[decoder.run(count) for decoder in decoders] for count in counts]
        parts = [list(runs) for runs in zip(*turns, strict=True)]
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
    assert chi_square(*cells) > RARE


# What a runner does beside


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=5, top_p=0.9, seed=0)])
def test_run_never_waits_for_the_gpu(name: str, sampling: Sampling) -> None:
    model = random_model()
    decoder = Decoder(model, prompts_of(model, 2, 5), 8, runner=name, sampling=sampling)
    decoder.run(4)
    with never_synchronizing():
        decoder.run(4)


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
