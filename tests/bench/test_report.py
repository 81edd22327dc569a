"""The report: what the page holds, of full records, and of old, foreign, hostile and empty ones."""

import base64
import gzip
import html
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recorded
import synthetic
from typer.testing import CliRunner

from tinylm.bench import cli, plots, report, results
from tinylm.bench.page import charts, commands, sections, sheet, trust

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }} ${1} `x`; rm -rf /\u2028"


ABLATION = plots.PLOTS["ablation"]


@pytest.fixture(scope="module", autouse=True)
def few_plots() -> Iterator[None]:
    """Drawing takes seconds: one picture stands for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PLOTS", {"kv_vs_nokv": plots.PLOTS["kv_vs_nokv"]})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded.write(tmp_path_factory.mktemp("report") / "results")


@pytest.fixture(scope="module")
def made(folder: Path, few_plots: None) -> dict[str, Any]:
    return report.context(results.documents([folder])[0], results.calibrations([folder]))


@pytest.fixture(scope="module")
def text(made: dict[str, Any]) -> str:
    return report.render(made)


def seen(*documents: dict[str, Any], label: str = "cpu") -> dict[str, Any]:
    """The context of these documents, each a run."""
    runs = [({"label": label, "suite": "main", "run": f"run-{i}"}, made) for i, made in enumerate(documents)]
    return report.context(runs, {})


def data(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def column(table: dict[str, Any], key: str) -> list[Any]:
    at = [part["key"] for part in table["columns"]].index(key)
    return [row[at] for row in table["rows"]]


def test_the_same_input_gives_the_same_bytes(folder: Path, text: str) -> None:
    assert report.page([folder]) == (text, [])


def test_nothing_is_asked_of_the_network(text: str) -> None:
    outside = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    links = re.findall(r'(?:src|href)="([^"]*)"', outside)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in html.unescape(text)
    packed = re.search(r'id="plotly">([^<]*)<', text)
    assert packed and b"plotly.js" in gzip.decompress(base64.b64decode(packed[1]))[:200]


def test_every_picture_has_words_from_its_numbers(text: str) -> None:
    alternatives = [html.unescape(alt) for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text)]
    assert len(alternatives) == 1 and text.count("<figcaption") == text.count('<figure class="figure"') > 5
    assert all("with KV cache" in alt and "h200 from" in alt for alt in alternatives)
    for picture in re.findall(r'<img src="data:image/webp;base64,([^"]*)"', text):
        assert base64.b64decode(picture)[8:12] == b"WEBP"


def test_captions_name_the_lowest_and_the_highest_point(folder: Path) -> None:
    table = results.frame(results.read([folder])[0])
    points = ABLATION.points(table)
    (said, *_) = charts.caption(ABLATION, points)
    times = points[(points["quantity"] == "time") & (points["label"] == "h200")]["value"]
    for end in (times.min(), times.max()):
        assert charts.amount(end, "ms") in said


def test_tables_hold_the_median_over_runs(folder: Path, text: str) -> None:
    rows, _ = results.read([folder])
    table = data(text)["tables"]["cells-rmsnorm"]
    cells = set(zip(column(table, "label"), column(table, "cell"), strict=True))
    assert len(cells) == len(table["rows"])
    assert cells == {(row["label"], sheet.cell(row)) for row in rows if row["experiment"] == "rmsnorm"}
    for label, cell, median, span in list(
        zip(*(column(table, k) for k in ("label", "cell", "median", "span")), strict=True)
    )[::29]:
        times = [
            r["median"] for r in rows if (r["label"], sheet.cell(r)) == (label, cell) and r["outcome"] == "measured"
        ]
        if times:
            assert median == pytest.approx(sum(times) / 2) and span == [min(times), max(times)]
        else:
            assert median is None and span is None


def test_a_line_is_of_the_commit_measured_last(folder: Path) -> None:
    """Without what an earlier commit measured or failed at; a cell that the later one only skipped is the earlier's."""
    rows, _ = results.read([folder])
    first = next(row for row in rows if row["outcome"] == "measured")
    old = {**first, "commit": "b", "datetime": "2026-11-01T00:00:00+00:00"}
    new = {**first, "commit": "a", "datetime": "2026-11-02T00:00:00+00:00", "median": 3 * first["median"]}
    failed = {**old, "outcome": "failed", "reason": "as it was"}
    for order in ([old, failed, new], [new, failed, old]):
        (line,) = sheet.lines(order)
        assert (line["median"], line["runs"], line["reason"]) == (new["median"], 1, None)
    (line,) = sheet.lines([old, {**new, "outcome": "skipped", "reason": "no time"}])
    assert (line["median"], line["outcome"], line["reason"]) == (old["median"], "measured", None)
    (line,) = sheet.lines([failed, {**new, "outcome": "skipped", "reason": "no time"}])
    assert (line["outcome"], line["reason"]) == ("skipped", "no time")


