"""Data parallelism over the ranks that `torchrun` started, put around a finished model from outside.

`ddp`: every rank holds the model and gradients are averaged (DistributedDataParallel). `fsdp`: every rank
holds a slice of each tensor, which is gathered when its block runs (FSDP2's `fully_shard`). A rank gets its
slice of each batch; gloo carries the tensors between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinylm.config import ConfigError
from tinylm.model import Transformer

T = TypeVar("T")
# How long ranks wait for each other: one may have a text to download and prepare, or a checkpoint to write.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """The ranks of a run, and which of them this process is."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of equally shaped tensors, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def own_random(self) -> AbstractContextManager[None]:
        """Leaves torch's random generators, at the end, as they were before."""
        return torch.random.fork_rng(devices=[self.device.index] if self.device.type == "cuda" else [])

    def gathered(self, value: T) -> list[T]:
        """What each rank has, small and picklable, by rank; every rank must ask for it."""
        values = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises on the first rank, which alone calls it, on every rank that asks; all must."""
        if self.size == 1:
            return make()
        found: T | Exception | None = None
        if self.main:
            try:
                found = make()
            except Exception as error:
                found = error
        found = self.gathered(found)[0]
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]


@dataclass(frozen=True)
class Wrapped:
    """A model under a kind of parallelism: `module(tokens, targets=targets)` is this rank's loss."""

    module: Callable[..., Tensor]  # to be differentiated
    plain: Callable[..., Tensor]  # to be looked at alone: not compiled whole, since shapes and mode differ
    # Around each pass: whether its gradients meet those of the other ranks, as they must in a step's last.
    reducing: Callable[[bool], AbstractContextManager[Any]]
    # As `module`, but by this rank alone, differentiated by torch.autograd.grad; None: it needs the others.
    alone: Callable[..., Tensor] | None


def _none(model: Transformer, world: World, compiled: bool) -> Wrapped:
    module = torch.compile(model, dynamic=False) if compiled else model
    return Wrapped(module, model, lambda last: nullcontext(), module)


def _ddp(model: Transformer, world: World, compiled: bool) -> Wrapped:
    ids = None if world.device.type == "cpu" else [world.device.index]
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    # Around DDP: torch then compiles its buckets one by one, and reduces one while the next is computed.
    module = torch.compile(ddp, dynamic=False) if compiled else ddp
    return Wrapped(module, model, lambda last: nullcontext() if last else ddp.no_sync(), model)


def _fsdp(model: Transformer, world: World, compiled: bool) -> Wrapped:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    for block in model.blocks:
        if compiled:
            block.compile(dynamic=False)  # by itself: what gathers its tensors stays outside of the graph
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded: Any = model
    assert isinstance(sharded, FSDPModule)

    @contextlib.contextmanager
    def reducing(last: bool) -> Iterator[None]:
        sharded.set_requires_gradient_sync(last)
        yield

    return Wrapped(model, model, reducing, None)


KINDS: dict[str, Callable[[Transformer, World, bool], Wrapped]] = {"none": _none, "ddp": _ddp, "fsdp": _fsdp}


def wrap(model: Transformer, kind: str, world: World, *, compiled: bool = False) -> Wrapped:
    """A finished model under a row of KINDS; fsdp changes it in place: its parameters become DTensors.

    compiled: by torch.compile, when first called.
    """
    return KINDS[kind](model, world, compiled)


@contextlib.contextmanager
def ranks(kind: str, device: str = "auto") -> Iterator[World]:
    """This process among the ranks; joins them if it has not yet, and then leaves them at the end.

    device: "auto" is CUDA where there is one. Raises ConfigError for a device that is not there, and where
    `kind` and what torchrun started do not fit.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown parallel {kind!r}: use one of {', '.join(KINDS)}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if kind != "none" and "RANK" not in os.environ:
        raise ConfigError(
            f"parallel {kind} needs ranks: start it by torchrun --standalone --nproc-per-node N -m tinylm.train"
        )
    if kind == "none" and launched > 1:
        raise ConfigError(f"torchrun started {launched} ranks, and parallel is none: give --parallel ddp or fsdp")
    found = _device(device)
    if kind == "none":
        yield World(found)
        return
    on_gpu = found.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(found)
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=found if on_gpu else None, timeout=PATIENCE)
    yield World(found, dist.get_rank(), dist.get_world_size())
    # Not after an error: to leave can mean to wait for ranks that wait for this one, which torchrun ends if this ends.
    if joins:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the process, with all that it printed. One of ranks ends at once, without the interpreter's own end: gloo's
    threads abort there now and then (torch 2.13: "terminate called without an active exception", one run in six)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(status)
    sys.exit(status)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: use cpu, cuda, or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local if device.index is None else device.index)
    there = torch.cuda.device_count()
    if device.index >= there:
        raise ConfigError(f"device {device}: torch sees {there} CUDA devices; use one of them, or --device cpu")
    return device


def sharded(tensor: Any) -> bool:
    """Whether this rank holds a slice of it."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor: all of it, or its slice."""
    return tensor.to_local() if sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor, of which this rank may hold a slice; every rank must ask for it."""
    return tensor.full_tensor() if sharded(tensor) else tensor


@torch.no_grad()
def assign(tensor: Any, value: Tensor | None, world: World) -> None:
    """Copies the first rank's whole `value`, None on the others, into a tensor of which each rank may hold a slice."""
    if sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        tensor.copy_(
            distribute_tensor(there if value is None else there.copy_(value), tensor.device_mesh, tensor.placements)
        )
        return
    if value is not None:
        tensor.copy_(value)
    if world.size > 1:
        dist.broadcast(tensor, 0)
