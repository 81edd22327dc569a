"""Prepared folders are whole or not there, tokens are the text's, and samples follow from seed and number alone."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from full_disk import largest_file
from hypothesis import given
from hypothesis import strategies as st
from strategies import splits
from typer.testing import CliRunner

from tinylm.config import ConfigError
from tinylm.data import Sampler, Tokens, eval_windows, preparation, prepare
from tinylm.data.__main__ import app
from tinylm.data.tokens import MANIFEST, ShardWriter, is_prepared
from tinylm.data.windows import IGNORED, permuted
from tinylm.tokenizer import EOT, Tokenizer

STORIES = [f"Story {n}: the {n % 7} cats and the dog, don't they? Ünïcödé 🙂\n" for n in range(300)]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(EOT.join(STORIES), encoding="utf-8")
    return path


def fails(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def all_of(tokens: Tokens) -> np.ndarray:
    return tokens.read(np.array([0]), len(tokens))[0]


def written(folder: Path, ids: np.ndarray, shard_tokens: int = 1 << 20, vocab_size: int = 1000) -> Tokens:
    """A prepared folder of these tokens, without a text."""
    with ShardWriter(folder, "train", np.dtype("<u2"), shard_tokens) as writer:
        writer.write(ids)
    entry = {"tokens": len(ids), "bytes": len(ids), "documents": 1, "shards": writer.entries}
    described = {
        "format": 1,
        "tokenizer": {"kind": "char", "digest": ""},
        "vocab_size": vocab_size,
        "dtype": "uint16",
        "shard_tokens": shard_tokens,
        "splits": {"train": entry},
    }
    (folder / MANIFEST).write_text(json.dumps(described))
    return Tokens(folder, "train")


# --- prepare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_tokens_are_the_documents_each_with_its_end(text: Path, kind: str) -> None:
    folder = prepare(text=text, tokenizer=kind, vocab_size=300 if kind == "bpe" else None)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eot is not None
    found: set[str] = set()
    for split in ("train", "val"):
        tokens = Tokens(folder, split)
        ids = all_of(tokens)
        assert tokens.vocab_size == tokenizer.vocab_size
        assert tokens.bytes == tokenizer.token_bytes()[ids].sum()
        ends = np.flatnonzero(ids == tokenizer.eot)
        assert ends[-1] == len(ids) - 1
        documents = [tokenizer.decode(part[part != tokenizer.eot]) for part in np.split(ids, ends + 1)[:-1]]
        assert not found & set(documents)
        found |= set(documents)
    assert found == set(STORIES)


def test_a_single_document_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(STORIES), encoding="utf-8")
    folder = prepare(text=path, tokenizer="char")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eot is None
    assert "".join(tokenizer.decode(all_of(Tokens(folder, split))) for split in ("train", "val")) == "".join(STORIES)


def test_validation_never_trains_the_tokenizer(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = preparation.train_bpe

    def spy(texts: Any, *args: Any, **kwargs: Any) -> Tokenizer:
        seen.extend(texts)
        return real(seen, *args, **kwargs)

    monkeypatch.setattr(preparation, "train_bpe", spy)
    folder = prepare(text=text, vocab_size=300)
    val = Tokenizer.load(folder).decode(all_of(Tokens(folder, "val")))
    assert val
    assert seen
    assert not [document for document in seen if document in val]


def test_a_validation_text_of_its_own(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "val.txt"
    other.write_text(f"{STORIES[3]}{EOT}quite another")
    folder = prepare(text=text, val_text=other, vocab_size=300)
    described = json.loads((folder / MANIFEST).read_text())["splits"]
    assert (described["train"]["documents"], described["val"]["documents"]) == (len(STORIES) - 1, 2)


def test_the_default_needs_no_network_and_is_made_once(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for number in range(30):
        (library / f"m{number}.py").write_text(f"def f{number}():\n    return {number}\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(library))
    folder = prepare(vocab_size=257)
    assert folder.is_relative_to(own_home)
    monkeypatch.setattr(preparation, "_make", lambda *_: pytest.fail("made again"))
    assert prepare("stdlib", vocab_size=257) == folder


def test_other_settings_and_other_content_have_another_folder(text: Path) -> None:
    made = {
        prepare(text=text, vocab_size=257),
        prepare(text=text, vocab_size=258),
        prepare(text=text, vocab_size=257, pre="whitespace"),
        prepare(text=text, vocab_size=257, val_fraction=0.2),
        prepare(text=text, tokenizer="char"),
    }
    text.write_text(text.read_text(encoding="utf-8") + "more", encoding="utf-8")
    assert len(made | {prepare(text=text, vocab_size=257)}) == 6


def test_a_folder_of_ones_own(text: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    assert prepare(text=text, folder=target, vocab_size=257) == target
    before = (target / MANIFEST).stat().st_mtime_ns
    assert prepare(text=text, folder=target, vocab_size=257) == target
    assert (target / MANIFEST).stat().st_mtime_ns == before
    fails("mine was prepared with settings .*name another folder", lambda: prepare(text=text, folder=target))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    fails("other is there, and is no prepared data", lambda: prepare(text=text, folder=other))
    fails("stories.txt is there, and is no", lambda: prepare(text=text, folder=text))


def test_a_full_disk_leaves_nothing(text: Path, own_home: Path) -> None:
    with largest_file(2000):
        fails("make room", lambda: prepare(text=text, vocab_size=300))
    assert not [path for path in own_home.rglob("*") if path.suffix != ".lock" and path.is_file()]
    assert len(Tokens(prepare(text=text, vocab_size=300), "train")) > 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that takes no files from anybody")
def test_a_folder_that_cannot_be_made_is_an_error_and_not_waited_for(text: Path) -> None:
    code = "import sys; from tinylm.data.__main__ import app; app(sys.argv[1:])"
    line = [sys.executable, "-c", code, "prepare", "--text", str(text), "--folder", "/proc/made"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "/proc/.made.lock cannot be read or written" in done.stderr


def test_files_are_on_the_disk_before_the_folder_has_its_name(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    sync, rename = os.fsync, os.rename

    def spy_sync(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        sync(file)

    def spy_rename(part: Path, target: Path) -> None:
        assert synced == {path.stat().st_ino for path in part.iterdir()}
        rename(part, target)

    monkeypatch.setattr("os.fsync", spy_sync)
    monkeypatch.setattr("os.rename", spy_rename)
    assert len(list(prepare(text=text, vocab_size=300).iterdir())) == len(synced) == 4


@pytest.mark.parametrize(
    "place",
    [
        "tinylm.tokenizer.Tokenizer.save",
        "tinylm.data.preparation._encode",
        "tinylm.data.tokens.ShardWriter.write",
        "os.rename",
    ],
)
def test_killed_anywhere_there_is_no_folder_and_the_next_cleans_up(
    text: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    target = tmp_path / "made" / "here"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, kill)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # who is killed does not clean up
        prepare(text=text, folder=target, vocab_size=257)
    assert not target.exists()
    assert [path for path in target.parent.iterdir() if path.suffix == ".part"]
    prepare(text=text, folder=target, vocab_size=257)
    assert {path.name for path in target.parent.iterdir()} - {".here.lock"} == {"here"}
    assert len(Tokens(target, "train")) > 0


def test_several_at_once_make_it_once(text: Path, tmp_path: Path) -> None:
    made: list[int] = []
    real = preparation._fill

    def counted(*args: Any) -> None:
        made.append(1)
        real(*args)

    target = tmp_path / "made"
    with mock.patch.object(preparation, "_fill", counted):
        threads = [
            threading.Thread(target=prepare, kwargs={"text": text, "folder": target, "vocab_size": 257})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made == [1]
    assert len(Tokens(target, "val")) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, "vocab_size is 256.*at least 257"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"tokenizer": "char", "vocab_size": 300}, "vocab_size is 300, but the tokenizer char .*leave it out"),
        ({"pre": "words"}, "unknown pre-tokenization"),
        ({"tokenizer": "words"}, "unknown tokenizer 'words': use one of bpe, char"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
    ],
)
def test_settings_that_cannot_work(text: Path, settings: dict[str, Any], message: str) -> None:
    fails(message, lambda: prepare(text=text, **settings))


def test_a_character_that_only_validation_has(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("abc" * 100 + "xyz", encoding="utf-8")
    fails("val split.*'x' at character 28.*use tokenizer bpe", lambda: prepare(text=path, tokenizer="char"))


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """What kept the text would need a byte or more for each of its characters; a quarter of that is the bound.

    The first text is long enough that every buffer has been full once: 256 pieces are the longest of them. Words
    are few and long, because the time goes by words.
    """
    words = [f"{n * 7919 % 1000:03d}" * 20 for n in range(1000)]
    sizes = {"short": 20, "long": 220}
    for name, times in sizes.items():
        with open(tmp_path / name, "w") as file:
            for _ in range(times):
                file.write(" ".join(words))
    extra = (tmp_path / "long").stat().st_size - (tmp_path / "short").stat().st_size
    code = f"""
