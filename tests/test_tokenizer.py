"""Every text and every byte comes back, special tokens are only where they were put, and files say what they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_bytes, texts

from tinylm.config import ConfigError
from tinylm.tokenizer import (
    BYTE_TO_CHAR,
    EOT,
    PRE_TOKENIZERS,
    SMALLEST_BPE,
    Tokenizer,
    train_bpe,
    train_char,
)

TEXT = "the cat and the dog, then the others; there's none in the house. Ünïcödé 🙂\n\n\t  don't stop 1234 5678\n" * 3
BPES = {pre: train_bpe([TEXT], 320, pre=pre) for pre in PRE_TOKENIZERS}
CHAR = train_char([TEXT], eot=True)
ALL = {**BPES, "char": CHAR}

every_bpe = pytest.mark.parametrize("bpe", BPES.values(), ids=list(BPES))
every_kind = pytest.mark.parametrize("tokenizer", ALL.values(), ids=list(ALL))


@every_bpe
@given(data=any_bytes)
def test_any_bytes_come_back(bpe: Tokenizer, data: bytes) -> None:
    ids = bpe.encode_bytes(data)
    assert bpe.decode_bytes(ids) == data
    assert bpe.decode(ids) == data.decode("utf-8", "replace")
    assert bpe.token_bytes()[ids].sum() == len(data)
    assert bpe.eot not in ids


@every_bpe
@given(text=texts)
def test_bytes_of_a_text_are_encoded_like_the_text(bpe: Tokenizer, text: str) -> None:
    assert bpe.encode_bytes(text.encode()) == bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text


@every_bpe
@given(batch=st.lists(any_bytes.map(lambda data: data.decode("utf-8", "surrogateescape")), max_size=5))
def test_a_batch_is_encoded_like_its_texts(bpe: Tokenizer, batch: list[str]) -> None:
    encoded = bpe.encode_batch(batch)
    assert [ids.tolist() for ids in encoded] == [bpe.encode(text) for text in batch]
    assert all(ids.dtype == bpe.dtype for ids in encoded)


@given(text=st.text(alphabet=sorted(set(TEXT)), max_size=50))
def test_characters_come_back(text: str) -> None:
    ids = CHAR.encode(text)
    assert len(ids) == len(text)
    assert CHAR.decode(ids) == text
    assert CHAR.token_bytes()[ids].sum() == len(text.encode())
    assert CHAR.encode_batch([text])[0].tolist() == ids


@given(data=st.binary(max_size=50))
def test_characters_that_are_no_utf8_come_back(data: bytes) -> None:
    tokenizer = train_char([data.decode("utf-8", "surrogateescape")])
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_the_alphabet_writes_each_byte_as_its_own_character() -> None:
    assert len(set(BYTE_TO_CHAR)) == 256
    bpe = BPES["byte_level"]
    for byte in range(256):
        assert bpe.decode_bytes(bpe.encode_bytes(bytes([byte]))) == bytes([byte])


@every_kind
def test_the_end_of_text_is_recognized_only_on_demand(tokenizer: Tokenizer) -> None:
    assert tokenizer.eot is not None
    assert tokenizer.encode(f"the{EOT}dog", special=True) == [
        *tokenizer.encode("the"),
        tokenizer.eot,
        *tokenizer.encode("dog"),
    ]
    assert tokenizer.decode_bytes([tokenizer.eot]) == b""
    assert tokenizer.token_bytes()[tokenizer.eot] == 0
    if tokenizer.kind == "bpe":
        literal = tokenizer.encode(f"the{EOT}dog")
        assert tokenizer.eot not in literal
        assert tokenizer.decode(literal) == f"the{EOT}dog"


def test_a_word_is_cut_where_the_pre_tokenization_says() -> None:
    """`the,the,` is one word to whitespace, so that a merge may cross the comma; to GPT-2's pattern it never is."""
    repeated = ["x the,the,the,the, y"] * 50
    crossing = {pre: any(b"e," in data for data in train_bpe(repeated, 300, pre=pre)._bytes) for pre in PRE_TOKENIZERS}
    assert crossing == {"byte_level": False, "whitespace": True}
    for pre in PRE_TOKENIZERS:
        for data in train_bpe(["a b c d e\n\n  f g"] * 50, 400, pre=pre)._bytes:
            assert not data.strip() or b" " not in data.lstrip(), "a merge across words"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_training_is_deterministic_and_streams(pre: str) -> None:
    assert train_bpe(iter([TEXT]), 320, pre=pre).digest == BPES[pre].digest
    assert BPES[pre].vocab_size == 320


