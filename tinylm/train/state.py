"""A run's tensors by name, whole whatever the ranks: what a checkpoint holds."""

from __future__ import annotations

from torch import Tensor

from tinylm.checkpoint import MODEL, STATE, Checkpoint, check
from tinylm.optim import Optimizer
from tinylm.parallel import World, assign, whole

Named = dict[str, Tensor]


def state_of(optimizer: Optimizer, weights: Named) -> Named:
    """The optimizer's tensors by "<parameter>/<key>"; it changes them in place."""
    return {f"{name}/{key}": value for name, p in weights.items() for key, value in optimizer.state[p].items()}


def gather(tensors: Named, *, kept: bool) -> Named:
    """The whole tensors on the host; every rank must ask for them. kept: on this rank; else there is nothing."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if kept:
            gathered[name] = value.cpu()
    return gathered


def restore(weights: Named, state: Named, before: Checkpoint, world: World) -> None:
    """Puts back, in place, what the first rank reads; the others need not see the checkpoint's folder.

    Raises CheckpointError unless the checkpoint has tensors of these names and shapes.
    """
    stored: Named = {}

    def read() -> None:
        for expected, found, file in (
            (weights, before.model_state(), MODEL),
            (state, before.optimizer_state(), STATE),
        ):
            check(expected, found, before.path / file)
            stored.update(found)

    world.first(read)
    for name, tensor in (weights | state).items():
        assign(tensor, stored.pop(name, None), world)
