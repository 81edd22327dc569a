"""JSON files to tables: every cell of every file once, numbers exact, broken files named, writes whole."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import results

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_one_row_per_cell_per_run(tmp_path: Path) -> None:
    folder = synthetic.write_runs(tmp_path / "results", runs=2)
    rows, broken = results.read([folder])
    assert not broken
    expected = {}
    for label in ("h200", "cpu"):
        made = synthetic.document(label)
        expected[label] = [2 * len(made[part]) for part in ("benchmarks", "skipped", "failed")]
    for label, counts in expected.items():
        outcomes = [row["outcome"] for row in rows if row["label"] == label]
        assert [outcomes.count(outcome) for outcome in ("measured", "skipped", "failed")] == counts
    assert {row["suite"] for row in rows} == {"main"}
    assert {row["experiment"] for row in rows} == {"rmsnorm", "kv_cache", "vram", "decode", "ablation"}
    assert len({(row["label"], row["run"], row["fullname"]) for row in rows}) == len(rows)


def test_tables_hold_parameters_statistics_and_extra_info_exactly(tmp_path: Path) -> None:
    rows, _ = results.read([synthetic.write_runs(tmp_path / "results", runs=1)])
    written = results.write_tables(rows, tmp_path / "tables")
    assert sorted(path.name for path in written) == [
        *("ablation.csv", "decode.csv", "kv_cache.csv", "rmsnorm.csv", "vram.csv"),
    ]
    with (tmp_path / "tables" / "rmsnorm.csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if (row["label"], row["outcome"]) == ("h200", "measured")]
    made = {cell["fullname"]: cell for cell in synthetic.document("h200")["benchmarks"]}
    assert len(table) == sum("bench_rmsnorm" in name for name in made)
    for row in table:
        cell = made[row["fullname"]]
        stats = {key: cell["stats"][key] for key in results.STATS}
        for key, value in (cell["params"] | cell["extra_info"] | stats).items():
            assert type(value)(row[key]) == value


def test_null_and_absent_stay_apart() -> None:
    text = results.csv_text([{"a": None, "b": 1}, {"b": 2}], ["a", "b"])
    assert text == "a,b\nnull,1\n,2\n"


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False) | st.integers(-(2**62), 2**62))))
def test_numbers_read_back_exactly(rows: list[results.Row]) -> None:
    lines = results.csv_text(rows, ["a", "b", "c"]).splitlines()
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:], strict=True):
        for key, field in zip("abc", line.split(","), strict=True):
            assert field == "" if key not in row else type(row[key])(field) == row[key]


def test_column_order_does_not_depend_on_file_order(tmp_path: Path) -> None:
    rows, _ = results.read([synthetic.write_runs(tmp_path, runs=1)])
    keys = results.columns(rows)
    assert keys == results.columns(rows[::-1])
    assert keys[:5] == ["label", "suite", "run", "experiment", "outcome"]
    with_more = results.columns([*rows, {"zeta": 1, "alpha": 2}])
    assert [key for key in with_more if key in keys] == keys


def test_plain_pytest_benchmark_json_merges(tmp_path: Path) -> None:
    file = write(tmp_path / "plain.json", synthetic.plain(3))
    rows, broken = results.read([file])
    assert not broken
    assert {(row["label"], row["suite"], row["run"], row["experiment"]) for row in rows} == {
        ("unlabelled", "", "plain", "test_sort")
    }
    assert [row["outcome"] for row in rows] == ["measured"] * 3
    assert rows[1]["n"] == 1 and rows[1]["median"] == 2e-6
    assert rows[1]["shape"] == "[2, 1]"
    assert rows[1]["param_run"] == "mine", "a parameter must not hide a column of ours"
    (table,) = results.write_tables(rows, tmp_path / "tables")
    assert len(pd.read_csv(table)) == 3


def test_label_comes_from_the_file_then_from_the_folder(tmp_path: Path) -> None:
    named, plain = synthetic.document("h200"), synthetic.plain()
    files = [
        write(tmp_path / "results" / "folder" / "suite" / "a.json", named),
        write(tmp_path / "results" / "folder" / "suite" / "b.json", plain),
        write(tmp_path / "elsewhere" / "b.json", plain),
    ]
    rows, _ = results.read(files)
    assert {(row["label"], row["suite"], row["run"]) for row in rows} == {
        *(("h200", "suite", "a"), ("folder", "suite", "b"), ("unlabelled", "", "b")),
    }
    # A folder with another name may stand for results/.
    (tmp_path / "results").rename(tmp_path / "other")
    assert {row["label"] for row in results.read([tmp_path / "other"])[0]} == {"h200", "folder"}


def test_runs_of_one_name_in_different_folders_stay_apart(tmp_path: Path) -> None:
    files = [write(tmp_path / part / "run.json", synthetic.plain(1)) for part in ("before", "after")]
    rows, _ = results.read(files)
    assert len({row["run"] for row in rows}) == 2


def test_each_file_counts_once_and_runs_in_progress_not_at_all(tmp_path: Path) -> None:
    file = write(tmp_path / "a" / "b" / "run.json", synthetic.plain(1))
    write(tmp_path / "a" / "b" / ".next.partial" / "next.json", synthetic.plain(1))
    write(tmp_path / "a" / "b" / ".hidden.json", synthetic.plain(1))
    assert list(results.find([tmp_path, file, tmp_path / "a", str(tmp_path / "*" / "b")])) == [file]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"benchmarks": {}}', b'{"benchmarks": [1]}'),
        *(b'{"benchmarks": [{"stats": {}}]}', b'{"benchmarks": [], "skipped": [{}]}', b"[" * 100_000),
    ],
)
def test_a_broken_file_is_named_and_the_others_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    write(tmp_path / "sound.json", synthetic.plain(2))
    rows, broken = results.read([tmp_path])
    assert len(rows) == 2
    (line,) = broken
    assert "broken.json" in line and "\n" not in line


@given(JSON)
def test_any_json_gives_rows_or_one_line(tmp_path_factory: pytest.TempPathFactory, document: object) -> None:
    entry = {"name": "test_x", "fullname": document, "params": document, "extra_info": document}
    entry |= {"stats": document, "group": document, "reason": document}
    folder = tmp_path_factory.mktemp("any")
    write(folder / "a.json", document)
    whole = {"benchmarks": [entry], "skipped": [entry], "machine_info": document, "commit_info": document}
    write(folder / "b.json", whole)
    rows, broken = results.read([folder])
    assert len(rows) == 2 and len(broken) == 1
    results.write_tables(rows, folder / "tables")


@pytest.mark.parametrize(
    ("fullname", "expected"),
    [
        ("benchmarks/bench_rmsnorm.py::test_rmsnorm[a/b]", "rmsnorm"),
        ("elsewhere\\bench_kv_cache.py::test", "kv_cache"),
        ("test_sort.py::TestIt::test_x", "test_sort"),
        ("../..::x", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_experiment(fullname: str | None, expected: str) -> None:
    assert results.experiment({"fullname": fullname}) == expected


@pytest.mark.parametrize("name", ["h200", "rtx-2070-max-q", "A.b_c-1"])
def test_good_labels(name: str) -> None:
    assert results.check_label(name) == name


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "..", ".a", "-a", "a b", "a\n", "tables", "plots", "é"])
def test_bad_labels(name: str) -> None:
    with pytest.raises(results.BadInput, match="expected letters"):
        results.check_label(name)


def test_writes_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "table.csv"
    results.write_atomically(path, "first")
    assert path.read_text() == "first"
    seen = []
    replace = os.replace

    def spy(source: Path, target: Path) -> None:
        # All of the new text lies in the same folder before the old one goes.
        seen.append((Path(source).parent == path.parent, Path(source).read_text(), path.read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    results.write_atomically(path, "second")
    assert seen == [(True, "second", "first")] and path.read_text() == "second"

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(results.BadInput, match="No space left"):
        results.write_atomically(path, "third")
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["table.csv"]


def test_set_label_keeps_everything_else(tmp_path: Path) -> None:
    document = synthetic.plain()
    file = write(tmp_path / "plain.json", document)
    results.set_label(file, "my-card")
    changed = json.loads(file.read_text())
    assert changed["machine_info"].pop("label") == "my-card"
    assert changed == document
    assert results.read([file])[0][0]["label"] == "my-card"


def test_frame_has_the_columns_of_the_tables(tmp_path: Path) -> None:
    rows, _ = results.read([synthetic.write_runs(tmp_path, runs=1)])
    frame = results.frame(rows)
    assert list(frame) == results.columns(rows) and len(frame) == len(rows)
    again = pd.read_csv(io.StringIO(results.csv_text(rows)))
    assert list(again) == list(frame) and len(again) == len(frame)


def test_an_older_way_of_measuring_gives_way_where_the_present_one_is_there() -> None:
    def row(label: str, experiment: str, **extra: Any) -> dict[str, Any]:
        return {"label": label, "experiment": experiment, "outcome": "measured", "name": "x"} | extra

    old, new = {"stop_reason": "samples"}, {"stop_reason": "width", "blocks": 5}
    rows = [
        *(row("h200", "rmsnorm", **old), row("h200", "rmsnorm", **new), row("h200", "decode", **old)),
        *(row("cpu", "rmsnorm", **old), row("h200", "vram", stop_reason="given"), row("h200", "rmsnorm")),
        row("h200", "rmsnorm", **old) | {"outcome": "skipped"},
    ]
    assert results.current(rows) == rows[1:]
