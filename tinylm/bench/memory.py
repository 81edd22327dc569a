"""The memory of tensors and arrays: spoiled before a call, read after it, and given new values behind its back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from tinylm.bench.leaves import buffers, imported, is_array, is_floating, is_tensor, tensors, walk, words

if TYPE_CHECKING:
    from tinylm.bench.device import Gpu

# What is smaller than this is copied without asking how much memory is free.
SMALL_BYTES = 16 << 20
# Free blocks to poison: of small ones as many as there may be holes in the heap, of large ones two.
LEAST_BLOCKS, MOST_BLOCKS, BLOCKS_BYTES = 2, 16, 32 << 20


def poisonable(tensor: Any) -> bool:
    """All bits set is a NaN in every floating format; an integer made wild could be an index, so it is left alone."""
    apart = all(stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if length > 1)
    return tensor.is_floating_point() and tensor.numel() > 0 and apart


def poison(tensor: Any) -> None:
    words(tensor).fill_(-1)


def poisoned(tensor: Any) -> float:
    """The share of the elements that are still poison."""
    return (words(tensor) == -1).sum().item() / tensor.numel()


def heal(tensor: Any, saved: Any) -> None:
    """Give elements that are still poison their values back."""
    torch = imported("torch")
    now = words(tensor)
    now.copy_(torch.where(now == -1, words(saved), now))


def extent(tensor: Any) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size() if tensor.numel() else 0


def spoil(given: list[Any]) -> tuple[list[tuple[int, int]], list[Any]]:
    """Poison these tensors, and blocks of free memory of each one's size; the ranges of all that, and guards.

    What is allocated next of that size is most likely one of the blocks, or one of the tensors if they are freed. The
    guards lie between the blocks of a host's heap, and keep them apart until they are dropped.
    """
    torch = imported("torch")
    found, guards = list(given), []
    with contextlib.suppress(torch.OutOfMemoryError):
        for tensor in given:
            count = min(MOST_BLOCKS, max(LEAST_BLOCKS, BLOCKS_BYTES // tensor.nbytes))
            if tensor.is_cuda:
                found += [torch.empty_like(tensor) for _ in range(count)]
            else:  # a heap finds an aligned block only in one that is larger by the alignment
                pairs = [torch.empty(tensor.nbytes + 64, dtype=torch.uint8) for _ in range(2 * count)]
                guards += pairs[::2]
                found += pairs[1::2]
                del pairs
    for tensor in found:
        poison(tensor)
    return [(t.data_ptr(), t.data_ptr() + extent(t)) for t in found], guards


def roomy(gpu: Gpu | None, size: int) -> bool:
    """Whether so many bytes more are at most half of what is free."""
    if size < SMALL_BYTES:
        return True
    if gpu is None:
        import psutil

        return size <= psutil.virtual_memory().available // 2
    cuda = gpu.torch.cuda
    return size <= (cuda.mem_get_info()[0] + cuda.memory_reserved() - cuda.memory_allocated()) // 2


def storages(value: Any, depth: int = 4, seen: set[int] | None = None) -> set[int]:
    """Where the memory begins of every tensor that can be reached from a value through attributes of objects."""
    torch = imported("torch")
    seen = set() if seen is None else seen
    found: set[int] = set()
    if torch is None:
        return found
    for leaf in walk(value):
        if tensors(leaf):
            found.add(leaf.untyped_storage().data_ptr())
        elif isinstance(leaf, torch.nn.Module):
            found |= {t.untyped_storage().data_ptr() for t in tensors([*leaf.parameters(), *leaf.buffers()])}
        elif depth and id(leaf) not in seen and hasattr(leaf, "__dict__") and not callable(leaf):
            seen.add(id(leaf))
            found |= storages(list(vars(leaf).values()), depth - 1, seen)
    return found


# --- new values in the same memory -----------------------------------------------------------------------------------


def rewritable(args: Any, fresh: Any) -> bool:
    """Whether the values of `fresh` can be written into the memory of `args`: plain tensors of the same shapes."""
    ours, theirs = (list(walk(value)) for value in (args, fresh))
    if len(ours) != len(theirs) or not all(_takes(a, b) for a, b in zip(ours, theirs, strict=True)):
        return False
    starts = [_start(leaf) for leaf in buffers(args) if leaf.nbytes]
    return len(set(starts)) == len(starts) > 0


def _start(leaf: Any) -> int:
    return leaf.untyped_storage().data_ptr() if is_tensor(leaf) else leaf.__array_interface__["data"][0]


def _takes(ours: Any, theirs: Any) -> bool:
    if is_array(ours) and is_array(theirs):
        return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and ours.flags.writeable
    if not (is_tensor(ours) and is_tensor(theirs)):
        return isinstance(ours, (bool, int, float, str, bytes, type(None))) and ours == theirs
    if len(tensors([ours, theirs])) < 2 or ours.requires_grad or theirs.requires_grad:
        return False
    alike = all(getattr(ours, name) == getattr(theirs, name) for name in ("shape", "dtype", "device"))
    strides = [stride for length, stride in zip(ours.shape, ours.stride(), strict=True) if length > 1]
    return alike and ours.stride() == theirs.stride() and all(strides)  # a stride of 0: one element, seen many times


def rewrite(args: Any, fresh: Any) -> None:
    """New values into the same memory. Neither pointer, shape, identity nor version tells that anything changed."""
    for ours, theirs in zip(buffers(args), buffers(fresh), strict=True):
        if is_array(ours):
            ours[...] = theirs
        else:
            ours.data.copy_(theirs.data)


def move(args: Any) -> None:
    """Every floating element takes the place of the next one, in the same memory."""
    for leaf in buffers(args):
        if is_array(leaf) and is_floating(leaf):
            leaf[...] = imported("numpy").roll(leaf, 1)
        elif is_floating(leaf):
            leaf.data.copy_(leaf.data.roll(1))  # without a dimension: of the flattened tensor
