"""A run that outlives its cells: pytest measures in a process of its own, and another goes on where one was lost.

A cell may end its process (a signal, an exit, the system's out-of-memory killer) or lose its CUDA context. The journal
says which cell it was; it is recorded as failed, and a fresh process resumes the journal with the cells that are left.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tinylm.bench import journal
from tinylm.bench.results import BrokenFile

# What the measuring process is told: a token for its journal, with the end of a pipe that breaks when its supervisor
# dies; a journal to resume.
_TOKEN, _RESUME = "TINYLM_SUPERVISED", "TINYLM_RESUME"
# Options by which the tests run in the process that was started.
_STAYS = ("tinylm_in_process", "tinylm_profile", "collectonly", "usepdb", "trace", "help")
_WORD = re.compile(rb"\bmeasure\b")
# A person or the system asked the process to end.
_ASKED = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)}


def wanted(config: pytest.Config) -> bool:
    """Whether this pytest should leave the measuring to another process: a plain command line."""
    arguments = list(config.invocation_params.args)
    return (
        not any(config.getoption(name, False) for name in _STAYS)
        and config.getoption("dist", "no") == "no"
        and not config.invocation_params.plugins
        # Not where a program calls pytest.main, a debugger or a tracer: they expect the tests in their process.
        and Path(sys.argv[0]).name.partition(".")[0] in ("pytest", "py", "__main__")
        and sys.argv[1:] == arguments
        and sys.gettrace() is None
        and _ours(config)
    )


def _ours(config: pytest.Config) -> bool:
    """Whether a file of this run has the word `measure`: a suite without it has nothing to do with us."""
    patterns, passed_over = config.getini("python_files"), config.getini("norecursedirs")
    for argument in config.args:
        start = Path(argument.partition("::")[0])
        files = [
            folder / "conftest.py" for folder in start.absolute().parents if folder.is_relative_to(config.rootpath)
        ]
        if not start.is_dir():
            files.append(start)
        for folder, folders, names in os.walk(start):
            folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in passed_over)]
            files += [Path(folder, name) for name in names if any(fnmatch(name, p) for p in (*patterns, "conftest.py"))]
        if not start.exists() or any(file.is_file() and _WORD.search(file.read_bytes()) for file in files):
            return True
    return False


def adopt() -> tuple[str | None, Path | None]:
    """In the measuring process: end it when its supervisor dies. Gives its token, if any, and what to resume."""
    token, resume = os.environ.pop(_TOKEN, None), os.environ.pop(_RESUME, None)
    if token is None:
        return None, None
    if pipe := token.partition("-")[2]:
        threading.Thread(target=_end_with, args=(int(pipe),), daemon=True).start()
    return token, Path(resume) if resume else None


def _end_with(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written: this returns when the other end is closed
    os._exit(1)


def supervise(command: Sequence[str], path: Path) -> int:
    """Run pytest, whose journal is at `path`, again for as long as cells end it. Gives its exit status."""
    from tinylm.bench.isolated import exit_reason  # and multiprocessing with it

    resume: Path | None = None
    while True:
        token, status = _run(command, resume)
        try:
            history = journal.read(path)
        except BrokenFile:
            return _code(status)  # no cell of ours
        if "--in-process" in command or (history.ended is None and -status in _ASKED):
            return _code(status)
        ours = history.header.get("token") == token  # else it ended before its first cell
        if (history.ended and not history.ended.get("poisoned")) or not (ours or resume):
            return _code(status)
        cell, ending = history.running, "the rest runs in a fresh process"
        if ours and cell is not None:
            reason = f"crashed: {exit_reason(status)}"
            journal.append(path, journal.lost(cell, reason, crashed=True) | {"at": cell.get("at")})
            _say(f"{cell['start']}: {reason}; {ending}")
        elif ours and history.latest:  # so that a process that ends before it measures is not started for ever
            _say(f"{exit_reason(status) if history.ended is None else 'the CUDA context is lost'}; {ending}")
        else:
            _say(f"{exit_reason(status)}, before it measured; `tinylm-bench recover {path}` makes JSON")
            return _code(status)
        resume = path


def _code(status: int) -> int:
    return 128 - status if status < 0 else status  # of a signal, as a shell gives it


def _run(command: Sequence[str], resume: Path | None) -> tuple[str, int]:
    """One measuring process: its token and exit status. An interrupt reaches it too, and it then writes what it has."""
    environment = os.environ | ({_RESUME: str(resume)} if resume else {})
    ours = theirs = None
    if os.name == "posix":
        theirs, ours = os.pipe()
    token = environment[_TOKEN] = f"{uuid.uuid4().hex}-{'' if theirs is None else theirs}"
    try:
        with subprocess.Popen(command, env=environment, pass_fds=() if theirs is None else (theirs,)) as child:
            while True:
                try:
                    return token, child.wait()
                except KeyboardInterrupt:
                    continue
    finally:
        for end in (ours, theirs):
            if end is not None:
                os.close(end)


def _say(line: str) -> None:
    print(f"\ntinylm: {line}", file=sys.stderr, flush=True)
