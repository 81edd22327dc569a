"""Whether a run can start: its batch fits the ranks, its folder has no other run, its checkpoint is of its config."""

from __future__ import annotations

import dataclasses

import torch

from tinylm import checkpoint
from tinylm.config import CheckpointError, ConfigError, ModelConfig
from tinylm.parallel import World
from tinylm.train.config import TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

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
    return found


def check_same(before: checkpoint.Checkpoint, digests: dict[str, str], shape: ModelConfig) -> None:
    """Raises ConfigError, which names what differs, unless the text and the model are the checkpoint's."""
    for name, digest in digests.items():
        if (theirs := before.meta["digests"].get(name)) != digest:
            raise ConfigError(f"the {name} has sha256 {digest}, but {before.path} was trained with {theirs}: {ANOTHER}")
    for name, ours in dataclasses.asdict(shape).items():
        if (theirs := before.meta["model"].get(name)) != ours:
            raise ConfigError(f"the model's {name} is {ours!r}, but that of {before.path} is {theirs!r}: {ANOTHER}")
