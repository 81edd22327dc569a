"""Plots: the CSV beside a picture holds what it shows, for one label or many, one run or several."""

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from tinylm.bench import plots, points, results
from tinylm.bench.crossover import crossover
from tinylm.bench.plots import PLOTS

NAMES = [
    *("kv_curve", "kv_curve_speedup", "kv_curve_panels", "kv_time", "kv_vs_nokv", "rmsnorm"),
    *("rmsnorm_share", "rmsnorm_speedup", "vram_seq", "tokens_sec", "ablation"),
]
Drawn = dict[str, tuple[Figure, pd.DataFrame]]


def read(folder: Path) -> pd.DataFrame:
    return results.frame(results.read([folder])[0])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return read(synthetic.write_runs(tmp_path_factory.mktemp("runs"), runs=3))


@pytest.fixture(scope="module")
def drawn(table: pd.DataFrame) -> Drawn:
    found = {}
    for name in NAMES:
        result = plots.draw(name, table)
        assert not isinstance(result, str), result
        found[name] = result
    return found


def close(a: list[float], b: list[float]) -> bool:
    return bool(np.allclose(sorted(a), sorted(b), rtol=1e-12, atol=0))


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.get_axes() if axes.axison]


def test_the_plots_of_the_issue() -> None:
    assert list(PLOTS) == [*NAMES, "training_curve"]  # which has its own tests: it is not of the same table


@pytest.mark.parametrize("name", [name for name in NAMES if PLOTS[name].x])
def test_lines_show_the_points_and_nothing_else(drawn: Drawn, name: str) -> None:
    figure, points = drawn[name]
    shown = []
    for axes in panels(figure):
        bars = {id(part) for box in axes.containers if isinstance(box, ErrorbarContainer) for part in box[1]}
        for line in axes.get_lines():
            x, y = (np.asarray(part, dtype=float) for part in line.get_data())
            if id(line) not in bars and line.get_transform() == axes.transData:  # not caps, not references
                shown += list(zip(x, y, strict=True))
    expected = list(zip(points[PLOTS[name].x].astype(float), points["value"], strict=True))
    assert close([x for x, _ in shown], [x for x, _ in expected])
    assert close([y for _, y in shown], [y for _, y in expected])
    assert close([x * y for x, y in shown], [x * y for x, y in expected])


def test_a_point_is_of_the_commit_measured_last(table: pd.DataFrame) -> None:
    """Of three runs the two of one commit, whichever of the names sorts first; a cell that it lacks, of the other."""
    first, *others = sorted(table["run"].unique())
    table = table[(table["experiment"] == "rmsnorm") & (table["outcome"] == "measured")]
    lacking = (table["impl"] == "eager") & (table["run"] != first)
    for old, new in (("a", "b"), ("b", "a")):
        dated = table.assign(
            commit=np.where(table["run"] == first, old, new),
            datetime=np.where(table["run"] == first, "2026-11-01T00:00:00+00:00", "2026-11-02T00:00:00+00:00"),
        )[~lacking]
        found = points.over_runs(points.valued(points.cells(dated, "rmsnorm"), points.TIME))
        assert (found["runs"] == np.where(found["impl"] == "eager", 1, len(others))).all()
        expected = dated[dated["run"] != first].groupby(["label", "name"])["median"].median() * 1e3
        assert close(list(found[found["impl"] != "eager"]["value"]), list(expected))


@pytest.mark.parametrize("name", ["kv_vs_nokv", "tokens_sec"])
def test_bars_are_as_long_as_the_values(drawn: Drawn, name: str) -> None:
    figure, points = drawn[name]
    lengths = [bar.get_x() + bar.get_width() for axes in panels(figure) for bar in axes.patches]  # type: ignore[attr-defined]
    assert close(lengths, list(points["value"]))


@pytest.mark.parametrize("name", NAMES)
def test_error_bars_reach_from_low_to_high(drawn: Drawn, name: str) -> None:
    figure, points = drawn[name]
    look = PLOTS[name]
    if look.style == "quantity":
        points = points[~points["quantity"].isin([*look.loose, *look.unmarked])]
    ends = []
    for axes in panels(figure):
        for box in axes.containers:
            if isinstance(box, ErrorbarContainer):
                for segments in box[2]:
                    for segment in segments.get_segments():
                        ends += list(segment[:, 1 if look.x else 0])
    assert close(ends, [*points["low"], *points["high"]])


