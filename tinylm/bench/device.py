"""One CUDA device as an instrument: stamps, cache flush, blocking kernel, clocks of the multiprocessors.

The kernels are compiled by NVRTC through cuda-bindings, both of which come with torch's CUDA builds, so that no
compiler is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

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

// The time, and then leave to the next kernel to begin while this one ends.
extern "C" __global__ void start_stamp(volatile u64* started) {
  const u64 t = now_ns();
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  *started = t;
}

// Resident before the work ends, waiting for the end of all of it; then the time since start_stamp's.
extern "C" __global__ void end_stamp(volatile u64* started, u64* ring, unsigned capacity, unsigned* taken) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const u64 t = now_ns();
  u64 s;
  while ((s = *started) == 0) {}
  *started = 0;
  ring[(*taken)++ % capacity] = t - s;
}

extern "C" __global__ void stamp(u64* out) { *out = now_ns(); }

extern "C" __global__ void timer_step(u64* out) {
  u64 last = now_ns(), least = ~0ull;
  for (int i = 0; i < 2000; ++i) {
    const u64 t = now_ns();
    if (t != last && t - last < least) least = t - last;
    last = t;
  }
  *out = least;
}

// One entry for each multiprocessor that this ran on: its cycle counter and the global timer.
extern "C" __global__ void clock_marks(ulonglong2* marks) {
  unsigned sm;
  asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
  ulonglong2 mark;
  mark.x = clock64();
  mark.y = now_ns();
  marks[sm] = mark;
}

// Cycles of `count` loads, each of which waits for the one before; zero is 0, and the compiler cannot know.
extern "C" __global__ void chase(const unsigned* data, u64 stride, int count, unsigned zero, u64* cycles) {
  u64 i = 0;
  const long long start = clock64();
  for (int k = 0; k < count; ++k) i += stride + (__ldcg(data + i) & zero);
  *cycles = clock64() - start + (i & zero);
}
"""
KERNELS = (*("hold", "read_all", "start_stamp", "end_stamp", "stamp", "timer_step", "clock_marks", "chase"),)

# A blocking kernel ends by itself after this time: drivers of display cards kill longer ones.
HOLD_LIMIT_S = 0.2
# The flush reads this many times the L2 cache.
FLUSH_L2_MULTIPLE = 2
# Samples that can be queued before they are read.
RING = 4096
# Above this step the global timer is too coarse for stamps, and events are used. H200: 32 ns; some cards: 1 us.
FINE_TIMER_NS = 100
CHASE_LOADS = 64


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


class Stamp:
    """A time on the device's global timer, once the stream has got there."""

    def __init__(self, slot: Any) -> None:
        self._slot = slot

    def ns(self) -> int:
        """Nanoseconds; waits for the stream."""
        return int(self._slot.item())


