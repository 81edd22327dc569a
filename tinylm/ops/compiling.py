"""Functions through torch.compile, one compiled function for each shape."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch


def compiler(
    backend: str | Callable[..., object], options: dict[str, Any] | None = None
) -> Callable[..., Callable[..., Any]]:
    """`compile_for(function, *key)`: the function by `torch.compile(fullgraph=True, dynamic=False)`, for one key.

    key: what a compiled function is bound to, such as shapes, dtypes and device. Nothing is compiled before the
    function that is returned is called.
    """
    compiled: dict[tuple[object, ...], Callable[..., Any]] = {}

    def compile_for(function: Any, *key: object) -> Callable[..., Any]:
        if key not in compiled:
            compiled[key] = torch.compile(
                _copied(function), fullgraph=True, dynamic=False, backend=backend, options=options
            )
        return compiled[key]

    return compile_for


def _copied(function: Any) -> Callable[..., Any]:
    """The function with a copy of its code. Dynamo counts recompilations per code object and stops compiling at 8:
    the copy has a count of its own, so no shape is ever left uncompiled."""
    return types.FunctionType(function.__code__.replace(), function.__globals__)
