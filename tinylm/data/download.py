"""A file from its publisher: resumable, whole or not at all, verified by digest.

The digest of a file that has no published one is recorded beside it at the first download; a later difference is
an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import http
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.config import ConfigError

CHUNK = 1 << 20  # bytes
TRIES = 5  # connections, each going on where the last one broke off
FAILED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class Remote:
    """A file on the web: its name here, and its sha256 in hex where that is known."""

    url: str
    name: str
    sha256: str | None = None


def fetch(remote: Remote, folder: Path) -> str:
    """Puts the file into the folder, unless it is there, and returns its sha256 in hex.

    Raises ConfigError, which says what to do, where the file cannot be had, written or trusted.
    """
    path, record = folder / remote.name, folder / f"{remote.name}.json"
    recorded = _read(record)
    expected = remote.sha256 or recorded.get("sha256")
    origin = "that is published" if remote.sha256 else f"of the first download (remove {record} to accept another file)"
    if path.exists() and expected and recorded.get("stamp") == _stamp(path):
        return expected  # looked at before, and not touched since
    try:
        # Two processes that appended to one part would spoil it.
        with locked(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                part = path.with_name(f"{path.name}.part")
                _download(remote.url, part)
                _state(part).unlink()
                if expected and (found := _sha256(part)) != expected:
                    part.unlink()
                    raise ConfigError(
                        f"{remote.url} came with sha256 {found}, not the one {origin}, {expected}: "
                        f"try again, or put the right file there yourself, as {path}"
                    )
                os.replace(part, path)
            found = _sha256(path)
            if expected and found != expected:
                raise ConfigError(
                    f"{path} has sha256 {found}, not the one {origin}, {expected}: "
                    "remove the file to load it anew, or give it as a local text"
                )
            _write(record, {"url": remote.url, "sha256": found, "stamp": _stamp(path)})
    except FAILED as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise ConfigError(
            f"{remote.url} cannot be loaded ({reason}): try again to go on where it stopped, "
            f"put the file there yourself, as {path}, or use --text with a text of your own"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written or read ({error.strerror}): make room, or name another folder in TINYLM_HOME; "
            "what has arrived is kept"
        ) from None
    return found


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file, made with its folder; waits for other processes. Raises OSError."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # filelock would try for ever in folders that take no files, such as /proc
    with filelock.FileLock(path):
        yield


def _download(url: str, part: Path) -> None:
    """All of the file into `part`, over as many connections as bring something new."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(part.stem, total=None)
        for _ in range(TRIES):
            before = _size(part)
            with contextlib.suppress(ConnectionError, TimeoutError, http.client.IncompleteRead):
                if _transfer(url, part, lambda done, total: progress.update(task, completed=done, total=total)):
                    return
            if _size(part) == before:
                break
        raise ConnectionError(f"the connection broke off after {_size(part)} bytes")


def _transfer(url: str, part: Path, report: Callable[[int, int | None], object]) -> bool:
    """One connection, going on behind what is there if the file is still the same; whether that was all of it."""
    known = _read(_state(part))
    have = _size(part) if known.get("url") == url and known.get("validator") else 0
    # With If-Range a server sends the rest only of the same file, and the whole of another.
    headers = {"Range": f"bytes={have}-", "If-Range": known["validator"]} if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        part.unlink()
        return False
    with response:
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        validator = _validator(response.headers)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            start = response.headers.get("Content-Range", "").partition("-")[0]
            if start != f"bytes {have}" or validator != known["validator"]:
                part.unlink()
                return False
            mode = "ab"
        else:
            have, mode, total = 0, "wb", int(length) if length else None
        with open(part, mode) as file:
            if mode == "wb":
                # Only now, when nothing of another file is left in the part.
                _write(_state(part), {"url": url, "validator": validator})
            report(have, total)
            while data := _received(response):
                file.write(data)
                have += len(data)
                report(have, total)
        return total is None or have == total


def _received(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except OSError as error:  # also TLS's, which would look like the disk's
        raise ConnectionError(error) from None


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What tells that a file is still the same, byte for byte; a weak ETag does not."""
    etag = headers["ETag"]
    return etag if etag and not etag.startswith("W/") else headers["Last-Modified"]


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read(path: Path) -> dict[str, Any]:
    """A record, or nothing where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _write(path: Path, record: dict[str, Any]) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(record), encoding="utf-8")
    os.replace(new, path)
