"""Made-up runs in the shape of our plugin's JSON: the material of the tests of merge, compare and plot.

The numbers follow simple rooflines, so that the curves have the shapes of real ones; none of them was
measured.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

GPU: dict[str, Any] = {
    "type": "cuda",
    "name": "NVIDIA H200",
    "memory_bytes": 150_000_000_000,
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "driver": "575.57.08",
    "cuda": "13.0",
    "torch": "2.11.0+cu130",
    "power_limit_w": 700.0,
    "on_battery": None,
    "wsl": False,
}
CPU = GPU | {
    "type": "cpu",
    "name": "A CPU of 2 cores",
    "memory_bytes": 8 * 2**30,
    "compute_capability": None,
    "multiprocessors": None,
    "driver": None,
    "cuda": None,
    "torch": "2.13.0+cpu",
    "power_limit_w": None,
}
DEVICES = {"h200": GPU, "cpu": CPU}
COPY = {"h200": 4.28e12, "cpu": 1.1e10}  # bytes/s
RMSNORM = {"eager": 0.07, "torch": 0.8, "compile": 0.95, "cuda": 0.98, "liger": 0.9}  # share of copy
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
Cell = dict[str, Any]


def cell(test: str, params: dict[str, Any], seconds: float, extra: dict[str, Any], noise: random.Random) -> Cell:
    """One finished cell whose samples scatter around `seconds`."""
    data = sorted(seconds * math.exp(noise.gauss(0, 0.01)) for _ in range(11))
    median, q1, q3 = data[5], data[2], data[8]
    extra = dict(extra)
    for key in ("bytes", "flops", "tokens"):
        if key in extra:
            extra[f"{key}_per_s"] = extra[key] / median
    if "bytes" in extra:
        extra["of_ceiling"] = extra["bytes_per_s"] / extra["ceiling_bytes_per_s"]
    stats: Cell = {
        "min": data[0],
        "max": data[-1],
        "mean": sum(data) / 11,
        "stddev": 0.01 * seconds,
        "rounds": 11,
    }
    stats |= {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "data": data}
    return named(test, params) | {"group": test, "extra_info": extra, "stats": stats}


def named(test: str, params: dict[str, Any]) -> Cell:
    """What every cell has, finished or not."""
    name = f"test_{test}[{'-'.join(map(str, params.values()))}]"
    return {"name": name, "fullname": f"benchmarks/bench_{test}.py::{name}", "params": params}


def document(label: str, seed: int = 0, slower: float = 1.0) -> dict[str, Any]:
    """One run. `slower` multiplies every time."""
    noise = random.Random(f"{label} {seed}")
    drift = slower * math.exp(noise.gauss(0, 0.004))
    gpu = label != "cpu"
    copy = COPY["h200" if gpu else "cpu"]
    measured: list[Cell] = []
    skipped: list[Cell] = []
    params: Cell
    extra: Cell
    for dtype in ("fp16", "bf16", "fp32") if gpu else ("fp16", "fp32"):
        odd = (1001, 50257) if dtype == "bf16" else ()
        for hidden in (256, 384, 1024, 4096, 16384, 65536, *odd) if gpu else (256, 1024, 4096):
            for direction in ("forward", "backward"):
                for mib in (0, 512, *([2048] if dtype == "bf16" else [])) if gpu else (0, 16):
                    rows = mib * 2**20 // (hidden * WIDTH[dtype]) or 16
                    for impl, share in RMSNORM.items():
                        if mib == 2048 and impl == "eager":
                            continue
                        params = {"op": "rmsnorm", "impl": impl, "dtype": dtype, "direction": direction}
                        params |= {"hidden": hidden, "rows": rows}
                        if impl in ("compile", "liger") and not gpu:
                            skipped.append(named("rmsnorm", params) | {"reason": f"{impl} cannot run", "group": None})
                            continue
                        moved = (2 + (direction == "backward")) * hidden * rows * WIDTH[dtype]
                        share *= (
                            (1 if gpu else 0.8)
                            - 0.35 * (direction == "backward")
                            - 0.2 * (impl == "torch" and hidden > 5000)
                            - 0.1 * (hidden % 8 > 0)
                        )
                        seconds = drift * (moved / copy / share + (3e-6 if gpu else 2e-5))
                        extra = {
                            "bytes": moved,
                            "ceiling_bytes_per_s": copy,
                            "timing": "cold" if gpu else "host",
                        }
                        measured.append(cell("rmsnorm", params, seconds, extra, noise))
    for hidden in (1024, 4096, 8192):
        for impl, share in RMSNORM.items():
            moved = 4 * 2**20 if not gpu else 2**31
            extra = {"bytes": moved, "ceiling_bytes_per_s": copy, "timing": "cold" if gpu else "host"}
            params = {"op": "add_rmsnorm", "impl": impl, "dtype": "bf16" if gpu else "fp32", "direction": "forward"}
            params |= {"hidden": hidden, "rows": 2**28 // hidden if gpu else 2**22 // hidden}
            measured.append(cell("rmsnorm", params, drift * moved / copy / share / 2, extra, noise))
            params = {"impl": impl, "dtype": params["dtype"], "phase": "call", "hidden": hidden, "rows": 1}
            measured.append(cell("rmsnorm", params, drift * 5e-6, {"timing": "host"}, noise))
    configs = [("nano", "fp32", 5e6), ("tiny", "fp32", 6e7), ("tiny", "bf16", 3e7)][1 - (not gpu) : 3 if gpu else 2]
    for preset, dtype, weights in configs:
        for context in (128, 256, 512, 1024, 2048, 4096, 8192) if gpu else (128, 256, 512):
            for impl in ("eager", "graph") if gpu else ("eager",):
                for cache in ("dense", "none"):
                    work = weights * (1 if cache == "dense" else context) / (copy * (1 if cache == "dense" else 25))
                    seconds = drift * (work + {"eager": 1.1e-3, "graph": 1.2e-4}[impl] * (1 if gpu else 3))
                    params = {"preset": preset, "dtype": dtype, "batch": 1, "context": context}
                    extra = {"tokens_per_s": 1 / seconds, "timing": "host"}
                    measured.append(cell("kv_cache", params | {"cache": cache, "impl": impl}, seconds, extra, noise))
    for preset, weights, state in (
        ("tiny", 31.5e6, 9e3),
        ("small", 2.2e8, 3.7e4),
        ("llama-3-8b", 1.6e10, 1.3e5),
    ):
        for batch in (1, 64):
            for context in (512, 2048, 8192, 32768):
                params = {
                    "preset": preset,
                    "dtype": "bf16" if gpu else "fp32",
                    "batch": batch,
                    "context": context,
                }
                predicted = int((weights + state * batch * context) * (1 if gpu else 2))
                if predicted > DEVICES["h200" if gpu else "cpu"]["memory_bytes"]:
                    extra = {"out_of_memory": True, "predicted_bytes": predicted}
                    skipped.append(named("vram", params) | {"reason": "out of memory", "extra_info": extra})
                elif gpu or preset == "tiny":
                    extra = {"predicted_bytes": predicted, "device_used_bytes": int(predicted * 1.1 + 5e8)}
                    extra |= {"peak_allocated_bytes": int(predicted * 1.03) if gpu else None}
                    measured.append(cell("vram", params, 0.1, extra, noise))
    for preset, weights in (("nano", 1e6), ("tiny", 3.1e7), ("llama-3-8b", 1.6e10))[: 3 if gpu else 2]:
        for dtype in ("bf16", "fp32") if gpu else ("fp32",):
            for batch in (1, 8):
                for phase, impl in (("decode", "eager"), ("decode", "graph"), ("prefill", "eager"))[:: 1 if gpu else 2]:
                    params = {
                        "phase": phase,
                        "preset": preset,
                        "dtype": dtype,
                        "batch": batch,
                        "context": 128,
                        "impl": impl,
                    }
                    overhead = {"eager": 2e-3, "graph": 1e-4}[impl]
                    seconds = drift * (weights / copy + overhead) / (batch if phase == "decode" else 128 * batch)
                    extra = {"tokens_per_s": 1 / seconds}
                    measured.append(cell("decode", params, seconds, extra, noise))
    for phase, base in (("decode", 1.1e-3), ("train", 8e-3)):
        for preset in ("nano", "tiny")[: 2 if gpu else 1]:
            for impl, gain in (("eager", 1.0), ("torch", 1.2), ("compile", 1.31))[: 3 if gpu else 2]:
                params = {"op": "rmsnorm", "impl": impl, "phase": phase, "preset": preset}
                params |= {
                    "dtype": "bf16" if gpu else "fp32",
                    "batch": 1 if phase == "decode" else 8,
                    "context": 128,
                }
                measured.append(cell("ablation", params, drift * base / gain * (1 if gpu else 30), {}, noise))
    failed = named("decode", {"preset": "small"}) | {
        "reason": "wrong result: error 0.3, expected 0.01",
        "group": None,
    }
    return {
        "machine_info": {"node": "somewhere", "label": label, "device": DEVICES.get(label, GPU)},
        "commit_info": {"id": "0123abc", "dirty": False},
        "benchmarks": measured,
        "skipped": skipped,
        "failed": [failed],
        "datetime": f"2026-11-2{seed}T05:12:00+00:00",
        "version": "5.3.1",
    }


def write_runs(results: Path, runs: int = 3, labels: tuple[str, ...] = ("h200", "cpu"), slower: float = 1.0) -> Path:
    """results/<label>/main/<run>.json for each label; gives `results`."""
    for label in labels:
        folder = results / label / "main"
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(runs):
            (folder / f"2026112{seed}T0512Z.json").write_text(json.dumps(document(label, seed, slower)))
    return results


def plain(tests: int = 2) -> dict[str, Any]:
    """What pytest-benchmark alone writes, without a key of ours."""
    stats: Cell = {
        "min": 1e-6,
        "max": 3e-6,
        "mean": 2e-6,
        "stddev": 1e-7,
        "median": 2e-6,
        "iqr": 1e-7,
        "q1": 1.9e-6,
    }
    stats |= {"q3": 2.1e-6, "rounds": 5, "iterations": 1, "ops": 5e5, "total": 1e-5, "outliers": "0;0"}
    entry: Cell = {"group": None, "param": None, "extra_info": {}, "options": {"timer": "perf_counter"}}
    return {
        "machine_info": {"node": "somewhere", "cpu": {"count": 2}},
        "commit_info": {"id": "0123abc", "dirty": True},
        "benchmarks": [
            entry
            | {
                "name": f"test_sort[{i}]",
                "fullname": f"tests/test_sort.py::test_sort[{i}]",
                "params": {"n": i, "shape": [2, i], "run": "mine"} if i else None,
                "stats": stats,
            }
            for i in range(tests)
        ],
        "datetime": "2026-11-21T05:12:00+00:00",
        "version": "5.1.0",
    }


LOG = (
    *("step", "tokens", "seconds", "lr", "train_loss", "grad_norm", "val_loss", "perplexity", "bits_per_byte"),
    *("tokens_per_s", "mfu"),
)


def write_log(
    path: Path,
    *,
    rows: int = 40,
    seed: int = 0,
    every: int = 10,
    tokens: int = 8192,
    rate: float = 1e6,
    floor: float = 1.4,
) -> Path:
    """A training log in the shape of `python -m tinylm.train`: a row for 10 steps, a validation every `every` rows."""
    noise, lines = random.Random(seed), [",".join(LOG)]
    for row in range(1, rows + 1):
        step = 10 * row
        loss = floor + 2.8 * math.exp(-5 * row / rows) + noise.gauss(0, 0.02)
        held_out = loss + 0.1 + 0.1 * row / rows
        validated = [held_out, math.exp(held_out), held_out / math.log(2)] if row % every == 0 else [""] * 3
        values = [step, step * tokens, step * tokens / rate, 1e-3, loss, 1.0, *validated, rate, 0.4]
        lines.append(",".join(map(str, values)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return path
