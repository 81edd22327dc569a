"""Results to one self-contained page: tables, pictures, interactive charts, and how to measure each of them again.

The page asks nothing of the network: style, scripts, pictures, data and Plotly are inside the file, and its content
security policy lets nothing else run. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from plotly.offline import get_plotlyjs

from tinylm.bench import picture, plots, results
from tinylm.bench.look import words
from tinylm.bench.page import charts, commands, sections, sheet, trust
from tinylm.bench.page.sheet import Line, number

SCRIPTS = ("format.js", "tables.js", "theme.js", "charts.js", "page.js")  # in the order in which they need each other
DPI = 150
# Experiments by name: title, and what is measured. Others go by their name alone.
ABOUT = {
    "rmsnorm": (
        "RMSNorm",
        "One operation of the model by itself: each row is divided by its root mean square. It does little arithmetic, "
        "so that it can run no faster than memory; the share of the copy ceiling says how near it comes.",
    ),
    "kv_cache": (
        "KV cache",
        "Time per token with and without a cache of keys and values. Without one, every new token reads the whole "
        "text before it again; with one, the work per token hardly grows with the context.",
    ),
    "vram": (
        "Memory",
        "What a model and its cache take, measured in a fresh process each, beside what weights and cache should take. "
        "A cell that ran out of memory is a result too: it stands at its predicted size.",
    ),
    "decode": (
        "Decoding and prefill",
        "Tokens per second: prefill reads a prompt all at once, decoding makes one token after another.",
    ),
    "ablation": (
        "Ablation",
        "The RMSNorm backend swapped in the whole model, all else equal: what a faster kernel is worth there.",
    ),
}


def write(inputs: Iterable[str | Path], folder: Path) -> tuple[Path, list[str]]:
    """The page of all files that `inputs` name, as index.html in `folder`; and one line for each broken file."""
    text, broken = page([*inputs])
    path = folder / "index.html"
    results.write_atomically(path, text)
    return path, broken


def page(inputs: Sequence[str | Path]) -> tuple[str, list[str]]:
    """The page as text, and one line for each broken file. Raises BadInput where there is no file."""
    documents, broken = results.documents(inputs)
    return render(context(documents, results.calibrations(inputs), broken)), broken


def render(seen: Mapping[str, Any]) -> str:
    """A context as HTML, with style, scripts and Plotly in it."""
    environment = Environment(
        loader=PackageLoader("tinylm.bench", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"plural": sections.count, "per_s": charts.prefixed}
    files = resources.files("tinylm.bench.page")
    script = "".join(files.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    library = get_plotlyjs()
    # Hashes instead of 'unsafe-inline': nothing that came with the data could run, even if it got into the page.
    hashes = " ".join(f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'" for text in (script, library))
    return environment.get_template("page.html").render(
        **seen,
        style=files.joinpath("style.css").read_text(encoding="utf-8"),
        script=script,
        plotly=_base64(gzip.compress(library.encode(), mtime=0)),
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def context(
    documents: sections.Documents, calibrations: Mapping[str, Mapping[str, Any]], broken: Sequence[str] = ()
) -> dict[str, Any]:
    """What the template shows, all of it plain data; `data` is what the scripts get."""
    rows = results.current([row for run, document in documents for row in results.rows_of(dict(document), run)])
    lines, table = sheet.lines(rows), results.frame(rows)
    labels = sorted({row["label"] for row in rows})
    labels += sorted({run["label"] for run, _ in documents} | calibrations.keys() - set(labels) - {""})
    labels = list(dict.fromkeys(labels))
    pens = charts.pens(labels)
    figures = _figures(table, lines, documents, labels)
    experiments = [_experiment(name, lines, documents, labels, figures) for name in _order(lines)]
    seen: dict[str, Any] = {
        "pens": pens,
        "machines": sections.machines(documents, rows, pens),
        "experiments": experiments,
        "glance": _glance(experiments, lines, labels),
        "roofline": sections.roofline(lines, rows, labels),
        "telemetry": trust.telemetry(lines, rows, labels),
        "verdicts": trust.verdicts(lines, labels),
        "calibrations": [trust.calibration(label, calibrations[label]) for label in labels if label in calibrations],
        "uncalibrated": [label for label in labels if label not in calibrations],
        "missing": sections.missing(documents),
        "wall": sections.wall(documents),
        "broken": list(broken),
        "measured": sum(line["outcome"] == "measured" for line in lines),
        "days": sorted({str(document.get("datetime") or "")[:10] for _, document in documents} - {""}),
        "runs": len(documents),
    }
    return seen | {"data": _data(seen, lines)}


def _order(lines: Sequence[Line]) -> list[str]:
    """Known experiments first, in the order of ABOUT."""
    present = {line["experiment"] for line in lines}
    return [*(name for name in ABOUT if name in present), *sorted(present.difference(ABOUT))]


def _experiment(
    name: str, lines: Sequence[Line], documents: sections.Documents, labels: Sequence[str], figures: Sequence[Line]
) -> dict[str, Any]:
    own = [line for line in lines if line["experiment"] == name]
    title, about = ABOUT.get(name, (name, ""))
    return {
        "name": name,
        "title": title,
        "about": about,
        "outcomes": _outcomes(own),
        "said": sections.memory(own, labels),
        "figures": [figure for figure in figures if figure["experiment"] == name],
        "table": sheet.table(own, f"cells-{name}", f"Cells of {title}"),
        "commands": commands.for_labels(labels, own, documents),
        "one_cell": commands.one_cell(own),
    }


def _figures(
    table: pd.DataFrame, lines: Sequence[Line], documents: sections.Documents, labels: Sequence[str]
) -> list[Line]:
    """Every picture that has something to show: drawn, as a chart's data, and in words."""
    found = []
    for name, plot in plots.PLOTS.items():
        drawn = plots.draw(name, table)
        if isinstance(drawn, str):
            continue
        figure, points = drawn
        # A picture belongs to the experiment whose rows alone give points.
        parts = ((line, table[table["experiment"] == line]) for line in _order(lines))
        owner = next((name for name, part in parts if not plot.points(part).empty), _order(lines)[0])
        image, (width, height) = _image(figure)
        own = [line for line in lines if line["experiment"] == owner]
        found.append(
            {
                "name": name,
                "experiment": owner,
                "title": plot.title,
                "said": charts.caption(plot, points),
                "notes": [picture.spread_words(points), *filter(None, plot.note.split("\n"))],
                "image": image,
                "width": width,
                "height": height,
                "chart": charts.chart(plot, points),
                "gains": charts.gains(plot, points),
                "commands": commands.for_labels(labels, own, documents, points, plot.ignore),
            }
        )
    return found


