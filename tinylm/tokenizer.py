"""Text to tokens and back: byte-level BPE, trained at run time, or one token a character.

Byte-level BPE (Radford et al., 2019) writes each byte as one printable character and merges frequent pairs
inside words, so that no text is unknown and every text comes back byte for byte. Bytes that are no UTF-8 travel
through Python strings as `surrogateescape` has them, and become the tokens of single bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tinylm.config import ConfigError, first_line

EOT = "<|endoftext|>"
ENDS = (EOT, "<|end_of_text|>", "</s>")  # how others call the token that ends a document
FILE = "tokenizer.json"
# How a text is cut into the words inside which BPE merges, as a pattern; GPT-2's own is built into the library.
# `whitespace`: a word is what stands between whitespace, with the space before it.
PRE_TOKENIZERS: dict[str, str | None] = {"byte_level": None, "whitespace": r" ?\S+|\s+(?!\S)|\s+"}
SMALLEST_BPE = 256 + 1  # the bytes, and the end of text

_ESCAPED = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8


class Tokenizer:
    """What both kinds have; `load`, `train_bpe` and `train_char` make one."""

    kind: str  # "bpe" or "char"
    vocab_size: int
    eot: int | None  # the token that ends a document

    def __init__(self, saved: str) -> None:
        self._saved = saved

    @property
    def digest(self) -> str:
        """sha256 of the saved form, hex: two tokenizers with the same digest are the same."""
        return hashlib.sha256(self._saved.encode()).hexdigest()

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest unsigned type that holds every token."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text.

        A document is data: special tokens that it spells out are text like any other, unless `special`, which
        also adds those that the tokenizer's own template has (Llama's begin of text).
        Raises ConfigError for a character without a token.
        """
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, (n,) of `dtype`, on all cores."""
        raise NotImplementedError

    def encode_bytes(self, data: bytes) -> list[int]:
        """The tokens of any bytes: `decode_bytes` gives them back exactly."""
        return self.encode(data.decode("utf-8", "surrogateescape"))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD, special tokens nothing."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of tokens, exactly; special tokens stand for none. Raises ConfigError for an unknown id."""
        table = self._bytes
        if unknown := [id for id in ids if not 0 <= id < len(table)]:
            raise ConfigError(f"token {unknown[0]} is not in the vocabulary of {len(table)} tokens")
        return b"".join([table[id] for id in ids])

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: how many bytes of text each token stands for; special tokens 0."""
        return np.array([len(data) for data in self._bytes], np.int64)

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` into the folder, whole or not at all."""
        part = Path(folder) / f".{FILE}-{secrets.token_hex(4)}"
        try:
            part.write_text(self._saved, encoding="utf-8")
            os.replace(part, Path(folder) / FILE)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """The tokenizer of a folder of ours, or of a Hugging Face checkpoint. Raises ConfigError."""
        path = Path(folder) / FILE
        try:
            saved = path.read_text(encoding="utf-8")
            found = json.loads(saved)
            return Characters(saved) if found.get("kind") == "char" else BPE(saved)
        except Exception as error:  # what the library raises has no narrower class
            raise ConfigError(f"{path}: cannot be read as a tokenizer: {first_line(error)}") from None


