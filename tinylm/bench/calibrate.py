"""How far the figures can be trusted, measured: modes against Nsight Compute, processes against each other, pairs.

Sections, each of one question, each kept in results/<label>/calibration.json:

modes          do `cold`, `graph` and `hot` say what Nsight Compute says of the same kernels (GPU)
repeatability  do fresh processes agree
pairs          how often is identical code called different, and a slower one not
energy         do windows of the energy counter agree (GPU)
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinylm.bench import isolated, nsight, results, sampling, stats, telemetry, timing, trial
from tinylm.bench.kernels import KERNELS, Kernel
from tinylm.bench.machine import Machine
from tinylm.bench.timing import Limits
from tinylm.bench.watch import energy

SAMPLES = 80
# Nsight Compute leaves milliseconds between two kernels: as long here, because back to back heavy ones lower the clock.
PAUSE_S = 4e-3
# What `cold` and `graph` may be away from Nsight Compute: below and from 20 us.
SHORT_S, SHORT_ERROR_S, ERROR = 20e-6, 0.3e-6, 0.01
# A run of the suite would stop here too; the width is finer, because the medians themselves are compared.
REPEAT = Limits(min_samples=100, max_samples=1000, seconds=0.5, width=0.001)
PAIR_S = 0.4
SLOWER = {"cuda": 0.01, "cpu": 0.06}
THRESHOLD = {"cuda": 0.005, "cpu": 0.03}
ENERGY_WINDOWS = 4


SECTIONS = ("modes", "repeatability", "pairs", "energy")


def run(
    on: Machine,
    path: Path,
    only: tuple[str, ...] = SECTIONS,
    processes: int = 10,
    count: int = 1000,
    threshold: float | None = None,
    say: Callable[[str], Any] = print,
) -> None:
    """Answer the questions `only`, and write each answer to `path` at once, beside those that are there already.

    processes: to repeat in. count: pairs of identical code. threshold: of the pairs' verdicts. What this machine cannot
    answer is null, with the reason under `reasons`.
    """
    asked: dict[str, Callable[[], Any]] = {
        "modes": lambda: modes(on, say),
        "repeatability": lambda: repeatability(on, processes, say),
        "pairs": lambda: pairs(on, count, THRESHOLD[on.device] if threshold is None else threshold, say),
        "energy": lambda: joules(on, say),
    }
    found: dict[str, Any] = {"reasons": {}, "ncu": None, "wall_s": {}}
    with contextlib.suppress(OSError, ValueError):
        found |= {key: value for key, value in json.loads(path.read_text()).items() if key in {*SECTIONS, *found}}
    for section in only:
        say(f"{section}:")
        found["reasons"].pop(section, None)
        start = time.perf_counter()
        try:
            found[section] = asked[section]()
        except nsight.Unavailable as error:
            found[section], found["reasons"][section] = None, str(error)
            say(str(error))
        found["wall_s"][section] = time.perf_counter() - start
        if section == "modes" and found[section]:
            found["ncu"] = nsight.version()
        results.write_atomically(path, json.dumps(_header(on) | found, indent=1) + "\n")


def _header(on: Machine) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    origin = {"commit": commit and commit.strip(), "commit_dirty": None if changes is None else bool(changes.strip())}
    return {"calibration": 1, "label": on.label, "device": on.facts, "datetime": now} | origin


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def machine(device: str, label: str | None) -> Machine:
    """The machine to calibrate. Raises MachineError."""
    found = telemetry.resolve_device(device)
    facts = telemetry.device_facts(found)
    limits = timing.GPU_LIMITS if found == "cuda" else timing.CPU_LIMITS
    return Machine(found, facts, telemetry.label(facts, label), limits)


def works(names: list[str], on: Machine) -> Iterator[tuple[Kernel, timing.Work]]:
    """Kernels of the table with their work built, one at a time: the largest fill a good part of a card."""
    import torch

    for kernel in KERNELS:
        if kernel.name in names:
            with on.stream():
                yield kernel, kernel.build(torch, on.gpu)
            if on.gpu is not None:
                torch.cuda.empty_cache()


def _names(on: Machine, suits: Callable[[Kernel], bool] = lambda kernel: True) -> list[str]:
    return [kernel.name for kernel in KERNELS if (on.device == "cuda" or kernel.cpu) and suits(kernel)]


# --- modes ---


def modes(on: Machine, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """One row a kernel. Raises nsight.Unavailable where Nsight Compute cannot be asked."""
    if on.device != "cuda":
        raise nsight.Unavailable("Nsight Compute measures GPUs: there is none here")
    alone = nsight.durations(_names(on))
    # In a process of its own: one whose context was there while another used the card, as the profiler did, sees
    # kernels in graphs 0.6 us shorter from then on (H200; why is not known).
    rows = []
    for row in _fresh(timed, names=list(alone), device=on.device):
        cold, warm = alone[row["kernel"]]
        row |= {"kernels": cold.kernels, "ncu_s": cold.seconds, "ncu_spread_s": cold.spread, "ncu_hot_s": warm.seconds}
        note = row.pop("note")
        for name in ("cold", "graph"):
            row[f"{name}_ok"] = None if note else _agree(row[f"{name}_s"], cold.seconds)
        rows.append(row | {"note": note or _why_hot_differs(row)})
        say(_line(rows[-1]))
    return rows


def timed(names: list[str], device: str) -> list[dict[str, Any]]:
    """Each kernel by each mode; called in a fresh process."""
    on = machine(device, None)
    rows = []
    for kernel, work in works(names, on):
        row: dict[str, Any] = {"kernel": kernel.name, "bound": kernel.bound, "note": kernel.note}
        for name, make in {"cold": timing.cold, "graph": timing.graph, "stream": timing.held}.items():
            row[f"{name}_s"] = _paced(make(work, on.gpu))
        row["hot_s"] = sampling.collect([timing.hot(work, on.gpu)], Limits(5, 20, 0.2))[0].median
        rows.append(row)
    return rows


def _fresh(function: Callable[..., Any], **arguments: Any) -> Any:
    outcome = isolated.run(function, timeout=600.0, **arguments)
    if outcome.status != "ok":
        raise RuntimeError(f"a process of its own: {outcome.status}: {outcome.reason}")
    return outcome.value


def _paced(sampler: timing.Sampler) -> float:
    """The median of samples as far apart as the profiler's."""
    found = []
    for _ in range(SAMPLES):
        time.sleep(PAUSE_S)
        found += sampler.take(1, lambda: None)
    return statistics.median(found)


