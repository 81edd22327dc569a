"""Where a process's memory on a GPU went: what the driver counts, split into parts with names.

The driver (NVML) counts pages: those of the CUDA context, of libraries and their kernels, loaded at first use, and
of the segments that torch's allocator reserved. The allocator knows the rest: it rounds each request up and keeps
its blocks in the segments. So a process takes three readings: with a context alone; after a small pass of the same
kernels, whose tensors are gone again; and at the end, with all tensors still there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PARTS = (
    *("context_bytes", "libraries_bytes", "workspace_bytes", "inputs_bytes", "rounding_bytes", "transient_bytes"),
    *("unused_bytes", "unexplained_bytes"),
)


@dataclass(frozen=True)
class Reading:
    """Bytes. used: by the driver, of this process. reserved, allocated, requested: by torch's allocator, now; peak:
    the most allocated until now."""

    used: int
    reserved: int
    allocated: int
    requested: int
    peak: int

    @property
    def outside(self) -> int:
        """Of the driver's, what is not the allocator's."""
        return self.used - self.reserved


def read(used: Callable[[], int | None]) -> Reading | None:
    """Of the current device, when all that was queued is done; None where the driver does not tell."""
    import torch

    torch.cuda.synchronize()
    found = used()
    if found is None:
        return None
    stats = torch.cuda.memory_stats()
    reserved, allocated, requested = (
        stats[f"{kind}_bytes.all.current"] for kind in ("reserved", "allocated", "requested")
    )
    return Reading(found, reserved, allocated, requested, peak=stats["allocated_bytes.all.peak"])


def parts(context: Reading, warm: Reading, end: Reading, predicted: int) -> dict[str, int]:
    """By name, the bytes that `end.used` is more than `predicted`; they add up to it.

    context_bytes: the driver's for a context, torch's own kernels included. libraries_bytes: cuBLAS and others, and
    kernels, as loaded by the small pass. workspace_bytes: what the allocator still holds after that pass. inputs_bytes:
    requested beside weights and cache (token ids). rounding_bytes: of requests to the allocator's block sizes.
    transient_bytes: the peak above what is there at the end, mostly activations. unused_bytes: room in segments
    that the peak left, fragmentation included. unexplained_bytes: grown outside the allocator since the small pass.
    """
    found = (
        context.outside,
        warm.outside - context.outside,
        warm.requested,
        end.requested - warm.requested - predicted,
        end.allocated - end.requested,
        end.peak - end.allocated,
        end.reserved - end.peak,
        end.outside - warm.outside,
    )
    return dict(zip(PARTS, found, strict=True))
