"""Training logs: which files are logs, what of them is drawn, and what is said of those that are broken."""

import csv
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from typer.testing import CliRunner, Result

from tinylm.bench import cli, plots, results, training_curve, training_logs
from tinylm.bench.training_curve import MOST, TRAIN, VALIDATION


def table(*inputs: Path) -> pd.DataFrame:
    rows, broken = training_logs.read(inputs)
    assert not broken
    return results.frame(rows)


def drawn(*inputs: Path) -> tuple[Figure, pd.DataFrame]:
    result = plots.draw("training_curve", table(*inputs))
    assert not isinstance(result, str), result
    return result


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for part in figure.subfigs for box in part.legends for text in box.get_texts()]


def lines(axes: Axes) -> list[tuple[str, list[tuple[float, float]]]]:
    """Colour and points of each line."""
    found = []
    for line in axes.get_lines():
        x, y = (np.asarray(part, dtype=float) for part in line.get_data())
        found.append((to_hex(line.get_color()), list(zip(x, y, strict=True))))
    return found


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["plot", *map(str, arguments), "--only", "training_curve"])


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """Logs of two machines, in the layout of results/, one of them with five seeds."""
    folder = tmp_path / "results"
    for seed in range(5):
        synthetic.write_log(folder / "h200" / "train" / f"shakespeare-seed{seed}.csv", seed=seed)
    synthetic.write_log(folder / "h200" / "train" / "stories.csv", floor=1.2)
    synthetic.write_log(folder / "cpu" / "train" / "shakespeare.csv", rate=1e4)
    return folder


def test_the_columns_are_those_of_the_training() -> None:
    """Read from the source: the measuring core imports nothing of what it measures."""
    assert training_logs.KINDS.keys() <= set(synthetic.LOG)
    source = Path(training_logs.__file__).parents[1] / "train" / "log.py"
    if source.exists():
        assert all(f'"{column}"' in source.read_text(encoding="utf-8") for column in synthetic.LOG)


def test_lines_show_the_points_and_nothing_else(committed: Path) -> None:
    figure, points = drawn(committed)
    for axes, x in zip(figure.get_axes(), ("tokens", "seconds"), strict=True):
        shown = Counter(point for _, line in lines(axes) for point in line)
        assert shown == Counter(zip(points[x].astype(float), points["value"], strict=True))
        assert len(lines(axes)) == 7 * 2


def test_points_are_those_of_the_logs(committed: Path) -> None:
    """Every one of them: these logs are short enough."""
    points = training_curve.points(table(committed))
    for label, run in {*zip(points["label"], points["run"], strict=True)}:
        with (committed / label / "train" / f"{run}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for quantity, column in ((TRAIN, "train_loss"), (VALIDATION, "val_loss")):
            chosen = points[(points["label"] == label) & (points["run"] == run) & (points["quantity"] == quantity)]
            expected = [[row[key] for key in ("step", "tokens", "seconds", column)] for row in rows if row[column]]
            assert chosen[["step", "tokens", "seconds", "value"]].to_numpy().tolist() == [
                [float(value) for value in row] for row in expected
            ]


def test_a_colour_for_each_series_and_for_each_label(committed: Path) -> None:
    figure, _ = drawn(committed)
    assert legend(figure)[-2:] == [TRAIN, VALIDATION]
    named = [text.partition(":")[0] for text in legend(figure)[:-2]]
    assert named == ["cpu · shakespeare", "h200 · shakespeare", "h200 · stories"]
    for axes in figure.get_axes():
        assert sorted(Counter(colour for colour, _ in lines(axes)).values()) == [2, 2, 10]


def test_a_labels_first_series_has_its_colour_of_the_other_pictures(committed: Path, tmp_path: Path) -> None:
    bars = results.read([synthetic.write_runs(tmp_path / "bars", runs=1, labels=("cpu", "h200", "a"))])[0]
    both = results.frame(bars + training_logs.read([committed])[0])
    curve, speed = plots.draw("training_curve", both), plots.draw("kv_curve", both)
    assert not isinstance(curve, str) and not isinstance(speed, str)
    texts = (text for axes in speed[0].get_axes() for text in axes.texts)
    tags = {text.get_text(): text.get_color() for text in texts}  # the colours, darkened
    first = [to_rgb(line.get_color()) for line in curve[0].subfigs[0].legends[0].get_lines()[:2]]
    for label, colour in zip(("cpu", "h200"), first, strict=True):
        assert tags[label] == pytest.approx([0.75 * part for part in colour])
    # Results without logs, and all other pictures of results with them.
    assert plots.draw("training_curve", results.frame(bars)) == "no training log with a loss"
    alone = plots.draw("kv_curve", results.frame(bars))
    assert not isinstance(alone, str) and alone[1].equals(speed[1])


def test_the_legend_ends_where_validation_did(committed: Path) -> None:
    figure, points = drawn(committed)
    last = points[points["quantity"] == VALIDATION].groupby(["label", "run"])["value"].last()
    seeds = [last["h200", f"shakespeare-seed{seed}"] for seed in range(5)]
    said = f"{np.median(seeds):.4f} ({min(seeds):.4f} to {max(seeds):.4f}, 5 runs)"
    assert legend(figure)[:3] == [
        f"cpu · shakespeare: {last['cpu', 'shakespeare']:.4f}",
        f"h200 · shakespeare: {said}",
        f"h200 · stories: {last['h200', 'stories']:.4f}",
    ]


def test_a_users_own_runs(tmp_path: Path) -> None:
    """Runs are named by their folders; what lies in them besides, and tables beside them, are left alone."""
    for lr in ("0.001", "0.01"):
        run = synthetic.write_log(tmp_path / "runs" / "sweep-lr" / f"lr={lr}" / "log.csv").parent
        (run / "step-00000400").mkdir()
        (run / "step-00000400" / "checkpoint.json").write_text("{}")
    (tmp_path / "runs" / "sweep-lr" / "sweep.csv").write_text("name,train_loss,val_loss,seconds\nlr=0.001,1,1,1\n")
    result = call(tmp_path / "runs", "-o", tmp_path / "plots")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        f"training_curve.{suffix}" for suffix in ("csv", "png", "svg")
    ]
    points = pd.read_csv(tmp_path / "plots" / "training_curve.csv")
    assert set(zip(points["label"], points["run"], strict=True)) == {
        *(("unlabelled", "lr=0.001"), ("unlabelled", "lr=0.01")),
    }
    # Pictures are no input, wherever they lie; runs of one name stay apart; one log is enough.
    assert len(table(tmp_path)) == len(table(tmp_path / "runs"))
    other = synthetic.write_log(tmp_path / "again" / "lr=0.01" / "log.csv")
    assert table(tmp_path)["run"].nunique() == 3
    assert call(other, "-o", tmp_path / "one").exit_code == 0
    assert call(tmp_path / "*" / "lr=0.01", "-o", tmp_path / "pattern").exit_code == 0


