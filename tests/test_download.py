"""A download ends whole, verified and under its name, or says what to do, whatever the server does."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from full_disk import largest_file

from tinylm.config import ConfigError
from tinylm.data import download
from tinylm.data.download import Remote, fetch

CONTENT = bytes(range(256)) * 8192  # 2 MiB
OTHER = CONTENT[::-1]


@dataclass
class Site:
    """A server with one file, and what is wrong with it."""

    content: bytes = CONTENT
    ranges: bool = True
    validator: bool = True
    breaks: list[int] = field(default_factory=list)  # after how many bytes the next connections break off
    mixes: bool = False  # sends ranges of another file without a word
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    url: str = ""

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content, usedforsecurity=False).hexdigest()}"'

    def remote(self, sha256: str | None = None) -> Remote:
        return Remote(self.url, "text.txt", sha256)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            site.asked.append(asked)
            start = int(asked[len("bytes=") : -1]) if asked else 0
            same = site.mixes or self.headers["If-Range"] == site.etag
            if self.path != "/text.txt":
                self.send_error(404)
            elif asked and site.ranges and same and start >= len(site.content):
                self.send_error(416)
            else:
                partial = bool(asked) and site.ranges and same
                body = site.content[start if partial else 0 :]
                self.send_response(206 if partial else 200)
                if partial:
                    self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
                if site.validator:
                    self.send_header("ETag", site.etag)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: site.breaks.pop(0)] if site.breaks else body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site.url = f"http://127.0.0.1:{server.server_port}/text.txt"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"text.txt.lock"}


def fails(remote: Remote, folder: Path, message: str) -> str:
    with pytest.raises(ConfigError, match=message) as caught:
        fetch(remote, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_file_comes_whole_and_once(site: Site, tmp_path: Path, pinned: bool) -> None:
    remote = site.remote(sha256(CONTENT) if pinned else None)
    for _ in range(2):
        assert fetch(remote, tmp_path / "new") == sha256(CONTENT)
    assert (tmp_path / "new" / "text.txt").read_bytes() == CONTENT
    assert names(tmp_path / "new") == {"text.txt", "text.txt.json"}
    assert site.asked == [None]


@pytest.mark.parametrize("at", [1, 500_000, len(CONTENT) - 1])
def test_a_broken_connection_goes_on_where_it_broke(site: Site, tmp_path: Path, at: int) -> None:
    site.breaks = [at]
    assert fetch(site.remote(), tmp_path) == sha256(CONTENT)
    assert site.asked == [None, f"bytes={at}-"]


def test_an_interrupted_download_goes_on_in_the_next_run(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    site.breaks = [600_000]
    fails(site.remote(), tmp_path, "broke off after 600000 bytes.*try again to go on")
    assert "text.txt" not in names(tmp_path)
    assert fetch(site.remote(), tmp_path) == sha256(CONTENT)
    assert site.asked == [None, "bytes=600000-"]
    assert names(tmp_path) == {"text.txt", "text.txt.json"}


@pytest.mark.parametrize("flaw", ["no ranges", "no validator", "changed", "changed and mixed"])
def test_a_server_that_cannot_go_on_begins_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flaw: str
) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    site.breaks = [600_000]
    site.ranges, site.validator = flaw != "no ranges", flaw != "no validator"
    fails(site.remote(), tmp_path, "broke off")
    monkeypatch.undo()
    if "changed" in flaw:
        site.content = OTHER
    site.mixes = "mixed" in flaw
    assert fetch(site.remote(), tmp_path) == sha256(site.content)
    assert (tmp_path / "text.txt").read_bytes() == site.content


def test_a_part_that_is_longer_than_the_file_is_thrown_away(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    site.breaks = [600_000]
    fails(site.remote(), tmp_path, "broke off")
    monkeypatch.undo()
    with open(tmp_path / "text.txt.part", "ab") as file:
        file.write(CONTENT)
    assert fetch(site.remote(), tmp_path) == sha256(CONTENT)


def test_a_wrong_digest_is_refused(site: Site, tmp_path: Path) -> None:
    message = fails(site.remote(sha256(OTHER)), tmp_path, "came with sha256 .* not the one that is published")
    assert sha256(CONTENT) in message
    assert names(tmp_path) == set()


def test_the_first_digest_is_recorded_and_another_one_later_refused(site: Site, tmp_path: Path) -> None:
    fetch(site.remote(), tmp_path)
    (tmp_path / "text.txt").unlink()
    site.content = OTHER
    fails(site.remote(), tmp_path, "not the one of the first download")
    assert names(tmp_path) == {"text.txt.json"}
    (tmp_path / "text.txt.json").unlink()  # as the message says, to accept it
    assert fetch(site.remote(), tmp_path) == sha256(OTHER)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_file_that_changed_on_the_disk_is_refused(site: Site, tmp_path: Path, pinned: bool) -> None:
    remote = site.remote(sha256(CONTENT) if pinned else None)
    fetch(remote, tmp_path)
    (tmp_path / "text.txt").write_bytes(OTHER)
    os.utime(tmp_path / "text.txt", ns=(1, 1))
    fails(remote, tmp_path, "text.txt has sha256 .*remove the file")
    assert (tmp_path / "text.txt").read_bytes() == OTHER


def test_a_file_put_there_by_hand_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(CONTENT)
    assert fetch(Remote("http://127.0.0.1:9/text.txt", "text.txt", sha256(CONTENT)), tmp_path) == sha256(CONTENT)


@pytest.mark.parametrize("path", ["/text.txt", "/other.txt"])
def test_offline_or_not_found_says_which_file_to_put_where(site: Site, tmp_path: Path, path: str) -> None:
    # Port 9 of this machine: nobody listens, as if there were no network.
    url = "http://127.0.0.1:9/text.txt" if path == "/text.txt" else site.url.replace("/text.txt", path)
    message = fails(Remote(url, "text.txt"), tmp_path, re.escape(url))
    assert f"put the file there yourself, as {tmp_path / 'text.txt'}" in message
    assert "--text" in message
    assert "404" in message or "refused" in message


def test_a_full_disk_keeps_what_came(site: Site, tmp_path: Path) -> None:
    with largest_file(1_000_000):
        fails(site.remote(), tmp_path, r"cannot be written or read \(File too large\): make room.*is kept")
    kept = (tmp_path / "text.txt.part").stat().st_size
    assert 0 < kept <= 1_000_000
    assert fetch(site.remote(), tmp_path) == sha256(CONTENT)
    assert site.asked == [None, f"bytes={kept}-"]


def test_several_at_once_download_once(site: Site, tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(site.remote(), tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [sha256(CONTENT)] * 4
    assert site.asked == [None]
