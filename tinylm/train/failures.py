"""What stops a run that has begun: no room in the memory, or numbers that are none; each told in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from tinylm.train.step import Step

T = TypeVar("T")
# Of torch's allocator on the host, and of a tensor whose size no address could hold.
NO_ROOM = ("can't allocate memory", "Storage size calculation overflowed")


class TrainingStopped(RuntimeError):
    """A run that cannot go on. One line: at which step, why, what is left of it and what to do."""


class Diverged(TrainingStopped):
    """Losses, gradients or weights are no numbers; every rank sees it."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, had no room for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in NO_ROOM)


def with_room(make: Callable[[], T], told: Callable[[], str]) -> T:
    """What `make` returns. Raises TrainingStopped with what is `told` where the memory has no room for it."""
    try:
        return make()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Here, because an exception that is being handled keeps the tensors of its frames.
    raise TrainingStopped(told())


def too_large(step: Step) -> str:
    """That a pass does not fit, and the largest that does, which this rank tries alone."""
    rows, length = step.rows.shape
    told = f"{step.micro} sequences of {length - 1} tokens do not fit into the memory of {step.device}"
    if step.wrapped.alone is None:
        return f"{told}; a rank that has slices of the weights cannot try alone what does: give a smaller --micro-batch"
    sizes = [step.micro]
    while sizes[-1] > 1:  # the largest divisor of a rank's rows that is at most half of the one before
        sizes.append(next(size for size in range(sizes[-1] // 2, 0, -1) if rows % size == 0))
    fits = next((size for size in sizes[1:] if step.fits(size)), None)
    return (
        f"{told}, {fits} did: give --micro-batch {fits}"
        if fits
        else f"{told}, nor does one: give a smaller --context or model"
    )


def not_finite(first: int, losses: Iterable[float], norms: Iterable[float], *, scaled: bool) -> str | None:
    """What is no number, and at which of the steps from `first` on.

    scaled: of fp16's gradients some are not finite while the scale is found; those steps change nothing.
    """
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
        if not math.isfinite(loss):
            return f"the loss is {loss} at step {step}"
        if not (scaled or math.isfinite(norm)):
            return f"the gradient's norm is {norm} at step {step}"
    return None