def test_new_keys_are_shown(text: str) -> None:
    tables, drawn = data(text)["tables"], data(text)["charts"]
    keys = {part["key"] for part in tables["cells-ablation"]["columns"]}
    assert {"ci_width", "verdict", "ratio_span", "versus", "stop_reason", "sm_clock_hz", "flagged"} <= keys
    assert {"energy_j", "energy_per_token_j"} <= {part["key"] for part in tables["cells-decode"]["columns"]}
    assert len(tables["verdicts"]["rows"]) == len(drawn["verdicts"]["points"]) == 10
    assert set(column(tables["flagged"], "kept")) == {"yes", "no"}
    assert [phase for phase, _ in drawn["wall"]["phases"]] == list(recorded.document("cpu")["wall_s"])
    assert {point["mode"] for point in drawn["calibration-0"]["points"]} == {"cold", "graph", "hot"}
    assert "Not calibrated: cpu" in text and "<code>tinylm-bench calibrate</code>" in text
    assert (
        "called different in 0.3 % of 1,000 pairs (960 equivalent, 37 inconclusive)" in text
        and "caught in 99.5 % of 200 pairs" in text
    )
    assert "sw_power_cap in " in text and "wrong result: error 0.3" in text


def test_a_roof_is_the_measured_ceiling(folder: Path) -> None:
    rows, _ = results.read([folder])
    roof = sections.roofs([row for row in rows if row["label"] == "h200"])
    assert roof["bytes"] == synthetic.COPY["h200"] and roof["flops"] == {"bf16": 780e12, "fp16": 780e12, "fp32": 50e12}
    lines = sheet.lines(rows)
    found = sections.roofline(lines, rows, ["cpu", "h200"])
    placed = [line for line in lines if line["label"] == "h200" and line.get("intensity")]
    assert placed and f"h200: {len(placed)} cells" in " ".join(found["said"])
    assert all(line["intensity"] == line["flops"] / line["bytes"] for line in placed)


