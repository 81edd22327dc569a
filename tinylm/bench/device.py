"""One CUDA device as an instrument: blocking kernel, cache flush, clock probe, and the ceilings of the card.

The kernels are compiled by NVRTC through cuda-bindings, both of which come with torch's CUDA builds, so that no
compiler is needed. On a CPU only the ceilings exist.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from tinylm.bench import timing

SOURCE = r"""
typedef unsigned long long u64;
__device__ __forceinline__ u64 now_ns() { u64 t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)); return t; }

// flags[0]: set by the host to let go; flags[1]: set here when the limit ended the wait.
extern "C" __global__ void hold(volatile int* flags, u64 limit_ns) {
  const u64 start = now_ns();
  while (!flags[0])
    if (now_ns() - start > limit_ns) { flags[1] = 1; return; }
}

extern "C" __global__ void read_all(const uint4* __restrict__ data, u64 count, unsigned* sink) {
  const u64 stride = (u64)gridDim.x * blockDim.x;
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned seen = 0;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
    #pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __ldcg(data + i + k * stride);
    #pragma unroll
    for (int k = 0; k < 8; ++k) seen |= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += stride) { const uint4 v = __ldcg(data + i); seen |= v.x ^ v.y ^ v.z ^ v.w; }
  if (seen == 0) *sink = 1;  // random data never get here, and the compiler cannot know
}

extern "C" __global__ void clock_probe(u64* out, u64 span_ns) {
  const u64 ns = now_ns(); const long long cycles = clock64();
  u64 t; do t = now_ns(); while (t - ns < span_ns);
  out[0] = clock64() - cycles; out[1] = t - ns;
}
"""

# A blocking kernel ends by itself after this time: drivers of display cards kill longer ones.
HOLD_LIMIT_S = 0.2
# globaltimer advances in steps of up to 1 us, so that 500 us read the clock rate to 0.4% at the worst.
CLOCK_PROBE_S = 500e-6
# The flush reads this many times the L2 cache.
FLUSH_L2_MULTIPLE = 2
COPY_BYTES = 4 << 30
# On a CPU 512 MiB are many times any last-level cache, and take little time to fill.
CPU_COPY_BYTES = 512 << 20


class DeviceError(RuntimeError):
    """The device cannot be used; the message says why and what to do."""


class Hold:
    """One use of the blocking kernel."""

    limit_s = HOLD_LIMIT_S

    def __init__(self, flags: Any) -> None:
        self._flags = flags

    def release(self) -> None:
        self._flags[0] = 1

    def timed_out(self) -> bool:
        """Whether the kernel let go by itself. Valid once the stream has been synchronized."""
        return bool(self._flags[1])


class Gpu:
    """The current CUDA device of torch, with the kernels above compiled for it."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self._sink = torch.zeros(1, dtype=torch.int32, device="cuda")  # makes the context that modules load into
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._functions = _compile(self.properties.major, self.properties.minor)
        # Page-locked, so that the kernel reads host memory and the host can write it while the kernel runs.
        self._flags = torch.zeros(2, dtype=torch.int32).pin_memory()

    def _launch(self, name: str, grid: int, block: int, *arguments: tuple[Any, Any]) -> None:
        from cuda.bindings import driver

        values, kinds = zip(*arguments, strict=True)
        stream = self.torch.cuda.current_stream().cuda_stream
        _ok(driver.cuLaunchKernel(self._functions[name], grid, 1, 1, block, 1, 1, 0, stream, (values, kinds), 0))

    @contextmanager
    def held(self) -> Iterator[Hold]:
        """Hold the current stream while the body queues work on it; it is let go at the end, or by the limit."""
        self._flags.zero_()
        hold = Hold(self._flags)
        limit_ns = int(HOLD_LIMIT_S * 1e9)
        self._launch("hold", 1, 1, (self._flags.data_ptr(), ctypes.c_void_p), (limit_ns, ctypes.c_ulonglong))
        try:
            yield hold
        finally:
            hold.release()

    @cached_property
    def _flush_buffer(self) -> Any:
        count = FLUSH_L2_MULTIPLE * self.properties.L2_cache_size // 8
        return self.torch.randint(1 << 62, (count,), dtype=self.torch.int64, device="cuda")

    def flush(self) -> None:
        """Replace what is in the L2 cache by reading other data (writing would leave dirty lines behind)."""
        self.read(self._flush_buffer)

    def read(self, tensor: Any) -> None:
        """Read a contiguous tensor, a multiple of 16 bytes, once, from every multiprocessor."""
        blocks = self.properties.multi_processor_count * 8
        count = tensor.numel() * tensor.element_size() // 16
        self._launch(
            "read_all",
            blocks,
            256,
            (tensor.data_ptr(), ctypes.c_void_p),
            (count, ctypes.c_ulonglong),
            (self._sink.data_ptr(), ctypes.c_void_p),
        )

    def sm_clock_hz(self) -> float:
        """The clock rate of one multiprocessor now: its cycles over the global timer."""
        out = self.torch.empty(2, dtype=self.torch.int64, device="cuda")
        span_ns = int(CLOCK_PROBE_S * 1e9)
        self._launch("clock_probe", 1, 1, (out.data_ptr(), ctypes.c_void_p), (span_ns, ctypes.c_ulonglong))
        cycles, ns = out.tolist()
        return cycles / ns * 1e9


def _compile(major: int, minor: int) -> dict[str, Any]:
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise DeviceError(f"cuda-bindings is missing ({error}): pip install cuda-bindings") from error
    program = _ok(nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"tinylm_bench.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise DeviceError(f"NVRTC cannot compile for sm_{major}{minor}: {log.decode(errors='replace').strip()}")
    cubin = b" " * _ok(nvrtc.nvrtcGetCUBINSize(program))
    _ok(nvrtc.nvrtcGetCUBIN(program, cubin))
    module = _ok(driver.cuModuleLoadData(cubin))
    names = ("hold", "read_all", "clock_probe")
    return {name: _ok(driver.cuModuleGetFunction(module, name.encode())) for name in names}


def _ok(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value != 0:
        raise DeviceError(f"CUDA driver call failed: {status.name}")
    return values[0] if values else None


class Ceilings:
    """The most that this device was seen to do, each measured once, when first asked for.

    Bandwidths in bytes/s (a copy counts the bytes read plus the bytes written), arithmetic in FLOP/s per dtype.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self.gpu = gpu
        self._flops: dict[str, float | None] = {}

    @cached_property
    def bandwidth(self) -> tuple[float, float] | tuple[None, None]:
        """(copy, read), over 4 GiB or a quarter of the free memory where that is less (CPU: 512 MiB).

        (None, None) without torch.
        """
        try:
            import torch
        except ImportError:
            return None, None
        device = "cuda" if self.gpu else "cpu"
        size = CPU_COPY_BYTES
        if self.gpu:
            size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4) // 4096 * 4096
        source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
        copy = size * 2 / _median(self.gpu, functools.partial(torch.empty_like(source).copy_, source))
        if self.gpu is None:
            return copy, size / _median(None, source.view(torch.float64).nan_to_num_().sum)
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
    sampler = timing.cold(work, gpu) if gpu else timing.host(work)
    limits = timing.Limits(min_samples=3, max_samples=15, seconds=0.3)
    return statistics.median(timing.collect([sampler], limits)[0].seconds)