def _agree(seconds: float, reference: float) -> bool:
    return abs(seconds - reference) <= (SHORT_ERROR_S if reference < SHORT_S else ERROR * reference)


def _why_hot_differs(row: dict[str, Any]) -> str:
    """In words, where `hot` is more than 5% away from Nsight Compute's figure without a flush."""
    away = row["hot_s"] / row["ncu_hot_s"] - 1
    if abs(away) <= 0.05:
        return ""
    if away > 0 and row["ncu_hot_s"] < SHORT_S:
        return "hot: the host takes longer to launch it than the device to run it"
    return "hot: back to back, the card lowers its clock" if away > 0 else "hot: starts and ends overlap"


def _line(row: dict[str, Any]) -> str:
    figures = " ".join(f"{name} {row[f'{name}_s'] * 1e6:9.2f}" for name in ("ncu", "cold", "graph", "stream", "hot"))
    verdicts = " ".join({True: "ok", False: "OFF", None: "-"}[row[f"{name}_ok"]] for name in ("cold", "graph"))
    return f"{row['kernel']:28} {figures} us  {verdicts}  {row['note']}"


# --- repeatability ---


def medians(names: list[str], device: str) -> dict[str, float]:
    """Of each kernel, by the mode that the suite would use; called in a fresh process."""
    on = machine(device, None)
    found = {}
    watching = on.watch
    for kernel, work in works(names, on):
        sampler = timing.sampler("cold" if on.gpu else "host", work, on.gpu)
        found[kernel.name] = sampling.collect([sampler], REPEAT, watching)[0].median
    return found


