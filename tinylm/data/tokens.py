"""A prepared folder: data.json, which describes it, and the tokens of each split in shards, raw and little-endian.

Shards are written in a row and read by memory map. All of a split but the last have the same number of tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinylm.config import ConfigError
from tinylm.tokenizer import FILE

MANIFEST = "data.json"
FORMAT = 1
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def manifest(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of itself. Raises ConfigError for any other folder."""
    path = Path(folder) / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no prepared data: make it with python -m tinylm.data prepare") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; {_anew(folder)}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{path} is not of format {FORMAT}: {_anew(folder)}")
    return found


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` made it, damaged or not; a folder of texts may have a data.json of its own."""
    folder = Path(folder)
    return (folder / MANIFEST).is_file() and any((folder / name).is_file() for name in (FILE, "train-000.bin"))


def _anew(folder: Path) -> str:
    return f"remove {folder}, then prepare the data again"


class Tokens:
    """The tokens of one split, "train" or "val", of a prepared folder, memory-mapped.

    verify: read all of it once and compare the digests; else only the sizes are checked. Raises ConfigError for a
    folder that is none, and for files that are missing, truncated or changed.
    """

    def __init__(self, folder: Path, split: str, *, verify: bool = True) -> None:
        found = manifest(folder)
        if split not in found["splits"]:
            raise ConfigError(f"{folder} has no split {split!r}: it has {', '.join(found['splits'])}")
        entry = found["splits"][split]
        self.vocab_size: int = found["vocab_size"]
        self.bytes: int = entry["bytes"]  # of text that the tokens stand for
        self._length: int = entry["tokens"]
        self._shard_tokens: int = found["shard_tokens"]  # in every shard but the last
        dtype = DTYPES[found["dtype"]]
        self._shards = [_mapped(Path(folder), shard, dtype, verify) for shard in entry["shards"]]
        content = [found["tokenizer"]["digest"], found["dtype"], *(shard["sha256"] for shard in entry["shards"])]
        self.digest = hashlib.sha256(" ".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return self._length

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(N,) int64 starts -> (N, length) int64: the tokens from each start on. They must all be there."""
        starts = np.asarray(starts)
        if len(starts) and not (starts.min() >= 0 and starts.max() + length <= len(self)):
            raise ConfigError(f"tokens {starts.min()} to {starts.max() + length} of {len(self)}: out of range")
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            done = 0
            while done < length:  # once, but for a window that crosses into another shard
                shard, place = divmod(start + done, self._shard_tokens)
                part = self._shards[shard][place : place + length - done]
                row[done : done + len(part)] = part
                done += len(part)
        return rows


def _mapped(folder: Path, shard: dict[str, Any], dtype: np.dtype, verify: bool) -> np.ndarray:
    path = folder / shard["file"]
    expected = shard["tokens"] * dtype.itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise ConfigError(f"{path} has {size} bytes, expected {expected}: {_anew(folder)}")
        if verify:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise ConfigError(f"{path} is not what was prepared, its digest differs: {_anew(folder)}")
        # As a plain array: slices of a memmap cost several times as much.
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {_anew(folder)}") from None


class ShardWriter:
    """Writes the tokens of one split into SPLIT-000.bin and so on; `entries` describes the files for data.json."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.entries: list[dict[str, Any]] = []
        self._room = 0  # tokens that the open shard still takes
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def write(self, ids: np.ndarray) -> None:
        """Appends tokens (n,)."""
        while len(ids):
            if self._file is None:
                name = f"{self.split}-{len(self.entries):03d}.bin"
                self.entries.append({"file": name, "tokens": 0, "sha256": ""})
                self._file = open(self.folder / name, "wb")  # noqa: SIM115
                self._room, self._digest = self.shard_tokens, hashlib.sha256()
            part, ids = ids[: self._room], ids[self._room :]
            data = part.astype(self.dtype, copy=False).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._room -= len(part)
            self.entries[-1]["tokens"] += len(part)
            if self._room == 0:
                self._finish()

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self.entries[-1]["sha256"] = self._digest.hexdigest()
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
