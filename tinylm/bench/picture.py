"""A frame of points to one figure: title, legend, a grid of panels, and how to read the spread.

A point has a label, the parameters of its cell, a quantity with its unit, `value`, `low` and `high`. Colour
and marker tell the label, dashes or hatches tell one parameter, panels tell the others.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox

from tinylm.bench import marks
from tinylm.bench.look import SPOKEN, Look, Pens, ordered, words

GREY = "0.35"


def figure(look: Look, points: pd.DataFrame, labels: Sequence[str]) -> Figure:
    """The figure. `labels` are all that the user has, so that a label looks the same in every picture."""
    return _Picture(look, points, labels).figure


class _Picture:
    def __init__(self, look: Look, points: pd.DataFrame, labels: Sequence[str]) -> None:
        self.look, self.points, self.pens = look, points, Pens(look, points, labels)
        self.params = [key for key in SPOKEN if key in points and key not in look.ignore]
        self.varying = [key for key in self.params if points[key].nunique() > 1]
        free = [key for key in self.varying if key not in {look.x, *look.across, *look.down}]
        self.categories = [] if look.x else free
        self.across = [key for key in look.across if key in points]
        self.down = [key for key in look.down if key in points]
        self.down += [key for key in free if look.x and key != look.style]
        self.ends: list[tuple[Axes, list[marks.End]]] = []
        self._lay_out()
        lay_out(self.figure)
        for axes, ends in self.ends if self.pens.direct else []:
            marks.tag(axes, ends, self.pens)

    def _lay_out(self) -> None:
        rows, columns = (self._tuples(keys) for keys in (self.down, self.across))
        grid = [[(*down, *across) for across in columns] for down in rows]
        if not self.across and self.look.x:
            grid = [[*itertools.chain(*grid)]]
        if len(grid) == 1 and len(grid[0]) > 3:  # wrap
            width = 2 if len(grid[0]) == 4 else 3
            grid = [grid[0][i : i + width] for i in range(0, len(grid[0]), width)]
        keys = [*self.down, *self.across]
        parts = [[self._part(keys, key) for key in line] for line in grid]
        slots: list[dict[tuple[str, str], float]] = [
            {} if self.look.x else self._slots(pd.concat(line)) for line in parts
        ]
        width = max(map(len, grid))
        # Sizes in inches.
        if self.look.x:
            heights, wide = [self.look.height] * len(grid), (3.35 if width > 2 else 4.3) * width
        else:
            heights = [0.7 + 0.19 * (max(line.values()) + 1) for line in slots]
            wide = (4.0 if width > 1 else 6.6) * width + 0.065 * max(len(c) for line in slots for c, _ in line)
        self.figure, body = framed(
            self.look.title, self._common(), self._handles(), self._notes(), wide=wide, tall=sum(heights)
        )
        cells = body.subplots(len(grid), width, squeeze=False, height_ratios=heights)
        for i, k in itertools.product(range(len(grid)), range(width)):
            panel = parts[i][k] if k < len(parts[i]) else self.points[:0]
            if panel.empty:
                cells[i][k].set_axis_off()
                continue
            self._panel(cells[i][k], panel, slots[i], first=k == 0)
            titled = [key for key in SPOKEN if key in keys and key in self.varying]
            titled += ["label"] if "label" in keys else []
            title = " · ".join(words(key, panel[key].iloc[0]) for key in titled)
            cells[i][k].set_title(title, fontsize=9, loc="left", color="0.15")
            # Lines share their axes: a title of an axis once a column, and once a row of one quantity.
            below = i + 1 < len(parts) and k < len(parts[i + 1]) and not parts[i + 1][k].empty
            if self.look.x and below:
                cells[i][k].set_xlabel("")
            if self.look.x and k and set(panel["quantity"]) == set(parts[i][k - 1]["quantity"]):
                cells[i][k].set_ylabel("")

    def _panel(self, axes: Axes, panel: pd.DataFrame, slots: dict[tuple[str, str], float], *, first: bool) -> None:
        if self.look.x:
            self.ends.append((axes, marks.lines(axes, panel, self.points, self.look, self.pens)))
            return
        keys = zip(self._category(panel), self._bar_labels(panel), strict=True)
        marks.bars(axes, panel.assign(place=[slots[key] for key in keys]), self.look, self.pens)
        places = pd.Series(slots).groupby(level=0, sort=False).mean()
        axes.set_ylim(max(slots.values()) + 0.8, -0.8)
        axes.set_yticks(list(places), list(places.index) if first else [""] * len(places), fontsize=8)

    def _tuples(self, keys: list[str]) -> list[tuple[str, ...]]:
        """The combinations of values that occur, in order."""
        found = set(self.points[keys].itertuples(index=False, name=None)) if keys else {()}
        return [key for key in itertools.product(*(ordered(self.points, k) for k in keys)) if key in found]

    def _part(self, keys: list[str], values: tuple[str, ...]) -> pd.DataFrame:
        chosen = np.ones(len(self.points), dtype=bool)
        for key, value in zip(keys, values, strict=True):
            chosen &= (self.points[key] == value).to_numpy()
        return self.points[chosen]

    def _slots(self, line: pd.DataFrame) -> dict[tuple[str, str], float]:
        """Where the bars of a line of panels go: (category, label) -> place; 1 apart, categories further."""
        ranks = {key: ordered(self.points, key) for key in [*self.categories, "label"]}
        line = line.sort_values(list(ranks), key=lambda column: column.map(ranks[column.name].index))
        slots: dict[tuple[str, str], float] = {}
        last, place = None, -1.0
        for category, label in zip(self._category(line), self._bar_labels(line), strict=True):
            if (category, label) not in slots:
                place += 1 if category == last or last is None or "label" in self.look.across else 1.6
                slots[category, label] = place
                last = category
        return slots

    def _category(self, panel: pd.DataFrame) -> pd.Series:
        parts = [panel[key].map(lambda value, key=key: words(key, value)) for key in self.categories]
        return parts[0].str.cat(parts[1:], sep=" · ") if parts else panel["quantity"]

    def _bar_labels(self, panel: pd.DataFrame) -> pd.Series:
        """The label where it tells bars of a panel apart."""
        return panel["label"].map(lambda label: "" if "label" in self.look.across else label)

    def _handles(self) -> list[Any]:
        """The legend: labels where they are not written into the panels, and what dashes tell."""
        look, handles = self.look, []
        told = self.pens.direct or "label" in (*look.across, *look.down)
        for label in [] if told else ordered(self.points, "label"):
            pen = self.pens.pen(label) | ({"linestyle": ""} if self.pens.styles or look.dots else {})
            bar = Patch(color=pen["color"], label=label)
            handles.append(Line2D([], [], label=label, **pen) if look.x or look.dots else bar)
        for style in self.pens.styles if look.x else []:
            pen = self.pens.pen(self.pens.labels[0], style)
            if not look.coloured:
                pen |= {"color": GREY} | ({"markeredgecolor": GREY} if style in look.loose else {"marker": ""})
            handles.append(Line2D([], [], label=words(look.style, style), **pen))
        return handles

    def _common(self) -> str:
        """The parameters that all points share, without those that the title names."""
        values = {key: self.points[key].iloc[0] for key in self.params if key not in self.varying}
        return " · ".join(words(k, v) for k, v in values.items() if v.lower() not in self.look.title.lower())

    def _notes(self) -> list[str]:
        return [spread_words(self.points), *filter(None, self.look.note.split("\n"))]


def framed(
    title: str, common: str, handles: Sequence[Any], notes: Iterable[str], *, wide: float, tall: float
) -> tuple[Figure, SubFigure]:
    """A figure with a title, what all panels have in common, a legend and notes; and its body, where panels go.

    wide, tall: inches of the body, which is widened where the title needs it.
    """
    # The title is one line; the legend and the notes take the lines that they need.
    wide = max(wide, 0.11 * len(title) + 0.2)
    spans = [0.65 + 0.065 * len(str(handle.get_label())) for handle in handles] or [1.0]
    columns = len(spans) if sum(spans) <= wide else max(1, int(wide / max(spans)))
    lines = [line for note in notes for line in textwrap.wrap(note, int(wide / 0.062))]
    legend = 0.1 + 0.2 * -(-len(spans) // columns) if handles else 0.0
    above, below = 0.4 + 0.17 * bool(common) + legend, 0.12 + 0.15 * len(lines)
    figure = Figure(figsize=(wide, above + tall + below), layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05)
    strips: Any = figure.subfigures(3, 1, height_ratios=(above, tall, below))
    head, body, foot = strips
    left, height = 0.1 / wide, head.bbox.height / figure.dpi
    head.text(left, 1 - 0.1 / height, title, va="top", fontsize=12, fontweight="bold")
    head.text(left, 1 - 0.36 / height, common, va="top", fontsize=9, color=GREY)
    if handles:
        head.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(left, 0), ncols=columns,
            frameon=False, fontsize=8.5, borderpad=0, borderaxespad=0.1, handlelength=2.6,
            columnspacing=1.6,
        )  # fmt: skip
    foot.text(left, 0.5, "\n".join(lines), va="center", fontsize=7.5, color=GREY)
    return figure, body


def lay_out(figure: Figure) -> None:
    """Place all parts, once: every further draw would do it again.

    The solver's last digits depend on where its variables lie in memory. They are cut off, because an SVG's names of
    clip paths are digests of all of them: the same numbers shall give the same bytes.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(9))
    for axes in figure.get_axes():
        axes.set_position(Bbox(axes.get_position().get_points().round(9)))


def spread_words(points: pd.DataFrame) -> str:
    """How many runs there are, and what the error bars show."""
    counts = points.groupby("label")["runs"].agg(["min", "max"])
    spans = [(label, f"{low}" if low == high else f"{low} to {high}") for label, low, high in counts.itertuples()]
    runs = ", ".join(f"{label} {span}" for label, span in spans)
    kinds = " or ".join(kind for kind in dict.fromkeys(points["spread"]) if kind)
    return f"Median over runs ({runs}){'; error bars: ' if kinds else ''}{kinds}."
