"""What is drawn into one panel: lines over a number, or bars or dots by category, with their spread.

Every function takes points: rows with `label`, parameters, `quantity`, `unit`, `value`, `low` and `high`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tinylm.bench.look import Look, Pens, ordered

LOG_SPAN = 20  # largest over smallest value from which an axis is logarithmic
X_TITLES = {"context": "context (tokens)", "hidden": "hidden size (elements of a row)"}
End = tuple[float, float, str]  # of a label's line: x, y, label


def lines(axes: Axes, panel: pd.DataFrame, points: pd.DataFrame, look: Look, pens: Pens) -> list[End]:
    """A line for each label and style, on axes as wide as `points` need. Gives each label's highest end."""
    tops = []
    for label in ordered(panel, "label"):
        ends = []
        for style in pens.styles or [""]:
            line = panel[panel["label"] == label]
            line = line[line[look.style] == style] if style else line
            if line.empty:
                continue
            line = line.assign(x=line[look.x].astype(float)).sort_values("x")
            pen = pens.pen(label, style)
            joined = line["x"] % look.step == 0
            sns.lineplot(line[joined], x="x", y="value", ax=axes, legend=False, errorbar=None, estimator=None, **pen)
            beside = pen | {"linestyle": "", "markerfacecolor": "white", "markeredgecolor": pen["color"]}
            axes.plot(line["x"][~joined], line["value"][~joined], **(beside | {"markeredgewidth": 1.2}))
            if style not in (*look.loose, *look.unmarked):
                _spread(axes, line["x"], line, "yerr", fmt="none", ecolor=pen["color"])
            ends.append((line["x"].iloc[-1], line["value"].iloc[-1], label))
        tops.append(max(ends))
    quantity = panel["quantity"].iloc[0]
    # Panels of one quantity have one range, so that they can be compared.
    _scale(axes.yaxis, points if look.measure else points[points["quantity"] == quantity], look, quantity)
    axes.set_xlabel(X_TITLES.get(look.x, look.x), fontsize=8.5)
    axes.set_ylabel(f"{look.measure or quantity} ({panel['unit'].iloc[0]})", fontsize=8.5)
    x = points[look.x].astype(float)
    low, high = x.min(), x.max()
    axes.set_xscale("log", base=2)
    # Room on the right for the labels of lines that end there.
    room = 0.03 * max(map(len, pens.labels)) + 0.06 if pens.direct else 0.05
    axes.set_xlim(low / (high / low) ** 0.05 / 1.1, high * max(high / low, 2) ** room * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(_powers(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    return tops


def tag(axes: Axes, ends: Iterable[End], pens: Pens) -> None:
    """Write each label at the end of its line, pushed up where two would meet. After layout."""
    placed: list[tuple[float, float]] = []  # in points (1/72 inch), from the lowest up
    for x, y, label in sorted(ends, key=lambda end: end[1]):
        left, height = axes.transData.transform((x, y)) * 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
        near = [above + 10 - height for beside, above in placed if abs(beside - left) < 6 * len(label)]
        lift = max([0.0, *near])
        placed.append((left, height + lift))
        axes.annotate(
            label, (x, y), (6, lift), textcoords="offset points", annotation_clip=False, va="center",
            color=pens.ink(label), fontsize=8.5, fontweight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        ).set_in_layout(False)  # fmt: skip


def bars(axes: Axes, panel: pd.DataFrame, look: Look, pens: Pens) -> None:
    """A bar (or dot) at each point's `place` on the y axis, with its value written beside it."""
    quantity, unit = panel["quantity"].iloc[0], panel["unit"].iloc[0]
    log = _scale(axes.xaxis, panel, look, quantity)
    if not look.dots:
        colours = {label: pens.pen(label)["color"] for label in panel["label"]}
        sns.barplot(
            panel, x="value", y="place", hue="label", palette=colours, saturation=1, width=0.85, ax=axes,
            dodge=False, native_scale=True, orient="h", errorbar=None, legend=False, edgecolor="white",
        )  # fmt: skip
        for bar in axes.patches if pens.styles else []:
            assert isinstance(bar, Rectangle)
            nearest = (panel["place"] - bar.get_y() - bar.get_height() / 2).abs().idxmin()
            bar.set_hatch(pens.hatch(panel.loc[nearest, look.style]))
    for label, part in panel.groupby("label"):
        pen = pens.pen(label)
        dot = {"fmt": pen["marker"], "color": pen["color"], "markersize": 6}
        _spread(axes, part["place"], part, "xerr", **(dot if look.dots else {"fmt": "none", "ecolor": "0.15"}))
    for point in panel.itertuples():
        axes.annotate(
            short(point.value) + ("×" if unit == "×" else ""), (point.high, point.place), (6, 0),
            textcoords="offset points", va="center", fontsize=7.5, color="0.2",
        )  # fmt: skip
    low, high = min([panel["low"].min(), *_reference(look, quantity)]), panel["high"].max()
    if log:
        axes.set_xlim(10 ** np.floor(np.log10(low) - 0.3), high * (high / low) ** 0.14 * 1.5)
    elif look.dots:
        margin = (high - low) / 10 or low / 10
        axes.set_xlim(low - margin, high + 3 * margin)
    else:
        axes.set_xlim(0, high * 1.2)
    axes.set_ylabel("")
    axes.set_xlabel(f"{quantity} ({unit}{', log scale' if log else ''})", fontsize=8.5)
    axes.grid(visible=False, axis="y")


def _spread(axes: Any, where: pd.Series, points: pd.DataFrame, error: str, **pen: Any) -> None:
    """Error bars from `low` to `high`."""
    place, value, low, high = (part.to_numpy() for part in (where, *(points[k] for k in ("value", "low", "high"))))
    x, y = (place, value) if error == "yerr" else (value, place)
    axes.errorbar(x, y, capsize=2, elinewidth=1, ls="", **{error: [value - low, high - value], **pen})


def _reference(look: Look, quantity: str) -> list[float]:
    return [look.reference[quantity]] if quantity in look.reference else []


def _scale(axis: Any, points: pd.DataFrame, look: Look, quantity: str) -> bool:
    """Set an axis' scale, ticks, range and reference line for these points; tells if it is logarithmic."""
    axes, letter = axis.axes, axis.axis_name
    marks = _reference(look, quantity)
    for mark in marks:
        (axes.axhline if letter == "y" else axes.axvline)(mark, color="0.5", lw=1, ls=(0, (2, 2)), zorder=1)
    low, high = min([points["low"].min(), *marks]), max([points["high"].max(), *marks])
    log = quantity in look.log or (high >= LOG_SPAN * low and quantity not in look.linear)
    log = bool(log and low > 0)
    if log:
        axes.set(**{f"{letter}scale": "log"})
        span = high / low
        subs = (1,) if span > 300 else (1, 3) if span > 10 else (1, 2, 3, 5)
        axis.set_major_locator(LogLocator(subs=subs) if span > 3 else MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
        room = max(1.1, span**0.08)
        axes.set(**{f"{letter}lim": (low / room, high * room)})
    else:
        axes.set(**{f"{letter}lim": (0, high * 1.12)})
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.tick_params(labelsize=8)
    return log


def short(value: float) -> str:
    """Three digits and a suffix: 12345 -> 12.3k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _powers(low: float, high: float) -> list[int]:
    """Powers of two over a range, as many as there is room for."""
    powers = [2**i for i in range(int(np.ceil(np.log2(low))), int(np.floor(np.log2(high))) + 1)]
    return powers[:: -(-len(powers) // (7 if high < 10_000 else 5))] if powers else [int(low)]
