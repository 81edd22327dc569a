"""From a source to a folder of tokens, once: tokenizer.json, train-*.bin, val-*.bin and, last of all, data.json.

The folder is made under another name and renamed when all of it is there. Documents stream through three times:
to see how they can be split, to train the tokenizer on the training split, to be encoded.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinylm.config import ConfigError
from tinylm.data.corpus import SOURCES, SPLITS, STDLIB, Corpus, Piece, find
from tinylm.data.download import locked
from tinylm.data.tokens import DTYPES, FORMAT, MANIFEST, ShardWriter, Tokens, is_prepared, manifest
from tinylm.tokenizer import Tokenizer, check_bpe, train_bpe, train_char

if TYPE_CHECKING:
    from rich.progress import Progress

VOCAB_SIZE = 4096  # of a BPE over a text without a usual one
TOKENIZERS = ("bpe", "char")
BATCH = 1 << 21  # characters encoded at a time: enough for many cores, and some 200 MB inside the library
SHARD_TOKENS = 1 << 27  # 256 MiB as uint16


def home() -> Path:
    """Where downloads and prepared data are: TINYLM_HOME, else `tinylm` below XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("TINYLM_HOME")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinylm"


def prepare(
    source: str | None = None,
    folder: Path | None = None,
    *,
    text: Path | None = None,
    val_text: Path | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    pre: str = "byte_level",
    val_fraction: float = 0.1,
    progress: bool = False,
) -> Path:
    """The folder of a source's tokens, made if it is not there yet.

    source: "tinyshakespeare", "tinystories" (downloaded once) or "stdlib", Python's own library, the default; or
    text: a file, or a folder of text files, and val_text, one that validates, if the text shall not be split.
    folder: where; by default one below `home()`, named by content and settings.
    tokenizer: "bpe" or "char"; vocab_size, pre: of the BPE, see `train_bpe`. None: as the source usually has it.
    val_fraction: of the text that validates, where neither the publisher nor val_text says which.
    Raises ConfigError for what cannot be read, written or made, and for a folder with anything else in it.
    """
    if source is None and text is None:
        source = STDLIB
    usual = SOURCES.get(source or "")
    if tokenizer is None:
        tokenizer = usual.tokenizer if usual else "bpe"
    if tokenizer not in TOKENIZERS:
        raise ConfigError(f"unknown tokenizer {tokenizer!r}: use one of {', '.join(TOKENIZERS)}")
    if tokenizer == "char" and vocab_size is not None:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but the tokenizer char has the characters of the text: "
            "leave it out, or give tokenizer bpe"
        )
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}: expected a share between 0 and 1")
    settings: dict[str, Any] = {"tokenizer": tokenizer}
    if tokenizer == "bpe":
        if vocab_size is None:
            vocab_size = usual.vocab_size if usual else VOCAB_SIZE
        check_bpe(vocab_size, pre)
        settings |= {"vocab_size": vocab_size, "pre": pre}
    try:
        corpus = find(source, text, val_text, val_fraction, home() / "downloads")
        if not corpus.val:
            settings["val_fraction"] = val_fraction
        identity = {"format": FORMAT, "text": corpus.digest, "settings": settings}
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        target = Path(folder) if folder else home() / "data" / f"{corpus.name}-{tokenizer}-{key}"
        if not _is_prepared(target, identity):
            _make(target, corpus, identity, progress)
    except OSError as error:
        where = error.filename or "the prepared data"
        raise ConfigError(
            f"{where} cannot be read or written ({error.strerror}): make room, or name another folder; "
            "nothing is left half-done"
        ) from None
    return target


def _is_prepared(folder: Path, identity: dict[str, Any]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not is_prepared(folder):
        raise ConfigError(f"{folder} is there, and is no prepared data: name another folder")
    found = manifest(folder)
    for name, wanted in identity.items():
        if found.get(name) != wanted:
            raise ConfigError(f"{folder} was prepared with {name} {found.get(name)}, not {wanted}: name another folder")
    for split in found["splits"]:
        Tokens(folder, split, verify=False)
    return True


def _make(target: Path, corpus: Corpus, identity: dict[str, Any], progress: bool) -> None:
    # Of several processes that want the same, such as the ranks of a run, one works and the others wait.
    with locked(target.with_name(f".{target.name}.lock")):
        if _is_prepared(target, identity):
            return
        # What a killed process left.
        for old in target.parent.glob(glob.escape(f".{target.name}.") + "????????.part"):
            shutil.rmtree(old)
        # A name of its own, for file systems whose locks do not hold.
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        part.mkdir()
        try:
            _fill(part, corpus, identity, progress)
            _sync(part)
            os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Puts a folder's files on the disk, where a rename could arrive before them."""
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _fill(folder: Path, corpus: Corpus, identity: dict[str, Any], progress: bool) -> None:
    with _bar(progress) as bar:
        corpus.survey(_task(bar, "read"))
        pieces = corpus.pieces("train", _task(bar, "train tokenizer"))
        tokenizer = _train(identity["settings"], (piece.text for piece in pieces), eot=corpus.separated)
        tokenizer.save(folder)
        splits = {}
        for split in SPLITS:
            pieces = corpus.pieces(split, _task(bar, f"encode {split}"))
            splits[split] = _encode(folder, split, tokenizer, pieces, corpus.separated)
    described = {
        **identity,
        "source": corpus.name,
        "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest},
        "vocab_size": tokenizer.vocab_size,
        "dtype": np.dtype(tokenizer.dtype).name,
        "shard_tokens": SHARD_TOKENS,
        "splits": splits,
    }
    (folder / MANIFEST).write_text(json.dumps(described, indent=1), encoding="utf-8")


def _bar(shown: bool) -> Progress:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)


def _task(bar: Progress, name: str) -> Callable[[int], None]:
    """Shows a pass over the text, and no other; what it returns is told the bytes read."""
    for task in bar.tasks:
        bar.update(task.id, visible=False)
    task_id = bar.add_task(name, total=None)
    return functools.partial(bar.advance, task_id)


def _train(settings: dict[str, Any], texts: Iterable[str], *, eot: bool) -> Tokenizer:
    if settings["tokenizer"] == "char":
        return train_char(texts, eot=eot)
    return train_bpe(texts, settings["vocab_size"], pre=settings["pre"])


def _encode(folder: Path, split: str, tokenizer: Tokenizer, pieces: Iterable[Piece], separated: bool) -> dict[str, Any]:
    """Writes the shards of a split; returns its entry in data.json."""
    end = np.array([tokenizer.eot] if separated else [], tokenizer.dtype)
    size = documents = 0
    with ShardWriter(folder, split, DTYPES[np.dtype(tokenizer.dtype).name], SHARD_TOKENS) as shards:
        for batch in _batches(pieces):
            try:
                encoded = tokenizer.encode_batch([piece.text for piece in batch])
            except ConfigError as error:
                raise ConfigError(f"{split} split, after {documents} documents: {error}") from None
            for piece, ids in zip(batch, encoded, strict=True):
                shards.write(ids)
                if piece.ends:
                    shards.write(end)
                documents += piece.begins
                size += len(piece.text.encode("utf-8", "surrogateescape"))
    if not shards.entries:
        raise ConfigError(f"the {split} split is empty: give another text")
    tokens = sum(shard["tokens"] for shard in shards.entries)
    return {"tokens": tokens, "bytes": size, "documents": documents, "shards": shards.entries}


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