def _image(figure: Any) -> tuple[str, tuple[int, int]]:
    """A data URI and its size in pixels. Lossless WebP is a third of PNG's size."""
    out = io.BytesIO()
    with rc_context(plots.STYLE):
        figure.savefig(out, format="webp", dpi=DPI, pil_kwargs={"lossless": True})
    width, height = figure.get_size_inches() * DPI
    return f"data:image/webp;base64,{_base64(out.getvalue())}", (round(width), round(height))


def _glance(experiments: Sequence[Line], lines: Sequence[Line], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Per experiment and label: how many cells, and the best of them."""
    found = []
    for entry in experiments:
        gains = [figure["gains"] for figure in entry["figures"] if figure["gains"]]
        for i, label in enumerate(labels):
            own = [line for line in lines if line["experiment"] == entry["name"] and line["label"] == label]
            if own:
                # Prefill and training make many tokens at once: their rates are no speed of decoding.
                decoding = [line for line in own if line["params"].get("phase", "decode") == "decode"]
                best = {"of_ceiling": _best(own, "of_ceiling"), "tokens_per_s": _best(decoding, "tokens_per_s")}
                best["gain"] = gains[0].get(label) if gains else None
                found.append({"name": entry["name"], "title": entry["title"], "pen": i, **_outcomes(own), **best})
    return found


def _best(lines: Sequence[Line], key: str) -> tuple[float, str] | None:
    known = [line for line in lines if number(line[key])]
    best = max(known, key=lambda line: line[key], default=None)
    if best is None:
        return None
    varying = [name for name in best["params"] if len({str(line["params"].get(name)) for line in lines}) > 1]
    return best[key], ", ".join(words(name, str(best["params"][name])) for name in varying)


def _outcomes(lines: Sequence[Line]) -> dict[str, int]:
    return {o: sum(line["outcome"] == o for line in lines) for o in ("measured", "skipped", "failed")}


def _data(seen: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, Any]:
    """Tables and charts by name. Roofline and telemetry are drawn from the experiments' tables."""
    tables = [entry["table"] for entry in seen["experiments"]]
    tables += [seen["verdicts"]["table"], seen["wall"]["table"]]
    tables += [sheet.listing("flagged", "Blocks below the steady clock", trust.BLOCKS, seen["telemetry"]["flagged"])]
    drawn: dict[str, Any] = {f["name"]: f["chart"] for entry in seen["experiments"] for f in entry["figures"]}
    drawn["roofline"] = {"form": "roofline", "title": "Roofline", "roofs": seen["roofline"]["roofs"]}
    drawn["telemetry"] = {"form": "telemetry", "title": "Telemetry", "readings": seen["telemetry"]["readings"]}
    drawn["verdicts"] = {"form": "ranks", "title": "Ratios inside runs", "points": seen["verdicts"]["points"]}
    wall = seen["wall"]
    bars = [{key: row[key] for key in ("label", "run", "phases")} for row in wall["rows"]]
    drawn["wall"] = {"form": "stack", "title": "Wall time", "rows": bars}
    drawn["wall"]["phases"] = [*zip(wall["phases"], charts.shades(len(wall["phases"])), strict=True)]
    for i, entry in enumerate(seen["calibrations"]):
        for part in entry["tables"]:
            part["name"] = f"calibration-{i}-{part['name']}"
            tables.append(part)
        chart = {"form": "calibration", "title": f"Calibration of {entry['label']}", "points": entry["points"]}
        drawn[f"calibration-{i}"] = chart | {"label": entry["label"], "gate": trust.GATE}
    return {"pens": seen["pens"], "tables": {part["name"]: part for part in tables}, "charts": drawn}
