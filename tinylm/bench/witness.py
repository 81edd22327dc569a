"""What only the device can tell of some work: on which stream it runs, how long it takes, what is in the cache.

Nothing here trusts a clock or an event that the work could have replaced: the device writes its own timer, the host's
clock was taken when this file was imported, and the driver itself is asked to wait for everything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from tinylm.bench import leaves, memory
from tinylm.bench.case import CheckFailed

if TYPE_CHECKING:
    from tinylm.bench.device import Gpu

Work = Callable[[], Any]

_now = time.perf_counter  # as it was before any work ran

# Work is repeated until it takes about this long, so that what goes on after its end is well above the 20 to 50 us
# in which the host learns that a device is done.
BATCH_S = 3e-3
MOST_CALLS = 200
# All calls of a batch have to be queued at once: a stream takes 1,024 launches, of 5 us of the host each. Where that is
# too much, the hold ends by itself, and a quarter of the calls is tried.
QUEUE_S = 5e-3
# A tail after the end of the work: this, and a quarter of the work, three times in a row. A wake-up of the host that
# came late is rarer.
TAIL_S = 0.3e-3
ATTEMPTS = 3
# CUDA events against the global timer: its steps of up to 1 us on either side, the launches of the two stamps, and
# 3% for what runs between stamp and event.
CLOCK_SLACK_S = 10e-6
CLOCK_SLACK = 0.03
# Elements of a result that are looked at while the stream is held: one row in ten thousand is not missed.
PEEKED = 1 << 20
# Memory is about 2.5 times as far away as the L2 cache (H200: 800 cycles and 300). Where it is not even a quarter
# further, cache and memory cannot be told apart.
FARTHER = 1.25


class Batch(NamedTuple):
    """Times of several calls, queued while the stream was held, in seconds."""

    device: float  # by the global timer
    events: float  # by torch's events
    host: float  # from the release to the return of the last event's synchronize
    tail: float  # from then until the driver says that the device is done
    queue: float  # of the host, to queue one call


class Witness:
    """Proofs of work that runs on the current stream of one device. Each raises CheckFailed or says nothing."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._reader = gpu.torch.cuda.Stream()
        gpu.stamp().ns()  # what a first one loads is not to be loaded while the stream is held

    # --- streams ---------------------------------------------------------------------------------------------------

    def waits_for_its_stream(self, work: Work, may_poison: Callable[[Any], bool]) -> bool:
        """Nothing of the work's result may be written while the stream that it was called on is held.

        False if that cannot be seen, since the work waits for the device while it is called.

        A result is spoiled and freed, as is free memory of its size, so that a new one lies in memory whose content
        is known; another stream then reads it.
        """
        result = work()
        for _ in range(ATTEMPTS):  # a result that lies elsewhere is spoiled in turn, so that its memory is known
            known = [t for t in leaves.tensors(result) if t.is_cuda and may_poison(t)]
            if not known:
                return True
            saved = {t.data_ptr(): t.detach().clone() for t in known}
            spoiled, _ = memory.spoil(known)
            self._still_poison(known, spoiled)  # loads the kernels and makes the buffers that the held part needs
            del known, result
            self.gpu.drain()
            with self.gpu.held() as hold:
                result = work()
                share = self._still_poison(leaves.tensors(result), spoiled)
            self.gpu.drain()
            for tensor in leaves.tensors(result):  # state that the work keeps is not to be lost
                if memory.poisonable(tensor) and tensor.data_ptr() in saved:
                    memory.heal(tensor, saved[tensor.data_ptr()])
            if hold.timed_out():
                return False
            if share is not None and share < 1:
                raise CheckFailed(
                    f"side stream: {1 - share:.3g} of the result was written while the stream that the work was "
                    "called on was held: launch on the current stream, or let the other one wait for it"
                )
            if share is not None:
                return True
        return True

    def _still_poison(self, found: list[Any], spoiled: list[tuple[int, int]]) -> float | None:
        """The smallest share of poison in the tensors that lie in spoiled memory, read through a stream of our own."""
        torch = self.gpu.torch
        shares = []
        with torch.cuda.stream(self._reader):
            for tensor in found:
                start = tensor.data_ptr()
                inside = any(low <= start and start + memory.extent(tensor) <= high for low, high in spoiled)
                if tensor.is_cuda and memory.poisonable(tensor) and inside:
                    flat = leaves.words(tensor).reshape(-1)
                    picked = flat[:: max(1, len(flat) // PEEKED)]
                    shares.append((picked == -1).double().mean().item())
        return min(shares, default=None)

    def ends_with_its_stream(self, work: Work, call_s: float, queue_s: float) -> None:
        """When the stream that the work was called on is done, the device is; and its events tell the time.

        call_s: about how long a call takes; queue_s: how long the host needs to queue it.
        """
        most = max(1, min(MOST_CALLS, int(QUEUE_S / max(queue_s, 1e-7))))
        calls = max(1, min(most, 8, int(BATCH_S / max(call_s, 1e-7))))
        shrunk = False
        for attempt in range(ATTEMPTS + 1):
            found = self._batch(work, calls)
            while found is None:
                if calls == 1:
                    return  # it waits for the device itself, so that a mode with a hold refuses it
                shrunk = True
                most = calls = max(1, calls // 4)  # the queue was full, and the host waited until the hold ended
                found = self._batch(work, calls)
            batch = found
            if attempt == 0:  # to see how long a call takes, whatever part of it is where
                # The call before may have made memory or code: what queueing takes is what it took here.
                most = max(1, min(MOST_CALLS, int(QUEUE_S / max(batch.queue, 1e-7)), most if shrunk else MOST_CALLS))
                calls = max(1, min(most, math.ceil(calls * BATCH_S / (batch.device + batch.tail))))
                continue
            # Another stream's work keeps the last stamp waiting for a multiprocessor, but for a part of its time only.
            if batch.host < 0.9 * batch.device and batch.device > 0.5 * batch.tail:
                raise CheckFailed(
                    f"patched timing: torch.cuda.Event.synchronize came back after {batch.host * 1e6:.0f} us from "
                    f"work of {batch.device * 1e6:.0f} us"
                )
            if batch.tail > TAIL_S + 0.25 * batch.device:
                continue
            if abs(batch.events - batch.device) > CLOCK_SLACK_S + CLOCK_SLACK * batch.device:
                raise CheckFailed(
                    f"patched timing: torch.cuda.Event gives {batch.events * 1e6:.1f} us for work of "
                    f"{batch.device * 1e6:.1f} us by the device's own timer"
                )
            return
        raise CheckFailed(
            f"side stream: work goes on for {batch.tail * 1e6:.0f} us on another stream after {calls} calls have "
            f"ended ({batch.device * 1e6:.0f} us): let the current stream wait for the other one (wait_stream)"
        )

    def _batch(self, work: Work, calls: int) -> Batch | None:
        torch = self.gpu.torch
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.gpu.drain()
        with self.gpu.held() as hold:
            first = self.gpu.stamp()
            start.record()
            began = _now()
            for _ in range(calls):
                work()
            queue = (_now() - began) / calls
            end.record()
            last = self.gpu.stamp()
            released = _now()
        end.synchronize()
        ended = _now()
        self.gpu.drain()
        done = _now()
        if hold.timed_out():
            return None
        device, events = (last.ns() - first.ns()) * 1e-9, start.elapsed_time(end) * 1e-3
        return Batch(device, events, ended - released, done - ended, queue)

    # --- the host's wait -------------------------------------------------------------------------------------------

    def is_waited_for(self, work: Work, sync: Work, call_s: float) -> Any:
        """When `sync` has come back the device is done. Returns the work's result."""
        calls = max(1, min(MOST_CALLS, int(BATCH_S / max(call_s, 1e-7))))
        for _ in range(ATTEMPTS):
            self.gpu.drain()
            start = _now()
            for _ in range(calls):
                result = work()
            sync()
            ended = _now()
            self.gpu.drain()
            tail = _now() - ended
            if tail <= TAIL_S + 0.25 * (ended - start):
                return result
        raise CheckFailed(
            f"patched timing: synchronize came back {tail * 1e6:.0f} us before the device was done, from work of "
            f"{(ended - start + tail) * 1e6:.0f} us"
        )

    # --- the cache -------------------------------------------------------------------------------------------------

    def is_flushed(self, args: Any) -> None:
        """After the flush that `cold` uses, inputs that fit into the L2 cache are as far away as memory."""
        torch, cache = self.gpu.torch, self.gpu.properties.L2_cache_size
        fitting = {
            t.data_ptr(): t
            for t in leaves.tensors(args)
            if t.is_cuda and t.is_contiguous() and t.data_ptr() % 4 == 0 and 4096 <= t.nbytes <= cache
        }
        inputs = sorted(fitting.values(), key=lambda t: -t.nbytes)[:ATTEMPTS]
        other = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")
        for tensor in inputs or [torch.ones(1 << 18, device="cuda")]:
            for _ in range(ATTEMPTS):
                other.fill_(1)
                self.gpu.drain()
                far = self.gpu.latency_cycles(tensor)
                near = self.gpu.latency_cycles(tensor)
                self.gpu.flush()
                found = self.gpu.latency_cycles(tensor)
                if far < FARTHER * near or found > (far + near) / 2:
                    break
            else:
                raise CheckFailed(
                    f"hot in cache: after the flush an input of {tensor.nbytes} bytes is "
                    f"{found:.0f} cycles away, as is the L2 cache ({near:.0f}) and not memory ({far:.0f}): the "
                    "flush of `cold` does not flush"
                )
