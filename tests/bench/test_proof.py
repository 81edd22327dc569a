"""What the proof is made of: rows of a result, bytes of inputs, memory that is spoiled, and what a device says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="these are about tensors")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tinylm.bench import leaves, memory  # noqa: E402
from tinylm.bench.proof import Case, CheckFailed, Proof, against, clocks_agree, implausible  # noqa: E402
from tinylm.bench.swallowed import swallowed  # noqa: E402
from tinylm.bench.witness import Batch, Witness  # noqa: E402

# --- against ---------------------------------------------------------------------------------------------------------


def judged(got: Any, want: Any, tolerance: float = 1e-3) -> float:
    return against(lambda: want, tolerance)(got)


def test_the_error_is_relative_to_the_norm() -> None:
    want = torch.randn(50, 20, dtype=torch.float64)
    assert judged(want * (1 + 5e-4), want) == pytest.approx(5e-4)
    assert judged((want, 2 * want), [want, 2 * want]) == 0.0
    with pytest.raises(CheckFailed, match=r"relative error 0\.5"):
        judged(want * 1.5, want)


@pytest.mark.parametrize(
    ("shape", "where", "words"),
    [
        ((1_000_000, 8), 123_456, "1 of 1000000 rows are wrong .* the first is row 123456 \\(all zeros\\)"),
        ((64, 2000), (..., -1), "1 of 2000 columns are wrong .* the first is column 1999 \\(all zeros\\)"),
        ((4, 16, 32), (2, 5), "1 of 64 rows are wrong .* the first is row 37"),
        ((5000,), 4999, "1 of 5000 elements are wrong .* the first is element 4999"),
    ],
)
def test_a_part_that_is_skipped_does_not_drown_in_the_norm(shape: Any, where: Any, words: str) -> None:
    want = torch.rand(shape).add(1.0)
    got = want.clone()
    got[where] = 0
    with pytest.raises(CheckFailed, match="skips .*" + words):
        judged(got, want, 0.05)


def test_rounding_of_every_kind_of_row_is_no_skipped_row() -> None:
    """Rows of very different size, and rows of next to nothing, whose errors come from numbers that cancelled."""
    want = torch.randn(4096, 512, dtype=torch.float64) * torch.logspace(-6, 3, 4096, dtype=torch.float64)[:, None]
    want[::7] = 0
    assert judged(want.bfloat16(), want, torch.finfo(torch.bfloat16).eps) > 0
    noise = torch.randn(4096, 512, dtype=torch.float64) * want.square().mean().sqrt() * 1e-3
    judged(want + noise, want, 1.1e-3)


def test_infinities_are_right_where_the_reference_has_them() -> None:
    want = torch.randn(8, 8)
    want[2, 3:] = -torch.inf
    assert judged(want.clone(), want) == 0.0
    with pytest.raises(CheckFailed):
        judged(want.nan_to_num(neginf=0.0), want)


@pytest.mark.parametrize(
    "got", [None, 1.0, (torch.zeros(2), torch.zeros(2)), torch.zeros(3), torch.full((2,), torch.nan)]
)
def test_what_is_no_such_tensor_is_wrong(got: Any) -> None:
    with pytest.raises(CheckFailed):
        judged(got, torch.ones(2))


# --- bytes -----------------------------------------------------------------------------------------------------------

KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


@given(st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 70), st.data())
def test_a_fingerprint_sees_every_change(kind: Any, rows: int, columns: int, data: st.DataObject) -> None:
    tensor = torch.randint(0, 2, (rows, columns)).to(kind)
    before = leaves.fingerprint(tensor)
    assert leaves.fingerprint(tensor.clone()) == before
    flat = leaves.words(tensor).view(-1)
    on_device = leaves.device_hash(flat)
    chosen = data.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1, max_size=4, unique=True))
    highest = {1: -(2**7), 2: -(2**15), 4: -(2**31), 8: -(2**63)}[tensor.element_size()]
    flat[chosen] ^= 1 if kind is torch.bool else highest  # the sign, whose differences cancel in a plain sum
    assert leaves.fingerprint(tensor) != before and leaves.device_hash(flat) != on_device


def test_new_values_in_the_same_memory_leave_no_trace() -> None:
    ours, fresh = ((torch.randn(4, 3), torch.arange(3), 7, "x") for _ in range(2))
    assert memory.rewritable(ours, fresh)
    seen = ours[0].data_ptr(), ours[0]._version
    memory.rewrite(ours, fresh)
    assert torch.equal(ours[0], fresh[0]) and seen == (ours[0].data_ptr(), ours[0]._version)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(3, requires_grad=True),),
        lambda: (torch.randn(1).expand(3),),
        lambda: (torch.randn(3), object()),
        lambda: (torch.randn(int(torch.randint(2, 1000, ()))),),
        lambda: (lambda t: (t, t))(torch.randn(3)),
        tuple,
    ],
    ids=["grad", "expanded", "object", "lengths", "twice", "none"],
)
def test_inputs_that_cannot_be_rewritten_are_left_alone(make: Callable[[], tuple[Any, ...]]) -> None:
    assert not memory.rewritable(make(), make())


def test_poison_is_healed_where_nothing_was_written() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float8_e5m2):
        tensor = torch.ones(10, 4).to(kind)[:, 1:3]
        saved = tensor.clone()
        memory.poison(tensor)
        assert tensor.float().isnan().all() and memory.poisoned(tensor) == 1
        tensor[4:] = 2
        assert memory.poisoned(tensor) == pytest.approx(0.4)
        memory.heal(tensor, saved)
        assert tensor.float()[:, 0].tolist() == [1.0] * 4 + [2.0] * 6


def test_state_that_a_work_keeps_is_not_spoiled() -> None:
    """As of a cache that returns a view of all its entries, and writes one."""
    entries = torch.zeros(16, 8)

    def append(x: Any) -> Any:
        entries[3] = x
        return entries[:4]

    def check(result: Any, x: Any) -> None:
        assert torch.equal(result[3], x) and not result[:3].any()

    case = Case(append, lambda: (torch.randn(8),), check)
    proof = Proof(case, None, "host")
    args, _ = proof.before()
    proof.after(lambda: append(*args), args)
    assert entries.isfinite().all() and not entries[:3].any()


def test_a_step_that_changes_its_state_is_declared() -> None:
    total = torch.zeros(8)
    case = Case(lambda x: total.add_(x), lambda: (torch.randn(8),), lambda result, x: None, mutates=True)
    Proof(case, None, "host").before()
    assert total.isfinite().all()


# --- results that are none, and exceptions ---------------------------------------------------------------------------


class Lazy:
    def __array__(self) -> Any:
        raise AssertionError("computed")


Sub = type("Sub", (torch.Tensor,), {})


async def later() -> int:
    return 1


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (iter([1]), "iterator"),
        ({"logits": [map(str, [1])]}, "map"),
        (lambda: 1, "function"),
        (Lazy(), "Lazy.__array__"),
        (torch.ones(2).as_subclass(Sub), "Sub is a subclass"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conj"),
        (SimpleNamespace(result=len, done=len), "future"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_promises_are_no_results(result: Any, words: str) -> None:
    assert words in (leaves.unfinished(result, waited_for=False) or "")


def test_a_coroutine_is_no_result() -> None:
    promise = later()
    assert "awaitable" in (leaves.unfinished(promise, waited_for=False) or "")
    promise.close()


@pytest.mark.parametrize("result", [None, 1, "x", (1.0, [torch.ones(2)]), {"a": b"x"}, object(), torch.nn.Linear(1, 1)])
def test_values_are_results(result: Any) -> None:
    assert leaves.unfinished(result, waited_for=False) is None


def test_an_exception_that_comes_out_is_not_swallowed_and_the_tracer_is_put_back() -> None:
    def raising() -> None:
        raise KeyError("x")

    def quiet() -> Iterator[int]:
        yield from (i for i in range(3))

    before = sys.gettrace()
    assert swallowed(raising, raising) is None
    assert swallowed(lambda: list(quiet()), quiet) is None
    assert sys.gettrace() is before


# --- what a device says ----------------------------------------------------------------------------------------------

GOOD = Batch(device=3e-3, events=3.001e-3, host=3.1e-3, tail=40e-6, queue=1e-5)


class Told(Witness):
    """A witness of batches that are given."""

    def __init__(self, batches: list[Batch | None]) -> None:
        self.batches = iter(batches)

    def _batch(self, work: Any, calls: int) -> Batch | None:
        return next(self.batches)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([GOOD, GOOD], None),
        ([GOOD, GOOD._replace(tail=5e-3), GOOD], None),  # once is the host's delay
        ([GOOD, *[GOOD._replace(tail=2e-3)] * 3], "side stream: work goes on for 2000 us"),
        # The other stream's work keeps the last stamp waiting.
        ([GOOD, *[Batch(53e-6, 2e-6, 20e-6, 600e-6, 1e-5)] * 3], "side stream: work goes on for 600 us"),
        ([GOOD, GOOD._replace(events=1.5e-3)], "torch.cuda.Event gives 1500.0 us for work of 3000.0 us"),
        ([GOOD, GOOD._replace(host=20e-6)], "Event.synchronize"),
        ([None, None], None),  # with one call too: it waits for the device
    ],
)
def test_the_verdict_on_a_batch(batches: list[Batch | None], words: str | None) -> None:
    witness = Told(batches)
    if words is None:
        witness.ends_with_its_stream(lambda: None, 1e-3, 1e-5)
    else:
        with pytest.raises(CheckFailed, match=words):
            witness.ends_with_its_stream(lambda: None, 1e-3, 1e-5)


@pytest.mark.parametrize(
    ("cycles", "hot"),
    [
        ([800, 300, 790], False),
        ([800, 300, 310] * 3, True),
        ([800, 300, 310, 800, 300, 780], False),
        ([400, 390, 395], False),
    ],
    ids=["cold", "hot", "hot once", "no difference"],
)
def test_the_verdict_on_a_flush(cycles: list[float], hot: bool) -> None:
    told = iter(cycles)
    block = SimpleNamespace(fill_=lambda value: None, nbytes=1 << 20)
    witness = Told([])
    witness.gpu = SimpleNamespace(  # type: ignore[assignment]
        torch=SimpleNamespace(empty=lambda *a, **k: block, ones=lambda *a, **k: block, uint8=None),
        properties=SimpleNamespace(L2_cache_size=1 << 20),
        latency_cycles=lambda tensor: next(told),
        flush=lambda: None,
        drain=lambda: None,
    )
    if hot:
        with pytest.raises(CheckFailed, match=r"hot in cache: .* 310 cycles away"):
            witness.is_flushed(())
    else:
        witness.is_flushed(())


def test_more_than_the_card_can_do_is_not_believed() -> None:
    assert "more bytes are declared" in (implausible(1.5, "cold", 1e9, 5e7) or "")
    assert implausible(1.05, "cold", 1e9, 5e7) is None
    assert implausible(3.0, "hot", 1e9, 5e7) is None and implausible(3.0, "cold", 1e8, 5e7) is None


def test_the_clock_is_what_it_was() -> None:
    clocks_agree()