def test_colours_are_apart_from_their_surface() -> None:
    labels = [f"card-{i}" for i in range(12)]
    for pen in charts.pens(labels):
        for name, surface in charts.SURFACES.items():
            colour = tuple(int(pen[name][i : i + 2], 16) / 255 for i in (1, 3, 5))
            light, dark = sorted((charts._luminance(colour), charts._luminance(surface)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > charts.CONTRAST[name] - 0.05
    style = Path(report.__file__).with_name("page").joinpath("style.css").read_text()
    for surface in charts.SURFACES.values():
        assert f"--surface: {charts._hex(surface)};" in style
    few = charts.pens(["a", "b"])
    assert few == charts.pens(["a", "b", "c"])[:2], "a label keeps its colour when another comes"


def test_commands_name_commit_label_and_what_is_restricted(made: dict[str, Any]) -> None:
    (figure,) = (f for e in made["experiments"] for f in e["figures"] if f["name"] == "kv_vs_nokv")
    told = dict(figure["commands"])
    assert told["cpu"] == (
        "git checkout 0123abc\n"
        "tinylm-bench run benchmarks/bench_kv_cache.py --gpu-label cpu --device cpu --presets tiny --contexts 512"
    )
    assert told["h200"].endswith("--gpu-label h200 --dtypes fp32 --contexts 512")
    alone = {e["name"]: e["one_cell"] for e in made["experiments"]}
    assert alone["vram"].startswith("pytest 'benchmarks/bench_vram.py::test_vram[")


# --- what is not as it should be ---


def test_old_files_without_the_new_keys(tmp_path: Path) -> None:
    text, _ = report.page([synthetic.write_runs(tmp_path / "results", runs=1, labels=("cpu",))])
    for absent in (
        "No run recorded a comparison",
        "Not calibrated: cpu",
        "did not watch the clock",
        "Not recorded in cpu",
    ):
        assert absent in text
    assert "No cell declared both" in text


@pytest.mark.parametrize("section", ["skipped", "failed"])
def test_cells_that_never_ran(section: str) -> None:
    cell = synthetic.named("rmsnorm", {"impl": "cuda", "hidden": 1}) | {"reason": "needs a GPU " * 90}
    made = seen({"benchmarks": [], section: [cell]})
    (group,) = made["missing"]
    assert (group["outcome"], group["reason"]) == (section, ("needs a GPU " * 90).strip())
    (entry,) = made["experiments"]
    assert column(entry["table"], "outcome") == [section] and not entry["figures"]


def test_other_suites_and_empty_files(tmp_path: Path) -> None:
    made = seen(synthetic.plain(), {"benchmarks": []}, label="mine")
    (entry,) = made["experiments"]
    assert entry["name"] == "test_sort" and {"n", "shape"} <= {part["key"] for part in entry["table"]["columns"]}
    assert entry["commands"] == [("mine", "git checkout 0123abc  # and changes that were not committed\n"
        "pytest tests/test_sort.py --benchmark-json=FILE")]  # fmt: skip
    (tmp_path / "empty.json").write_text('{"benchmarks": []}')
    assert "No cell is recorded" in report.page([tmp_path])[0]


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    made = recorded.document("cpu")
    made["machine_info"]["label"] = HOSTILE
    made["machine_info"]["device"] = {"name": HOSTILE, "type": "cuda"}
    made["null_reasons"] = made["wall_s"] = {HOSTILE: 1.0}
    for cell in made["benchmarks"] + made["skipped"]:
        cell["params"]["impl"] = cell["reason"] = HOSTILE
        cell["fullname"] = f"benchmarks/bench_{HOSTILE}.py::{HOSTILE}{cell['name']}"
        cell["extra_info"] = cell.get("extra_info", {}) | {"verdict": HOSTILE, "ratio": 2.0, "throttle": [HOSTILE]}
    (tmp_path / "it.json").write_text(json.dumps(made))
    (tmp_path / "calibration.json").write_text(json.dumps(recorded.calibration(HOSTILE)))
    text, broken = report.page([tmp_path])
    assert not broken and "<img src=x" not in text and "alert(1)</script>" not in text and "{{ 7*7 }}" in text
    assert len(re.findall(r"<script", text)) == 3
    assert {pen["label"] for pen in data(text)["pens"]} == {HOSTILE}
    again = commands.command(HOSTILE, [], [({"label": HOSTILE}, made)], {"preset": [HOSTILE]})
    assert shlex.split(again)[-4:] == ["--gpu-label", HOSTILE, "--presets", HOSTILE]


def test_values_that_json_should_not_have(tmp_path: Path) -> None:
    made = recorded.document("h200")
    for i, cell in enumerate(made["benchmarks"]):
        wrong = (float("nan"), float("inf"), "text", None, [1], True)[i % 6]
        cell["extra_info"] |= dict.fromkeys(
            ("bytes", "flops_per_s", "error", "sm_clock_hz", "ratio", "flagged_blocks"), wrong
        )
    made |= {"wall_s": {"work": float("nan"), "import": "long"}, "null_reasons": [], "commit_info": None}
    (tmp_path / "it.json").write_text(json.dumps(made))
    (tmp_path / "calibration.json").write_text(
        '{"calibration": 1, "modes": [{"kernel": 1, "cold_s": "x"}, 3], "pairs": []}'
    )
    text, broken = report.page([tmp_path])
    assert not broken and data(text)["tables"]


def test_medians_of_a_calibration_that_lacks_sections() -> None:
    made = trust.calibration("h200", {"calibration": 1})
    assert not made["tables"] and not made["said"] and not made["points"]


# --- the command ---


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def test_the_command_writes_one_file_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(synthetic.plain()))
    result = call(tmp_path / "plain.json", "-o", tmp_path / "site")
    assert result.exit_code == 0 and result.stdout.startswith(str(tmp_path / "site" / "index.html"))
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]
    assert (tmp_path / "site" / "index.html").read_text(encoding="utf-8").endswith("</html>")


def test_broken_files_are_named_on_the_page_too(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(synthetic.plain()))
    (tmp_path / "broken.json").write_text("{")
    result = call(tmp_path, "-o", tmp_path / "site")
    assert result.exit_code == 1 and "not valid JSON" in result.stderr
    assert "not valid JSON" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "good.json").write_text(json.dumps(synthetic.plain()))
    for arguments, said in (
        (["nowhere"], "no such file or folder"),
        ([tmp_path / "good.json", "-o", tmp_path / "file"], "cannot be written"),
    ):
        result = call(*arguments)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and said in line and line.startswith("tinylm-bench report: ")