import resource, sys
from pathlib import Path
from tinylm.data import corpus, preparation
corpus.PIECE, corpus.HASHED, corpus.READ, preparation.BATCH = 1 << 11, 1 << 9, 1 << 15, 1 << 17
for name in {list(sizes)}:
    preparation.prepare(text=Path({str(tmp_path)!r}) / name, vocab_size=2000, pre="whitespace")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert extra > 10e6
    assert long - short < extra / 4


# --- tokens ----------------------------------------------------------------------------------------------------------


@given(
    parts=splits(60),
    shard_tokens=st.integers(1, 70),
    starts=st.lists(st.integers(0, 50), max_size=6),
    length=st.integers(1, 10),
)
def test_tokens_read_like_the_array_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[int], shard_tokens: int, starts: list[int], length: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.random.default_rng(0).integers(0, 1 << 16, 60)
    with ShardWriter(folder, "train", np.dtype("<u2"), shard_tokens) as writer:
        for part in np.split(ids, np.cumsum(parts)[:-1]):
            writer.write(part)
    assert len(writer.entries) == -(-60 // shard_tokens)
    tokens = written(folder, ids, shard_tokens)
    read = tokens.read(np.array(starts, np.int64), length)
    assert read.dtype == np.int64
    assert read.tolist() == [ids[start : start + length].tolist() for start in starts]


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_that_are_not_what_was_prepared(text: Path, split: str) -> None:
    folder = prepare(text=text, vocab_size=300)
    digest = Tokens(folder, split).digest
    path = folder / f"{split}-000.bin"
    content = path.read_bytes()
    changed = bytes([content[0] ^ 1]) + content[1:]
    for data, message in (
        (content[:-1], f"has {len(content) - 1} bytes, expected {len(content)}"),
        (b"", "has 0 bytes"),
        (changed, "its digest differs"),
    ):
        path.write_bytes(data)
        fails(f"{message}.*remove {folder}, then prepare", lambda: Tokens(folder, split))
    assert len(Tokens(folder, split, verify=False)) == len(content) // 2
    path.unlink()
    fails("cannot be read", lambda: Tokens(folder, split))
    fails("cannot be read", lambda: prepare(text=text, vocab_size=300))
    path.write_bytes(content[:-1])
    fails("bytes, expected", lambda: prepare(text=text, vocab_size=300))
    path.write_bytes(content)
    assert Tokens(folder, split).digest == digest


def test_folders_that_are_none(text: Path, tmp_path: Path) -> None:
    folder = prepare(text=text, vocab_size=300)
    fails("no split 'test': it has train, val", lambda: Tokens(folder, "test"))
    fails("is no prepared data: make it with", lambda: Tokens(tmp_path / "nosuch", "train"))
    for content, message in (("{", "cannot be read"), ("[]", "not of format 1"), ('{"format": 2}', "not of format 1")):
        (folder / MANIFEST).write_text(content)
        fails(message, lambda: Tokens(folder, "train"))
        fails(f"{message}.*remove {folder}, then prepare", lambda: prepare(text=text, vocab_size=300))
    shutil.rmtree(folder)
    assert prepare(text=text, vocab_size=300) == folder


def test_a_data_json_of_ones_own_makes_no_prepared_folder(text: Path, tmp_path: Path) -> None:
    folder = prepare(text=text, vocab_size=300)
    assert is_prepared(folder)
    (folder / MANIFEST).write_text("{")
    assert is_prepared(folder)
    own = tmp_path / "own"
    own.mkdir()
    (own / MANIFEST).write_text('{"stories": 300}')
    assert not is_prepared(own)
    assert not is_prepared(text)
    fails("own is there, and is no prepared data", lambda: prepare(text=text, folder=own))


def test_digests_tell_splits_and_settings_apart(text: Path) -> None:
    folders = [prepare(text=text, vocab_size=size) for size in (300, 310)]
    assert len({Tokens(folder, split).digest for folder in folders for split in ("train", "val")}) == 4


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """70,000 characters: only by their own numbers."""
    path = tmp_path / "many.txt"
    characters = [chr(point) for point in range(0x10000, 0x10000 + 70_000)]
    path.write_text("".join(characters) + "".join(characters[:8000]), encoding="utf-8")
    folder = prepare(text=path, tokenizer="char")
    assert Tokens(folder, "train").vocab_size == 70_000
    assert all_of(Tokens(folder, "train")).max() == 69_999
    assert (folder / "train-000.bin").stat().st_size == 4 * len(Tokens(folder, "train"))


# --- samples ---------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_the_order_is_a_permutation(size: int, key: int) -> None:
    places = np.arange(size, dtype=np.uint64)
    assert sorted(permuted(places, size, np.full(size, key, np.uint64)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 - 87])
def test_the_order_of_many_repeats_nothing(size: int) -> None:
    places = np.arange(size - 20_000, size, dtype=np.uint64)
    found = permuted(places, size, np.full(len(places), 5, np.uint64))
    assert found.max() < size
    assert len(np.unique(found)) == len(places)


def test_the_order_is_spread_out() -> None:
    """Of a random permutation the correlation of places and values has the standard deviation 1 / sqrt(n - 1)."""
    size = 4096
    places = np.arange(size, dtype=np.uint64)
    orders = np.array([permuted(places, size, np.full(size, key, np.uint64)) for key in range(20)], float)
    correlations = np.corrcoef(np.vstack([places.astype(float), orders]))
    assert np.abs(correlations[~np.eye(21, dtype=bool)]).max() < 5.5 / np.sqrt(size - 1)
    # A neighbour's distance in a random order is (size + 1) / 3 on average, its standard deviation size / sqrt(18).
    distances = np.abs(np.diff(orders, axis=1)).mean(axis=1)
    assert np.abs(distances - size / 3).max() < 5.5 * size / np.sqrt(18 * size) * np.sqrt(2)


@given(length=st.integers(2, 200), context=st.integers(1, 20), seed=st.integers(0, 2**70), epoch=st.integers(0, 1000))
def test_a_pass_takes_every_window_once(length: int, context: int, seed: int, epoch: int) -> None:
    tokens = mock.MagicMock(spec=Tokens)
    tokens.__len__.return_value = length
    if length < context + 1:
        fails("fewer than one window", lambda: Sampler(tokens, context, seed))
        return
    sampler = Sampler(tokens, context, seed)
    starts = np.sort(sampler.starts(epoch * sampler.windows, sampler.windows))
    assert (np.diff(starts) == context).all()  # the windows' targets touch, and none is in two of them
    assert starts[0] >= 0
    assert starts[-1] + context + 1 <= length
    assert length - 1 - sampler.windows * context < 2 * context  # targets that a pass leaves out


def test_over_many_passes_every_token_is_a_target(tmp_path: Path) -> None:
    sampler = Sampler(written(tmp_path, np.arange(103)), 10, seed=3)
    samples = sampler.samples(0, 200 * sampler.windows)
    assert set(samples[:, 1:].flatten().tolist()) == set(range(1, 103))


@given(parts=splits(40), first=st.integers(0, 500), seed=st.integers(-5, 5))
def test_a_sample_does_not_depend_on_how_samples_are_asked_for(parts: list[int], first: int, seed: int) -> None:
    tokens = mock.MagicMock(spec=Tokens)
    tokens.__len__.return_value = 100
    sampler = Sampler(tokens, 9, seed)
    at, found = first, []
    for part in parts:
        found += sampler.starts(at, part).tolist()
        at += part
    assert found == Sampler(tokens, 9, seed).starts(first, 40).tolist()


def test_samples_are_tokens_of_the_text(tmp_path: Path) -> None:
    ids = np.arange(1000) * 31 % 1000
    samples = Sampler(written(tmp_path, ids, shard_tokens=100), 16, seed=0).samples(5, 300)
    assert samples.shape == (300, 17)
    assert samples.dtype == torch.int64
    assert ((samples[:, 1:] - samples[:, :-1]) % 1000 == 31).all()


def test_seeds_and_passes_have_orders_of_their_own(tmp_path: Path) -> None:
    tokens = written(tmp_path, np.arange(1000))
    orders = [Sampler(tokens, 10, seed).starts(epoch * 98, 98) // 10 for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


# --- evaluation ------------------------------------------------------------------------------------------------------


@given(length=st.integers(2, 90), context=st.integers(1, 20), batch=st.integers(1, 5))
def test_evaluation_scores_every_token_but_the_first_once(
    tmp_path_factory: pytest.TempPathFactory, length: int, context: int, batch: int
) -> None:
    tokens = written(tmp_path_factory.mktemp("eval"), np.arange(length) + 1, shard_tokens=13)
    if length < context + 1:
        fails(f"has {length} tokens, fewer than one window", lambda: list(eval_windows(tokens, context, batch)))
        return
    scored: list[int] = []
    for inputs, targets in eval_windows(tokens, context, batch):
        assert inputs.shape == targets.shape == (batch, context)
        assert inputs.dtype == targets.dtype == torch.int64
        assert (targets[targets != IGNORED] == inputs[targets != IGNORED] + 1).all()
        assert (inputs[targets == IGNORED] == 0).all()
        scored += targets[targets != IGNORED].tolist()
    assert scored == list(range(2, length + 1))


@pytest.mark.parametrize("context", [0, -1])
def test_a_window_has_at_least_one_token(tmp_path: Path, context: int) -> None:
    tokens = written(tmp_path, np.arange(10))
    fails("context is .*at least 1", lambda: Sampler(tokens, context, 0))
    fails("context is .*at least 1", lambda: list(eval_windows(tokens, context, 1)))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made(text: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    result = CliRunner().invoke(
        app, ["prepare", "--text", str(text), "--folder", str(target), "--vocab-size", "300", "--pre", "whitespace"]
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == str(target)
    assert lines[0] == "bpe tokenizer, 300 tokens"
    total = sum(int(found) for found in re.findall(r"(\d+) documents", result.stdout))
    assert total == len(STORIES)


def test_each_part_of_a_single_document_counts_as_one(text: Path) -> None:
    text.write_text("abcdefgh\n" * 20_000)  # so long that it is cut between pieces too
    result = CliRunner().invoke(app, ["prepare", "--text", str(text), "--tokenizer", "char"])
    described = ["train: 162,000 tokens, 162,000 bytes, 1 documents", "val: 18,000 tokens, 18,000 bytes, 1 documents"]
    assert result.stdout.splitlines()[1:3] == described


@pytest.mark.parametrize("name", ["text.bin", "text.bin.xz"])
def test_bytes_that_are_no_text_are_taken_with_a_word(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / name, b"\0\xff" * 999
    path.write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    folder = prepare(text=path, vocab_size=257)
    assert capsys.readouterr().err == f"{path} has NUL bytes, so it may be no text: it is taken as it is\n"
    parts = [Tokenizer.load(folder).decode_bytes(all_of(Tokens(folder, split))) for split in ("train", "val")]
    assert b"".join(parts) == data


def test_the_command_fails_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prepare", "--text", str(tmp_path / "nosuch.txt")])
    assert result.exit_code == 2
    assert result.stderr.startswith("tinylm.data prepare: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif("TINYLM_TEST_DATA" not in os.environ, reason="TINYLM_TEST_DATA names no folder of real text")
def test_shakespeare_by_characters() -> None:
    folder = prepare(text=Path(os.environ["TINYLM_TEST_DATA"], "tinyshakespeare.txt"), tokenizer="char")
    train, val = Tokens(folder, "train"), Tokens(folder, "val")
    assert (train.vocab_size, len(train), len(val)) == (65, 1_003_854, 111_540)
    assert Tokenizer.load(folder).decode(all_of(train)[:13]) == "First Citizen"
