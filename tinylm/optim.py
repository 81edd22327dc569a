"""Optimizers (fused AdamW; Muon for the blocks' matrices, AdamW for the rest), clipping, and learning rate schedules.

Nothing here waits for the device: lr may be a tensor on it (capturable, for CUDA graphs), a norm stays there, and a
step whose gradients are not finite is skipped there (`guard`).

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by the orthogonal matrix nearest
to its momentum, U V^T of its SVD U S V^T. Five steps of an odd polynomial make that nearly so, with products alone:
they bring singular values between 0.007 and 1 of the norm to between 0.68 and 1.21. torch.optim.Muon takes a
matrix at a time, reads lr on the host, and knows neither fused projections nor sharded parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.config import ConfigError, ModelConfig
from tinylm.parallel import local, sharded, whole

OPTIMIZERS = ("adamw", "muon")
# Rows of the projections that one matrix holds: each is orthogonalized by itself, as it would be apart.
SPLITS: dict[str, Callable[[ModelConfig], tuple[int, ...]]] = {
    "attention.qkv.weight": lambda c: (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim),
    "mlp.gate_up.weight": lambda c: (c.d_ff, c.d_ff),
}
# a x + b x^3 + c x^5, steepest at 0: the coefficients of Jordan et al.
QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# The RMS of an update, about that of AdamW's, so that one lr and weight decay serve both (arXiv:2502.16982).
UPDATE_RMS = 0.2

# ---------------------------------------------------------------------------------------------------- optimizers


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    muon_lr: float | None = None,
    momentum: float = 0.95,
    capturable: bool = False,
) -> Optimizer:
    """`adamw` or `muon` over a Transformer's parameters, which may be DTensors; make it after sharding or moving them.

    Matrices decay, gains and biases do not. muon_lr: of the matrices that Muon moves, lr if None; its updates have
    the size of AdamW's. capturable: each group's lr is a tensor on the device, so that a CUDA graph of a step obeys
    `set_lr`. Groups have `initial_lr`, which `set_lr` multiplies. Raises ConfigError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"unknown optimizer {name!r}: use one of {', '.join(OPTIMIZERS)}")
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}
    muon = {key: p for key, p in named.items() if name == "muon" and p.ndim == 2 and "blocks." in key}
    rest = [p for key, p in named.items() if key not in muon]
    groups: list[dict[str, Any]] = [
        {"params": list(muon.values()), "momentum": momentum, "initial_lr": lr if muon_lr is None else muon_lr},
        {"params": [p for p in rest if p.ndim >= 2], "initial_lr": lr},
        {"params": [p for p in rest if p.ndim < 2], "initial_lr": lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        device = group["params"][0].device
        group["lr"] = torch.tensor(group["initial_lr"], device=device) if capturable else group["initial_lr"]
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizer = Optimizer(groups, **settings, fused=True, capturable=capturable)
    ends = {end: rows(model.config) for end, rows in SPLITS.items() if muon}  # type: ignore[arg-type]
    optimizer.rows = {p: rows for key, p in muon.items() for end, rows in ends.items() if key.endswith(end)}
    return optimizer


class Optimizer(torch.optim.AdamW):
    """Muon for the groups that have a momentum, fused AdamW for the others; otherwise an optimizer like any of torch.

    rows: how many rows each of the matrices has that a parameter holds, where it holds several. Under FSDP every
    rank orthogonalizes the gathered updates and keeps its own shard.
    """

    rows: dict[Tensor, tuple[int, ...]]
    found_inf: Tensor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the steps left. Settings, lr's tensors among them, stay those that this optimizer was made with."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for a step in every parameter's state

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        # What AdamW.step collects of a group; of ours, nothing.
        return False if "momentum" in group else super()._init_group(group, *lists)

    def allocate(self) -> None:
        """Makes the state that the first step would, and changes nothing else; leaves no gradients."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        guard(self, torch.full((), math.nan, device=parameters[0].device))
        self.step()
        del self.found_inf
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; skipped on the device where `found_inf` is set and not 0. grad_scale divides gradients."""
        loss = super().step(closure)
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf.bool()
        own = [local(p) for p in parameters]
        gradients = [local(p.grad) for p in parameters]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        if scale is not None:
            gradients = list(torch._foreach_mul(gradients, scale.reciprocal()))
        if skip is None:
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        else:
            for old, new in zip(momenta, torch._foreach_lerp(momenta, gradients, 1 - group["momentum"]), strict=True):
                torch.where(skip, old, new, out=old)
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's

        lr = group["lr"]
        decay = lr * group["weight_decay"]
        torch._foreach_mul_(own, 1 - (decay if skip is None else decay * ~skip))
        # A sharded parameter's update is subtracted from zeros first, of which it then adds its own shard.
        full = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) if sharded(p) else p for p in parameters]
        buckets: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, update, into in zip(parameters, updates, full, strict=True):
            rows = self.rows.get(p, p.shape[:1])
            for piece, target in zip(_gathered(update, p).split(rows), into.split(rows), strict=True):
                buckets.setdefault(piece.shape, []).append((piece, target))
        for shape, pairs in buckets.items():
            pieces, targets = zip(*pairs, strict=True)
            size = UPDATE_RMS * max(shape) ** 0.5  # an orthogonal matrix has an RMS of 1 / sqrt(max(rows, columns))
            moves = orthogonalize(_stacked(pieces)).to(targets[0].dtype).mul_(lr * size)
            if skip is not None:
                moves.masked_fill_(skip, 0)
            torch._foreach_sub_(targets, moves.unbind())
        for p, shard, into in zip(parameters, own, full, strict=True):
            if sharded(p):
                shard.add_(_shard(into, p))


