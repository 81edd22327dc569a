"""A run's tensors by the names of the parameters, whole whatever the ranks: what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinylm.config import CheckpointError
from tinylm.parallel import assign, whole

Named = dict[str, Tensor]


def gather(model: nn.Module, optimizer: Any) -> tuple[Named, Named]:
    """(weights, optimizer's tensors named "<parameter>/<key>") on the host; every rank must ask for them."""
    weights = {name: whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()}
    state = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = whole(value).cpu()
    return weights, state


@torch.no_grad()
def restore(model: nn.Module, optimizer: Any, weights: Named, state: Named, origin: str) -> None:
    """Puts what `gather` returned back, in place where the optimizer has its tensors already.

    Raises CheckpointError, which names `origin`, unless weights and state are of this model.
    """
    parameters = dict(model.named_parameters())
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    if wrong := parameters.keys() ^ weights.keys():
        raise CheckpointError(f"{origin}: the weights are not those of its model: {', '.join(sorted(wrong)[:8])}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise CheckpointError(
                f"{origin}: {name} has shape {list(weights[name].shape)}; the model has {list(parameter.shape)}"
            )
        assign(parameter, weights[name])
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{origin}: the optimizer's {path} is of no parameter of the model")
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
