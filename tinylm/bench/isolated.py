"""One callable in a fresh process: for memory readings, crashes, and whatever must not disturb the run.

The process is forked from a server that has imported torch and touched no device (where the system cannot fork it
is started from nothing), so that a cell costs no import.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


@dataclass(frozen=True)
class Outcome:
    """How a process ended: `ok` with its value, or `out-of-memory`, `failed`, `crashed`, `timeout` with the reason."""

    status: str
    value: Any = None
    reason: str = ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on the device."""
    return any(kind.__name__ in OUT_OF_MEMORY for kind in type(error).__mro__) or (
        "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _child(pipe: Connection, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        outcome = Outcome("ok", function(**arguments))
    except BaseException as error:
        status = "out-of-memory" if is_out_of_memory(error) else "failed"
        lines = traceback.format_exception_only(error)[-1].strip().splitlines() or [""]
        outcome = Outcome(status, reason=lines[0])
    pipe.send(outcome)
    pipe.close()


def _end_with_parent() -> None:
    """A run that is killed leaves nothing behind that still holds memory or keeps the device busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run(function: Callable[..., Any], *, timeout: float = 300.0, **arguments: Any) -> Outcome:
    """Call `function(**arguments)` in a fresh process and wait for it, at most `timeout` seconds.

    The function and its arguments must be picklable: a function of a module, not a closure.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, arguments), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return Outcome("timeout", reason=f"no result within {timeout:g} s")
        return ours.recv()
    except EOFError:
        process.join()
        return Outcome("crashed", reason=exit_reason(process.exitcode))
    finally:
        process.kill()
        process.join()
        ours.close()


def exit_reason(code: int | None) -> str:
    """How a process ended that gave no result, from its exit code."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system's out-of-memory killer sends it)" if name == "SIGKILL" and os.name == "posix" else ""
        return f"the process was ended by {name}{hint}"
    return f"the process ended with exit code {code} and no result"
