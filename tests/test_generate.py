from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import rows as rows
from strategies import configs
from torch import Tensor

from tinylm.cache import Batch, Cache
from tinylm.config import ConfigError, ModelConfig, preset
from tinylm.generate import Decoder, Sampling, generate, prefill, runners
from tinylm.generate.loop import Loop
from tinylm.generate.runners import graph as graph_module
from tinylm.model import Transformer

pytestmark = pytest.mark.usefixtures("rows")
PATHS: list[dict[str, Any]] = [
    {"cache": cache, **runner}
    for cache in ("dense", None)
    for runner in ({}, {"runner": "uncaptured", "granularity": 1}, {"runner": "uncaptured", "granularity": 4})
]


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).eval()


def nano(**more: Any) -> Transformer:
    return model_of(preset("nano", **{"context": 64, "init_std": 0.3, **more}))


def prompt(rows: int = 2, tokens: int = 5) -> Tensor:
    return torch.randint(512, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def naive(model: Transformer, tokens: Tensor, new: int) -> Tensor:
    """Greedy, from the definition."""
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


# Every path gives the same tokens


@settings(max_examples=25)
@given(
    config=configs(),
    rows=st.integers(1, 3),
    length=st.integers(1, 8),
    new=st.integers(1, 10),
    granularity=st.integers(1, 7),
    chunk=st.none() | st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_every_path_chooses_the_tokens_of_the_definition(
    config: ModelConfig, rows: int, length: int, new: int, granularity: int, chunk: int | None, seed: int
) -> None:
    """In fp64, where no two candidates are so close that the order of additions decides."""
    model = model_of(config, seed).double()
    tokens = torch.randint(config.vocab_size, (rows, length))
    expected = naive(model, tokens, new)
    for cache in ("dense", None):
        assert torch.equal(generate(model, tokens, new, cache=cache, chunk=chunk), expected)
        decoder = Decoder(model, tokens, new, cache=cache, runner="uncaptured", granularity=granularity, chunk=chunk)
        assert torch.equal(torch.cat((tokens, decoder.first, decoder.run(new - 1)), 1), expected)


@pytest.mark.parametrize("name", ["nano", "tiny", "gpt2-124m"])
def test_greedy_in_fp32_is_the_same_with_and_without_the_cache(name: str) -> None:
    model = model_of(preset(name, layers=2, vocab_size=512, context=64))
    tokens = prompt(2, 20)
    cached = generate(model, tokens, 24)
    assert torch.equal(cached, generate(model, tokens, 24, cache=None))
    assert torch.equal(cached[:, :20], tokens) and cached.shape == (2, 44)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)])
def test_rewind_repeats_the_work_and_its_result(path: dict[str, Any], sampling: Sampling) -> None:
    decoder = Decoder(nano(), prompt(), 12, sampling=sampling, **path)
    first = decoder.run(12)
    for parts in ([12], [5, 7], [0, 1, 11]):
        decoder.rewind()
        assert torch.equal(torch.cat([decoder.run(part) for part in parts], 1), first)
    assert first.shape == (2, 12) and decoder.first.shape == (2, 1)


def test_all_paths_sample_the_same_tokens_with_a_seed() -> None:
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=7)
    model = nano().double()
    runs = [Decoder(model, prompt(), 20, sampling=sampling, **path).run(20) for path in PATHS]
    assert all(torch.equal(run, runs[0]) for run in runs)
    other = Decoder(model, prompt(), 20, sampling=Sampling(temperature=1.0, seed=8)).run(20)
    assert not torch.equal(other, runs[0])
    unseeded = [Decoder(model, prompt(), 20, sampling=Sampling(temperature=1.0)).run(20) for _ in range(2)]
    assert not torch.equal(*unseeded)


@torch.no_grad()
def test_prefill_in_chunks_is_prefill_at_once() -> None:
    model, tokens = nano().double(), prompt(2, 7)
    expected = model(tokens)[:, -1:]
    for chunk in (None, 1, 3, 7, 100):
        logits = prefill(model, tokens, model.new_cache(batch=2, context=7), chunk=chunk)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


# What each path does


