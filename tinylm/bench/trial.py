"""Cases measured together: proven, timed block by block in turn, proven again; then what the device said of each."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, TypedDict

import pytest

from tinylm.bench import leaves, memory, sampling, stats, timing, watch
from tinylm.bench.device import DeviceError, Gpu
from tinylm.bench.machine import Machine
from tinylm.bench.proof import Case, CheckFailed, Proof
from tinylm.bench.sampling import Samples


class Work(TypedDict, total=False):
    """What one call does, and how it is to be timed.

    timing: `cold` (what a GPU gets by default), `graph`, `hot` or `host`; a CPU is always timed by `host`.
    sync: waits for work that torch's streams do not see. units: how many equal units one call does, as the tokens of a
    decode loop; samples, bytes, flops and tokens are then per unit. bytes: that must move; flops: floating-point
    operations; tokens: produced.
    """

    timing: str | None
    sync: Callable[[], Any] | None
    units: int
    bytes: float | None
    flops: float | None
    tokens: float | None


DECLARED = ("bytes", "flops", "tokens")


def known(work: Mapping[str, Any]) -> None:
    if unknown := set(work) - set(Work.__annotations__):
        raise TypeError(f"measure: unknown {sorted(unknown)[0]!r}; expected some of {', '.join(Work.__annotations__)}")


@dataclass
class Result:
    samples: Samples
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Run:
    """A case that is being measured. It may have the same arguments as another."""

    fn: Callable[..., Any]
    result: Result
    proof: Proof
    args: tuple[Any, ...]
    bytes: int  # of the device's memory that came with it
    work: timing.Work = lambda: None
    sampler: timing.Sampler | None = None


def judge(found: Mapping[Any, Result], threshold: float) -> None:
    """Each result against the first, round by round."""
    names = list(found)
    for name in names[1:]:
        first, own = found[names[0]].samples.medians, found[name].samples.medians
        if logs := stats.log_ratios(first, own):
            pair = stats.paired(logs, threshold)
            found[name].extra |= {"versus": names[0], "ratio": pair.ratio, "verdict": pair.verdict}
            found[name].extra |= {"ratio_low": pair.low, "ratio_high": pair.high}


def take(machine: Machine, cases: list[Case], work: Work, held: Sequence[int] = ()) -> list[Result | BaseException]:
    """Samples of each case, taken in turn. A case that fails gives its exception; a single one raises it.

    held: bytes of the device's memory that each case has taken already.
    """
    wall, units = machine.wall, work.get("units", 1)
    mode, sync = mode_of(machine, work)
    with wall.phase("warm-up"):
        watching = machine.watch
    runs: list[_Run | None] = []
    failures: dict[int, BaseException] = {}

    def attempt(i: int, step: Callable[[], Any]) -> Any:
        """The step's result, or None; its failure is that of the case, or of the test if the case is the only one."""
        try:
            return step() if i not in failures else None
        except (Exception, pytest.skip.Exception) as trouble:
            if len(cases) == 1 or _is_lost(machine.gpu):
                raise
            traceback.clear_frames(trouble.__traceback__)  # they hold the memory that the others need
            failures[i] = trouble
            return None

    with machine.stream():
        runs = [attempt(i, partial(prove, machine, case, mode, sync)) for i, case in enumerate(cases)]
        for run, taken_before in zip(runs, held, strict=False):
            if run is not None:
                run.bytes += taken_before
        _share([run for run in runs if run is not None])
        for i, run in enumerate(runs):
            if run is not None:
                peers = sum(peer.bytes for peer in runs if peer is not None and peer is not run)
                attempt(i, partial(_equip, machine, run, mode, sync, peers))
        ready = {i: run for i, run in enumerate(runs) if run is not None and i not in failures}
        if len({run.sampler.queued for run in ready.values() if run.sampler is not None}) > 1:
            # What is compared reaches the device in the same way: a launch from the stream takes longer.
            for i, run in ready.items():
                if run.sampler is not None and run.sampler.queued == "graph":
                    attempt(i, partial(_hold, machine, run))
            ready = {i: run for i, run in ready.items() if i not in failures}
        samplers = [run.sampler for run in ready.values() if run.sampler is not None]
        seed = random.randrange(1 << 32)
        taken = sampling.collect(samplers, machine.limits, watching, wall, seed)
        for i, samples in zip(ready, taken, strict=True):
            if samples.failure is not None:
                failures[i] = samples.failure
        with wall.phase("check"):
            _still_shared(ready, failures)
        for (i, run), samples in zip(ready.items(), taken, strict=True):
            run.result.samples = _per_unit(samples, units)
            attempt(i, partial(_finish, machine, run, list(ready.values()), units, work))
    return [failures[i] if i in failures else _result(run) for i, run in enumerate(runs)]