def test_the_same_logs_give_the_same_bytes(committed: Path, tmp_path: Path) -> None:
    written = []
    for part in ("a", "b"):
        assert call(committed, "-o", tmp_path / part).exit_code == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / part).iterdir()})
    assert written[0] == written[1] and len(written[0]) == 3


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_row_that_was_cut_short_is_left_out(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    """Wherever a kill cut the file: the whole rows are there, and a part of a number is none of them."""
    whole = synthetic.write_log(tmp_path_factory.mktemp("whole") / "run.csv", rows=3)
    header, _, body = whole.read_bytes().partition(b"\n")
    text = header + b"\n" + body[: int(share * len(body))]
    short = whole.with_name("short.csv")
    short.write_bytes(text)
    expected, _ = training_logs.read([whole])
    rows, broken = training_logs.read([short])
    kept = [row | {"run": "run", "name": "run"} for row in rows]
    assert not broken and kept == expected[: text.count(b"\n") - 1]


def test_a_broken_row_is_told_and_the_other_logs_drawn(committed: Path, tmp_path: Path) -> None:
    log = committed / "h200" / "train" / "stories.csv"
    log.write_bytes(log.read_bytes().replace(b"\r\n100,", b"\r\nnonsense,", 1))
    result = call(committed, "-o", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert str(log) in result.stderr and "line 11 " in result.stderr
    assert set(pd.read_csv(tmp_path / "out" / "training_curve.csv")["series"]) == {"shakespeare"}


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"step,tokens,seconds,train_loss\n"])
def test_a_csv_that_is_no_log(tmp_path: Path, content: bytes) -> None:
    """In a folder it is another table; named itself, one line says what was expected."""
    file = tmp_path / "in" / "other.csv"
    synthetic.write_log(tmp_path / "in" / "run.csv")
    file.write_bytes(content)
    assert call(tmp_path / "in", "-o", tmp_path / "out").exit_code == 0
    result = call(file, "-o", tmp_path / "out")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "no training log" in line and "val_loss" in line


def test_results_without_logs_and_logs_without_rows(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(synthetic.plain()))
    result = call(tmp_path, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, "training_curve: no training log with a loss\n")
    (tmp_path / "plain.json").unlink()
    synthetic.write_log(tmp_path / "run" / "log.csv", rows=0)
    result = call(tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "training logs" in result.stderr and result.stderr.count("\n") == 1


def test_long_logs_are_drawn_as_means(tmp_path: Path) -> None:
    """As many points as can be told apart; each the mean over its steps, so that the mean over all of them stays."""
    log = synthetic.write_log(tmp_path / "run.csv", rows=1000, every=20)
    rows, points = table(log), training_curve.points(table(log))
    train = points[points["quantity"] == TRAIN]
    assert len(train) <= MOST and (points["quantity"] == VALIDATION).sum() == 50
    assert train["step"].iloc[-1] == 10_000
    mean = np.average(train["value"], weights=train["step"].diff().fillna(train["step"]))
    assert math.isclose(mean, rows["train_loss"].mean(), rel_tol=1e-12)  # sums of 1000 terms in another order


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        *(("a-seed3", "a"), ("a_seed10", "a"), ("seed=3", "seed"), ("lr=0.1,seed=3", "lr=0.1")),
        *(("seed=3,lr=0.1", "lr=0.1"), ("lr=0.1,seed=3,batch=8", "lr=0.1,batch=8"), ("runs/x/seed=1", "runs/x")),
        *(("linseed5", "linseed5"), ("seed3x", "seed3x"), ("a", "a")),
    ],
)
def test_series(run: str, expected: str) -> None:
    assert training_curve.series(run) == expected


@pytest.mark.parametrize("many", [1, 12])
def test_few_points_and_many_series(tmp_path: Path, many: int) -> None:
    """A run that was validated once, runs of very different lengths, and more series than colours."""
    for i in range(many):
        synthetic.write_log(tmp_path / f"run{i}.csv", rows=1 if many == 1 else 4 * 2**i, every=1, seed=i)
    figure, _ = drawn(tmp_path)
    assert len(set(legend(figure))) == many + 2
    for axes in figure.get_axes():
        assert all(math.isfinite(end) for end in (*axes.get_xlim(), *axes.get_ylim()))
        assert axes.get_xscale() == ("log" if many > 1 else "linear")
    box = figure.subfigs[0].legends[0].get_window_extent()
    assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    texts = [axes.title.get_window_extent() for axes in figure.get_axes()]
    assert all(text.x1 <= figure.bbox.width for text in texts)
