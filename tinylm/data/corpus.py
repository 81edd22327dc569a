"""Where text comes from: sources, their files, and the documents of each split, as a stream.

A document is what stands between two `<|endoftext|>`, or between the ends of a file; it comes in pieces, so that
no document needs to fit into memory. Which split it belongs to follows from its own text alone: two copies of a
document are never on both sides, and nothing has to be remembered of those before. A corpus that is one document
is cut in two instead, training first.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import lzma
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from tinylm.config import ConfigError
from tinylm.data.download import Remote, fetch

SEPARATOR = "<|endoftext|>"
SPLITS = ("train", "val")
READ = 1 << 20  # bytes read at a time
PIECE = 1 << 16  # characters of a document handed on at a time, at most; the library takes 256 of them at once
HASHED = 1 << 14  # characters of a document that decide on its split; surely in its first piece

_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"


@dataclass(frozen=True)
class Source:
    """A text that its publisher has on the web, and how it is usually tokenized."""

    train: Remote
    val: Remote | None = None  # where the publisher splits
    tokenizer: str = "bpe"
    vocab_size: int = 10_000


SOURCES: dict[str, Source] = {
    "tinyshakespeare": Source(
        Remote(_SHAKESPEARE, "tinyshakespeare.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
        tokenizer="char",
    ),
    "tinystories": Source(
        Remote(f"{_STORIES}TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-train.txt"),
        Remote(f"{_STORIES}TinyStoriesV2-GPT4-valid.txt", "TinyStoriesV2-GPT4-valid.txt"),
    ),
}
STDLIB = "stdlib"
# Parts of Python's library that not every installation has, or that are generated or tests.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}


class Piece(NamedTuple):
    """Part of a document. Bytes that are no UTF-8 are in it as `surrogateescape` has them."""

    text: str
    begins: bool  # the document
    ends: bool  # the document


@dataclass
class Corpus:
    """The files of a text, and which of their documents train and which validate."""

    name: str
    train: Sequence[Path]
    val: Sequence[Path] = ()  # the validation text, where it is one of its own
    fraction: float = 0.1  # of the text that validates, where it is not
    digest: str = ""  # sha256 of all files
    _known: set[int] = field(default_factory=set, init=False)  # hashes of the documents in `val`
    _below: int = field(default=0, init=False)  # documents with smaller hashes validate
    _cut: int | None = field(default=None, init=False)  # where the only document is cut, in characters

    def survey(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Reads what must be known before documents can be split; `advance` gets the bytes read.

        Raises ConfigError for a text that is empty or cannot be split.
        """
        if self.val:
            self._known = {_hash(piece.text) for piece in _pieces(self.val, advance) if piece.begins}
            if not self._known:
                raise ConfigError(f"the validation text of {self.name} is empty: give one with text in it")
            return
        documents = characters = 0
        smallest, largest = 1 << 64, -1
        for piece in _pieces(self.train, advance):
            characters += len(piece.text)
            if piece.begins:
                documents += 1
                hashed = _hash(piece.text)
                smallest, largest = min(smallest, hashed), max(largest, hashed)
        if documents == 0:
            raise ConfigError(f"{self.name} is empty: give a text with more than whitespace in it")
        if documents == 1:
            self._cut = int(characters * (1 - self.fraction))
            if not 0 < self._cut < characters:
                raise ConfigError(f"{self.name} has {characters} characters: too few to split, give a longer text")
        elif smallest == largest:
            raise ConfigError(f"all {documents} documents of {self.name} are the same: give others, or a val text")
        # At least one document validates, however few there are.
        self._below = max(int(self.fraction * 2**64), smallest + 1)

    @property
    def separated(self) -> bool:
        """Whether documents end, with an end of text; the parts of a single one do not."""
        return self._cut is None

    def pieces(self, split: str, advance: Callable[[int], None] = lambda _: None) -> Iterator[Piece]:
        """The documents of a split, "train" or "val", in their order."""
        if self.val and split == "val":
            yield from _pieces(self.val, advance)
        elif self._cut is not None:
            yield from _contiguous(_pieces(self.train, advance), self._cut, split)
        else:
            chosen = False
            for piece in _pieces(self.train, advance):
                if piece.begins:
                    hashed = _hash(piece.text)
                    validates = hashed in self._known if self.val else hashed < self._below
                    # Where the validation text is one of its own, what it shares with the training text is dropped.
                    chosen = validates == (split == "val")
                if chosen:
                    yield piece


