"""What a result or a set of inputs is made of: tensors and arrays, their bytes and numbers, and what is no value yet.

Torch and numpy are used only where they were imported already, so that suites without them are proven too.
"""

from __future__ import annotations

import collections
import copy
import ctypes
import dataclasses
import itertools
import math
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

# A list of millions of Python numbers is not walked to its end.
MOST_LEAVES = 100_000
# Elements hashed at a time: 32 MiB of int64, of which about three are alive.
HASH_CHUNK = 1 << 22
# Packages whose objects hold finished numbers, though they offer to be converted into arrays.
FINISHED = ("numpy", "pandas", "polars", "pyarrow", "PIL")


def imported(name: str) -> Any:
    """A module, or None where nobody has imported it."""
    return sys.modules.get(name)


def is_tensor(value: Any) -> bool:
    torch = imported("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: Any) -> bool:
    numpy = imported("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def is_floating(value: Any) -> bool:
    return value.is_floating_point() if is_tensor(value) else is_array(value) and value.dtype.kind == "f"


def walk(value: Any) -> Iterator[Any]:
    """The values inside tuples, lists, dicts and dataclasses; anything else is a leaf."""
    return itertools.islice(_walk(value), MOST_LEAVES)


def _walk(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if isinstance(value, (tuple, list, set, frozenset, collections.deque)):
        for inner in value:
            yield from _walk(inner)
    else:
        yield value


def tensors(value: Any) -> list[Any]:
    """The tensors of plain memory (not sparse, not on `meta`) among the leaves."""
    torch = imported("torch")
    return [
        leaf
        for leaf in walk(value)
        if is_tensor(leaf) and leaf.layout is torch.strided and not leaf.is_meta and not leaf.is_nested
    ]


def buffers(value: Any) -> list[Any]:
    """The tensors and arrays among the leaves, whose bytes can be seen."""
    return [leaf for leaf in walk(value) if is_array(leaf) or tensors(leaf)]


# --- what is no value yet -- -----------------------------------------------------------------------------------------

# What gives away that a result is still to be computed, by the name it is called in the message. In any suite:
LAZY: dict[str, Callable[[Any], bool]] = {
    "a generator or another iterator": lambda v: hasattr(type(v), "__next__"),
    "a coroutine or another awaitable": lambda v: hasattr(type(v), "__await__"),
    "a future": lambda v: all(callable(getattr(v, name, None)) for name in ("result", "done")),
    "a function that is still to be called": lambda v: (
        callable(v) and not isinstance(v, type) and not _is_module(v) and not is_tensor(v)
    ),
}
# Where torch is there, and nobody has said by `sync` how to wait for the work:
HOOKS = ("__torch_function__", "__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__")
DEFERRED = ("compute", "collect", "realize", "materialize", "block_until_ready")


def _is_module(value: Any) -> bool:
    torch = imported("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def unfinished(result: Any, waited_for: bool) -> str | None:
    """Why a result is no finished value, in words, or None. waited_for: a `sync` of the suite's own has been called."""
    torch = imported("torch")
    for leaf in walk(result):
        if leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes)):
            continue
        kind = type(leaf)
        if is_tensor(leaf):
            if kind not in (torch.Tensor, torch.nn.Parameter):
                return f"{kind.__name__} is a subclass of Tensor, which may compute later: return a plain tensor"
            if leaf.is_meta:
                return "a tensor on the device `meta` has no values"
            if leaf.is_conj() or leaf.is_neg():
                return "the tensor's conjugation or negation is still to be done: return resolve_conj(), resolve_neg()"
            continue
        for what, is_so in LAZY.items():
            if is_so(leaf):
                return f"{what} ({kind.__name__}): compute it inside the work"
        if torch is None or waited_for or _is_module(leaf) or kind.__module__.partition(".")[0] in FINISHED:
            continue
        for hook in (*HOOKS, *DEFERRED):
            if hasattr(kind, hook):
                return f"an object with a hook to compute later ({kind.__name__}.{hook}): return tensors or numbers"
    return None


# --- bytes -----------------------------------------------------------------------------------------------------------


def words(tensor: Any) -> Any:
    """The tensor's own memory as integers of its element size; writing to them goes behind autograd's back."""
    torch = imported("torch")
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    data = torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data
    return data.view(kinds[data.element_size()])


def size(value: Any) -> int:
    """Bytes of all tensors and arrays."""
    return sum(leaf.nbytes for leaf in buffers(value))


def snapshot(value: Any) -> Any:
    """The same structure, with the tensors and arrays copied."""
    if is_tensor(value):
        return value.clone() if tensors(value) else value
    if is_array(value) or isinstance(value, (bytearray, collections.deque)):
        return value.copy()
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, inner in value.items():
            twin[key] = snapshot(inner)
        return twin
    if isinstance(value, (tuple, list)):
        inner = [snapshot(item) for item in value] if len(value) <= MOST_LEAVES else list(value)
        if isinstance(value, list):
            return inner
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                object.__setattr__(changed, field.name, snapshot(getattr(value, field.name)))
        return changed
    return value


def fingerprint(value: Any) -> tuple[Any, ...]:
    """A hash of each tensor and array, and the plain values themselves. No memory to speak of is needed."""
    found: list[Any] = []
    for leaf in walk(value):
        if is_tensor(leaf):
            found.append((tuple(leaf.shape), leaf.dtype, _hash(leaf)) if tensors(leaf) else None)
        elif is_array(leaf):
            found.append((leaf.shape, leaf.dtype.str, hash(leaf.tobytes())))
        elif isinstance(leaf, (bool, int, complex, str, bytes, type(None))):
            found.append(leaf)
        elif isinstance(leaf, (float, bytearray)):
            found.append(leaf.hex())  # NaN is like itself
    return tuple(found)


def _hash(tensor: Any) -> int:
    data = words(tensor).contiguous().reshape(-1)
    if data.is_cpu:
        return zlib.crc32((ctypes.c_char * data.nbytes).from_address(data.data_ptr())) if len(data) else 0
    return device_hash(data)


def device_hash(data: Any) -> int:
    """64 bits, on the tensor's device: words times odd numbers by place, mixed and summed modulo 2^64."""
    torch = imported("torch")
    if len(data) == 0:
        return 0
    if data.nbytes % 8 == data.storage_offset() * data.itemsize % 8 == 0:
        data = data.view(torch.int64)
    odd = torch.arange(1, 2 * min(len(data), HASH_CHUNK), 2, device=data.device) * 0x9E3779B97F4A7C1
    sums = []
    for part in data.split(HASH_CHUNK):
        mixed = part * odd[: len(part)]
        mixed ^= mixed >> 29  # or two signs that flip would cancel
        sums.append((mixed * 0xBF58476D1CE4E5B).sum())
    total = 0
    for partial in torch.stack(sums).tolist():
        total = (total * 0x100000001B3 + partial) % (1 << 64)
    return total


# --- numbers ----------------------------------------------------------------------------------------------------------


def nans(leaf: Any) -> int:
    """How many of a leaf's numbers are NaN."""
    if tensors(leaf):
        return int(_float(leaf).isnan().sum()) if leaf.is_floating_point() or leaf.is_complex() else 0
    if is_array(leaf):
        return int((leaf != leaf).sum()) if leaf.dtype.kind in "fc" else 0
    return int(isinstance(leaf, float) and leaf != leaf)


def finite(leaf: Any) -> bool:
    """Whether all numbers of a leaf are."""
    if tensors(leaf):
        return bool(_float(leaf).isfinite().all())
    if is_array(leaf):
        return leaf.dtype.kind not in "fc" or bool(imported("numpy").isfinite(leaf).all())
    return not isinstance(leaf, float) or math.isfinite(leaf)


def _float(tensor: Any) -> Any:
    """Formats of 8 bits have few operations."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def mostly_one_value(leaf: Any) -> bool:
    """Whether more than half of a tensor's or array's elements are equal."""
    flat = words(leaf).reshape(-1) if is_tensor(leaf) else leaf.reshape(-1)
    if len(flat) < 2:
        return False
    places = random.Random().choices(range(len(flat)), k=256)
    picked = flat[imported("torch").tensor(places, device=leaf.device)] if is_tensor(leaf) else flat[places]
    value, seen = collections.Counter(picked.tolist()).most_common(1)[0]
    # 80 of 256 are 6 standard deviations below the half; only then is it worth while to look at all.
    return seen >= 80 and int((flat == value).sum()) * 2 > len(flat)
