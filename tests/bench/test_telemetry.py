"""Labels, guarded NVML readings, and a device that is never replaced by the CPU in silence."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import telemetry

NAMES = {
    "NVIDIA H200": "h200",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 2070 with Max-Q Design": "rtx-2070-max-q",
    "NVIDIA GeForce RTX 4060 Laptop GPU": "rtx-4060-laptop",
    "NVIDIA H100 80GB HBM3": "h100-80gb-hbm3",
    "NVIDIA RTX A6000": "rtx-a6000",
    "Tesla T4": "t4",
}


@pytest.mark.parametrize(("name", "slug"), NAMES.items())
def test_the_label_is_the_name_without_the_vendors_words(name: str, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYLM_GPU_LABEL", raising=False)
    assert telemetry.label({"type": "cuda", "name": name}) == slug
    assert telemetry.label({"type": "cpu", "name": name}) == "cpu"


@given(st.text())
def test_any_name_makes_a_label_that_names_a_folder(name: str) -> None:
    assert telemetry.LABEL.fullmatch(telemetry.slug(name))


def test_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_GPU_LABEL", "my-card")
    assert telemetry.label({"type": "cpu", "name": "x"}) == "my-card"
    assert telemetry.label({"type": "cpu", "name": "x"}, "other") == "other"
    for bad in ("a/b", "..", "-x", "a b", "ü"):
        with pytest.raises(telemetry.MachineError, match="names a folder"):
            telemetry.label({"type": "cpu", "name": "x"}, bad)


class FakeError(Exception):
    pass


def fake_nvml(**functions: Any) -> Any:
    card = object()

    def refuse(*_: Any) -> Any:
        raise FakeError("Not Supported")

    names = [
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetTemperature",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetName",
        "nvmlSystemGetDriverVersion",
        "nvmlSystemGetCudaDriverVersion",
        "nvmlDeviceGetPowerManagementLimit",
    ]
    base = dict.fromkeys(names, refuse) | {
        "NVMLError": FakeError,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda i: card,
        "nvmlDeviceGetUUID": lambda handle: "GPU-1234",
    }
    return SimpleNamespace(**(base | functions))


def test_what_nvml_refuses_is_none_with_the_reason_and_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetPowerUsage=lambda card: 250_500))
    nvml = telemetry.Nvml.open("1234")
    for name in telemetry._READINGS:
        value = nvml.read(name)
        if name == "power_w":
            assert value == 250.5
        else:
            assert value is None and nvml.reasons[name], name


def test_readings_are_in_si_units(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_nvml(
        nvmlDeviceGetTemperature=lambda card, kind: 35,
        nvmlSystemGetCudaDriverVersion=lambda: 13010,
        nvmlDeviceGetPowerManagementLimit=lambda card: 700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    nvml = telemetry.Nvml.open()
    assert [nvml.read(n) for n in ("temperature_c", "driver_cuda", "power_limit_w")] == [35, "13.1", 700.0]


def test_without_the_package_or_a_card_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml = telemetry.Nvml.open()
    assert nvml.read("power_w") is None and "nvidia-ml-py" in nvml.reasons["power_w"]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    nvml = telemetry.Nvml.open("9999")
    assert nvml.read("power_w") is None and "9999" in nvml.reasons["power_w"]


def fake_torch(cuda: str | None, available: bool = False, works: bool = True) -> Any:
    def ones(*_: Any, **__: Any) -> Any:
        if not works:
            raise RuntimeError("CUDA error: no kernel image is available\nmore")
        return SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: 8.0))

    def is_available() -> bool:
        if cuda and not available:
            warnings.warn("CUDA initialization: the driver is too old", stacklevel=2)  # as torch does
        return available

    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=is_available),
        ones=ones,
    )


CASES = [
    (fake_torch(None), "CPU build"),
    (fake_torch("13.0"), "update the driver"),
    (fake_torch("13.0", available=True, works=False), "no kernel image"),
]


@pytest.mark.parametrize(("torch", "words"), CASES)
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_card_that_torch_cannot_use_stops_the_run(
    torch: Any, words: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(telemetry, "card_in_machine", lambda: "NVIDIA H200")
    with pytest.raises(telemetry.MachineError) as error:
        telemetry.resolve_device(asked)
    message = str(error.value)
    assert "NVIDIA H200" in message and words in message and "--device cpu" in message and "\n" not in message
    assert telemetry.resolve_device("cpu") == "cpu"


def test_without_a_card_auto_is_the_cpu_and_asking_for_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(None))
    monkeypatch.setattr(telemetry, "card_in_machine", lambda: None)
    assert telemetry.resolve_device("auto") == "cpu"
    with pytest.raises(telemetry.MachineError, match="no NVIDIA GPU"):
        telemetry.resolve_device("cuda")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert telemetry.resolve_device("auto") == "cpu"
    with pytest.raises(telemetry.MachineError, match="torch is not installed"):
        telemetry.resolve_device("cuda")


def test_a_working_card_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch("13.0", available=True))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert telemetry.resolve_device("auto") == telemetry.resolve_device("cuda") == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(telemetry, "card_in_machine", lambda: "NVIDIA H200")
    with pytest.raises(telemetry.MachineError, match="CUDA_VISIBLE_DEVICES hides it"):
        telemetry.resolve_device("auto")


def test_facts_are_the_same_at_every_look() -> None:
    facts = telemetry.device_facts("cpu")
    assert facts == telemetry.device_facts("cpu")
    assert facts["type"] == "cpu" and facts["memory_bytes"] > 0 and facts["name"]
