"""Around a run that `tinylm-bench run` starts: where its file goes, and what is left of one that did not end."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tinylm.bench import journal, results
from tinylm.bench.results import BadInput, BrokenFile

# pytest's short options that take a value: what follows them is no path.
VALUED = ("-k", "-m", "-p", "-c", "-o", "-W", "-r", "-n")
_PARTIAL = re.compile(r"\.(?P<stem>.+)\.partial")  # a hidden folder: of the file while it is written


def has_paths(arguments: Sequence[str]) -> bool:
    """Whether pytest's arguments say what to run: a file, folder or test id."""
    before = ["", *arguments]
    return any(
        not argument.startswith("-") and last not in VALUED and Path(argument.partition("::")[0]).exists()
        for last, argument in zip(before, arguments, strict=False)
    )


def place(folder: Path, resume: Path | None) -> tuple[Path, Path]:
    """Where the file is written, and where it is put when it is done: names in nobody's use in `folder`.

    A run that was left in its hidden folder goes on there. Raises BadInput where nothing can be written.
    """
    if resume is not None and (there := _PARTIAL.fullmatch(resume.absolute().parent.name)):
        name = there["stem"] + ".json"
        return resume.absolute().parent / name, resume.absolute().parents[1] / name
    name = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%MZ")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem in (name, *(f"{name}-{i}" for i in range(2, 1000))):
            claimed = folder / f".{stem}.partial"
            if not (folder / f"{stem}.json").exists():
                try:
                    claimed.mkdir()
                except FileExistsError:
                    continue
                return claimed / f"{stem}.json", folder / f"{stem}.json"
    except OSError as error:
        reason = error.strerror
    else:
        reason = f"a thousand runs of {name} are there"
    raise BadInput(f"{folder}: cannot be written ({reason}); choose another folder with --results")


def sound(path: Path) -> bool:
    """Whether this is pytest-benchmark JSON, whole."""
    try:
        results.load(path)
    except BrokenFile:
        return False
    return True


def has_timings(path: Path) -> bool:
    """Whether this is a JSON file with measured cells."""
    try:
        return bool(results.load(path)["benchmarks"])
    except BrokenFile:
        return False


def complete(status: int, partial: Path) -> str | None:
    """Why there is no sound file after pytest ended with this status; None where there is one."""
    if status not in (0, 1):  # 1: with failed cells
        return f"pytest ended with status {status}"
    try:
        results.load(partial)
    except BrokenFile as error:
        if not _recovered(partial):
            return str(error) if partial.exists() and partial.stat().st_size else "no benchmark was measured"
    return None


def _recovered(partial: Path) -> bool:
    """pytest-benchmark writes nothing where no cell was measured: what was skipped or failed is in the journal."""
    try:
        history = journal.read(journal.beside(partial))
    except BrokenFile:
        return False
    write(history, partial)
    return True


def write(history: journal.History, path: Path) -> None:
    """Make a JSON file of what a journal tells."""
    text = json.dumps(journal.document(history), indent=4, default=str)
    results.write_atomically(path, text + "\n")


def left(partial: Path) -> str:
    """What a run without results leaves, and how to go on; its folder is removed where it leaves nothing."""
    files = sorted(path for path in partial.parent.iterdir() if path.stat().st_size)
    if not files:
        shutil.rmtree(partial.parent)
    path = journal.beside(partial)
    if path not in files:
        return "".join(f"; see {file}" for file in files)
    shown = os.path.relpath(path)
    again = shlex.join(["tinylm-bench", *sys.argv[1:], "--resume", shown])
    return f"; `{again}` goes on, `{shlex.join(['tinylm-bench', 'recover', shown])}` makes JSON of what is there"
