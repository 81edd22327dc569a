"""The points of a picture as an interactive chart's data, and in words: what the chart shows, said from its numbers.

A chart shows one panel of a picture at a time; the parameters that tell panels apart are its *facets*, chosen by the
reader. Colours, marks and dashes are those of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns

from tinylm.bench import look, marks
from tinylm.bench.look import SPOKEN, Look, ordered, words

# matplotlib's marks in Plotly's words, and as characters for legends in text.
SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
SYMBOLS |= {"X": "x", "<": "triangle-left", ">": "triangle-right"}
CHARACTERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶"}
PATTERNS = {"": "", "////": "/", "....": ".", "xxxx": "x", "\\\\\\\\": "\\", "++++": "+", "----": "-"}
SURFACES = {"light": (1.0, 1.0, 1.0), "dark": (0.071, 0.086, 0.106)}  # as in style.css
# WCAG 1.4.11 asks 3 of a mark against its surface; thin lines on a dark one need more to be told apart.
CONTRAST = {"light": 3.0, "dark": 4.5}
Colour = tuple[float, float, float]


def pens(labels: Sequence[str]) -> list[dict[str, Any]]:
    """Each label's colour on both surfaces, mark and dashes; the same in every chart of the page."""
    colours = sns.color_palette("colorblind", max(len(labels), 1))
    found = []
    for i, label in enumerate(labels):
        marker = look.MARKERS[i % len(look.MARKERS)]
        pen: dict[str, Any] = {"label": label, "index": i, "dash": dash(i)}
        pen |= {"symbol": SYMBOLS[marker], "character": CHARACTERS[marker]}
        found.append(
            pen | {name: _hex(readable(colours[i], surface, CONTRAST[name])) for name, surface in SURFACES.items()}
        )
    return found


def shades(count: int) -> list[str]:
    """Colours of parts of a whole, apart from the labels': told apart by lightness, so by everyone."""
    return [_hex(colour) for colour in sns.color_palette("cividis", count)]


def readable(colour: Colour, surface: Colour, contrast: float) -> Colour:
    """The colour, moved towards black or white until it has this contrast against the surface."""
    end = 0.0 if _luminance(surface) > 0.5 else 1.0
    for step in range(21):
        mixed = tuple(part + (end - part) * step / 20 for part in colour)
        light, dark = sorted((_luminance(mixed), _luminance(surface)), reverse=True)
        if (light + 0.05) / (dark + 0.05) >= contrast:
            break
    return mixed  # type: ignore[return-value]


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{round(part * 255):02x}" for part in colour)


def dash(rank: int) -> str:
    """matplotlib's dashes in Plotly's words: lengths in pixels."""
    lengths = look.DASHES[rank % len(look.DASHES)]
    return "solid" if isinstance(lengths, str) else ",".join(f"{2.5 * length:g}px" for length in lengths[1])


# --- a chart ---


def chart(plot: Look, points: pd.DataFrame) -> dict[str, Any]:
    """What the page's script needs to draw these points."""
    varying = [key for key in SPOKEN if key in points and key not in plot.ignore and points[key].nunique() > 1]
    styled = plot.style if plot.style in points and points[plot.style].nunique() > 1 else ""
    free = [key for key in varying if key not in {plot.x, styled}]
    across = [key for key in (*plot.across, *plot.down) if key in points and points[key].nunique() > 1]
    # A chart of bars has room for few of them: panels, and one dtype.
    facets = [key for key in free if plot.x or key in (*across, "dtype")]
    facets += [key for key in across if key not in facets and key != styled]
    if points["quantity"].nunique() > 1 and plot.style != "quantity" and "quantity" not in facets:
        facets.append("quantity")
    categories = [] if plot.x else [key for key in free if key not in facets]
    categories = categories or ([] if plot.x else ["quantity"])
    keys = [
        "label",
        "quantity",
        "unit",
        *facets,
        *categories,
        *([plot.x] if plot.x else []),
        *([styled] if styled else []),
    ]
    keys = list(dict.fromkeys([*keys, *(key for key in plot.ignore if key in points)]))
    shown = points[[*keys, "value", "low", "high", "runs", "spread"]]
    return {
        "title": plot.title,
        "form": "lines" if plot.x else "dots" if plot.dots else "bars",
        "x": plot.x,
        "step": plot.step,
        "x_title": marks.X_TITLES.get(plot.x, plot.x),
        "style": styled,
        "styles": _styles(plot, points, styled),
        "facets": [{"key": key, "values": _values(points, key)} for key in facets],
        "start": _start(points, facets, plot),
        "categories": categories,
        "words": {key: {value: words(key, value) for value in points[key].unique()} for key in categories},
        "log": list(plot.log),
        "linear": list(plot.linear),
        "span": marks.LOG_SPAN,
        "reference": plot.reference,
        "measure": plot.measure,
        "columns": list(shown),
        "points": [[_plain(value) for value in row] for row in shown.itertuples(index=False, name=None)],
    }


def _plain(value: Any) -> Any:
    """For JSON: seven digits are more than a chart shows."""
    return float(f"{value:.7g}") if isinstance(value, float) else int(value) if hasattr(value, "item") else value