def test_spread_over_runs_is_the_lowest_and_highest_run(table: pd.DataFrame, drawn: Drawn) -> None:
    shown = drawn["tokens_sec"][1]
    rows = points.cells(table, "decode")
    for point in shown[shown["quantity"] == "speed"].to_dict("records"):
        keys = ("label", "impl", "dtype", "phase", "preset", "batch")
        chosen = np.logical_and.reduce([rows[key] == point[key] for key in keys])
        same = rows[chosen]["tokens_per_s"]
        assert (point["value"], point["low"], point["high"]) == (same.median(), same.min(), same.max())
        assert point["runs"] == len(same) == 3


def test_each_side_of_the_cache_is_its_fastest_runner_and_where_they_cross_is_marked(
    table: pd.DataFrame, drawn: Drawn
) -> None:
    shown, rows = drawn["kv_time"][1], points.cells(table, "kv_cache")
    keys = ["label", "preset", "dtype", "context", "cache"]
    medians = rows.groupby([*keys, "impl"])["median"].median() * 1e3
    sides = shown[shown["quantity"] != points.CROSSOVER]
    assert len(sides) == len(medians.groupby(keys).min())
    for point in sides.to_dict("records"):
        runners = medians[tuple(point[key] for key in keys)]
        assert point["value"] == runners.min() and point["impl"] == runners.idxmin()
    marks = shown[shown["quantity"] == points.CROSSOVER].set_index(["label", "preset", "dtype"])
    for setting, side in sides.groupby(["label", "preset", "dtype"]):
        both = (side[side["cache"] == cache].set_index("context")["value"] for cache in points.SIDES)
        ours, theirs = ({int(n): value for n, value in part.items()} for part in both)
        length, value = marks.loc[setting, ["context", "value"]]
        assert (round(crossover(ours, theirs)[0]), crossover(ours, theirs)[1]) == (int(length), value)  # type: ignore[index]


def test_a_context_without_the_runner_that_is_fastest_elsewhere_is_left_out() -> None:
    """And what is slower at a shorter context than at a longer one, with the other runner there, stays; what lies
    between two contexts of another runner does not."""
    times = {
        ("fused", 128): 5.2, ("graph", 128): 5.1, ("graph", 256): 20.0, ("fused", 512): 5.0, ("graph", 512): 30.0,
        ("compile", 1024): 6.0, ("graph", 2048): 20.0, ("compile", 4096): 24.0,
    }  # fmt: skip
    line = pd.DataFrame([{"impl": impl, "context": str(n), "value": value} for (impl, n), value in times.items()])
    fastest = line.loc[line.groupby("context")["value"].idxmin()]
    left = [row["context"] for _, row in fastest.iterrows() if not points.beaten(row, fastest, line)]
    assert sorted(left, key=int) == ["128", "512", "1024", "4096"]


def test_the_time_to_the_first_token_stands_beside_the_speeds(table: pd.DataFrame, drawn: Drawn) -> None:
    shown, rows = drawn["tokens_sec"][1], points.cells(table, "decode")
    first = shown[shown["quantity"] == points.FIRST_TOKEN.text]
    assert set(first["phase"]) == {"prefill"}
    prefills = rows[rows["phase"] == "prefill"].groupby(["label", "preset", "dtype", "batch"])["median"].median() * 1e3
    assert close(list(first["value"]), list(prefills))


def test_of_one_run_the_samples_quartiles_are_shown(tmp_path: Path) -> None:
    table = read(synthetic.write_runs(tmp_path, runs=1, labels=("cpu",)))
    (row,) = table[table["fullname"].str.contains("test_decode[decode-nano-fp32-1-", regex=False)].to_dict("records")
    points = PLOTS["tokens_sec"].points(table)
    point = points[(points["phase"] == "decode") & (points["preset"] == "nano") & (points["batch"] == "1")].iloc[0]
    rate = row["tokens_per_s"] * row["median"]
    assert point["low"] == pytest.approx(rate / row["q3"]) and point["high"] == pytest.approx(rate / row["q1"])
    assert set(points["spread"]) == {"quartiles of the samples"}