def repeatability(on: Machine, processes: int, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The medians of so many fresh processes, one after another."""
    names = _names(on, lambda kernel: kernel.steady)
    found: list[dict[str, float]] = [_fresh(medians, names=names, device=on.device) for _ in range(processes)]
    rows = []
    for name in names:
        values = [medians_[name] for medians_ in found]
        spread = max(values) / min(values) - 1
        rows.append(
            {"kernel": name, "mode": "cold" if on.device == "cuda" else "host", "medians_s": values, "spread": spread}
        )
        say(f"{name:28} {statistics.median(values) * 1e6:9.2f} us  spread {spread:.3%}")
    return rows


# --- pairs ---


def pairs(on: Machine, count: int, threshold: float, say: Callable[[str], Any]) -> dict[str, Any]:
    """`count` pairs of identical code, and a fifth as many where the second does a share more of the same work.

    Both sides have the same memory, as implementations that are measured together do. `placement` tells what memory of
    its own would make of identical code: the ratios of a tenth as many pairs.
    """
    import torch

    slower = SLOWER[on.device]
    elements = (96 << 20) if on.gpu else (1 << 19)
    limits = Limits(min_samples=50, max_samples=2000, seconds=PAIR_S / 4, width=threshold / 4, warmup_seconds=0.0)
    watching = on.watch
    with on.stream():
        tensors = [torch.randn(round(elements * (1 + slower)) >> 10 << 10, device=on.device) for _ in range(6)]
        sides = [x[:elements] for x in tensors]
        mode = "cold" if on.gpu else "host"

        def sampler(x: Any) -> timing.Sampler:
            return timing.sampler(mode, functools.partial(torch.add, x, 1.0), on.gpu)

        # The longest first: what it writes to is then free for the others, at the same place.
        longer, base, twin = sampler(tensors[0]), sampler(sides[0]), sampler(sides[0])
        elsewhere = [sampler(x) for x in sides[1:]]
        longest = 0.0

        def judge(first: timing.Sampler, second: timing.Sampler, seed: int) -> stats.Paired:
            nonlocal longest
            start = time.perf_counter()
            one, two = sampling.collect([first, second], limits, watching, seed=seed)
            pair = stats.paired(stats.log_ratios(one.medians, two.medians), threshold)
            longest = max(longest, time.perf_counter() - start)
            return pair

        same = [judge(base, twin, seed) for seed in range(count)]
        slowed = [judge(base, longer, seed) for seed in range(max(1, count // 5))]
        moved = [judge(base, elsewhere[seed % len(elsewhere)], seed) for seed in range(max(1, count // 10))]
        typical = statistics.median(base.take(20, lambda: None))
    found: dict[str, Any] = {
        "threshold": threshold,
        "seconds": PAIR_S,
        "longest_s": longest,
        "kernel": f"add of {elements >> 8} KiB",
    }
    found |= {"kernel_s": typical, "identical": _verdicts(same), "placement": _verdicts(moved)}
    found["slowed"] = {"slowdown": slower, "caught": sum(pair.verdict == "slower" for pair in slowed)}
    found["slowed"] |= _verdicts(slowed)
    for name in ("identical", "slowed", "placement"):
        say(f"{name}: {found[name]}")
    say(f"longest pair {longest:.3f} s, kernel {typical * 1e6:.1f} us, threshold {threshold:.2%}")
    return found


def _verdicts(found: list[stats.Paired]) -> dict[str, float]:
    told = [pair.verdict for pair in found]
    ratios = [pair.ratio for pair in found]
    counts = {name: told.count(name) for name in ("faster", "slower", "equivalent", "inconclusive")}
    different = {"pairs": len(found), "different": counts["faster"] + counts["slower"]}
    spread = {"ratio_min": min(ratios), "ratio_median": statistics.median(ratios), "ratio_max": max(ratios)}
    return different | counts | spread


# --- energy ---


def joules(on: Machine, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Joules a call of several windows, of a kernel that moves data and of one that computes."""
    if on.gpu is None:
        raise nsight.Unavailable("energy: no NVIDIA GPU, whose counter could be read")
    rows = []
    for kernel, work in works(_names(on, lambda kernel: kernel.energy), on):
        case = trial.batch(on, work, sampling.collect([timing.cold(work, on.gpu)], Limits(5, 5, 1.0))[0].median)
        windows = [energy(*case, lambda: on.nvml.read("energy_j")) for _ in range(ENERGY_WINDOWS)]
        values = [window.joules / window.calls for window in windows if window is not None]
        if len(values) < ENERGY_WINDOWS:
            raise nsight.Unavailable(on.null_reasons.get("energy_j", "the card has no energy counter"))
        rows.append({"kernel": kernel.name, "joules": values, "spread": max(values) / min(values) - 1})
        rows[-1]["power_w"] = [window.joules / window.seconds for window in windows if window is not None]
        say(f"{kernel.name:28} {statistics.median(values):.4g} J a call, spread {rows[-1]['spread']:.2%}")
    return rows
