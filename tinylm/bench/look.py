"""How a picture looks: the order and words of values, and each label's own colour, marker and dashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import seaborn as sns

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
    (0, (5, 1, 1, 1, 1, 1)),
)
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "----")

# Values in the order in which they are shown, which also fixes their dashes; others follow.
ORDER: dict[str, tuple[str, ...]] = {
    "impl": ("eager", "torch", "compile", "cuda", "liger", "triton", "graph", "fused", "hf"),
    "dtype": ("bf16", "fp16", "fp32"),
    "direction": ("forward", "backward"),
    "phase": ("decode", "sample", "prefill", "train"),
    "cache": ("dense", "none"),
}
# Parameters as titles, categories and panels go through them.
SPOKEN = (
    "preset",
    "phase",
    "op",
    "direction",
    "dtype",
    "batch",
    "context",
    "hidden",
    "rows",
    "impl",
    "cache",
)
# How a value is called where it does not say itself what it is.
WORDS = {
    "batch": {"": "batch {}"},
    "context": {"": "context {}"},
    "hidden": {"": "hidden {}"},
    "rows": {"": "{} rows"},
    "phase": {"sample": "decode, top-k 200"},
    "cache": {"dense": "with KV cache", "none": "without KV cache"},
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How points are drawn. Parameters that vary and are not named here become panels or categories."""

    title: str
    x: str = ""  # a number, on a logarithmic axis; without it there are bars
    style: str = ""  # what dashes or hatches tell
    coloured: bool = False  # colour and marker tell the style instead: each label has panels of its own
    order: tuple[str, ...] = ()  # of the values of `style`, where ORDER does not have it
    across: tuple[str, ...] = ()  # one column of panels for each value; without it panels wrap
    down: tuple[str, ...] = ()  # one line of panels for each value
    ignore: tuple[str, ...] = ()  # parameters that may vary along a line
    step: int = 1  # x that are no multiple of it are marks beside the line
    dots: bool = False  # marks instead of bars: for values whose zero means nothing
    log: tuple[str, ...] = ()  # quantities that are always on a logarithmic axis
    linear: tuple[str, ...] = ()  # quantities that never are
    unmarked: tuple[str, ...] = ()  # values of `style` that are a line without markers
    loose: tuple[str, ...] = ()  # values of `style` that are marks without a line
    height: float = 2.3  # of a panel of lines, in inches
    measure: str = ""  # what the quantities are together, where they share an axis
    note: str = ""
    reference: dict[str, float] = field(default_factory=dict)  # quantity -> where a reference line goes


def ordered(points: pd.DataFrame, key: str) -> list[str]:
    """A column's values as they are shown: as in ORDER, numbers by size, names as they come."""
    values, known = list(dict.fromkeys(points[key])), ORDER.get(key, ())
    if key == "label":
        return sorted(values)
    if all(value.isdigit() or not value for value in values):
        return sorted(values, key=lambda value: int(value or 0))
    return sorted(values, key=lambda value: known.index(value) if value in known else len(known))


def words(key: str, value: str) -> str:
    """`batch`, `1` -> `batch 1`."""
    named = WORDS.get(key, {})
    return named.get(value, named.get("", "{}")).format(value)


class Pens:
    """The same pen for a label in every picture, and the same dashes or hatch for a value of `look.style`."""

    def __init__(self, look: Look, points: pd.DataFrame, labels: Sequence[str]) -> None:
        self.look, self.labels = look, list(labels)
        # Few labels are written at the ends of their lines; more would not find room there.
        self.direct = bool(look.x) and points["label"].nunique() <= 3 and not look.coloured
        present = ordered(points, look.style) if look.style in points else []
        known = look.order or ORDER.get(look.style, ())
        self.ranks = [*known, *(value for value in present if value not in known)]
        # The values that occur; none where there is but one, which needs no telling apart.
        self.styles = [value for value in self.ranks if value in present] if len(present) > 1 else []
        self.colours = sns.color_palette("colorblind", max(len(self.ranks if look.coloured else self.labels), 1))

    def pen(self, label: str, style: str = "") -> dict[str, Any]:
        """What matplotlib needs for a line with markers."""
        i = self.labels.index(label)
        rank = self.ranks.index(style) if style else i
        i, rank = (rank, 0) if self.look.coloured else (i, rank)
        pen = {"color": self.colours[i % len(self.colours)], "linestyle": DASHES[rank % len(DASHES)], "linewidth": 1.5}
        pen |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 4.5, "markeredgewidth": 0.6}
        if style in self.look.unmarked:
            pen |= {"marker": "", "color": self.ink(label), "linewidth": 1.2, "zorder": 3}
        if style in self.look.loose:
            pen |= {"linestyle": "", "marker": "x", "markersize": 9}
            pen |= {"markeredgewidth": 2.2, "markeredgecolor": pen["color"]}
        return pen

    def ink(self, label: str) -> tuple[float, ...]:
        """A label's colour darkened until it can be read as text."""
        return tuple(0.75 * part for part in self.colours[self.labels.index(label)])

    def hatch(self, style: str) -> str:
        return HATCHES[self.ranks.index(style) % len(HATCHES)]