class Spy(Transformer):
    """Records the shapes that pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        logits = super().forward(tokens, **options)
        self.calls.append(("forward", tokens.shape[1], logits.shape[1]))
        return logits

    def step(self, batch: Batch, cache: Cache, *, last_only: bool = True) -> Tensor:
        logits = super().step(batch, cache, last_only=last_only)
        plan = cache.plan(batch)
        self.calls.append(("step", batch.tokens.shape[1], plan.span, plan.mask is not None, logits.shape[1]))
        return logits


@pytest.mark.parametrize(
    ("path", "prefilled", "decoded"),
    [
        ({}, ("step", 5, 5, False, 1), [("step", 1, n, False, 1) for n in (6, 7, 8, 9)]),
        ({"runner": "uncaptured", "granularity": 1}, None, [("step", 1, n, False, 1) for n in (6, 7, 8, 9)]),
        ({"runner": "uncaptured", "granularity": 4}, None, [("step", 1, n, True, 1) for n in (8, 8, 8, 10)]),
        ({"cache": None}, ("forward", 5, 1), [("forward", n, 1) for n in (6, 7, 8, 9)]),
        ({"cache": None, "runner": "uncaptured", "granularity": 4}, None, [("forward", n, 1) for n in (8, 8, 8, 10)]),
    ],
)
def test_a_path_does_the_work_it_says(
    path: dict[str, Any], prefilled: tuple[Any, ...] | None, decoded: list[tuple[Any, ...]]
) -> None:
    """(what ran, new tokens, entries attended to, masked, positions projected to the vocabulary)."""
    spy = Spy(preset("nano", context=10))
    decoder = Decoder(spy, prompt(1, 5), 4, **path)
    assert prefilled is None or spy.calls == [prefilled]
    spy.calls.clear()
    decoder.run(4)
    assert spy.calls == decoded, "10 is the model's context, which is no multiple of 4"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=5, top_p=0.9, seed=0)])
def test_run_never_waits_for_the_device(
    path: dict[str, Any], sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing on its way asks a tensor for its value."""
    decoder = Decoder(nano(), prompt(), 8, sampling=sampling, **path)

    def value(self: Tensor, *arguments: Any) -> Any:
        raise AssertionError("a value was asked for, which on a GPU waits for it")

    for name in (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
        "nonzero",
    ):
        monkeypatch.setattr(Tensor, name, value)
    monkeypatch.setattr(torch, "multinomial", value)
    decoder.run(8)


@pytest.mark.parametrize("cache", ["dense", None])
def test_a_static_step_works_on_the_same_memory_whatever_the_position(cache: str | None) -> None:
    """What a graph's replay presumes: no buffer is replaced, and a span's step fits each position in it."""
    decoder = Decoder(nano(), prompt(1, 3), 12, cache=cache, runner="uncaptured", granularity=16)
    buffers = (decoder.loop.ids, decoder.loop.position)
    addresses = [buffer.data_ptr() for buffer in buffers]
    decoder.run(12)
    assert [buffer.data_ptr() for buffer in (decoder.loop.ids, decoder.loop.position)] == addresses
    assert decoder.loop.ids is buffers[0] and decoder.loop.position is buffers[1]
    assert int(decoder.loop.position) == 3 + 12


