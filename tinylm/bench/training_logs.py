"""Training logs to rows: one CSV per run, of a user's own as they come, or committed under results/.

`<name>/log.csv` is the run <name>; `results/<label>/<suite>/<run>.csv` names itself. What lies among them without a
log's columns, such as tables, is none.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tinylm.bench import results
from tinylm.bench.results import BadInput, BrokenFile, Row

EXPERIMENT = "training_log"  # in the table of all runs
# What is read of a log. val_loss is empty where nothing was validated; losses in nats a token.
KINDS = {"step": int, "tokens": int, "seconds": float, "train_loss": float, "val_loss": float}
LOSSES = ("train_loss", "val_loss")


def read(inputs: Iterable[str | Path]) -> tuple[list[Row], list[str]]:
    """A row for each row of every log that `inputs` name, and one line for each broken one.

    Raises BadInput for an input that does not exist, and for a CSV file, named itself, that is no log.
    """
    given = [Path(name) for name in inputs]
    logs: list[tuple[tuple[str, str, str], Path, list[Row]]] = []
    broken = []
    for file, source in results.files(given, ".csv").items():
        if file.suffix != ".csv":
            continue
        try:
            rows = _rows(file)
        except BrokenFile as error:
            broken.append(str(error))
            continue
        if rows is not None:
            logs.append((_identity(file, source), file, rows))
        elif file in given:
            raise BadInput(
                f"{file}: no training log (its columns have to be {', '.join(KINDS)} or more); "
                "give the log.csv of a run of `python -m tinylm.train`"
            )
    times = Counter((label, run) for (label, _, run), _, _ in logs)
    found = []
    for (label, suite, run), file, rows in logs:
        if times[label, run] > 1:  # the same name in other folders
            run = (file.parent if file.name == results.TRAINING_LOG else file.with_suffix("")).as_posix()
        origin = {"label": label, "suite": suite, "run": run, "experiment": EXPERIMENT, "outcome": "measured"}
        found += [origin | {"name": run} | row for row in rows]
    return found, broken


def _identity(file: Path, source: Path) -> tuple[str, str, str]:
    """Label, suite and run."""
    if file.name == results.TRAINING_LOG:
        return results.UNLABELLED, "", file.absolute().parent.name
    return *results.layout(file, source), file.stem


def _rows(file: Path) -> list[Row] | None:
    """A log's rows with what is not empty of KINDS; None if it is no log. Raises BrokenFile for a row that is none."""
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFile(f"{file}: cannot be read ({error})") from None
    # A kill may cut the last row short, even inside a number; a whole row ends its line.
    lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.reader(lines)
    header = next(reader, [])
    if not KINDS.keys() <= set(header):
        return None
    rows = []
    for fields in reader:
        named = dict(zip(header, fields, strict=False))
        try:
            rows.append({key: kind(named[key]) for key, kind in KINDS.items() if named[key] or key not in LOSSES})
        except (KeyError, ValueError):
            raise BrokenFile(
                f"{file}: line {reader.line_num} is no row of a training log ({','.join(fields)!r})"
            ) from None
    return rows