def orthogonalize(x: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """x (B, rows, columns): of each matrix U S V^T about U V^T: of s the `steps`-fold QUINTIC of s / norm(S)."""
    a, b, c = QUINTIC
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp_(min=1e-7)).to(x.dtype)
    tall = x.shape[1] > x.shape[2]
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x


def _stacked(pieces: tuple[Tensor, ...]) -> Tensor:
    """One batch of equal matrices, a few kernels however many they are; in bf16 where the card computes it fast."""
    fast = pieces[0].is_cuda and torch.cuda.get_device_capability(pieces[0].device) >= (8, 0)
    batch = pieces[0].new_empty(len(pieces), *pieces[0].shape, dtype=torch.bfloat16 if fast else pieces[0].dtype)
    torch._foreach_copy_(batch.unbind(), pieces)
    return batch


def _gathered(update: Tensor, p: Any) -> Tensor:
    if not sharded(p):
        return update
    from torch.distributed.tensor import DTensor

    where = {"device_mesh": p.device_mesh, "placements": p.placements, "shape": p.shape, "stride": p.stride()}
    return whole(DTensor.from_local(update, **where, run_check=False))


def _shard(full: Tensor, p: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None))


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Each group's lr becomes its initial_lr times `multiplier`; a lr on the device is written in place."""
    for group in optimizer.param_groups:
        lr = group["initial_lr"] * multiplier
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@torch.no_grad()
def clip(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """The norm of all gradients together, () on the device, which are scaled down to max_norm if it is larger."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def guard(optimizer: Optimizer, norm: Tensor) -> None:
    """The optimizer's next step changes nothing, on the device, unless `norm` () is finite."""
    optimizer.found_inf = (~norm.isfinite()).float()  # what GradScaler sets as well


# ----------------------------------------------------------------------------------------------------- schedules


def cosine(step: int, steps: int, decay: int) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


def wsd(step: int, steps: int, decay: int) -> float:
    return min(1.0, (steps - step) / max(decay, 1))


def wsd_sqrt(step: int, steps: int, decay: int) -> float:
    return 1 - math.sqrt(1 - wsd(step, steps, decay))


def constant(step: int, steps: int, decay: int) -> float:
    return 1.0


# (steps after warm-up, how many there are, how many decay) -> from 1 to 0.
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "cosine": cosine,
    "wsd": wsd,
    "wsd-sqrt": wsd_sqrt,
    "constant": constant,
}


def schedule(name: str, step: int, steps: int, *, warmup: int = 0, decay: int = 0, final: float = 0.0) -> float:
    """The multiplier of lr at a step of 0..steps: (step + 1) / (warmup + 1) until it is 1 at `warmup`, `final` at
    `steps`.

    cosine: half a period after warm-up. wsd: 1, then a line over the last `decay` steps; wsd-sqrt: 1 - sqrt(t)
    instead (arXiv:2405.18392). constant: 1 to the end. Raises ConfigError for an unknown name, and for phases that
    do not fit into steps.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}: use one of {', '.join(SCHEDULES)}")
    if warmup < 0 or decay < 0 or warmup + decay > steps:
        raise ConfigError(f"warmup {warmup} and decay {decay} do not fit into {steps} steps: give fewer, or more steps")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step >= steps:
        return 1.0 if name == "constant" else final
    return final + (1 - final) * SCHEDULES[name](step - warmup, steps - warmup, decay)
