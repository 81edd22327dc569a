"""What a run is measured on, and the instruments for it, each made when first used."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tinylm.bench import telemetry, watch
from tinylm.bench.ceilings import Ceilings
from tinylm.bench.device import Gpu
from tinylm.bench.timing import Limits
from tinylm.bench.wall import Wall


@dataclass
class Machine:
    """One device, its limits, and whether energy is measured too."""

    device: str  # "cpu" | "cuda"
    facts: dict[str, Any]
    label: str
    limits: Limits
    energy: bool = False
    wall: Wall = field(default_factory=Wall)

    @cached_property
    def gpu(self) -> Gpu | None:
        return Gpu() if self.device == "cuda" else None

    @cached_property
    def ceilings(self) -> Ceilings:
        return Ceilings(self.gpu)

    @cached_property
    def nvml(self) -> telemetry.Nvml:
        return telemetry.Nvml.open(str(self.gpu.properties.uuid)) if self.gpu else telemetry.Nvml(reason="no card")

    @cached_property
    def watch(self) -> watch.Watch:
        if self.gpu is None:
            return watch.Watch()
        watching = watch.GpuWatch(self.gpu, self.nvml)
        watching.settle()
        return watching

    @property
    def null_reasons(self) -> dict[str, str]:
        """Why readings were null, by name."""
        made = self.__dict__
        return (self.nvml.reasons if "nvml" in made else {}) | (self.ceilings.reasons if "ceilings" in made else {})

    @property
    def computes_bf16(self) -> bool:
        """Whether bf16 is computed natively: compute capability 8.0 up. A CPU is not counted as doing so."""
        capability = self.facts["compute_capability"]
        return capability is not None and float(capability) >= 8.0

    def stream(self) -> AbstractContextManager[Any]:
        """Makes the instrument's stream the current one: the default stream cannot be captured."""
        if self.gpu is None:
            return nullcontext()
        torch = self.gpu.torch
        torch.cuda.synchronize()  # models and inputs were made on another stream
        return torch.cuda.stream(self.gpu.stream)
