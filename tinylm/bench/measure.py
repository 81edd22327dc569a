"""The `measure` fixture's object: prove, time, judge against peers, record, replay into pytest-benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack

import pytest

from tinylm.bench import leaves, trial
from tinylm.bench.journal import PROFILING, RECORD
from tinylm.bench.machine import Machine
from tinylm.bench.proof import Case, CheckFailed, implausible
from tinylm.bench.sampling import Samples
from tinylm.bench.trial import Result, Work
from tinylm.bench.watch import Block


class Clock:
    """A clock that stands still until a sample is replayed: the `timer` that pytest-benchmark reads."""

    __name__ = "replayed_samples"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Measure:
    """What a benchmark gets as `measure`: called once per test with the work, and what one call of it does."""

    def __init__(self, benchmark: Any, machine: Machine, clock: Clock, request: pytest.FixtureRequest) -> None:
        self.machine = machine
        self.device = machine.device
        self.seconds: list[float] = []  # what was replayed
        self._benchmark = benchmark
        self._clock = clock
        self._request = request
        self._used = False

    @property
    def extra_info(self) -> dict[str, Any]:
        """The record's keys so far; a benchmark may add its own."""
        return self._benchmark.extra_info

    def __call__(
        self,
        fn: Callable[..., Any],
        *,
        inputs: Callable[[], tuple[Any, ...]] = tuple,
        check: Callable[..., float | None] | None = None,
        mutates: bool = False,
        constant: bool = False,
        **work: Unpack[Work],
    ) -> None:
        """Prove, time and record fn(*inputs()): see `Case` and `Work`.

        Raises CheckFailed for a wrong or dishonest result, TimingError for work that the mode cannot time.
        """
        trial.known(work)
        case = Case(fn, inputs, check, mutates, constant)
        if self._benchmark.disabled:
            self._once(case)
            return
        self._profiled(lambda: case, work)
        with self._failing():
            (result,) = trial.take(self.machine, [case], work)
            assert isinstance(result, Result)
            self._record(result, work)
        self._replay(result.samples.seconds, lambda: fn(*inputs()))

    def interleaved(self, axis: str, build: Callable[[Any], Case], *, base: Any = None, **work: Unpack[Work]) -> None:
        """Measure this test together with its peers, which differ from it in parameter `axis` alone, block by block.

        build(value) makes the peer's case; it may skip. The first test of the group measures all that were selected;
        each test replays its own samples, and records how it compares with the peer `base` (or, where that is not
        there, the first).
        """
        trial.known(work)
        node = self._request.node
        own = node.callspec.params[axis]
        if self._benchmark.disabled:
            self._once(build(own))
            return
        self._profiled(lambda: build(own), work)
        groups = node.config.stash.setdefault(_GROUPS, {})
        key = (node.nodeid.partition("[")[0], *((k, v) for k, v in node.callspec.params.items() if k != axis))
        with self._failing():
            if key not in groups:
                groups[key] = self._take_group(self._peers(axis), build, base, work)
            result = groups[key].pop(own)
            if isinstance(result, BaseException):
                raise result
            self._record(result, work)
        self._replay(result.samples.seconds, lambda: None)

    def samples(self, seconds: list[float], timing: str, **declared: float | None) -> None:
        """Record samples that were taken elsewhere: in another process, or from the events of a serving loop."""
        if self._benchmark.disabled:
            self._used = True
            self._benchmark.pedantic(lambda: None)
            return
        if PROFILING in self._request.config.stash:
            pytest.skip("--profile: these samples were taken elsewhere, so that there is nothing here to look into")
        with self._failing():
            if not seconds or not all(math.isfinite(s) and s >= 0 for s in seconds):
                raise ValueError(f"samples {seconds!r}: expected at least one, finite and not negative")
            given = Samples([Block([second]) for second in seconds], "given")
            self._record(Result(given, {"timing": timing}), declared)
        self._replay(seconds, lambda: None)

    # --- measuring -------------------------------------------------------------------------------------------------

    def _once(self, case: Case) -> None:
        """Without timing (--benchmark-disable): the work and its check, once."""
        self._used = True
        args = case.inputs()
        given = leaves.snapshot(args) if case.mutates else args
        result = self._benchmark.pedantic(case.fn, args=args)
        if case.check is not None:
            case.check(result, *(args if result is None else given))

    def _profiled(self, build: Callable[[], Case], work: Work) -> None:
        """With --profile: record calls of the case instead of timing it, which ends the test."""
        if (profiling := self._request.config.stash.get(PROFILING, None)) is not None:
            with self._failing():
                profiling.take(self._request.node, self.machine, build, work)

    def _peers(self, axis: str) -> dict[Any, pytest.Item]:
        """The tests that differ from this one in `axis` alone, by their value of it, and are to be measured."""
        node = self._request.node
        record = node.config.stash[RECORD]
        own = {k: v for k, v in node.callspec.params.items() if k != axis}
        found = {}
        for item in node.session.items:
            if item.nodeid.partition("[")[0] == node.nodeid.partition("[")[0]:
                params = dict(item.callspec.params)
                value = params.pop(axis)
                if params == own and not record.settled(item):
                    found[value] = item
        return found

    def _take_group(
        self, peers: dict[Any, pytest.Item], build: Callable[[Any], Case], base: Any, work: Work
    ) -> dict[Any, Result | BaseException]:
        cases: dict[Any, Case] = {}
        taken: dict[Any, Result | BaseException] = {}
        held: list[int] = []
        for value in sorted(peers, key=lambda value: value != base):  # the base first: ratios are taken to the first
            try:
                with self.machine.wall.phase("inputs"):
                    before = trial.allocated(self.machine.gpu)
                    cases[value] = self._told(build(value), peers[value])
                    held.append(trial.allocated(self.machine.gpu) - before)
            except (Exception, pytest.skip.Exception) as error:
                taken[value] = error
        measured = dict(zip(cases, trial.take(self.machine, list(cases.values()), work, held), strict=True))
        found = {value: result for value, result in measured.items() if isinstance(result, Result)}
        with self.machine.wall.phase("statistics"):
            trial.judge(found, self.machine.limits.threshold)
        return taken | measured

    def _told(self, case: Case, item: pytest.Item) -> Case:
        """The case, of which the journal knows that it is on: if it ends the process, it is not the test that runs."""

        def inputs() -> tuple[Any, ...]:
            self._request.config.stash[RECORD].start(item)
            return case.inputs()

        return replace(case, inputs=inputs)

    # --- recording -------------------------------------------------------------------------------------------------

    def _record(self, result: Result, declared: Mapping[str, Any]) -> None:
        samples = result.samples
        median = samples.median
        extra = {name: declared[name] for name in trial.DECLARED if declared.get(name) is not None}
        rates = {f"{name}_per_s": value / median for name, value in extra.items() if median > 0}
        record = result.extra | {"stop_reason": samples.stop_reason} | extra | rates
        if samples.stop_reason != "given":
            record |= {"ci_width": samples.width, "blocks": len(samples.blocks)}
            record["block_samples"] = len(samples.blocks[0].seconds)
        shares, copy_share = [], 0.0
        if "bytes" in extra or "flops" in extra:
            with self.machine.wall.phase("ceilings"), self.machine.stream():
                copy, read = self.machine.ceilings.bandwidth
            record |= {"ceiling_bytes_per_s": copy, "ceiling_read_bytes_per_s": read}
            if copy and "bytes_per_s" in rates:
                copy_share = rates["bytes_per_s"] / copy
                shares.append(copy_share)
        dtype = self._request.node.callspec.params.get("dtype") if hasattr(self._request.node, "callspec") else None
        if "flops" in extra and dtype is not None:
            with self.machine.wall.phase("ceilings"), self.machine.stream():
                ceiling = record["ceiling_flops_per_s"] = self.machine.ceilings.flops(dtype)
            if ceiling and "flops_per_s" in rates:
                shares.append(rates["flops_per_s"] / ceiling)
        if shares:
            record["of_ceiling"] = max(shares)
        if copy_share and self.machine.gpu is not None:
            cache = self.machine.gpu.properties.L2_cache_size
            if why := implausible(copy_share, record["timing"], extra["bytes"], cache):
                raise CheckFailed(why)
        self._benchmark.extra_info.update(record)

    def _replay(self, seconds: list[float], work: Callable[[], Any]) -> None:
        """Give the samples to pytest-benchmark, one round each; further calls (cProfile's) do the work itself."""
        self._used = True
        self.seconds = list(seconds)
        remaining = iter(seconds)

        def setup() -> None:
            self._clock.now = 0.0

        def target() -> None:
            sample = next(remaining, None)
            if sample is None:
                work()
            else:
                self._clock.now = sample

        with self.machine.wall.phase("reporting"):
            self._benchmark.pedantic(target, setup=setup, rounds=len(seconds), iterations=1)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Tell pytest-benchmark of a failure the one public way there is: raise it inside `pedantic`."""
        try:
            yield
        except Exception as error:
            self._used = True
            self._benchmark.pedantic(_raiser(error))

    def close(self) -> None:
        """Mark a fixture that was never used, because the test ended before, as failed for pytest-benchmark."""
        if not self._used:
            unused = RuntimeError("the test ended before it measured")
            try:
                self._benchmark.pedantic(_raiser(unused))
            except RuntimeError as error:
                if error is not unused:
                    raise


_GROUPS = pytest.StashKey[dict[Any, dict[Any, "Result | BaseException"]]]()


def _raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail
