"""What calibrating makes of its readings; the readings themselves need a GPU, or are a machine's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the kernels that are measured are torch's")

from tinylm.bench import calibrate, nsight, results  # noqa: E402
from tinylm.bench.kernels import KERNELS  # noqa: E402


def raw(calls: list[list[tuple[str, float]]]) -> list[list[str]]:
    header = [["ID", "Kernel Name", nsight.METRIC], ["", "", "ns"]]
    return header + [["0", name, f"{ns:,.0f}"] for call in calls for name, ns in call]


def test_the_list_of_kernels_is_taken_apart_into_calls() -> None:
    """One kernel a call, then two; the durations of a call add up, thousands have commas."""
    calls = []
    for kernels, ns in ((1, 2000.0), (2, 1500.0)):
        for before in (nsight.FLUSH, nsight.MARK):
            faster = ns / 2 if before == nsight.MARK else ns
            call = [(f"{before}(args)", 26000.0), *[("void work<float>()", faster)] * kernels]
            calls += [call] * (nsight.WARM_REPEATS if before == nsight.MARK else nsight.REPEATS)
    found = nsight.take_apart(["one", "two"], raw([[("read_all", 26000.0)], *calls]))
    cold, warm = found["one"]
    assert (cold.seconds, warm.seconds, cold.kernels) == (pytest.approx(2e-6), pytest.approx(1e-6), 1)
    cold, warm = found["two"]
    assert (cold.seconds, warm.seconds, cold.kernels) == (pytest.approx(3e-6), pytest.approx(1.5e-6), 2)
    assert cold.spread == 0


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(nsight.Unavailable, match="calls where"):
        nsight.take_apart(["one"], raw([[(nsight.FLUSH, 1.0), ("work", 1.0)]]))


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "NVreg_RestrictProfilingToAdminUsers=0"),
        ("==ERROR== No kernels were profiled.", 9, "status 9: ==ERROR== No kernels"),
    ],
)
def test_a_profiler_that_may_not_count_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int, said: str
) -> None:
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setattr(nsight, "command", lambda: str(program))
    with pytest.raises(nsight.Unavailable, match=said):
        nsight.run([], ["true"])


def test_without_the_profiler_it_is_told_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsight.shutil, "which", lambda *_, **__: None)
    with pytest.raises(nsight.Unavailable, match="install NVIDIA Nsight Compute"):
        nsight.command()


@pytest.mark.parametrize(
    ("measured", "reference", "ok"), [(2.29, 2, True), (2.31, 2, False), (100.9, 100, True), (101.1, 100, False)]
)
def test_the_gate_is_absolute_below_20_us_and_relative_above(measured: float, reference: float, ok: bool) -> None:
    assert calibrate._agree(measured * 1e-6, reference * 1e-6) is ok


def test_sections_are_kept_beside_each_other_and_what_cannot_be_answered_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = calibrate.machine("cpu", "bench")
    path = tmp_path / "bench" / results.CALIBRATION
    said: list[str] = []
    monkeypatch.setattr(calibrate, "PAIR_S", 0.02)
    calibrate.run(on, path, ("pairs", "modes", "energy"), count=3, threshold=0.5, say=said.append)
    first = json.loads(path.read_text())
    assert first["calibration"] == 1 and first["label"] == "bench" and first["modes"] is None
    assert "GPU" in first["reasons"]["modes"] and "counter" in first["reasons"]["energy"]
    identical = first["pairs"]["identical"]
    assert identical["different"] + identical["equivalent"] + identical["inconclusive"] == identical["pairs"] == 3
    monkeypatch.setattr(
        calibrate, "repeatability", lambda *_: [{"kernel": "k", "medians_s": [1.0, 1.0], "spread": 0.0}]
    )
    calibrate.run(on, path, ("repeatability",), say=said.append)
    second = json.loads(path.read_text())
    assert second["pairs"] == first["pairs"] and second["repeatability"][0]["spread"] == 0.0


def test_the_kernels_are_of_every_kind() -> None:
    assert len(KERNELS) >= 12 and {kernel.bound for kernel in KERNELS} == {"memory", "compute", "latency"}
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    assert any(kernel.cpu for kernel in KERNELS)


def test_processes_of_their_own_give_medians(tmp_path: Path) -> None:
    name = next(kernel.name for kernel in KERNELS if kernel.cpu)
    assert calibrate.medians([name], "cpu")[name] > 0
