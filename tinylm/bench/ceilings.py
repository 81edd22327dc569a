"""The most that a device was seen to do: copy, read and arithmetic, measured in the run that refers to them."""

from __future__ import annotations

import functools
import statistics
from functools import cached_property

from tinylm.bench import sampling, timing
from tinylm.bench.device import Gpu

COPY_BYTES = 4 << 30
# On a CPU 512 MiB are many times any last-level cache, and take little time to fill.
CPU_COPY_BYTES = 512 << 20
# A copy of less than this many times the L2 cache measures the cache.
LEAST_L2_MULTIPLE = 8
LIMITS = timing.Limits(min_samples=5, max_samples=15, seconds=0.3)


class Ceilings:
    """Each is measured once, when first asked for; `reasons` tells why one is None.

    Bandwidths in bytes/s (a copy counts the bytes read plus the bytes written), arithmetic in FLOP/s per dtype.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self.gpu = gpu
        self.reasons: dict[str, str] = {}
        self._flops: dict[str, float | None] = {}

    @cached_property
    def bandwidth(self) -> tuple[float, float] | tuple[None, None]:
        """(copy, read), over 4 GiB or a quarter of the free memory where that is less (CPU: 512 MiB).

        (None, None) without torch, and where the memory left is too little to be more than a cache.
        """
        try:
            import torch
        except ImportError:
            return None, None
        if self.gpu is None:
            source = torch.empty(CPU_COPY_BYTES // 8, dtype=torch.int64).random_()
            copy = 2 * CPU_COPY_BYTES / _median(None, functools.partial(torch.empty_like(source).copy_, source))
            return copy, CPU_COPY_BYTES / _median(None, source.view(torch.float64).nan_to_num_().sum)
        size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4) // 4096 * 4096
        if size < LEAST_L2_MULTIPLE * self.gpu.properties.L2_cache_size:
            self.reasons["ceiling_bytes_per_s"] = f"{size >> 20} MiB of memory to copy are too few beside the L2 cache"
            return None, None
        source = torch.empty(size // 8, dtype=torch.int64, device="cuda").random_()
        copy = 2 * size / _median(self.gpu, functools.partial(torch.empty_like(source).copy_, source))
        return copy, size / _median(self.gpu, functools.partial(self.gpu.read, source))

    def flops(self, dtype: str) -> float | None:
        """A square matrix product a b^T, as of a linear layer, of random data, without TF32.

        dtype: `fp32`, `fp16`, `bf16` or `fp64`. None for any other, where it cannot be computed, and without torch.
        """
        if dtype not in self._flops:
            self._flops[dtype] = self._measure_flops(dtype)
        return self._flops[dtype]

    def _measure_flops(self, dtype: str) -> float | None:
        try:
            import torch
        except ImportError:
            return None
        device = "cuda" if self.gpu else "cpu"
        kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
        if dtype not in kinds:
            return None
        # Grow until one product is long enough to be at full rate, so that a slow dtype costs no minutes.
        rate = None
        for n in (1024, 2048, 4096, 8192) if self.gpu else (256, 512, 1024, 2048):
            try:
                a, b = (torch.randn(n, n, device=device).to(kinds[dtype]) for _ in range(2))
                seconds = _median(self.gpu, functools.partial(torch.nn.functional.linear, a, b))
            except timing.TimingError:
                raise
            except RuntimeError:  # no kernel for the dtype, or no memory for this size
                return rate
            rate = max(rate or 0.0, 2 * n**3 / seconds)
            if seconds * 8 > 0.1:
                break
        return rate


def _median(gpu: Gpu | None, work: timing.Work) -> float:
    work()  # a first call may take longer than a hold lasts
    sampler = timing.held(work, gpu) if gpu else timing.host(work)
    return statistics.median(sampling.collect([sampler], LIMITS)[0].seconds)