def _styles(plot: Look, points: pd.DataFrame, key: str) -> list[dict[str, Any]]:
    if not key:
        return []
    known = plot.order or look.ORDER.get(key, ())
    present = ordered(points, key)
    ranks = [*known, *(value for value in present if value not in known)]
    own = pens(ranks) if plot.coloured else []
    return [
        {
            "value": value,
            "text": words(key, value),
            "dash": "solid" if plot.coloured else dash(i),
            "pen": own[i] if plot.coloured else None,
            "pattern": PATTERNS[look.HATCHES[i % len(look.HATCHES)]],
            "line": value not in plot.loose,
            "marks": value not in plot.unmarked,
        }
        for i, value in enumerate(ranks)
        if value in present
    ]


def _values(points: pd.DataFrame, key: str) -> list[list[str]]:
    return [[value, words(key, value)] for value in ordered(points, key)]


def _start(points: pd.DataFrame, facets: list[str], plot: Look) -> dict[str, str]:
    """The panel that is seen first: one with a loose mark (out of memory), of the most labels, of the most points."""
    if not facets:
        return {}
    loose = points[plot.style].isin(plot.loose) if plot.style in points else False
    groups = points.assign(loose=loose).groupby(facets, sort=False)
    sizes = pd.DataFrame({"loose": groups["loose"].any(), "labels": groups["label"].nunique(), "points": groups.size()})
    best = sizes.sort_values(list(sizes), ascending=False, kind="stable").index[0]
    return dict(zip(facets, best if isinstance(best, tuple) else (best,), strict=True))


# --- in words ---


def amount(value: float, unit: str = "") -> str:
    """Three digits, whole thousands kept, and a unit: `3,120 tokens/s`, `13.7×`."""
    if unit == "GiB" and abs(value) < 0.1:
        value, unit = value * 1024, "MiB"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text}{unit}" if unit in ("×", "") else f"{text} {unit}"


def prefixed(value: float, unit: str) -> str:
    """With an SI prefix: `4.28 TB/s`."""
    steps = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, prefix = next(((size, prefix) for size, prefix in steps if abs(value) >= size), (1.0, ""))
    return f"{value / size:.3g} {prefix}{unit}"


def caption(plot: Look, points: pd.DataFrame) -> list[str]:
    """What is seen: each label's range of each quantity and where its ends are, then what the styles differ by."""
    varying = [key for key in SPOKEN if key in points and key not in plot.ignore and points[key].nunique() > 1]
    said = []
    for quantity in ordered(points, "quantity") if plot.style != "quantity" else _known(plot, points):
        part = points[points["quantity"] == quantity]
        ranges = [_range(label, rows, varying) for label, rows in part.groupby("label")]
        said.append(f"{quantity[0].upper()}{quantity[1:]}: {'; '.join(ranges)}.")
    said += [text for _, rows in points.groupby("label") if (text := _styles_apart(plot, rows, varying))]
    return said


def gains(plot: Look, points: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Each label's largest ratio, and where it is; nothing of pictures without ratios."""
    ratios = points[points["unit"] == "×"]
    varying = [key for key in SPOKEN if key in points and key not in plot.ignore and points[key].nunique() > 1]
    best = [rows.loc[rows["value"].idxmax()] for _, rows in ratios.groupby("label")]
    return {top["label"]: (f"{amount(top['value'], '×')} {top['quantity']}", _where(top, varying)) for top in best}


def _known(plot: Look, points: pd.DataFrame) -> list[str]:
    present = set(points["quantity"])
    return [*(value for value in plot.order if value in present), *sorted(present.difference(plot.order))]


def _range(label: str, rows: pd.DataFrame, varying: Sequence[str]) -> str:
    low, high = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
    if low["value"] == high["value"]:
        where = f" ({_where(low, varying)})" if len(rows) == 1 and varying else ""
        return f"{label} {amount(low['value'], low['unit'])}{where}"
    ends = (f"{amount(end['value'], end['unit'])} ({_where(end, varying)})" for end in (low, high))
    return f"{label} from {' to '.join(ends)}"


def _where(point: pd.Series, keys: Sequence[str]) -> str:
    return ", ".join(words(key, point[key]) for key in keys if point[key]) or "all alike"


def _styles_apart(plot: Look, rows: pd.DataFrame, varying: Sequence[str]) -> str:
    """One label's styles side by side, at both ends of x: in the panel with the widest range, there the highest."""
    if not plot.x or not plot.style or plot.style == "quantity" or plot.style not in varying:
        return ""
    panel = [key for key in (*varying, "quantity") if key not in (plot.x, plot.style)]
    best: tuple[float, float, pd.DataFrame] | None = None
    for _, part in rows.groupby(panel, sort=False) if panel else [((), rows)]:
        x = part[plot.x].astype(float)
        wide = part[x.isin([end for end, same in part.groupby(x) if same[plot.style].nunique() > 1])]
        rank = x.max() / x.min(), part["value"].max()
        if len(wide) and (best is None or rank > best[:2]):
            best = *rank, wide
    if best is None:
        return ""
    part = best[-1]
    x = part[plot.x].astype(float)
    ends = [part[x == end] for end in dict.fromkeys((x.min(), x.max()))]
    first = part.iloc[0]
    where = _where(first, [key for key in panel if key != "quantity"])
    texts = [
        f"at {plot.x} {end[plot.x].iloc[0]} "
        + ", ".join(f"{words(plot.style, r[plot.style])} {amount(r['value'], r['unit'])}" for _, r in end.iterrows())
        for end in ends
    ]
    return f"{first['label']}, {first['quantity']}, {where}: {'; '.join(texts)}."
