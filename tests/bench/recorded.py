"""Made-up runs with every key that a record can have, and a calibration: the material of the report's tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import synthetic

VERDICTS = ("faster", "slower", "equivalent", "inconclusive")


def document(label: str, seed: int = 0) -> dict[str, Any]:
    """A synthetic run, with telemetry on a GPU, stops, verdicts of the ablation, and wall time."""
    made = synthetic.document(label, seed)
    noise = random.Random(f"{label} {seed} record")
    gpu = label != "cpu"
    for i, cell in enumerate(made["benchmarks"]):
        extra, params = cell["extra_info"], cell["params"]
        extra |= {"stop_reason": ("width", "seconds", "samples")[i % 3], "ci_width": noise.uniform(0.001, 0.006)}
        extra |= {"blocks": 8, "block_samples": 12, "error": noise.uniform(0, 1e-6), "flagged_blocks": []}
        clock = noise.gauss(1.96e9, 1e7) if gpu else None
        extra |= {"sm_clock_hz": clock, "sm_clock_low_hz": clock and 0.99 * clock}
        extra |= {
            "temperature_c": noise.randint(40, 70) if gpu else None,
            "power_w": noise.uniform(200, 690) if gpu else None,
        }
        extra |= {"throttle": ["sw_power_cap"] if i % 40 == 7 else []} if gpu else {"throttle": None}
        if "rmsnorm" in cell["name"] and "bytes" in extra:
            extra["flops"] = 4 * params["hidden"] * params["rows"]
            extra["flops_per_s"] = extra["flops"] / cell["stats"]["median"]
            extra["ceiling_flops_per_s"] = 50e12 if params["dtype"] == "fp32" else 780e12
            extra["ceiling_read_bytes_per_s"] = 1.07 * extra["ceiling_bytes_per_s"]
        if gpu and i % 50 == 11:
            kept = {"clock_hz": 1.61e9, "median_s": 1.2e-3, "throttle": ["sw_thermal_slowdown"], "temperature_c": 84}
            extra["flagged_blocks"] = [kept | {"kept": False}, kept | {"kept": True}]
        if gpu and "decode" in cell["name"]:
            extra |= {"energy_j": noise.uniform(0.1, 2), "energy_per_token_j": 0.03, "energy_window_s": 5.1}
        if "ablation" in cell["name"] and params["impl"] != "eager":
            ratio = noise.uniform(0.7, 1.2)
            extra |= {"versus": "eager", "ratio": ratio, "ratio_low": 0.99 * ratio, "ratio_high": 1.012 * ratio}
            extra["verdict"] = VERDICTS[i % 4]
    made["wall_s"] = {"import": 6.1, "compile": 88.0, "warm_up": 12.5, "flush": 61.0, "work": 140.2, "reporting": 3.3}
    made["null_reasons"] = {} if gpu else {"sm_clock_hz": "no card"}
    return made


def calibration(label: str) -> dict[str, Any]:
    noise = random.Random(label)
    modes = []
    for i, bound in enumerate(("memory", "compute", "latency") * 4):
        truth = 2e-6 * 2.03**i
        entry: dict[str, Any] = {"kernel": f"{bound} work {i}", "kernels": 1 + i % 3, "bound": bound, "ncu_s": truth}
        entry |= {"cold_s": truth * noise.gauss(1, 0.003), "graph_s": truth * noise.gauss(1, 0.004)}
        modes.append(entry | {"hot_s": truth * 0.8, "cold_ok": True, "graph_ok": i != 3, "note": "warm caches"})
    again = [{"kernel": "copy", "mode": "cold", "medians_s": [2e-5, 2.001e-5, 2.003e-5], "spread": 0.0015}]
    identical = {"pairs": 1000, "different": 3, "equivalent": 960, "inconclusive": 37}
    return {
        "calibration": 1,
        "label": label,
        "datetime": "2026-11-25T01:02:03+00:00",
        "commit": "0123abcdef0123",
        "ncu": "2025.3.1",
        "modes": modes,
        "repeatability": again,
        "pairs": {
            "threshold": 0.005,
            "seconds": 0.4,
            "kernel": "copy",
            "identical": identical,
            "slowed": {"slowdown": 0.01, "pairs": 200, "caught": 199},
        },
        "energy": [{"kernel": "matmul", "joules": [5.01, 5.05, 4.99], "spread": 0.012}],
        "wall_s": {"ncu": 30.0},
    }


def write(folder: Path, runs: int = 2, labels: tuple[str, ...] = ("h200", "cpu"), calibrated: str = "h200") -> Path:
    """results/<label>/main/<run>.json, and one label's calibration; gives the folder."""
    for label in labels:
        for seed in range(runs):
            path = folder / label / "main" / f"2026112{seed}T0512Z.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document(label, seed)))
        if label == calibrated:
            (folder / label / "calibration.json").write_text(json.dumps(calibration(label)))
    return folder
