"""The `measure` fixture's object: check, warm up, time, read telemetry, replay into pytest-benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest

from tinylm.bench import telemetry, timing
from tinylm.bench.device import Ceilings, Gpu
from tinylm.bench.timing import Limits, Samples

# The telemetry pass keeps the device busy about this long, so that clocks and temperature are those of the work.
TELEMETRY_S = 0.03


class CheckFailed(AssertionError):
    """The work's result is not that of the reference: the cell fails, and no time is taken."""


class Clock:
    """A clock that stands still until a sample is replayed: the `timer` that pytest-benchmark reads."""

    __name__ = "replayed_samples"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Machine:
    """What a run is measured on; the instruments are made when first used."""

    device: str  # "cpu" | "cuda"
    facts: dict[str, Any]
    label: str
    limits: Limits

    @cached_property
    def gpu(self) -> Gpu | None:
        return Gpu() if self.device == "cuda" else None

    @cached_property
    def ceilings(self) -> Ceilings:
        return Ceilings(self.gpu)

    @cached_property
    def nvml(self) -> telemetry.Nvml:
        return telemetry.Nvml.open(str(self.gpu.properties.uuid)) if self.gpu else telemetry.Nvml(reason="no card")

    @property
    def null_reasons(self) -> dict[str, str]:
        """Why readings were null, by name."""
        return dict(self.nvml.reasons) if "nvml" in self.__dict__ else {}

    @property
    def computes_bf16(self) -> bool:
        """Whether bf16 is computed natively: compute capability 8.0 up. A CPU is not counted as doing so."""
        capability = self.facts["compute_capability"]
        return capability is not None and float(capability) >= 8.0


@dataclass(frozen=True)
class Case:
    """One implementation to be measured.

    fn(*inputs()) is the work. check(result, *args) gets the result on fresh inputs; it returns the error against
    the reference (a float) or None, and raises AssertionError if the result is wrong.
    """

    fn: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]] = tuple
    check: Callable[..., float | None] | None = None