def test_ratios_are_taken_within_a_run(tmp_path: Path) -> None:
    """A run that is slow as a whole changes no ratio."""
    folder = synthetic.write_runs(tmp_path / "a", runs=2, labels=("h200",))
    before = PLOTS["ablation"].points(read(folder))
    path = folder / "h200" / "main" / "20261120T0512Z.json"
    document = json.loads(path.read_text())
    for cell in document["benchmarks"]:
        cell["stats"] = {k: v * 7 if isinstance(v, float) else v for k, v in cell["stats"].items()}
    path.write_text(json.dumps(document))
    after = PLOTS["ablation"].points(read(folder))
    relative = before["quantity"] == "speed relative to torch"
    assert relative.any() and not relative.all()
    assert np.allclose(after[relative]["value"], before[relative]["value"], rtol=1e-12)
    assert not np.allclose(after[~relative]["high"], before[~relative]["high"])


def test_rmsnorm_lines_hold_inputs_of_one_size(drawn: Drawn) -> None:
    """The largest that every backend has: not 2 GiB, which eager was not measured at; and no other op."""
    for name in ("rmsnorm", "rmsnorm_speedup"):
        _, points = drawn[name]
        elements = points["rows"].astype(float) * points["hidden"].astype(float)
        mib = elements * points["dtype"].map(synthetic.WIDTH) / 2**20
        assert {label: set(part.round()) for label, part in mib.groupby(points["label"])} == {
            "h200": {512},
            "cpu": {16},
        }
        assert set(points["direction"]) == {"forward", "backward"} and set(points["op"]) == {"rmsnorm"}


def test_the_share_of_copy_has_a_colour_for_each_backend(drawn: Drawn, tmp_path: Path) -> None:
    """Of labels with bf16 inputs of 0.5 GiB alone, one line of panels each; odd hidden sizes are not joined."""
    figure, points = drawn["rmsnorm_share"]
    assert set(points["label"]) == {"h200"} and set(points["hidden"]) >= {"256", "1001", "50257", "65536"}
    legend = {text.get_text(): line for text, line in legend_of(figure)}
    assert list(legend) == ["eager", "torch", "compile", "cuda", "liger"]
    assert len({line.get_color() for line in legend.values()}) == 5
    assert {line.get_linestyle() for line in legend.values()} == {"-"}
    joined = [line for axes in panels(figure) for line in axes.get_lines() if line.get_linestyle() == "-"]
    hidden = {float(x) for line in joined for x in np.asarray(line.get_xdata(), dtype=float) if x > 1}
    assert hidden == {float(x) for x in points["hidden"]} - {1001, 50257}
    two = read(synthetic.write_runs(tmp_path, runs=1, labels=("h200", "rtx-4090", "cpu")))
    result = plots.draw("rmsnorm_share", two)
    assert not isinstance(result, str)
    titles = [axes.get_title(loc="left") for axes in panels(result[0])]
    assert titles == [f"{way} · {label}" for label in ("h200", "rtx-4090") for way in ("forward", "backward")]


def legend_of(figure: Figure) -> list[Any]:
    legends = [legend for part in figure.subfigs for legend in part.legends]
    return [pair for legend in legends for pair in zip(legend.get_texts(), legend.get_lines(), strict=True)]


def test_out_of_memory_is_a_mark_at_its_prediction(drawn: Drawn) -> None:
    figure, points = drawn["vram_seq"]
    out = points[points["quantity"] == "out of memory"]
    assert len(out) and set(out["label"]) == {"h200", "cpu"}
    marks: list[float] = []
    for line in itertools.chain.from_iterable(axes.get_lines() for axes in panels(figure)):
        if line.get_marker() == "x":
            marks += np.asarray(line.get_ydata(), dtype=float).tolist()
    assert close(marks, list(out["value"]))


def test_logarithmic_where_values_span_decades(drawn: Drawn) -> None:
    assert {axes.get_yscale() for axes in panels(drawn["kv_curve_panels"][0])} == {"log"}
    assert {axes.get_yscale() for axes in panels(drawn["vram_seq"][0])} == {"log"}
    # Bars whose lengths are compared start at zero.
    for axes in panels(drawn["kv_vs_nokv"][0]):
        assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0


