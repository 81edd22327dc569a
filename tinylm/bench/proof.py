"""Proof that a measured case did the work it is timed for: before it is timed, and after.

Every failure is a CheckFailed whose one line begins with what is wrong:

side stream         the timed stream does not wait for all of the work (GPU)
cached output       an earlier result came back, though the inputs are others
unfinished          the result is a promise, or is filled in after the call has returned
not written         memory of the result in which still lies what was put there before the call
zero inputs         inputs of one value, which caches, clocks and power treat better than data
hot in cache        the flush of `cold` does not flush (GPU)
patched timing      a clock, an event or a synchronization is not what it was
right once          right before the timing, wrong after it
skips rows          (or elements) wrong in a few places, right in the others
mutates its inputs  they are not bit for bit what they were
an exception was swallowed, NaN output

What lies in a closure and not in `inputs` cannot be given other values: a copy of an earlier result passes there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tinylm.bench import faults, leaves, memory
from tinylm.bench.case import Case, CheckFailed, against, checked
from tinylm.bench.faults import clocks_agree, implausible
from tinylm.bench.isolated import is_out_of_memory
from tinylm.bench.swallowed import swallowed
from tinylm.bench.witness import Witness

if TYPE_CHECKING:
    from tinylm.bench.device import Gpu

__all__ = ["Case", "CheckFailed", "Proof", "against", "clocks_agree", "implausible"]

Work = Callable[[], Any]

_now = time.perf_counter  # as it was before any work ran

# A heap does not always give the memory that was spoiled, so a wrong result is looked at again.
RETRIES = 3


class Proof:
    """One case, proven before and after it is timed: about five calls of the work, and two or three of its check.

    mode: as in `timing.MODES`; sync: what `host` waits with. Wrong work raises CheckFailed.
    """

    def __init__(self, case: Case, gpu: Gpu | None, mode: str, sync: Callable[[], Any] | None = None) -> None:
        self.case, self.gpu, self.mode, self.sync = case, gpu, mode, sync
        self._kept: Any = None  # the last result, as long as its memory matters
        self._static = False  # the work returns the same memory each time
        self._state = False  # and has old values in it by right
        self._spoiled: list[tuple[Any, Any]] = []  # what lies in poisoned memory, and what was there
        self._inputs: set[int] = set()  # memory of the inputs
        self._prints: tuple[Any, ...] = ()  # of the inputs that are timed
        self._earlier: set[tuple[Any, ...]] = set()  # prints of results on other values
        self._timed = False
        self.call_s = 0.0  # of the last call, with the wait for its end
        self._queue_s = 0.0

    def before(self) -> tuple[tuple[Any, ...], float | None]:
        """The arguments to be timed, and the worst error on them. Asks for two sets of inputs."""
        args = self._given()
        first = _prints(args)
        self._earlier.add(leaves.fingerprint(self._run(self._bound(args))[1]))
        self._witnessed(self._bound(args))
        fresh = self._given()
        changed = _prints(fresh) != first
        if memory.rewritable(args, fresh):
            memory.rewrite(args, fresh)  # into the first one's memory: what is kept by pointer or version is now wrong
        else:
            args = fresh
        del fresh
        work = self._bound(args)
        error = self._judged(work, args, changed)
        if not changed:
            self._moved(work, args)
        self._prints = _prints(args)
        self._heal()
        self._kept = self._kept if self._static else None
        self._timed = True
        clocks_agree()
        return args, error

    def adopt(self, args: tuple[Any, ...]) -> None:
        """Be timed on these arguments, of another case that has the same kind of them."""
        self._prints = _prints(args)
        self._inputs |= memory.storages(args)

    def kept(self, args: tuple[Any, ...]) -> bool:
        """Whether the arguments that are timed are bit for bit what they were."""
        return self.case.mutates or _prints(args) == self._prints

    def after(self, work: Work, args: tuple[Any, ...]) -> float | None:
        """The worst error of exactly what was timed: work() gives the result (of a graph: that of its capture)."""
        clocks_agree()
        self._unchanged(args, self._prints)
        self._witnessed(work)
        if self.gpu is not None and self.mode in ("cold", "graph"):
            self._device.is_flushed(args)
        if not (faults.plain(args) and self._roomy(leaves.size(args))):
            return self._judged(work, args)
        fresh = self._given()
        if not memory.rewritable(args, fresh):
            error = self._judged(work, args)
            return _worst(error, self._judged(self._bound(fresh), fresh, changed=True))
        self._earlier.add(leaves.fingerprint(self._run(work)[1]))
        changed = _prints(fresh) != self._prints
        memory.rewrite(args, fresh)
        error = self._judged(work, args, changed)
        if not changed:
            self._moved(work, args)
        return error

    # --- one call --------------------------------------------------------------------------------------------------

    def _given(self) -> tuple[Any, ...]:
        args = self.case.inputs()
        self._inputs |= memory.storages(args)
        if not self.case.constant:
            faults.data_matters(args, self.case.mutates)
        return args

    def _bound(self, args: tuple[Any, ...]) -> Work:
        return lambda: self.case.fn(*args)

    def _run(self, work: Work) -> tuple[Any, Any]:
        """The result of one call, and a copy taken as soon as the call came back (on a device: queued).

        The memory of the last result is spoiled before it, and so is free memory of that size.
        """
        self._heal()
        last = leaves.tensors(self._kept)
        last = [t for t in last if self._may_poison(t)] if self._roomy(4 * leaves.size(last)) else []
        guards: list[Any] = []
        places = memory.storages(last)
        if last:
            self._spoiled = [(tensor, tensor.detach().clone()) for tensor in last]
            guards = memory.spoil(last)[1]
            self._wait()
        start = _now()
        result = work()
        self._queue_s = _now() - start
        del guards
        if why := leaves.unfinished(result, waited_for=self._waits_itself):
            raise CheckFailed(f"unfinished: the work returned {why}")
        twin = leaves.snapshot(result) if self._roomy(leaves.size(result)) else result
        self._wait()
        self.call_s = _now() - start
        self._static = bool(places & memory.storages(result))
        self._kept = result
        return result, twin

    def _heal(self) -> None:
        """Give spoiled memory its values back where nothing else was written: it may be state that the work keeps."""
        for tensor, values in self._spoiled:
            with contextlib.suppress(RuntimeError):  # compiled graphs take the memory of earlier results away
                memory.heal(tensor, values)
        self._spoiled = []

    def _judged(self, work: Work, args: tuple[Any, ...], changed: bool = False) -> float | None:
        """The error of one call on these arguments. changed: they have other values than at the call before."""
        given = leaves.snapshot(args) if self.case.mutates else args
        prints = _prints(args)
        result, twin = self._run(work)
        told, stale = leaves.fingerprint(twin), ""
        if self.case.check is None:
            time.sleep(faults.PAUSE_S)
        try:
            faults.settled(result, told)
            self._unchanged(args, prints)
            stale = faults.stale(twin)
            self._heal()
            if stale:
                told = leaves.fingerprint(result)
            if stale and changed and self.case.check and self._static:
                # Perhaps state that the work keeps, which has old values by right. They were put back: if it is, the
                # result is now right on values that are new to it.
                self._state = True
                result, twin = self._run(work)
                told = leaves.fingerprint(twin)
            elif stale:
                raise CheckFailed("if it is state that the work keeps, declare mutates=True")
            faults.numbers(twin, given)
            error = checked(self.case.check, twin, args if twin is None else given)
        except Exception as trouble:
            if is_out_of_memory(trouble):
                raise
            said = "; ".join(filter(None, (stale, str(trouble).strip() or type(trouble).__name__)))
            why = self._why(trouble, said, work, result, told, changed)
            if why is None:
                raise
            raise CheckFailed(why) from trouble
        self._earlier.add(told)
        return error

    def _moved(self, work: Work, args: tuple[Any, ...]) -> None:
        """Where `inputs` gives the same values each time: a result that stays when they are moved by one element.

        Moved values may be none that the work is made for, so that nothing but that is held against it.
        """
        if self.case.check is None or not memory.rewritable(args, args) or not self._roomy(2 * leaves.size(args)):
            return
        saved = leaves.snapshot(args)
        memory.move(args)
        try:
            twin = self._run(work)[1]
            if leaves.fingerprint(twin) in self._earlier and _prints(args) != _prints(saved):
                self.case.check(twin, *args)
        except AssertionError as trouble:
            raise CheckFailed(f"cached output: an earlier result came back for other inputs; {trouble}") from trouble
        except Exception:  # it cannot work on them
            pass
        finally:
            memory.rewrite(args, saved)

    # --- what may be wrong -----------------------------------------------------------------------------------------

    def _unchanged(self, args: tuple[Any, ...], prints: tuple[Any, ...]) -> None:
        if self.case.mutates:
            return
        for i, (now, then) in enumerate(zip(_prints(args), prints, strict=True)):
            if now != then:
                found = leaves.buffers(args)[i]
                raise CheckFailed(
                    f"mutates its inputs: tensor {i} of them ({found.dtype}, {tuple(found.shape)}) is not what it was; "
                    "work on a copy, or declare mutates=True if it is meant to"
                )

    def _why(
        self, trouble: Exception, said: str, work: Work, result: Any, told: tuple[Any, ...], changed: bool
    ) -> str | None:
        """In words, why a result is wrong; None where the trouble itself says it."""
        late = said.startswith("unfinished") or faults.changes(result, told)
        if hidden := swallowed(work, self.case.fn):
            return f"an exception was swallowed in the work: {hidden}; {said}"
        if said.startswith(("unfinished", "mutates")):
            return None
        if late:
            return f"unfinished: the result was filled in after the call had returned; {said}"
        for _ in range(0 if said.startswith("not written") else RETRIES):
            if stale := faults.stale(self._run(work)[1]):
                said = f"{stale}; {said}"
                break
        self._heal()
        if said.startswith("not written"):
            return said
        if changed and told in self._earlier and not all(leaves.mostly_one_value(b) for b in leaves.buffers(result)):
            return f"cached output: an earlier result came back for other inputs; {said}"
        if result is None and not isinstance(trouble, AssertionError):
            return f"the work returned None where the check expects a result ({said})"
        if self._timed and isinstance(trouble, AssertionError):
            return f"right once: right before the timing, wrong after it; {said}"
        return None

    # --- the machine -----------------------------------------------------------------------------------------------

    @cached_property
    def _device(self) -> Witness:
        assert self.gpu is not None
        return Witness(self.gpu)

    def _witnessed(self, work: Work) -> None:
        """Where a device does the work: that what was timed is all of it."""
        if self.gpu is None:
            return
        if self.mode == "host":
            if self._timed and self.sync is not None:
                self._device.is_waited_for(work, self.sync, self.call_s)
            return
        self._run(work)
        self._heal()
        roomy = self._roomy(4 * leaves.size(self._kept))
        if not roomy or self._device.waits_for_its_stream(work, self._may_poison):
            self._device.ends_with_its_stream(work, self.call_s, self._queue_s)

    @property
    def _waits_itself(self) -> bool:
        """Whether the suite says how its work is waited for, as one of JAX must: its results are promises till then."""
        torch = leaves.imported("torch")
        return self.sync is not None and (torch is None or self.sync is not torch.cuda.synchronize)

    def _wait(self) -> None:
        if self.sync is not None:
            self.sync()
        if self.gpu is not None:
            self.gpu.drain()

    def _may_poison(self, tensor: Any) -> bool:
        if self.case.mutates or self._state or not memory.poisonable(tensor):
            return False
        return tensor.untyped_storage().data_ptr() not in self._inputs

    def _roomy(self, size: int) -> bool:
        return memory.roomy(self.gpu, size)


def _worst(*errors: float | None) -> float | None:
    return max((error for error in errors if error is not None), default=None)


def _prints(args: Any) -> tuple[Any, ...]:
    return leaves.fingerprint(leaves.buffers(args))