def against(reference: Callable[..., Any], tolerance: float) -> Callable[..., float]:
    """A check: the largest ||result - reference|| / ||reference||, over all tensors returned, is within `tolerance`.

    reference(*args) gets the same inputs and should compute in fp64; the norms are taken in fp64. A result that is
    not finite where the reference is finite fails.
    """

    def check(result: Any, *args: Any) -> float:
        expected = reference(*args)
        results, expecteds = (value if isinstance(value, tuple) else (value,) for value in (result, expected))
        if len(results) != len(expecteds):
            raise CheckFailed(f"{len(results)} results where the reference gives {len(expecteds)}")
        worst = 0.0
        for got, want in zip(results, expecteds, strict=True):
            if got.shape != want.shape:
                raise CheckFailed(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            want = want.double()
            error = ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()
            if not error <= tolerance:
                raise CheckFailed(f"relative error {error:.3g} against the reference, tolerance {tolerance:.3g}")
            worst = max(worst, error)
        return worst

    return check


@dataclass
class _Result:
    samples: Samples
    extra: dict[str, Any] = field(default_factory=dict)


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
        timing: str | None = None,
        sync: Callable[[], Any] | None = None,
        units: int = 1,
        bytes: float | None = None,
        flops: float | None = None,
        tokens: float | None = None,
    ) -> None:
        """Check, time and record fn(*inputs()). Raises CheckFailed for a wrong result, TimingError for work that the
        mode cannot time.

        timing: `cold` (what a GPU gets by default), `graph`, `hot` or `host`; a CPU is always timed by `host`.
        sync: waits for work that torch's streams do not see. units: how many equal units one call of fn does, as
        the tokens of a decode loop; samples, bytes, flops and tokens are then per unit. bytes: that must move;
        flops: floating-point operations; tokens: produced.
        """
        case = Case(fn, inputs, check)
        declared = {"bytes": bytes, "flops": flops, "tokens": tokens}
        if self._disabled(case):
            return
        with self._failing():
            (result,) = self._take([case], timing, sync, units)
            assert isinstance(result, _Result)
            self._record(result, declared)
        self._replay(result.samples.seconds, lambda: fn(*inputs()))

    def interleaved(
        self,
        axis: str,
        build: Callable[[Any], Case],
        *,
        timing: str | None = None,
        sync: Callable[[], Any] | None = None,
        units: int = 1,
        bytes: float | None = None,
        flops: float | None = None,
        tokens: float | None = None,
    ) -> None:
        """Measure this test together with its peers, which differ from it in parameter `axis` alone, round by round.

        build(value) makes the peer's case; it may skip. The first test of the group measures all that were
        selected; each test replays its own samples.
        """
        node = self._request.node
        own = node.callspec.params[axis]
        if self._benchmark.disabled:
            self._disabled(build(own))
            return
        groups = node.config.stash.setdefault(_GROUPS, {})
        key = (node.path, node.originalname, *((k, v) for k, v in node.callspec.params.items() if k != axis))
        with self._failing():
            if key not in groups:
                groups[key] = self._take_group(self._peers(axis), build, timing, sync, units)
            result = groups[key].pop(own)
            if isinstance(result, BaseException):
                raise result
            self._record(result, {"bytes": bytes, "flops": flops, "tokens": tokens})
        self._replay(result.samples.seconds, lambda: None)

    def samples(self, seconds: list[float], timing: str, **declared: float | None) -> None:
        """Record samples that were taken elsewhere: in another process, or from the events of a serving loop."""
        if self._benchmark.disabled:
            self._used = True
            self._benchmark.pedantic(lambda: None)
            return
        with self._failing():
            if not seconds or not all(math.isfinite(s) and s >= 0 for s in seconds):
                raise ValueError(f"samples {seconds!r}: expected at least one, finite and not negative")
            self._record(_Result(Samples(list(seconds), "given"), {"timing": timing}), declared)
        self._replay(seconds, lambda: None)

    # --- measuring -------------------------------------------------------------------------------------------------

    def _disabled(self, case: Case) -> bool:
        if not self._benchmark.disabled:
            return False
        self._used = True
        args = case.inputs()
        _checked(case.check, self._benchmark.pedantic(case.fn, args=args), args)
        return True

    def _peers(self, axis: str) -> list[Any]:
        node = self._request.node
        own = {k: v for k, v in node.callspec.params.items() if k != axis}
        found = []
        for item in node.session.items:
            if (item.path, getattr(item, "originalname", None)) == (node.path, node.originalname):
                params = dict(item.callspec.params)
                value = params.pop(axis)
                if params == own:
                    found.append(value)
        return found

    def _take_group(
        self, values: list[Any], build: Callable[[Any], Case], *how: Any
    ) -> dict[Any, _Result | BaseException]:
        cases: dict[Any, Case] = {}
        taken: dict[Any, _Result | BaseException] = {}
        for value in values:
            try:
                cases[value] = build(value)
            except (Exception, pytest.skip.Exception) as error:
                taken[value] = error
        return taken | dict(zip(cases, self._take(list(cases.values()), *how), strict=True))

    def _take(
        self, cases: list[Case], mode: str | None, sync: Callable[[], Any] | None, units: int
    ) -> list[_Result | BaseException]:
        """Samples of each case, taken in turn. A case that fails gives its exception; a single one raises it."""
        mode = "host" if self.device == "cpu" else mode or "cold"
        if mode == "host" and sync is None and self.device == "cuda":
            import torch

            sync = torch.cuda.synchronize
        results: list[_Result | BaseException] = []
        running: list[tuple[_Result, timing.Work, timing.Sampler]] = []
        for case in cases:
            try:
                args = case.inputs()
                error = _checked(case.check, case.fn(*args), args)
                del args
                work = _bind(case.fn, case.inputs())
                sampler = timing.sampler(mode, work, self.machine.gpu, sync)
            except (Exception, pytest.skip.Exception) as trouble:
                if len(cases) == 1:
                    raise
                results.append(trouble)
                continue
            extra = {"timing": mode} | ({} if error is None else {"error": error})
            result = _Result(Samples(), extra)
            results.append(result)
            running.append((result, work, sampler))
        for (result, _, _), samples in zip(
            running, timing.collect([sampler for *_, sampler in running], self.machine.limits), strict=True
        ):
            result.samples = Samples([s / units for s in samples.seconds], samples.stop_reason)
        for result, work, _ in running:
            result.extra |= self._telemetry(work, result.samples.median * units)
        return results

    def _telemetry(self, work: timing.Work, seconds: float) -> dict[str, Any]:
        """Allocator peaks of one call, then power, temperature and clock.

        The peaks are the process's: they hold what else lives beside the work (cold's flush buffer, the peers of an
        interleaved group). Work of less than 30 ms is kept running while they are read; the driver averages
        `power_w` over up to a second, so that it also knows what ran before.
        """
        if self.device == "cpu":
            return {}
        import torch

        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        found: dict[str, Any] = {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
        for _ in range(min(1000, math.ceil(TELEMETRY_S / seconds)) if seconds < TELEMETRY_S else 0):
            work()
        for name in ("power_w", "temperature_c", "throttle"):
            found[name] = self.machine.nvml.read(name)
        assert self.machine.gpu is not None
        found["sm_clock_hz"] = self.machine.gpu.sm_clock_hz()
        return found

    # --- recording -------------------------------------------------------------------------------------------------

    def _record(self, result: _Result, declared: Mapping[str, float | None]) -> None:
        median = result.samples.median
        extra = {name: value for name, value in declared.items() if value is not None}
        rates = {f"{name}_per_s": value / median for name, value in extra.items() if median > 0}
        record = result.extra | {"stop_reason": result.samples.stop_reason} | extra | rates
        shares = []
        if "bytes" in extra or "flops" in extra:
            copy, read = self.machine.ceilings.bandwidth
            record |= {"ceiling_bytes_per_s": copy, "ceiling_read_bytes_per_s": read}
            if copy and "bytes_per_s" in rates:
                shares.append(rates["bytes_per_s"] / copy)
        dtype = self._request.node.callspec.params.get("dtype") if hasattr(self._request.node, "callspec") else None
        if "flops" in extra and dtype is not None:
            ceiling = record["ceiling_flops_per_s"] = self.machine.ceilings.flops(dtype)
            if ceiling and "flops_per_s" in rates:
                shares.append(rates["flops_per_s"] / ceiling)
        if shares:
            record["of_ceiling"] = max(shares)
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


_GROUPS = pytest.StashKey[dict[Any, dict[Any, "_Result | BaseException"]]]()


def _bind(fn: Callable[..., Any], args: tuple[Any, ...]) -> timing.Work:
    return (lambda: fn(*args)) if args else fn


def _raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def _checked(check: Callable[..., float | None] | None, result: Any, args: tuple[Any, ...]) -> float | None:
    error = None if check is None else check(result, *args)
    if error is not None and not math.isfinite(error):
        raise CheckFailed(f"the check gives an error of {error}: a result that is not finite is wrong")
    return error