def find(name: str | None, text: Path | None, val_text: Path | None, fraction: float, home: Path) -> Corpus:
    """The corpus of a source's name, downloaded into `home` where it is not there yet, or of a local text.

    text, val_text: a file, or a folder of text files; .xz is unpacked while it is read. Raises ConfigError.
    """
    if text is not None:
        if name is not None:
            raise ConfigError(f"both the source {name} and a text are given: give one of the two")
        train, val = _files(text), _files(val_text) if val_text else []
        return Corpus(Path(text).name, train, val, fraction, _digest(Path(text), train, val))
    if val_text is not None:
        raise ConfigError("a val text is given without a text: give both")
    if name == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in sorted(root.rglob("*.py")) if not NOT_STDLIB & set(path.relative_to(root).parts)]
        if not files:
            raise ConfigError(f"{root} has no Python sources: use another source, or a text of your own")
        return Corpus(STDLIB, files, (), fraction, _digest(root, files))
    if name not in SOURCES:
        raise ConfigError(f"unknown source {name!r}: use one of {', '.join([*SOURCES, STDLIB])}, or a text of your own")
    source = SOURCES[name]
    remotes = [source.train, source.val] if source.val else [source.train]
    digests = [fetch(remote, home) for remote in remotes]
    paths = [home / remote.name for remote in remotes]
    return Corpus(name, paths[:1], paths[1:], fraction, hashlib.sha256("".join(digests).encode()).hexdigest())


def _files(path: Path) -> list[Path]:
    """A file, or all text files below a folder that are not hidden, sorted."""
    if path.is_file():
        if not _is_text(path):
            print(f"{path} has NUL bytes, so it may be no text: it is taken as it is", file=sys.stderr)
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path} is not there: give a text file, or a folder of them")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts) and _is_text(file)
    ]
    if not found:
        raise ConfigError(f"{path} has no text files in it: give a text file, or a folder of them")
    return found


def _is_text(path: Path) -> bool:
    """git's rule: no NUL among the first 8000 bytes."""
    with _opened(path) as file:
        return b"\0" not in file.read(8000)


def _digest(root: Path, *groups: Sequence[Path]) -> str:
    """sha256 over names and contents of files."""
    total = hashlib.sha256()
    for files in groups:
        for path in files:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(root) if path.is_relative_to(root) else path.name
            total.update(f"{content} {name}\n".encode("utf-8", "surrogateescape"))
        total.update(b"\n")
    return total.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, unpacked where it is packed. Raises ConfigError where that fails, now or later."""
    try:
        with cast(BinaryIO, lzma.open(path)) if path.suffix == ".xz" else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _pieces(paths: Iterable[Path], advance: Callable[[int], None]) -> Iterator[Piece]:
    """All documents of files, in pieces; those of nothing but whitespace are left out."""
    for path in paths:
        with _opened(path) as file:
            yield from _documents(_decoded(file, advance))


def _decoded(file: BinaryIO, advance: Callable[[int], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    while data := file.read(READ):
        advance(len(data))
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _documents(chunks: Iterable[str]) -> Iterator[Piece]:
    rest, begins = "", True
    for chunk in chunks:
        *ended, rest = (rest + chunk).split(SEPARATOR)
        for text in ended:
            yield from _cut_up(text, begins)
            begins = True
        # The rest may end in the beginning of a separator.
        while len(rest) > PIECE + len(SEPARATOR):
            stop = _place(rest)
            yield Piece(rest[:stop], begins, False)
            rest, begins = rest[stop:], False
    yield from _cut_up(rest, begins)


def _cut_up(text: str, begins: bool) -> Iterator[Piece]:
    """The pieces of a document's end."""
    if begins and not text.strip():
        return
    while len(text) > PIECE:
        stop = _place(text)
        yield Piece(text[:stop], begins, False)
        text, begins = text[stop:], False
    yield Piece(text, begins, True)


def _place(text: str) -> int:
    """Where a piece ends: after a line, else before a word, so that no word is cut that can be left whole."""
    for mark, after in (("\n", 1), (" ", 0)):
        if (found := text.rfind(mark, PIECE // 2, PIECE)) > 0:
            return found + after
    return PIECE


def _hash(text: str) -> int:
    """64 bits of a document, from its first piece, whatever whitespace is around it."""
    beginning = text.strip()[:HASHED].encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(beginning, digest_size=8).digest(), "little")


def _contiguous(pieces: Iterable[Piece], cut: int, split: str) -> Iterator[Piece]:
    """The characters before `cut`, or those from there on, of a single document, as a document of their own."""
    at, begins = 0, True
    for piece in pieces:
        local = min(max(cut - at, 0), len(piece.text))
        at += len(piece.text)
        text = piece.text[:local] if split == "train" else piece.text[local:]
        if text:
            yield Piece(text, begins, piece.ends)
            begins = False
