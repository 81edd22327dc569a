"""What the machine says of itself: NVML readings, facts that stay the same, and the label of the card.

Every NVML query is guarded: it gives a value, or None with the reason; never 0 for unknown.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

LABEL = re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE)
# Words of a device's name that tell two cards apart in no case.
_VENDOR_WORDS = {"nvidia", "geforce", "tesla", "quadro", "gpu", "graphics", "with", "design", "amd", "radeon"}


class MachineError(RuntimeError):
    """The device that was asked for cannot be used; the message says what to do."""


def slug(name: str) -> str:
    """A device's name without the vendor's words: 'NVIDIA GeForce RTX 2070 with Max-Q Design' -> rtx-2070-max-q."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _VENDOR_WORDS]
    return "-".join(words) or "unknown"


def label(facts: dict[str, Any], override: str | None = None) -> str:
    """The label of a run: `override`, else TINYLM_GPU_LABEL, else the slug of the device's name, `cpu` on a CPU."""
    given = override or os.environ.get("TINYLM_GPU_LABEL")
    if given:
        if not LABEL.fullmatch(given):
            raise MachineError(
                f"label {given!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit, "
                "because it names a folder"
            )
        return given
    return "cpu" if facts["type"] == "cpu" else slug(facts["name"])


@dataclass
class Nvml:
    """NVML's view of one card. Without a card, a driver or nvidia-ml-py every reading is None, with the reason."""

    handle: Any = None
    reason: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # of the last failed reading of each name

    @classmethod
    def open(cls, uuid: str | None = None) -> Nvml:
        """The card with this UUID, or the first."""
        try:
            import pynvml
        except ImportError:
            return cls(reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError as error:
            return cls(reason=f"NVML: {error}")
        for handle in handles:
            if uuid is None or uuid in pynvml.nvmlDeviceGetUUID(handle):
                return cls(handle)
        return cls(reason=f"NVML shows {count} cards, none with UUID {uuid}")

    def read(self, name: str) -> Any:
        """A reading by its name, or None; `reasons[name]` then tells why.

        name, driver, driver_cuda: str. power_limit_w, power_w: watts. energy_j: joules since the driver was loaded.
        temperature_c: degrees Celsius. throttle: list of reasons. used_bytes: of the whole card; own_bytes: of this
        process.
        """
        if self.handle is None:
            self.reasons[name] = self.reason or "no card"
            return None
        import pynvml

        try:
            return _READINGS[name](pynvml, self.handle)
        except (pynvml.NVMLError, AttributeError) as error:
            self.reasons[name] = f"NVML: {error}"
            return None


def _throttle_reasons(nvml: Any, handle: Any) -> list[str]:
    bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    names = {
        "sw_power_cap": nvml.nvmlClocksThrottleReasonSwPowerCap,
        "hw_slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
        "sync_boost": nvml.nvmlClocksThrottleReasonSyncBoost,
        "sw_thermal": nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        "hw_thermal": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "hw_power_brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    return [name for name, bit in names.items() if bits & bit]


def _power(nvml: Any, handle: Any) -> float:
    """Of this moment where the card tells; else the driver's average over up to a second."""
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if field.nvmlReturn == nvml.NVML_SUCCESS:
            return field.value.uiVal / 1e3
    return nvml.nvmlDeviceGetPowerUsage(handle) / 1e3


def _own_memory(nvml: Any, handle: Any) -> int | None:
    for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if process.pid == os.getpid():
            return process.usedGpuMemory  # None where the system does not tell (WSL, some containers)
    return None


_READINGS: dict[str, Any] = {
    "name": lambda nvml, card: nvml.nvmlDeviceGetName(card),
    "driver": lambda nvml, card: nvml.nvmlSystemGetDriverVersion(),
    "driver_cuda": lambda nvml, card: "{}.{}".format(*divmod(nvml.nvmlSystemGetCudaDriverVersion() // 10, 100)),
    "power_limit_w": lambda nvml, card: nvml.nvmlDeviceGetPowerManagementLimit(card) / 1e3,
    "power_w": _power,
    "energy_j": lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3,
    "temperature_c": lambda nvml, card: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
    "throttle": _throttle_reasons,
    "used_bytes": lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).used,
    "own_bytes": _own_memory,
}


def resolve_device(asked: str) -> str:
    """`auto`, `cpu` or `cuda` to `cpu` or `cuda`. Raises MachineError rather than fall back to the CPU silently."""
    if asked == "cpu":
        return "cpu"
    try:
        import torch
    except ImportError:
        if asked == "cuda":
            raise MachineError("--device cuda: torch is not installed: pip install torch") from None
        return "cpu"
    with warnings.catch_warnings():  # torch warns of the same trouble in many lines
        warnings.simplefilter("ignore")
        trouble = _cuda_trouble(torch)
    if trouble is None:
        return "cuda"
    card = card_in_machine()
    if card is None and asked == "auto":
        return "cpu"
    if card is None:
        raise MachineError("--device cuda: this machine shows no NVIDIA GPU: use --device cpu")
    raise MachineError(f"{card} is here but torch {torch.__version__} cannot use it: {trouble}, or use --device cpu")


def card_in_machine() -> str | None:
    """The name of the NVIDIA card that NVML or the driver shows, whether or not torch can use it."""
    name = Nvml.open().read("name")
    if name is None and glob.glob("/proc/driver/nvidia/gpus/*"):
        return "an NVIDIA GPU"
    return name


def _cuda_trouble(torch: Any) -> str | None:
    """Why torch cannot compute on the current card, with the remedy; None if it can."""
    if torch.version.cuda is None:
        return "it is a CPU build; install the CUDA build (see pytorch.org/get-started)"
    if os.environ.get("CUDA_VISIBLE_DEVICES", None) in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides it; unset it"
    if not torch.cuda.is_available():
        nvml = Nvml.open()
        driver, newest = nvml.read("driver"), nvml.read("driver_cuda")
        return (
            f"the build wants CUDA {torch.version.cuda}, driver {driver or 'unknown'} offers {newest or 'unknown'}; "
            "update the driver, or install a torch built for the older CUDA"
        )
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return f"a first kernel failed ({reason}); install a torch whose build includes this card's architecture"
    return None


def device_facts(device: str) -> dict[str, Any]:
    """Facts about `cpu` or `cuda` that stay the same from run to run; None where the machine does not tell."""
    import psutil

    facts: dict[str, Any] = {
        "type": device,
        "name": _cpu_name(),
        "memory_bytes": psutil.virtual_memory().total,
        "compute_capability": None,
        "multiprocessors": None,
        "driver": None,
        "cuda": None,
        "torch": None,
        "power_limit_w": None,
        "on_battery": _on_battery(),
        "wsl": "microsoft" in platform.release().lower(),
    }
    try:
        import torch
    except ImportError:
        return facts
    facts["torch"] = torch.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        nvml = Nvml.open(str(properties.uuid))
        facts |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": nvml.read("driver"),
            "power_limit_w": nvml.read("power_limit_w"),
        }
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


def _on_battery() -> bool | None:
    import psutil

    battery = getattr(psutil, "sensors_battery", lambda: None)()
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def running_s() -> float:
    """How long this process has been there."""
    import psutil

    return time.time() - psutil.Process().create_time()


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most memory of this process that was ever in RAM."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