def test_a_text_without_more_pairs_gives_a_smaller_vocabulary() -> None:
    assert SMALLEST_BPE <= train_bpe(["ab"], 400).vocab_size < 400
    assert train_bpe([], SMALLEST_BPE).vocab_size == SMALLEST_BPE


def test_training_takes_bytes_that_are_no_utf8() -> None:
    data = b"the \xff\xfe the \xc3( there" * 9
    tokenizer = train_bpe([data.decode("utf-8", "surrogateescape")], 270)
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert b"the" in tokenizer._bytes or b" the" in tokenizer._bytes


@every_kind
def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = Tokenizer.load(tmp_path)
    for name in ("kind", "vocab_size", "eot", "digest"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    loaded.save(tmp_path)
    assert Tokenizer.load(tmp_path).digest == tokenizer.digest


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CHAR.save(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        BPES["byte_level"].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path).digest == CHAR.digest


def save_hf(tokenizer: object, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]


def test_a_byte_level_tokenizer_of_others(tmp_path: Path) -> None:
    """As Llama 3's is: byte-level, an end of text and a begin of text, which a template adds."""
    import tokenizers
    from tokenizers import processors

    ours = json.loads(BPES["byte_level"]._saved)
    ours["added_tokens"] = []
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours))
    theirs.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    theirs.add_tokens(["[plain]"])
    begin = theirs.token_to_id("<|begin_of_text|>")
    theirs.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", begin)])
    save_hf(theirs, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    # Its file has an end of text of ours as a plain word of the vocabulary, which the table of ends has first.
    assert tokenizer.eot in (theirs.token_to_id("<|end_of_text|>"), theirs.token_to_id(EOT))
    assert tokenizer.encode("the dog") == theirs.encode("the dog", add_special_tokens=False).ids
    assert tokenizer.encode("the dog", special=True) == theirs.encode("the dog").ids
    assert tokenizer.encode("the dog", special=True)[0] == begin
    assert tokenizer.decode(tokenizer.encode("a [plain] dog", special=True)) == "a [plain] dog"
    assert tokenizer.token_bytes()[theirs.token_to_id("[plain]")] == len("[plain]")


def test_a_tokenizer_that_is_not_byte_level(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models

    theirs = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    theirs.decoder = decoders.Fuse()
    save_hf(theirs, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("aab")) == "aab"
    assert tokenizer.eot is None
    with pytest.raises(ConfigError, match="not byte-level"):
        tokenizer.token_bytes()
    with pytest.raises(ConfigError, match="not byte-level"):
        tokenizer.encode_bytes(b"\xff")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_bpe([TEXT], 256), "vocab_size is 256.* at least 257"),
        (lambda: train_bpe([TEXT], 300, pre="words"), "unknown pre-tokenization 'words'.*byte_level, whitespace"),
        (lambda: CHAR.encode("the Q"), "'Q' at character 4 .*use tokenizer bpe"),
        (lambda: CHAR.encode_batch(["dog", "\U0010ffff"]), "at character 0"),
        (lambda: CHAR.decode([CHAR.vocab_size]), "not in the vocabulary"),
        (lambda: BPES["whitespace"].decode([-1]), "token -1 is not in the vocabulary of 320"),
    ],
)
def test_what_cannot_work_is_one_clear_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"kind": "char"}', '{"kind": "char", "characters": 3}'])
def test_a_file_that_is_no_tokenizer(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read as a tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_small_and_large_vocabularies_have_the_smallest_type() -> None:
    tokenizer = train_char(["ab"])
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        tokenizer.vocab_size = size
        assert tokenizer.dtype is dtype


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts threads by Linux's /proc")
def test_encoding_starts_a_thread_for_each_core(tmp_path: Path) -> None:
    code = """
import os, sys
from tinylm.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])  # training would start threads, too
before = len(os.listdir("/proc/self/task"))
tokenizer.encode_batch(["the dog"] * 4096)
print(len(os.listdir("/proc/self/task")) - before >= len(os.sched_getaffinity(0)))
"""
    train_bpe(["the dog"], 260).save(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENIZERS", "RAYON"))}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # nor are numpy's meant
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "True"