class Gpu:
    """The current CUDA device of torch, with the kernels above compiled for it."""

    def __init__(self) -> None:
        import torch
        from cuda.bindings import driver

        self.torch = torch
        self._driver = driver
        self._sink = torch.zeros(1, dtype=torch.int32, device="cuda")  # makes the context that modules load into
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # Not the default stream: only others can be captured, and autograd works on the stream of the forward pass.
        self.stream = torch.cuda.Stream()
        self._functions = _compile(self.properties.major, self.properties.minor)
        # Made now: inside a capture it would belong to the graph.
        count = FLUSH_L2_MULTIPLE * self.properties.L2_cache_size // 8
        self._flush_buffer = torch.randint(1 << 62, (count,), dtype=torch.int64, device="cuda")
        # All graphs take their memory from one pool, one after another, so that what is compared writes
        # to the same addresses. The pool lasts as long as a graph that uses it.
        with torch.cuda.stream(self.stream):
            self._open_pool()
        # Page-locked, so that the kernel reads host memory and the host can write it while the kernel runs.
        self._flags = torch.zeros(2, dtype=torch.int32).pin_memory()
        marks = torch.zeros(2, self.properties.multi_processor_count + 64, 2, dtype=torch.int64, device="cuda")
        self._marks = marks
        self._started = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._ring = torch.zeros(RING, dtype=torch.int64, device="cuda")
        self._taken = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._read = 0
        overlaps = self.properties.major >= 9
        self.start_stamp = self._kernel("start_stamp", 1, 1, self._started)
        self.end_stamp = self._kernel(
            "end_stamp", 1, 1, self._started, self._ring, (RING, ctypes.c_uint), self._taken, overlaps=overlaps
        )
        self._mark = [self._kernel("clock_marks", self.properties.multi_processor_count, 32, half) for half in marks]
        limit_ns = (int(HOLD_LIMIT_S * 1e9), ctypes.c_ulonglong)
        self._flush = self._reader(self._flush_buffer)
        self._hold = self._kernel("hold", 1, 1, self._flags, limit_ns)

    def _kernel(self, name: str, grid: int, block: int, *given: Any, overlaps: bool = False) -> Callable[[], None]:
        """A launch on the current stream, its arguments packed once. A tensor stands for its pointer.

        overlaps: the kernel may become resident while the one before it runs (programmatic dependent launch).
        """
        driver, current, function = self._driver, self.torch.cuda.current_stream, self._functions[name]
        values = [
            kind(value)
            for value, kind in (a if isinstance(a, tuple) else (a.data_ptr(), ctypes.c_void_p) for a in given)
        ]
        packed = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        address = ctypes.addressof(packed)
        keep = (given, values, packed)  # as long as the launch
        if not overlaps:

            def launch(_keep: Any = keep) -> None:
                _ok(driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, current().cuda_stream, address, 0))

            return launch
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        config.gridDimX, config.blockDimX = grid, block
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1

        def launch_early(_keep: Any = keep) -> None:
            config.hStream = driver.CUstream(current().cuda_stream)
            _ok(driver.cuLaunchKernelEx(config, function, address, 0))

        return launch_early

    # --- time ---

    @cached_property
    def fine_timer(self) -> bool:
        """Whether the global timer steps finely enough for stamps."""
        out = self.torch.zeros(1, dtype=self.torch.int64, device="cuda")
        self._kernel("timer_step", 1, 1, out)()
        return 0 < out.item() <= FINE_TIMER_NS  # -1: no step was seen

    def stamp(self) -> Stamp:
        """Queue a reading of the global timer on the current stream."""
        slot = self.torch.zeros(1, dtype=self.torch.int64, device="cuda")
        self._kernel("stamp", 1, 1, slot)()
        return Stamp(slot)

    def stamped(self, count: int) -> list[float]:
        """Seconds between the last `count` pairs of start_stamp and end_stamp, all since the last call; waits."""
        taken = int(self._taken.item())
        if taken - self._read != count or count > RING:
            raise DeviceError(f"{taken - self._read} samples were stamped where {count} were expected")
        at = self.torch.arange(self._read, taken, device="cuda") % RING
        self._read = taken
        return [ns * 1e-9 for ns in self._ring[at].tolist()]

    def forget_stamps(self) -> None:
        """Leave unread what was stamped until now."""
        self._read = int(self._taken.item())

    def ease_start(self) -> None:
        """While capturing: let the next kernel begin when start_stamp, just captured, has taken its time.

        Otherwise it would wait for the end of start_stamp, which is not part of the work: 0.5 us on an H200.
        """
        if self.properties.major < 9:
            return
        driver, stream = self._driver, self.torch.cuda.current_stream().cuda_stream
        edge = driver.CUgraphEdgeData()
        edge.from_port = driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
        edge.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.value
        update = getattr(driver, "cuStreamUpdateCaptureDependencies_v2", driver.cuStreamUpdateCaptureDependencies)
        replace = driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES.value
        _ok(update(stream, list(self._capture_info(stream)[4][:1]), [edge], 1, replace))

    def captured_copies(self) -> int:
        """While capturing: how many copies between memories the graph has so far."""
        driver, stream = self._driver, self.torch.cuda.current_stream().cuda_stream
        graph = self._capture_info(stream)[3]
        _, _, count = driver.cuGraphGetNodes(graph)
        _, nodes, _ = driver.cuGraphGetNodes(graph, count)
        kinds = [_ok(driver.cuGraphNodeGetType(node)) for node in nodes[:count]]
        return kinds.count(driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY)

    def _capture_info(self, stream: int) -> Any:
        driver = self._driver
        info = getattr(driver, "cuStreamGetCaptureInfo_v3", driver.cuStreamGetCaptureInfo)(stream)
        _ok(info)
        return info

    def capture(self, body: Callable[[], Any]) -> Any:
        """What body queues on the current stream (not the default one), as a CUDA graph. Raises what body raises.

        Its memory is that of other graphs too: what it leaves there is lost when another is replayed.
        """
        graph = self.torch.cuda.CUDAGraph()
        self.torch.cuda.synchronize()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            body()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            # torch goes on as if it captured, with the pool and with its random generator, until another capture ends.
            self.torch.cuda.synchronize()
            self._open_pool()
            raise
        graph.capture_end()
        return graph

    def _open_pool(self) -> None:
        self._pool = self.torch.cuda.graph_pool_handle()
        self._anchor = self.capture(lambda: self._sink.fill_(0))

    def drain(self) -> None:
        """Wait for all streams, by the driver's call."""
        _ok(self._driver.cuCtxSynchronize())

    # --- clocks ---

    def mark_clocks(self, end: bool) -> None:
        """Queue a reading of every multiprocessor's cycle counter: the start of a span, or its end."""
        self._mark[end]()

    def clock_hz(self) -> float | None:
        """Mean clock rate between the marks, the median over multiprocessors; waits. None if no counter ran."""
        first, last = self._marks.tolist()
        rates = sorted(
            (c1 - c0) / (t1 - t0) * 1e9
            for (c0, t0), (c1, t1) in zip(first, last, strict=True)
            if t0 and t1 > t0 and c1 > c0
        )
        return rates[len(rates) // 2] if rates else None

    # --- caches and streams ---

    @contextmanager
    def held(self) -> Iterator[Hold]:
        """Hold the current stream while the body queues work on it; it is let go at the end, or by the limit."""
        flags = self._flags.numpy()
        flags[:] = 0
        hold = Hold(flags)
        self._hold()
        try:
            yield hold
        finally:
            hold.release()

    def flush(self) -> None:
        """Replace what is in the L2 cache by reading other data (writing would leave dirty lines behind)."""
        self._flush()

    @cached_property
    def flush_s(self) -> float:
        """How long one flush takes."""
        self.flush()
        before = self.stamp()
        for _ in range(20):
            self.flush()
        return (self.stamp().ns() - before.ns()) / 20e9

    def read(self, tensor: Any) -> None:
        """Read a contiguous tensor, a multiple of 16 bytes, once, from every multiprocessor."""
        self._reader(tensor)()

    def _reader(self, tensor: Any) -> Callable[[], None]:
        count = (tensor.numel() * tensor.element_size() // 16, ctypes.c_ulonglong)
        return self._kernel("read_all", self.properties.multi_processor_count * 8, 256, tensor, count, self._sink)

    def chase(self, tensor: Any, loads: int) -> Callable[[], Any]:
        """A launch of so many loads, each waiting for the one before, spread over a contiguous tensor; gives their
        cycles, an int64 tensor."""
        words = tensor.numel() * tensor.element_size() // 4
        out = self.torch.zeros(1, dtype=self.torch.int64, device="cuda")
        stride, count = (words // loads, ctypes.c_ulonglong), (loads, ctypes.c_int)
        launch = self._kernel("chase", 1, 1, tensor, stride, count, (0, ctypes.c_uint), out)
        return lambda: (launch(), out)[1]

    def latency_cycles(self, tensor: Any) -> float:
        """Mean cycles of a load from a contiguous tensor of at least 4 bytes: up to 64 dependent ones, all over it."""
        loads = min(CHASE_LOADS, max(1, tensor.numel() * tensor.element_size() // 128))
        return self.chase(tensor, loads)().item() / loads

    @property
    def own_bytes(self) -> int:
        """What this instrument itself holds of the device's memory."""
        held = [self._sink, self._marks, self._started, self._ring, self._taken, self._flush_buffer]
        return sum(-(-t.numel() * t.element_size() // 512) * 512 for t in held)


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
    return {name: _ok(driver.cuModuleGetFunction(module, name.encode())) for name in KERNELS}


def _ok(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value != 0:
        raise DeviceError(f"CUDA driver call failed: {status.name}")
    return values[0] if values else None