class BPE(Tokenizer):
    """Over a `tokenizers.Tokenizer`, given as its JSON."""

    kind = "bpe"

    def __init__(self, saved: str) -> None:
        import tokenizers

        super().__init__(saved)
        self._model = tokenizers.Tokenizer.from_str(saved)
        self.vocab_size = self._model.get_vocab_size()
        self.eot = next((id for id in map(self._model.token_to_id, ENDS) if id is not None), None)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self._model.encode_special_tokens = not special
        if _is_utf8(text):
            return self._model.encode(text, add_special_tokens=special).ids
        return [id for run in _ESCAPED.split(text) for id in self._encode_run(run)]

    def _encode_run(self, run: str) -> list[int]:
        """The tokens of a text, or of a run of escaped bytes."""
        if not _ESCAPED.match(run):
            return self._model.encode(run, add_special_tokens=False).ids
        if self._byte_ids is None:
            raise ConfigError("the text is no UTF-8, and this tokenizer is not byte-level: use one of ours")
        return [self._byte_ids[byte] for byte in run.encode("utf-8", "surrogateescape")]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        self._model.encode_special_tokens = True
        if all(map(_is_utf8, texts)):
            encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encoded]
        return [np.array(self.encode(text), self.dtype) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self._byte_ids is not None:
            return super().decode(ids)
        return self._model.decode([int(id) for id in ids], skip_special_tokens=True)

    @functools.cached_property
    def _byte_ids(self) -> list[int] | None:
        """The tokens of single bytes; None where not every byte has one: then the tokenizer is not byte-level."""
        ids = [id for id in map(self._model.token_to_id, BYTE_TO_CHAR) if id is not None]
        return ids if len(ids) == 256 else None

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        if self._byte_ids is None:
            raise ConfigError("this tokenizer is not byte-level: its tokens are no bytes by themselves; use decode")
        added = self._model.get_added_tokens_decoder()
        byte_of = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
        table = [b""] * self.vocab_size
        for token, id in self._model.get_vocab().items():
            if id not in added:
                table[id] = bytes(byte_of[char] for char in token)
            elif not added[id].special:
                table[id] = added[id].content.encode()
        return table


class Characters(Tokenizer):
    """A character a token, by a table; given as JSON."""

    kind = "char"

    def __init__(self, saved: str) -> None:
        super().__init__(saved)
        found = json.loads(saved)
        self._characters: str = found["characters"]
        self.eot = len(self._characters) if found["eot"] else None
        self.vocab_size = len(self._characters) + found["eot"]
        points = _points(self._characters)
        self._ids = np.full(int(points.max(initial=0)) + 2, -1, np.int64)  # the last: for all beyond the table
        self._ids[points] = np.arange(len(points))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if special and self.eot is not None:
            first, *rest = map(self.encode, text.split(EOT))
            return first + [id for part in rest for id in (self.eot, *part)]
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text).astype(self.dtype) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(_points(text), len(self._ids) - 1)]
        if (ids < 0).any():
            place = int(np.argmax(ids < 0))
            raise ConfigError(
                f"{text[place]!r} at character {place} is not among the {len(self._characters)} characters of the "
                "training text: use tokenizer bpe, which knows every text"
            )
        return ids

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        table = [char.encode("utf-8", "surrogateescape") for char in self._characters]
        return [*table, b""] if self.eot is not None else table


def train_bpe(texts: Iterable[str], vocab_size: int, *, pre: str = "byte_level") -> Tokenizer:
    """A byte-level BPE tokenizer of the texts, which stream through: only the counts of words stay in memory.

    vocab_size: of all tokens, the 256 bytes and the end of text (id 0) among them; fewer come out where the
    texts have no more pairs to merge. pre: a name in PRE_TOKENIZERS. Raises ConfigError.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    check_bpe(vocab_size, pre)
    model = tokenizers.Tokenizer(models.BPE())
    pattern = PRE_TOKENIZERS[pre]
    if pattern is None:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_only])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=list(BYTE_TO_CHAR),
        show_progress=False,
    )
    model.train_from_iterator(_utf8_runs(texts), trainer)
    return BPE(model.to_str())


def check_bpe(vocab_size: int, pre: str) -> None:
    """Raises ConfigError for what `train_bpe` cannot do."""
    if vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"vocab_size is {vocab_size}: a byte-level vocabulary needs the 256 bytes and {EOT}, "
            f"give at least {SMALLEST_BPE}"
        )
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(f"unknown pre-tokenization {pre!r}: use one of {', '.join(PRE_TOKENIZERS)}")


def train_char(texts: Iterable[str], *, eot: bool = False) -> Tokenizer:
    """A token for each character of the texts, in the characters' order; eot: and one that ends a document."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return Characters(json.dumps({"kind": "char", "characters": "".join(sorted(characters)), "eot": eot}))


def _byte_to_char() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself where it is printable, else from U+0100 on.

    GPT-2's table, which every byte-level tokenizer.json is written in.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_TO_CHAR = _byte_to_char()


def _is_utf8(text: str) -> bool:
    """Whether a string has no escaped bytes; the library takes no others."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _utf8_runs(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if _is_utf8(text):
            yield text
        else:
            yield from _ESCAPED.split(text)[::2]


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
