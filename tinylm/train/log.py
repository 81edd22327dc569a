"""What a run tells: rows of log.csv, and a progress bar, or, where no one watches, a line for each validation."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from tinylm import checkpoint
from tinylm.config import CheckpointError

if TYPE_CHECKING:
    from rich.progress import Progress

COLUMNS = (
    "step", "tokens", "seconds", "lr", "train_loss", "grad_norm", "val_loss", "perplexity", "bits_per_byte",
    "tokens_per_s", "mfu",
)  # fmt: skip


class Log:
    """RUN/log.csv: a row for each interval of steps, and for each validation; written and flushed at once.

    Raises CheckpointError where it cannot be written.

    train_loss: mean over the steps since the row before. grad_norm: of the row's step, before clipping. seconds:
    of training alone, without compilation, validation and checkpoints. mfu: a share of the peak rate.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Continues the file after `step`: rows of later steps are dropped."""
        self._path = path
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            if path.exists():
                with path.open(newline="", encoding="utf-8") as file:
                    rows = [row for row in csv.DictReader(file) if _complete(row) and int(row["step"]) <= step]
            part = path.with_name(f".{path.name}.part")
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(part, path)
            self._file: TextIO = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def write(self, row: dict[str, Any]) -> None:
        """Absent columns stay empty; floats are written to the last digit."""
        with self._told():
            self._writer.writerow(row)
            self._file.flush()

    def sync(self) -> None:
        """Onto the disk, before a checkpoint of the same step is."""
        with self._told():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what could not be written, which was told
            self._file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: the log cannot be written ({error.strerror}); {checkpoint.left(self._path.parent)}: "
                "make room, then use --resume"
            ) from None


def _complete(row: dict[str, Any]) -> bool:
    """A kill may cut the last row short."""
    return None not in row.values() and str(row["step"]).isdigit()


class Bar:
    """A progress bar on stderr; a line for each validation where that is no terminal; nothing unless `shown`."""

    def __init__(self, run: Path, steps: int, done: int, *, shown: bool = True) -> None:
        self._progress: Progress | None = None
        self._steps, self._shown = steps, shown
        if not (shown and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(run.name, total=steps, completed=done, told="warming up")

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, row: dict[str, Any], val_loss: float | None) -> None:
        """The newest row, and the last validation loss."""
        if not self._shown or (self._progress is None and "val_loss" not in row):
            return
        told = f"loss {row['train_loss']:.4f}" + ("" if val_loss is None else f"  val {val_loss:.4f}")
        told += f"  {row['tokens_per_s']:,.0f} tok/s  MFU {row['mfu']:.1%}"
        if self._progress is None:
            print(f"step {row['step']} of {self._steps}  {told}", file=sys.stderr)
        else:
            self._progress.update(self._task, completed=row["step"], told=told)
