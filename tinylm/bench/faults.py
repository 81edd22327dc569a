"""Faults of inputs, results and clocks: each is a CheckFailed that says in one line what is wrong."""

from __future__ import annotations

import time
from typing import Any

from tinylm.bench import leaves, memory, timing
from tinylm.bench.case import CheckFailed

_now = time.perf_counter  # as it was before any work ran

# How long a result is watched for being filled in late: where nothing checks it, and where it was found wrong.
PAUSE_S = 0.005
LONG_PAUSE_S = 0.15
# A copy on the same card is the ceiling; 10% is far more than such a measurement spreads.
MOST_OF_CEILING = 1.1


def clocks_agree() -> None:
    """Raises CheckFailed if the host's clock is not the one it was when this module was imported."""
    for name, clock in (("time.perf_counter", time.perf_counter), ("the clock of timing.host", timing._now)):
        low, told, high = _now(), clock(), _now()
        if not low <= told <= high:
            raise CheckFailed(f"patched timing: {name} says {told:.6f} s where it is {high:.6f} s")


def implausible(of_ceiling: float, mode: str, bytes: float, cache_bytes: float) -> str | None:
    """Why a share of the bandwidth that a copy reached on the card cannot be, or None.

    bytes: declared, of one call. Only `cold` and `graph` start without a warm cache, and only data of several times
    its size cannot stay in it while they are written.
    """
    if of_ceiling <= MOST_OF_CEILING or mode not in ("cold", "graph") or bytes < 8 * cache_bytes:
        return None
    return (
        f"{bytes:.3g} bytes at {of_ceiling:.2f} of what a copy reaches on this card: more bytes are declared than are "
        "moved"
    )


def plain(args: Any) -> bool:
    """Whether inputs are nothing but tensors, arrays and plain values, so that new ones cost little."""
    plain = (bool, int, float, str, bytes, type(None))
    return bool(leaves.buffers(args)) and all(
        leaves.is_tensor(leaf) or leaves.is_array(leaf) or isinstance(leaf, plain) for leaf in leaves.walk(args)
    )


def data_matters(args: Any, mutates: bool) -> None:
    """At least half of the floating inputs' bytes hold more than one value; of work that writes into them, some."""
    floating = [leaf for leaf in leaves.buffers(args) if leaves.is_floating(leaf) and leaves.size(leaf) > leaf.itemsize]
    total = leaves.size(floating)
    flat = leaves.size([leaf for leaf in floating if leaves.mostly_one_value(leaf)])
    if total and flat >= (total if mutates else total / 2):
        raise CheckFailed(
            f"zero inputs: {flat / total:.0%} of the floating inputs' bytes are in tensors of which more than half is "
            "one value; draw them at random, or declare constant=True if their values do not matter"
        )


def settled(result: Any, told: tuple[Any, ...]) -> None:
    if leaves.fingerprint(result) != told:
        raise CheckFailed("unfinished: the result changed after the call had returned, by another thread or stream")


def changes(result: Any, told: tuple[Any, ...]) -> bool:
    """Whether a result is still being filled in."""
    for _ in range(6):
        if leaves.fingerprint(result) != told:
            return True
        time.sleep(LONG_PAUSE_S / 6)
    return leaves.fingerprint(result) != told


def stale(twin: Any) -> str:
    """How much of a result is what was put into its memory before the call, in words; "" if nothing is."""
    found = [t for t in leaves.tensors(twin) if memory.poisonable(t)]
    share = max((memory.poisoned(t) for t in found), default=0.0)
    if share == 1:
        return "not written: the result is what lay in its memory before the call, as of a cached output"
    return f"not written: {share:.3g} of the result is what lay in its memory before the call" if share else ""


def numbers(twin: Any, args: Any) -> None:
    """No NaN in a result of finite inputs."""
    for leaf in leaves.walk(twin):
        if count := leaves.nans(leaf):
            if not all(leaves.finite(given) for given in leaves.walk(args)):
                return
            size = leaf.numel() if leaves.is_tensor(leaf) else getattr(leaf, "size", 1)
            raise CheckFailed(f"NaN output: {count} of {size} numbers, though the inputs are finite")