def mode_of(machine: Machine, work: Work) -> tuple[str, Callable[[], Any] | None]:
    """How the work is timed, and what waits for it."""
    mode, sync = "host" if machine.device == "cpu" else work.get("timing") or "cold", work.get("sync")
    if mode == "host" and sync is None and machine.gpu is not None:
        sync = machine.gpu.torch.cuda.synchronize
    return mode, sync


def _result(run: _Run | None) -> Result:
    assert run is not None
    return run.result


def prove(machine: Machine, case: Case, mode: str, sync: Callable[[], Any] | None) -> _Run:
    """The case with the arguments that are to be timed, its wall time counted."""
    wall, gpu = machine.wall, machine.gpu
    before = allocated(gpu)
    first = True

    @wraps(case.fn)
    def fn(*args: Any) -> Any:
        nonlocal first
        with wall.phase("first call") if first else nullcontext():
            first = False
            return case.fn(*args)

    def inputs() -> tuple[Any, ...]:
        with wall.phase("inputs"):
            return case.inputs()

    with wall.phase("check"):
        proof = Proof(replace(case, fn=fn, inputs=inputs), gpu, mode, sync)
        args, error = proof.before()
    extra = {"timing": mode} | ({} if error is None else {"error": error})
    return _Run(case.fn, Result(Samples(), extra), proof, args, allocated(gpu) - before)


def _share(runs: list[_Run]) -> None:
    """Give all the first one's arguments where theirs are of the same kind.

    Where in memory a tensor lies made up to 0.3% of a kernel's time on an H200 (`placement` of its calibration).
    """
    for run in runs[1:]:
        first = runs[0]
        if not (first.proof.case.mutates or run.proof.case.mutates) and memory.rewritable(first.args, run.args):
            run.bytes -= leaves.size(run.args)
            run.args = first.args
            run.proof.adopt(run.args)


def _equip(machine: Machine, run: _Run, mode: str, sync: Callable[[], Any] | None, peers: int) -> None:
    """Make the sampler, whose first calls tell the memory that the work needs: what the process holds then, without the
    instrument's own and without what the `peers` hold."""
    gpu = machine.gpu
    if gpu is not None:
        gpu.torch.cuda.reset_peak_memory_stats()
    with machine.wall.phase("warm-up"):
        run.work = bind(run.fn, run.args)
        run.sampler = timing.sampler(mode, run.work, gpu, sync, run.proof.call_s)
        if run.sampler.queued == "stream":
            run.sampler.take(1, lambda: None)  # what it cannot time, it refuses here
    if gpu is not None:
        run.result.extra["peak_allocated_bytes"] = gpu.torch.cuda.max_memory_allocated() - gpu.own_bytes - peers
    if run.sampler.queued is not None:
        run.result.extra["queued"] = run.sampler.queued


def _hold(machine: Machine, run: _Run) -> None:
    assert machine.gpu is not None
    with machine.wall.phase("warm-up"):
        run.sampler = timing.held(run.work, machine.gpu)
        run.sampler.take(1, lambda: None)
    run.result.extra["queued"] = run.sampler.queued


def _is_lost(gpu: Gpu | None) -> bool:
    """Whether the CUDA context is: every peer would then fail, and would be blamed for it."""
    try:
        if gpu is not None:
            gpu.drain()
    except DeviceError:
        return True
    return False


def _still_shared(ready: dict[int, _Run], failures: dict[int, BaseException]) -> None:
    """All that share arguments fail where one of them has changed these: none was timed on what it was given."""
    for i, run in ready.items():
        shared = sum(peer.args is run.args for peer in ready.values()) > 1
        if shared and not run.proof.kept(run.args):
            failures[i] = CheckFailed("mutates its inputs: one of the implementations that share them does, once timed")


