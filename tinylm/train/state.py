"""A run's tensors by the names of the parameters, whole whatever the ranks: what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinylm.config import CheckpointError
from tinylm.parallel import assign, whole

Named = dict[str, Tensor]


def gather(parameters: Named, optimizer: Any, *, kept: bool) -> tuple[Named, Named]:
    """(weights, optimizer's tensors named "<parameter>/<key>") on the host; every rank must ask for them.

    parameters: those that the optimizer has. A model under fsdp shows others while it has its slices gathered.
    kept: on this rank; else both are empty.
    """
    weights, state = {}, {}
    for name, parameter in parameters.items():
        value = whole(parameter.detach())
        if kept:
            weights[name] = value.cpu()
        for key, value in optimizer.state[parameter].items():
            value = whole(value)
            if kept:
                state[f"{name}/{key}"] = value.cpu()
    return weights, state


@torch.no_grad()
def restore(parameters: Named, optimizer: Any, weights: Named, state: Named, origin: str) -> None:
    """Puts what `gather` returned back, in place where the optimizer has its tensors already.

    Raises CheckpointError, which names `origin`, unless weights and state are of these parameters.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    if wrong := parameters.keys() ^ weights.keys():
        raise CheckpointError(f"{origin}: the weights are not those of its model: {', '.join(sorted(wrong)[:8])}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise CheckpointError(
                f"{origin}: {name} has shape {list(weights[name].shape)}; the model has {list(parameter.shape)}"
            )
        assign(parameter, weights[name])
    if wrong := parameters.keys() ^ {path.rpartition("/")[0] for path in state}:
        raise CheckpointError(f"{origin}: the optimizer's tensors are of others: {', '.join(sorted(wrong)[:8])}")
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        entry = optimizer.state[parameter]
        if key not in entry:
            entry[key] = _empty(value, parameter, groups[parameter])
        assign(entry[key], value)


def _empty(value: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Where the optimizer would make it: like the parameter, or, a count of steps, where it is read."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype)
    on_device = group.get("fused") or group.get("capturable")
    return torch.empty_like(value, device=parameter.device if on_device else "cpu")
