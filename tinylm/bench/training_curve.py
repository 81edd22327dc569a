"""Training logs drawn: loss over tokens, and over seconds of training, a line for each run.

Runs that differ in their seed alone are one series, of one colour. The first series of a label has the label's
colour in all other pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tinylm.bench import picture, results, training_logs
from tinylm.bench.look import MARKERS, Look
from tinylm.bench.marks import LOG_SPAN, short

TRAIN, VALIDATION = "train loss", "validation loss"
MOST = 300  # points of a line; more cannot be told apart, and make large files
X = {"tokens": "tokens of training", "seconds": "seconds of training"}
COLUMNS = ["label", "series", "run", "quantity", "unit", "step", "tokens", "seconds", "value"]
Series = tuple[str, str]  # label, and the runs' name without their seeds


def points(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn of each run: every validation loss, and MOST means of the train loss at most."""
    logs = table[table["experiment"] == training_logs.EXPERIMENT]
    parts = [pd.DataFrame(columns=COLUMNS)]
    for (label, _, run), rows in logs.groupby(["label", "suite", "run"]):
        rows = rows.reindex(columns=list(training_logs.KINDS)).sort_values("step")
        for quantity, column in zip((TRAIN, VALIDATION), training_logs.LOSSES, strict=True):
            line = rows.assign(value=rows[column].astype(float))
            line = line[np.isfinite(line["value"])]
            line = _means(line) if quantity == TRAIN else line
            named = {"label": label, "series": series(run), "run": run, "quantity": quantity, "unit": "nats/token"}
            parts.append(line.assign(**named)[COLUMNS])
    filled = [part for part in parts if len(part)]
    found = pd.concat(filled, ignore_index=True) if filled else parts[0]
    return found.astype({"step": int, "tokens": int}).sort_values(["label", "series"], kind="stable", ignore_index=True)


def series(run: str) -> str:
    """`shakespeare-seed3` -> `shakespeare`; `lr=0.01,seed=3` -> `lr=0.01`; `seed=3` -> `seed`."""
    return re.sub(r"(^|[-_,./ ])seed[-_=]?\d+(?![^-_,./ ])", "", run).lstrip("-_, ").rstrip("-_,/ ") or "seed"


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Neighbouring rows as one: a log's train loss is a mean over the steps since the row before, and so is theirs."""
    if len(rows) <= MOST:
        return rows
    steps = rows["step"].diff().fillna(rows["step"]).clip(lower=1)
    group = np.arange(len(rows)) // -(-len(rows) // MOST)
    value = (rows["value"] * steps).groupby(group).sum() / steps.groupby(group).sum()
    return rows.groupby(group).last().assign(value=value)


def figure(look: Look, points: pd.DataFrame, labels: Sequence[str]) -> Figure:
    """The figure. `labels` are all that the user has, so that a label looks the same in every picture."""
    pens = _pens(points, labels)
    handles = [
        Line2D([], [], label=_said(key, points), **pen, linewidth=1.4, markersize=4.5) for key, pen in pens.items()
    ]
    handles.append(Line2D([], [], color=picture.GREY, linewidth=0.8, alpha=0.6, label=TRAIN))
    handles.append(Line2D([], [], color=picture.GREY, linewidth=1.4, marker="o", markersize=4.5, label=VALIDATION))
    label = points["label"].iloc[0]
    common = label if set(points["label"]) == {label} - {results.UNLABELLED} else ""
    made, body = picture.framed(look.title, common, handles, look.note.split("\n"), wide=8.6, tall=look.height)
    for axes, x in zip(body.subplots(1, 2, sharey=True), X, strict=True):
        _panel(axes, points, x, pens)
    picture.lay_out(made)
    return made


def _pens(points: pd.DataFrame, labels: Sequence[str]) -> dict[Series, dict[str, Any]]:
    """A colour and a marker for each series, in the order in which they are shown."""
    keys = list(dict.fromkeys(zip(points["label"], points["series"], strict=True)))
    first = {key[0]: key for key in reversed(keys)}
    others = [key for key in keys if key not in first.values()]
    places = {key: labels.index(label) for label, key in first.items()}
    places |= {key: len(labels) + i for i, key in enumerate(others)}
    colours = sns.color_palette("colorblind", max(places.values()) + 1)
    return {key: {"color": colours[places[key]], "marker": MARKERS[places[key] % len(MARKERS)]} for key in keys}


def _said(key: Series, points: pd.DataFrame) -> str:
    """A series in the legend: its name, and where its validation loss ended."""
    label, name = key
    own = points[(points["label"] == label) & (points["series"] == name)]
    named = points["label"].nunique() > 1 and label != results.UNLABELLED
    text = f"{label} · {name}" if named else name
    ends = own[own["quantity"] == VALIDATION].groupby("run")["value"].last()
    runs = own["run"].nunique()
    if runs == 1:
        return f"{text}: {ends.iloc[0]:.4f}" if len(ends) else text
    spread = f": {ends.median():.4f} ({ends.min():.4f} to {ends.max():.4f}, {len(ends)} runs)" if len(ends) else ""
    return text + (spread or f" ({runs} runs)")


def _panel(axes: Axes, points: pd.DataFrame, x: str, pens: dict[Series, dict[str, Any]]) -> None:
    alone = points.groupby(["label", "series"])["run"].nunique() == 1
    for (label, name, _, quantity), line in points.groupby(["label", "series", "run", "quantity"], sort=False):
        pen = pens[label, name] | {"linewidth": 1.4, "markersize": 4.0, "markeredgewidth": 0.4, "zorder": 3}
        if not alone[label, name]:
            pen |= {"linewidth": 0.9, "markersize": 2.5}
        if quantity == TRAIN:
            pen |= {"linewidth": 0.8 if alone[label, name] else 0.5, "alpha": 0.6, "marker": "", "zorder": 2}
        every = -(-len(line) // 20)  # with a mark at the end
        axes.plot(line[x], line["value"], markevery=((len(line) - 1) % every, every), **pen)
    axes.set_xlabel(X[x], fontsize=8.5)
    ends = points.groupby(["label", "run"])[x].max()
    if 0 < LOG_SPAN * ends.min() <= ends.max():  # else the short runs would be at the edge
        axes.set_xscale("log", nonpositive="mask")
    else:
        axes.set_xlim(0, (ends.max() or 1) * 1.04)
    low, high = points["value"].min(), points["value"].max()
    if low > 0:
        axes.set_yscale("log")
        room = max(1.01, (high / low) ** 0.05)
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
        axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.tick_params(labelsize=8)
    if x == next(iter(X)):
        axes.set_ylabel(f"loss ({points['unit'].iloc[0]})", fontsize=8.5)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers over a range, from four to nine of them where there are as many."""
    found: list[float] = []
    for steps in ([1.0], [1, 3], [1, 2, 3, 5], [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8], list(np.arange(10, 100) / 10)):
        powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) >= 4:
            break
    return found[:: -(-len(found) // 9)] if found else [low, high]
