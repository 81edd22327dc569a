"""Small training runs and what they leave, for several test files."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from tinylm import checkpoint, data
from tinylm.train import TrainConfig

TINY = "layers=1,dim=16,heads=2,kv_heads=2,head_dim=8,d_ff=16"
TIMES = {"seconds", "tokens_per_s", "mfu"}
DONE = {"model.safetensors", "state.safetensors"}


def text(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(50)]
    return " ".join(draw.choices(known, k=words))


def prepared(folder: Path, words: int = 2000, seed: int = 0) -> str:
    (folder / "text.txt").write_text(text(words, seed))
    return str(data.prepare(text=folder / "text.txt", folder=folder / "data", tokenizer="char"))


def settings_of(tokens: str, out: Path, **changed: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "data": tokens, "model": TINY, "context": 16, "batch": 4, "steps": 8, "log_every": 1, "eval_every": 4,
        "eval_tokens": 64, "peak_flops": 1e9, "device": "cpu", "out": str(out),
    }  # fmt: skip
    return TrainConfig(**{**usual, **changed})


def log(run: Path) -> list[dict[str, str]]:
    """The rows of log.csv without what a clock said."""
    with (run / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def losses(run: Path) -> list[float]:
    return [float(row["train_loss"]) for row in log(run)]


def outcome(run: Path) -> tuple[Any, ...]:
    """All of a run that must not depend on how often it was stopped."""
    newest = checkpoint.saved(run)[-1]
    tensors = {name: data for name, data in contents(newest).items() if name in DONE}
    return log(run), tensors, [path.name for path in checkpoint.saved(run)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
