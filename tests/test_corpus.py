"""Documents come back whole, in one split each, from files of every kind."""

from __future__ import annotations

import lzma
import os
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import documents

from tinylm.config import ConfigError
from tinylm.data import corpus as module
from tinylm.data.corpus import NOT_STDLIB, SEPARATOR, SPLITS, STDLIB, Corpus, Piece, find

# Small, so that documents of a few words come in several pieces.
small_pieces = mock.patch.multiple(module, PIECE=16, HASHED=4)


def whole(pieces: Iterable[Piece]) -> list[str]:
    """Documents from their pieces, which must begin and end in turn."""
    found: list[str] = []
    open_ = False
    for text, begins, ends in pieces:
        assert begins is not open_
        assert text or ends
        if begins:
            found.append("")
        found[-1] += text
        open_ = not ends
    assert not open_
    return found


def make(folder: Path, texts: list[str], name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(SEPARATOR.join(texts).encode("utf-8", "surrogateescape"))
    return path


def of(path: Path, val: Path | None = None, fraction: float = 0.1) -> Corpus:
    found = find(None, path, val, fraction, path.parent)
    found.survey()
    return found


@given(docs=st.lists(documents, max_size=6), data=st.data())
def test_documents_come_back_however_the_text_is_read(docs: list[str], data: st.DataObject) -> None:
    text = SEPARATOR.join(docs)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    chunks = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    with small_pieces:
        pieces = list(module._documents(chunks))
        assert pieces == list(module._documents([text]))
        assert all(len(piece.text) <= 16 for piece in pieces)
    assert whole(pieces) == docs


@given(blank=st.sampled_from(["", "\n", " \n\t "]), docs=st.lists(documents, min_size=1, max_size=3))
def test_documents_of_whitespace_are_left_out(blank: str, docs: list[str]) -> None:
    text = SEPARATOR.join([blank, *docs, blank, blank])
    assert whole(module._documents([text])) == docs


def test_pieces_end_between_words_where_there_are_words() -> None:
    with small_pieces:
        lines = [piece.text for piece in module._documents(["one two three\nfour five six seven\neight"])]
        assert lines == ["one two three\n", "four five six", " seven\neight"]
        assert [piece.text for piece in module._documents(["x" * 40])] == ["x" * 16, "x" * 16, "x" * 8]


@given(
    docs=st.lists(documents.map(str.strip), min_size=2, max_size=30, unique_by=lambda text: text[:4]),
    fraction=st.floats(0.01, 0.99),
)
def test_each_document_is_in_one_split_and_its_copies_too(
    tmp_path_factory: pytest.TempPathFactory, docs: list[str], fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("split")
    copies = [f"\n{text}\n" for text in docs]
    with small_pieces:
        found = of(make(folder, docs + copies), fraction=fraction)
        train, val = (whole(found.pieces(split)) for split in SPLITS)
    assert sorted(train + val) == sorted(docs + copies)
    assert not {text.strip() for text in train} & {text.strip() for text in val}
    assert val
    assert found.separated


def test_the_split_follows_from_a_document_alone(tmp_path: Path) -> None:
    docs = [f"document {number}" for number in range(2000)]
    chosen = set(whole(of(make(tmp_path, docs)).pieces("val")))
    # The number that validates is binomial: 200 of 2000 by chance, and 5 standard deviations are 67.
    assert abs(len(chosen) - 200) < 67
    fewer = set(whole(of(make(tmp_path, docs[::-2])).pieces("val")))
    assert fewer == chosen & set(docs[::-2])


@pytest.mark.parametrize("fraction", [0.1, 0.25])
@pytest.mark.parametrize("packed", [False, True])
def test_a_single_document_is_cut_in_two(tmp_path: Path, fraction: float, packed: bool) -> None:
    text = "The quick brown fox, é and 🙂\n" * 700
    path = make(tmp_path, [text])
    if packed:
        path = tmp_path / "text.txt.xz"
        path.write_bytes(lzma.compress(text.encode()))
    with mock.patch.multiple(module, PIECE=100, HASHED=10, READ=333):
        found = of(path, fraction=fraction)
        train, val = ("".join(piece.text for piece in found.pieces(split)) for split in SPLITS)
    cut = int(len(text) * (1 - fraction))
    assert (train, val) == (text[:cut], text[cut:])
    assert not found.separated


@given(data=st.binary(min_size=30))
def test_files_of_any_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "text"
    path.write_bytes(b"some text" + data)
    with mock.patch.multiple(module, READ=7):
        found = of(path)
        text = "".join(piece.text for split in SPLITS for piece in found.pieces(split))
    assert text.encode("utf-8", "surrogateescape") == b"some text" + data


def test_what_validates_elsewhere_does_not_train(tmp_path: Path) -> None:
    train = make(tmp_path, ["one", "two\n", "three", "two"], "train.txt")
    val = make(tmp_path, ["\ntwo\n", "four"], "val.txt")
    found = of(train, val)
    assert whole(found.pieces("train")) == ["one", "three"]
    assert whole(found.pieces("val")) == ["\ntwo\n", "four"]
    assert found.separated


def test_a_folder_is_its_text_files(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"b", "a/c.md": b"c", "d": b"\xffd", "e.bin": b"e\0e", ".hidden": b"h", ".git/config": b"g",
        "f.txt.xz": lzma.compress(b"f"),
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = find(None, tmp_path, None, 0.1, tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found.train] == ["a/c.md", "b.txt", "d", "f.txt.xz"]
    found.survey()
    texts = {text for split in SPLITS for text in whole(found.pieces(split))}
    assert texts == {"b", "c", "\udcffd", "f"}


def test_the_digest_follows_content_and_not_place(tmp_path: Path) -> None:
    def digest(folder: str, content: str, name: str = "x.txt") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(content)
        return find(None, tmp_path / folder, None, 0.1, tmp_path).digest

    assert digest("one", "text") == digest("two", "text") != digest("three", "test")
    alone = tmp_path / "one" / "x.txt"
    moved = alone.rename(tmp_path / "y.txt")
    assert (
        find(None, moved, None, 0.1, tmp_path).digest == find(None, tmp_path / "two/x.txt", None, 0.1, tmp_path).digest
    )
    assert find(None, moved, moved, 0.1, tmp_path).digest != find(None, moved, None, 0.1, tmp_path).digest


def test_stdlib_is_there_and_has_no_tests_and_nobody_elses_packages() -> None:
    found = find(STDLIB, None, None, 0.1, Path())
    names = [path.name for path in found.train]
    assert {"abc.py", "argparse.py", "typing.py"} <= set(names)
    assert not any(NOT_STDLIB & set(path.parts[-3:]) for path in found.train)
    assert find(STDLIB, None, None, 0.1, Path()).digest == found.digest


@pytest.mark.parametrize(
    ("name", "text", "val", "message"),
    [
        ("nosuch", None, None, "unknown source 'nosuch': use one of tinyshakespeare, tinystories, stdlib"),
        (None, None, None, "unknown source None"),
        ("stdlib", "full.txt", None, "both the source stdlib and a text"),
        ("stdlib", None, "full.txt", "a val text is given without a text"),
        (None, "absent.txt", None, "absent.txt is not there"),
        (None, "empty folder", None, "has no text files in it"),
        (None, "empty.txt", None, "empty.txt is empty"),
        (None, "blank.txt", None, "blank.txt is empty"),
        (None, "full.txt", "blank.txt", "validation text of full.txt is empty"),
        (None, "letter.txt", None, "1 characters: too few to split"),
        (None, "copies.txt", None, "all 3 documents of copies.txt are the same"),
        (None, "damaged.xz", None, "damaged.xz: cannot be read"),
        (None, "cut.xz", None, "cut.xz: cannot be read"),
        (None, "damaged folder", None, "x.xz: cannot be read"),
    ],
)
def test_what_is_no_text_is_one_clear_line(
    tmp_path: Path, name: str | None, text: str | None, val: str | None, message: str
) -> None:
    (tmp_path / "empty folder").mkdir()
    make(tmp_path, [""], "empty.txt")
    make(tmp_path, [" \n", "\n\n"], "blank.txt")
    make(tmp_path, ["x"], "letter.txt")
    make(tmp_path, ["text and more"], "full.txt")
    make(tmp_path, ["x", "\nx", "x\n"], "copies.txt")
    packed = lzma.compress(os.urandom(5000))
    (tmp_path / "damaged.xz").write_bytes(packed[:1000] + b"damaged" + packed[1007:])
    (tmp_path / "cut.xz").write_bytes(packed[:1000])
    (tmp_path / "damaged folder").mkdir()
    (tmp_path / "damaged folder" / "x.xz").write_bytes(b"no xz")
    with pytest.raises(ConfigError, match=message) as caught:
        find(name, tmp_path / text if text else None, tmp_path / val if val else None, 0.1, tmp_path).survey()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("TINYLM_TEST_DATA" not in os.environ, reason="TINYLM_TEST_DATA names no folder of real text")
def test_shakespeare_is_cut_as_published() -> None:
    path = Path(os.environ["TINYLM_TEST_DATA"], "tinyshakespeare.txt")
    text = path.read_text(encoding="utf-8")
    found = of(path)
    train, val = ("".join(piece.text for piece in found.pieces(split)) for split in SPLITS)
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert train + val == text
    assert set(val) <= set(train)


@pytest.mark.skipif("TINYLM_TEST_DATA" not in os.environ, reason="TINYLM_TEST_DATA names no folder of real text")
def test_no_story_is_in_both_splits() -> None:
    folder = Path(os.environ["TINYLM_TEST_DATA"])
    found = of(folder / "tinystories-valid-part.txt")
    train, val = ({text.strip() for text in whole(found.pieces(split))} for split in SPLITS)
    assert not train & val
    assert len(train) + len(val) > 3000