def _finish(machine: Machine, run: _Run, runs: list[_Run], units: int, work: Work) -> None:
    """Prove what was timed, and read what was not to disturb the timing."""
    wall, result = machine.wall, run.result
    with wall.phase("check"):
        if any(peer.args is run.args for peer in runs if peer is not run):
            run.proof.adopt(run.args)  # the proof of one that shares them has written new values into them
        timed = run.work
        if run.sampler is not None and run.sampler.again is not None:
            timed = run.sampler.again
            timed()  # captures, which cannot be done while a stream is held
        error = run.proof.after(timed, run.args)
        if machine.gpu is not None:
            machine.gpu.forget_stamps()
    if error is not None:
        result.extra["error"] = max(error, result.extra.get("error", 0.0))
    if machine.gpu is None:
        if machine.energy:
            result.extra["energy_j"] = machine.nvml.read("energy_j")  # None, and why
            result.extra |= {"energy_per_token_j": None} if work.get("tokens") else {}
        return
    with wall.phase("telemetry"):
        result.extra |= _readings(result.samples)
    if machine.energy:
        with wall.phase("energy"):
            result.extra |= _energy(machine, run, units, work.get("tokens"))


def _energy(machine: Machine, run: _Run, units: int, tokens: float | None) -> dict[str, Any]:
    """Joules per unit of the work run back to back for seconds, without flushes: what it costs when it is used."""
    from_host = run.result.extra["timing"] == "host"
    calls = batch(machine, run.work, run.result.samples.median * units, from_host=from_host)
    found = watch.energy(*calls, lambda: machine.nvml.read("energy_j"))
    if found is None:
        return {"energy_j": None} | ({"energy_per_token_j": None} if tokens else {})
    joules = found.joules / found.calls / units
    extra = {"energy_j": joules, "energy_window_s": found.seconds, "power_w": found.joules / found.seconds}
    return extra | ({"energy_per_token_j": joules / tokens} if tokens else {})


def batch(machine: Machine, work: timing.Work, seconds: float, *, from_host: bool = False) -> tuple[timing.Work, int]:
    """A call that runs `work`, of about `seconds`, many times and waits for the device; and how many.

    from_host: launched as it is timed, its waits for the host being part of the work. Else from a graph.
    """
    gpu = machine.gpu
    assert gpu is not None
    count = max(1, min(500, math.ceil(watch.ENERGY_BATCH_S / max(seconds, 1e-9))))

    def calls() -> None:
        for _ in range(count):
            work()

    try:  # so that the host's launches do not keep the device waiting
        queue = gpu.capture(calls).replay if count > 1 and not from_host else calls
    except RuntimeError:
        gpu.torch.cuda.synchronize()
        queue = calls

    def run() -> None:
        queue()
        gpu.drain()

    return run, count


def bind(fn: Callable[..., Any], args: tuple[Any, ...]) -> timing.Work:
    return (lambda: fn(*args)) if args else fn


def allocated(gpu: Gpu | None) -> int:
    return gpu.torch.cuda.memory_allocated() if gpu else 0


def _per_unit(samples: Samples, units: int) -> Samples:
    """The same samples, of one unit each."""
    blocks = [replace(block, seconds=[second / units for second in block.seconds]) for block in samples.blocks]
    flagged = [(replace(block, seconds=[s / units for s in block.seconds]), kept) for block, kept in samples.flagged]
    return replace(samples, blocks=blocks, flagged=flagged)


def _readings(samples: Samples) -> dict[str, Any]:
    """What the device said during the blocks: medians, the lowest clock, all reasons; null where it did not tell."""

    def median(values: list[float | None]) -> float | None:
        told = sorted(value for value in values if value is not None)
        return told[len(told) // 2] if told else None

    blocks = samples.blocks
    clocks = [block.clock_hz for block in blocks if block.clock_hz is not None]
    reasons = [block.throttle for block in blocks if block.throttle is not None]
    return {
        "sm_clock_hz": median([block.clock_hz for block in blocks]),
        "sm_clock_low_hz": min(clocks, default=None),
        "temperature_c": median([block.temperature_c for block in blocks]),
        "power_w": median([block.power_w for block in blocks]),
        "throttle": sorted({reason for told in reasons for reason in told}) if reasons else None,
        "flagged_blocks": [
            {
                "clock_hz": block.clock_hz,
                "median_s": block.median,
                "throttle": block.throttle,
                "temperature_c": block.temperature_c,
                "kept": kept,
            }
            for block, kept in samples.flagged
        ],
    }