class Graph:
    """Stands for a CUDA graph: replays what was captured, which reads and writes static buffers alone."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            self.work()

    def work(self) -> None:
        raise AssertionError("nothing was captured")


@pytest.mark.parametrize("cache", ["dense", None])
def test_captured_buckets_are_each_captured_once_and_replayed_in_turn(
    cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of the capturing path, with a stand-in for CUDA's part."""
    sampling = Sampling(temperature=1.0, seed=5)
    expected = Decoder(nano(), prompt(), 20, cache=cache, sampling=sampling).run(20)
    captured: list[tuple[str, int]] = []
    steps = Loop.step
    current: list[Graph | None] = [None]

    def step(loop: Loop, span: int, exact: bool = False) -> None:
        graph = current[0]
        captured.append(("warm" if graph is None else "capture", span))
        if graph is None:
            steps(loop, span, exact)
        else:  # a capture records and does not run
            graph.work = lambda: steps(loop, span, exact)  # type: ignore[method-assign]

    class Capture:
        def __init__(self, graph: Graph, *, pool: Any, stream: Any, capture_error_mode: str) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            current[0] = self.graph

        def __exit__(self, *_: object) -> None:
            current[0] = None

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    cuda = torch.cuda
    monkeypatch.setattr(Loop, "step", step)
    monkeypatch.setattr(graph_module, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(runners.Graph, "devices", ("cpu",))
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": Capture,
        "graph_pool_handle": lambda: (0, 1),
        "device": lambda device: Stream(),
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(cuda, name, stand_in)
    decoder = Decoder(nano(), prompt(), 20, cache=cache, sampling=sampling, runner="graph", granularity=8)
    # A prompt of 5 and 20 more: prefixes of 6 to 25.
    spans = [32, 24, 16, 8]
    assert captured == [("warm", s) for s in spans] + [("capture", s) for s in spans]
    assert torch.equal(decoder.run(20), expected), "neither warm-up nor capture left a trace"
    assert isinstance(decoder._runner, runners.Graph)
    graphs: dict[int, Any] = dict(decoder._runner._graphs)
    assert {span: graph.replays for span, graph in graphs.items()} == {32: 1, 24: 8, 16: 8, 8: 3}
    decoder.rewind()
    assert torch.equal(decoder.run(20), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["dense", None])
@pytest.mark.parametrize("granularity", [1, 16])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=1)])
def test_graphs_on_a_gpu_choose_the_tokens_of_the_eager_path(
    cache: str | None, granularity: int, sampling: Sampling
) -> None:
    model = nano().double().cuda()
    expected = Decoder(model, prompt().cuda(), 40, sampling=sampling).run(40)
    decoder = Decoder(
        model, prompt().cuda(), 40, cache=cache, runner="graph", granularity=granularity, sampling=sampling
    )
    for _ in range(2):
        assert torch.equal(decoder.run(40), expected)
        decoder.rewind()


# What cannot be, and what is left behind


def test_what_cannot_be_is_an_error_in_one_line() -> None:
    model, tokens = nano(context=16), prompt(2, 10)
    calls: list[tuple[Any, str]] = [
        (lambda: generate(model, tokens, 7), "10 prompt tokens and 7 new.*context of 16"),
        (lambda: Decoder(model, tokens, 7), "context of 16"),
        (lambda: generate(model, tokens, 0), "max_new_tokens is 0"),
        (lambda: generate(model, tokens, 2, chunk=0), "chunk is 0"),
        (lambda: generate(model, tokens, 2, cache="pagd"), "pagd.*dense"),
        (lambda: generate(model, tokens[0], 2), r"expected int64 \(rows, tokens\)"),
        (lambda: generate(model, tokens.float(), 2), "float32"),
        (lambda: generate(model, tokens[:, :0], 2), "not empty"),
        (lambda: generate(model, tokens + 512, 2), "0 to 511"),
        (lambda: Decoder(model, tokens, 2, granularity=0), "granularity is 0"),
        (lambda: Decoder(model, tokens, 2).run(3), r"run\(3\) after 0 of max_new=2"),
        (lambda: Decoder(model, prompt(2, 17), 0), "prompt of 17 tokens.*context of 16"),
        (lambda: Decoder(model, tokens, 2, lengths=[10]), r"lengths \[10\] of 2 prompts"),
        (lambda: Decoder(model, tokens, 2, lengths=[0, 10]), "from 1 to 10"),
        (lambda: Decoder(model, tokens, 12, lengths=[5, 10]), "5 prompt tokens and 12 new.*context of 16"),
    ]
    for call, words in calls:
        with pytest.raises(ConfigError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    assert generate(model, tokens, 6).shape == (2, 16), "up to the context it works"


@pytest.mark.parametrize("training", [True, False])
def test_generation_has_no_dropout_and_leaves_the_model_as_it_was(training: bool) -> None:
    model = nano(dropout=0.5)
    expected = generate(model.eval(), prompt(), 8)
    model.train(training)
    assert torch.equal(generate(model, prompt(), 8), expected)
    assert model.training == training
    with pytest.raises(ConfigError):
        prefill(model, prompt(), model.new_cache(batch=2, context=2))
    assert model.training == training


def test_results_are_ordinary_tensors_and_the_model_still_trains() -> None:
    model = nano()
    tokens = generate(model, prompt(), 4)
    assert not tokens.is_inference()
    tokens += 0
    model(tokens).sum().backward()
    ids = Decoder(model, prompt(), 4).run(4)
    ids += 0
