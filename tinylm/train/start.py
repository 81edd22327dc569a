"""Whether a run can start: its batch fits the ranks, its folder has no other run, its checkpoint is of its config."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from tinylm import checkpoint
from tinylm.config import CheckpointError, ConfigError, ModelConfig
from tinylm.model import DTYPES
from tinylm.parallel import World
from tinylm.train.config import TrainConfig

# What a resumed run may set anew. The rest decides which weights come out, and must be as it was; of the data, the
# digest must.
MAY_CHANGE = {
    "data", "out", "resume", "tokenizer", "vocab_size", "steps", "micro_batch", "dtype", "compile", "graph", "rmsnorm",
    "linear_cross_entropy", "log_every", "eval_every", "eval_tokens", "save_every", "keep", "parallel", "device",
    "peak_flops",
}  # fmt: skip
ANOTHER = "give the same, or another --out for a new run"


def dtype_of(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of matrix products. Emulated bf16 does not count: a card before compute capability 8.0 gets fp16."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def rows_of_a_rank(config: TrainConfig, world: World, dtype: torch.dtype) -> tuple[int, int]:
    """(sequences of a rank's step, of one pass). Raises ConfigError for what no step can be made of."""
    if config.batch % world.size:
        raise ConfigError(f"batch {config.batch} is no multiple of the {world.size} ranks: give one that is")
    rows = config.batch // world.size
    micro = config.micro_batch or rows
    if rows % micro:
        raise ConfigError(
            f"micro_batch {micro} does not divide the {rows} sequences of a rank (batch {config.batch}, ranks "
            f"{world.size}): give a divisor"
        )
    if dtype == torch.float16 and world.device.type == "cpu":
        raise ConfigError("dtype fp16 is for GPUs: give fp32 or bf16 on the CPU")
    if dtype == torch.float16 and (config.graph or config.parallel == "fsdp"):
        raise ConfigError("dtype fp16 scales the loss, which neither graph nor fsdp can: give bf16 or fp32")
    if config.graph and (world.device.type != "cuda" or config.parallel != "none"):
        raise ConfigError(
            f"graph is for one process on a CUDA device, and this is parallel {config.parallel} on "
            f"{world.device.type}: leave --graph out"
        )
    return rows, micro


def to_resume(config: TrainConfig) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; a run that is there is neither overwritten nor mixed with another.

    Raises ConfigError, CheckpointError.
    """
    run = config.run
    there = checkpoint.saved(run)
    if (there or (run / "log.csv").exists()) and not config.resume:
        what = f"checkpoints up to step {checkpoint.step_of(there[-1])}" if there else "a log.csv"
        raise ConfigError(f"{run} has {what}, and nothing was overwritten: give --resume, or another --out")
    if not there:
        return None
    found = checkpoint.load(run)
    if missing := {"train", "digests", "seconds", "best", "newest", "scaler"} - found.meta.keys():
        lacks = ", ".join(sorted(missing))
        raise CheckpointError(f"{found.path}: no run to go on with, it lacks {lacks}: give another --out")
    before, now = found.meta["train"], dataclasses.asdict(config)
    for name in now:
        if name not in MAY_CHANGE and name in before and before[name] != now[name]:
            raise ConfigError(f"{name} is {now[name]!r}, but {found.path} was trained with {before[name]!r}: {ANOTHER}")
    if found.step > config.steps:
        raise ConfigError(f"steps is {config.steps}, but {found.path} has {found.step} behind it: give more")
    planned = dataclasses.replace(config, steps=before["steps"])
    if any(config.lr_share(index) != planned.lr_share(index) for index in (found.step - 1, found.step)):
        raise ConfigError(
            f"steps is {config.steps}, but {found.path} was to have {planned.steps}, and by {config.schedule} another "
            f"learning rate: {ANOTHER}; constant, or wsd before its decay, could go on"
        )
    return found


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """The run's folder, made if it is not there, for this process alone; removed again if nothing comes into it.

    Raises ConfigError where it cannot be made, or another process has it.
    """
    import filelock

    lock = filelock.FileLock(run / ".lock")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ConfigError(f"{run} is being trained into by another process: wait, or give another --out") from None
    except OSError as error:
        raise ConfigError(f"{run} cannot be the run's folder ({error.strerror}): give another --out") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if [path.name for path in run.iterdir()] == [".lock"]:
                (run / ".lock").unlink()
                run.rmdir()
        lock.release()


def check_alike(digests: list[dict[str, str]]) -> None:
    """Raises ConfigError unless all ranks, which may be on several machines, have the same text."""
    for rank, theirs in enumerate(digests):
        for name, digest in theirs.items():
            if digest != digests[0][name]:
                raise ConfigError(
                    f"the {name} has sha256 {digest} on rank {rank}, and {digests[0][name]} on the first: give each "
                    "machine the same"
                )


def check_same(before: checkpoint.Checkpoint, digests: dict[str, str], shape: ModelConfig) -> None:
    """Raises ConfigError, which names what differs, unless the text and the model are the checkpoint's."""
    for name, digest in digests.items():
        if (theirs := before.meta["digests"].get(name)) != digest:
            raise ConfigError(f"the {name} has sha256 {digest}, but {before.path} was trained with {theirs}: {ANOTHER}")
    for name, ours in dataclasses.asdict(shape).items():
        if (theirs := before.meta["model"].get(name)) != ours:
            raise ConfigError(f"the model's {name} is {ours!r}, but that of {before.path} is {theirs!r}: {ANOTHER}")
