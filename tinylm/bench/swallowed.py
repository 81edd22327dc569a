"""Exceptions that some work raises and catches itself, so that its caller learns nothing of them."""

from __future__ import annotations

import functools
import inspect
import sys
import sysconfig
from collections.abc import Callable
from types import FrameType
from typing import Any

# Exceptions by which Python itself says that something has ended.
ENDS = (StopIteration, StopAsyncIteration, GeneratorExit)


def swallowed(work: Callable[[], Any], fn: Callable[..., Any]) -> str | None:
    """Call the work once more and name the last exception that came up in code of its author's and went no further.

    The author's is what lies outside of Python's library and of installed packages, and the file of `fn` itself:
    libraries catch exceptions of their own all the time. Slow (sys.settrace), so for work that was found wrong only.
    """
    found: list[str] = []
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    home = _file(fn)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if file == __file__ or file.startswith("<") or (file != home and file.startswith(libraries)):
            return None
        if event == "exception" and not issubclass(argument[0], ENDS):
            found.append(f"{argument[0].__name__}: {argument[1]}".partition("\n")[0])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Exception:
        return None  # it comes out now, so that it is not swallowed
    finally:
        sys.settrace(before)
    return found[-1] if found else None


def _file(fn: Callable[..., Any]) -> str | None:
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(inspect.unwrap(getattr(fn, "__func__", fn)), "__code__", None)
    return code.co_filename if code else None
