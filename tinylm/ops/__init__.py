"""One op, many backends, chosen by name from one table. A new backend is one row of `OPS`.

Whether a backend can run is found out by running it (`probe`), never by a version number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tinylm.ops import rmsnorm_cuda  # the module, which a function of its own name must not hide
from tinylm.ops.cross_entropy import (
    compiled_linear_cross_entropy,
    linear_cross_entropy_chunked,
    linear_cross_entropy_eager,
    linear_cross_entropy_reference,
)
from tinylm.ops.linear import Linear, linear_reference, linear_torch
from tinylm.ops.rmsnorm import (
    add_rmsnorm_eager,
    add_rmsnorm_reference,
    add_rmsnorm_torch,
    compiled_add_rmsnorm,
    compiled_rmsnorm,
    rmsnorm_eager,
    rmsnorm_reference,
    rmsnorm_torch,
)
from tinylm.ops.rmsnorm_liger import add_rmsnorm_liger, rmsnorm_liger

__all__ = ["DEFAULTS", "EXAMPLES", "OPS", "REFERENCES", "Linear", "doctor", "get", "probe"]

OPS: dict[str, dict[str, Callable[..., Any]]] = {
    "rmsnorm": {
        "eager": rmsnorm_eager,
        "torch": rmsnorm_torch,
        "compile": compiled_rmsnorm(),
        "cuda": rmsnorm_cuda.rmsnorm_cuda,
        "liger": rmsnorm_liger,
    },
    "add_rmsnorm": {
        "eager": add_rmsnorm_eager,
        "torch": add_rmsnorm_torch,
        "compile": compiled_add_rmsnorm(),
        "cuda": rmsnorm_cuda.add_rmsnorm_cuda,
        "liger": add_rmsnorm_liger,
    },
    "linear": {"torch": linear_torch},
    "linear_cross_entropy": {
        "eager": linear_cross_entropy_eager,
        "compile": compiled_linear_cross_entropy(),
        "chunked": linear_cross_entropy_chunked,
    },
}
DEFAULTS: dict[str, str] = {
    "rmsnorm": "torch",
    "add_rmsnorm": "torch",
    "linear": "torch",
    "linear_cross_entropy": "chunked",
}
REFERENCES: dict[str, Callable[..., Any]] = {
    "rmsnorm": rmsnorm_reference,
    "add_rmsnorm": add_rmsnorm_reference,
    "linear": linear_reference,
    "linear_cross_entropy": linear_cross_entropy_reference,
}


def _rmsnorm_example(**to: Any) -> tuple[Any, ...]:
    return torch.randn(4, 64, **to), torch.randn(64, **to), 1e-5


def _add_rmsnorm_example(**to: Any) -> tuple[Any, ...]:
    return torch.randn(4, 64, **to), *_rmsnorm_example(**to)


def _linear_example(**to: Any) -> tuple[Any, ...]:
    return torch.randn(4, 64, **to), torch.randn(32, 64, **to), torch.randn(32, **to)


def _linear_cross_entropy_example(**to: Any) -> tuple[Any, ...]:
    targets = torch.arange(4, device=to.get("device"))
    return torch.randn(4, 64, **to), torch.randn(32, 64, **to), targets


# Small arguments for each op, made with the keywords of torch.randn.
EXAMPLES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "rmsnorm": _rmsnorm_example,
    "add_rmsnorm": _add_rmsnorm_example,
    "linear": _linear_example,
    "linear_cross_entropy": _linear_cross_entropy_example,
}

# A word in the reason why a backend cannot run -> what to do about it.
REMEDIES: dict[str, str] = {
    "native ops do not compile": "read the log that the reason names; update the compiler, or use another backend",
    "torch_cuda_arch_list": "unset TORCH_CUDA_ARCH_LIST, or set it to the card's compute capability",
    "nvcc": "install the CUDA toolkit of torch's CUDA version and set CUDA_HOME, or use another backend",
    "ninja": "pip install ninja, or use another backend",
    "liger": "pip install liger-kernel where there is an NVIDIA GPU, or use another backend",
    "triton": "pip install triton (triton-windows on Windows), or use another backend",
    "compiler": "install a C++ compiler (Debian and Ubuntu: apt install g++), or use another backend",
    "python.h": "install Python's headers (Debian and Ubuntu: apt install python3-dev)",
    "cuda": "install a torch built for this machine's CUDA driver, or use --device cpu",
}


def get(op: str, backend: str) -> Callable[..., Any]:
    """The callable of one backend of one op. Raises ValueError, which names the known ones."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: use one of {', '.join(OPS)}")
    if backend not in OPS[op]:
        raise ValueError(f"unknown backend {backend!r} of {op}: use one of {', '.join(OPS[op])}")
    return OPS[op][backend]


def probe(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """None if the backend runs here, else the reason, in one line; each case is tried once a process.

    Tries it by compiling and running a small forward and backward. Raises ValueError for an unknown op or
    backend.
    """
    get(op, backend)
    return _probe(op, backend, str(torch.device(device)), dtype)


@functools.cache
def _probe(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            arguments = EXAMPLES[op](device=device, dtype=dtype)
            tensors = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
            outputs = get(op, backend)(*arguments)
            # Of an op with several outputs, the first carries the gradient of all that went in.
            (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()
            finite = all(bool(t.grad.isfinite().all()) for t in tensors if t.grad is not None)
        return None if finite else f"{backend} {op} gave gradients that are not finite on {device} in {dtype}"
    except Exception as error:  # whatever stops a backend is a reason to report, never a crash of the suite
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A first line that ends in a colon (Inductor's) only announces the reason.
        told = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else "no message"
        return f"{type(error).__name__}: {told}"[:300]


def doctor(device: torch.device | str = "auto") -> list[tuple[str, bool, str, str]]:
    """(component, ok, detail, remedy) of each op's backends, by `probe` in fp32; `auto`: CUDA if there."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op, backends in OPS.items():
        for backend in backends:
            reason = probe(op, backend, device, torch.float32)
            remedy = "" if reason is None else remedy_for(reason)
            rows.append((f"{op}/{backend}", reason is None, reason or f"runs on {device}", remedy))
    return rows


def remedy_for(reason: str) -> str:
    """What to do about a probe's reason."""
    words = reason.lower()
    return next((remedy for word, remedy in REMEDIES.items() if word in words), "use another backend")