def test_a_label_looks_the_same_in_every_picture(drawn: Drawn) -> None:
    looks: dict[str, set[Any]] = {}
    for name in ("kv_curve", "kv_curve_speedup", "rmsnorm", "rmsnorm_speedup"):
        figure, _ = drawn[name]
        for axes in panels(figure):
            for text in axes.texts:
                looks.setdefault(text.get_text(), set()).add(tuple(text.get_color()))
    assert set(looks) == {"h200", "cpu"}
    assert all(len(colours) == 1 for colours in looks.values()) and looks["h200"] != looks["cpu"]


@pytest.mark.parametrize("name", NAMES)
def test_no_text_overlaps(drawn: Drawn, name: str) -> None:
    """Titles, tick labels, values and tags: what is written is not written over."""
    figure, _ = drawn[name]
    figure.draw_without_rendering()
    boxes = []
    for axes in panels(figure):
        texts = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # type: ignore[attr-defined]
        low, high = sorted(axes.get_xlim())
        texts += [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        low, high = sorted(axes.get_ylim())
        texts += [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes += [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for i, (text, box) in enumerate(boxes):
        for other, beside in boxes[i + 1 :]:
            width = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            height = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            assert width <= 1 or height <= 2, f"{text!r} over {other!r}"
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width + 1, f"{text!r} is cut off"


def test_files_are_whole_equal_to_the_points_and_the_same_each_time(
    drawn: Drawn, table: pd.DataFrame, tmp_path: Path
) -> None:
    written: list[dict[str, bytes]] = []
    for part in ("a", "b"):
        ((name, paths, reason),) = plots.save(table, tmp_path / part, ["kv_vs_nokv"])
        assert (name, reason) == ("kv_vs_nokv", "")
        assert sorted(path.suffix for path in paths) == [".csv", ".png", ".svg"]
        assert sorted(paths) == sorted((tmp_path / part).iterdir())
        written.append({path.suffix: path.read_bytes() for path in paths})
    assert written[0] == written[1], "the same numbers give the same bytes"
    assert written[0][".png"].startswith(b"\x89PNG") and b"<svg" in written[0][".svg"]
    _, points = drawn["kv_vs_nokv"]
    rows = list(csv.DictReader(written[0][".csv"].decode().splitlines()))
    assert [float(row["value"]) for row in rows] == list(points["value"])
    assert [[row[key] for key in ("label", "cache", "impl")] for row in rows] == points[
        ["label", "cache", "impl"]
    ].to_numpy().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_draw_says_why(name: str) -> None:
    reason = plots.draw(name, results.frame([]))
    assert isinstance(reason, str) and reason and "\n" not in reason


@pytest.mark.parametrize("name", NAMES)
def test_plain_files_and_lone_outcomes_draw_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(synthetic.plain()))
    assert isinstance(plots.draw(name, read(tmp_path)), str)


def test_many_labels_and_a_cpu_alone_are_drawn(tmp_path: Path) -> None:
    labels = ("h200", "rtx-4090", "rtx-2070-max-q", "gh200-480gb")
    table = read(synthetic.write_runs(tmp_path / "many", runs=1, labels=labels))
    for part in (table, read(synthetic.write_runs(tmp_path / "one", runs=1, labels=("cpu",)))):
        for name in ("kv_curve_panels", "kv_vs_nokv", "ablation"):
            result = plots.draw(name, part)
            assert not isinstance(result, str)
            assert set(result[1]["label"]) == set(part["label"])


@pytest.mark.parametrize("changes", [{"context": 512}, {"context": 512, "cache": "dense"}])
def test_a_single_point_is_drawn(table: pd.DataFrame, changes: dict[str, Any]) -> None:
    rows = table[np.logical_and.reduce([table[key] == value for key, value in changes.items()])]
    result = plots.draw("kv_curve", rows)
    assert not isinstance(result, str)
    assert all(math.isfinite(end) for axes in panels(result[0]) for end in (*axes.get_xlim(), *axes.get_ylim()))
