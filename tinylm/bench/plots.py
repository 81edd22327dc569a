"""The table to pictures: one series per label, and beside each picture a CSV of what it shows.

A plot is a row of `PLOTS`: a function that makes the plotted points from the rows of all runs, and how they
look. The points alone are drawn and written.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.figure import Figure

from tinylm.bench import picture, points, results, training_curve
from tinylm.bench.look import Look, words

# A fixed salt and font, so that the same numbers give the same bytes everywhere.
STYLE: Any = {"svg.hashsalt": "tinylm", "svg.fonttype": "path", "font.family": "DejaVu Sans"}


@dataclass(frozen=True, kw_only=True)
class Plot(Look):
    """One picture: its points, why there may be none, and how they become a figure."""

    points: Callable[[pd.DataFrame], pd.DataFrame]
    empty: str
    figure: Callable[[Look, pd.DataFrame, Sequence[str]], Figure] = picture.figure


NO_KV = "no measured cell of kv_cache with tokens_per_s"
NO_PAIR = "no run measured the same kv_cache cell with and without a cache"
SAME_RUN = "Ratios are taken within a run."
LARGEST = "A line has inputs of one size: the largest up to 0.5 GiB that the label measured at 3 hidden sizes or more."

PLOTS: dict[str, Plot] = {
    "kv_curve": Plot(
        title="Decoding speed against context, with and without a KV cache",
        points=points.kv_speed, empty=NO_KV, x="context", style="cache",
    ),
    "kv_curve_speedup": Plot(
        title="KV cache: speed with it over speed without it",
        points=points.kv_speedup, empty=NO_PAIR, x="context", ignore=("cache",), note=SAME_RUN,
        reference={"speed-up": 1},
    ),
    "kv_curve_panels": Plot(
        title="KV cache: decoding speed, and what the cache gains",
        points=points.kv_panels, empty=NO_KV, x="context", style="cache", across=("quantity",), note=SAME_RUN,
        log=("speed", "speed-up"), reference={"speed-up": 1},
    ),
    "kv_time": Plot(
        title="Time of a token against context, with and without a KV cache, each by its fastest runner",
        points=points.kv_times, empty=NO_KV, x="context", style="quantity", measure="time of a token",
        ignore=("cache", "impl"),
        order=(words("cache", "dense"), words("cache", "none"), points.CROSSOVER), loose=(points.CROSSOVER,),
        note="Crossover: from there on the cache pays; at the shortest context, from there or before. Between contexts "
        "that were measured both are lines on logarithmic axes.",
    ),
    "kv_vs_nokv": Plot(
        title="Decoding speed with and without a KV cache at one length",
        points=points.kv_one_length, empty="no context at which every label measured kv_cache", style="cache",
        across=("label",), linear=("speed",), note="Each label has its own scale, from zero.",
    ),
    "rmsnorm": Plot(
        title="RMSNorm: bandwidth, and its share of the ceiling measured on the same card",
        points=points.rmsnorm, empty="no measured cell of rmsnorm with bytes_per_s", x="hidden", style="impl",
        across=("quantity", "direction"), down=("dtype",), ignore=("rows",), linear=("share of ceiling",),
        note=LARGEST, reference={"share of ceiling": 100},
    ),
    "rmsnorm_share": Plot(
        title="RMSNorm of 0.5 GiB: share of the copy bandwidth measured on the same card",
        points=points.rmsnorm_share, empty="no measured cell of rmsnorm in bf16 with 0.5 GiB of input", x="hidden",
        style="impl", coloured=True, across=("direction",), down=("label",), ignore=("rows",), step=8, height=3.2,
        linear=("share of ceiling",), reference={"share of ceiling": 100},
        note="Marks beside the lines: hidden sizes that are no multiple of 8.",
    ),
    "rmsnorm_speedup": Plot(
        title="RMSNorm: speed-up over eager",
        points=points.rmsnorm_speedup,
        empty="no run measured the same rmsnorm cell with eager and with another backend", x="hidden",
        style="impl", across=("direction",), down=("dtype",), ignore=("rows",),
        note=f"{LARGEST}\n{SAME_RUN}", reference={"speed-up": 1},
    ),
    "vram_seq": Plot(
        title="Memory against context: measured, predicted, and where it ran out",
        points=points.memory, empty="no measured or out-of-memory cell of vram", x="context", style="quantity",
        order=tuple(quantity.text for quantity in points.MEMORY), measure="memory",
        unmarked=(points.PREDICTED.text, points.CAPACITY.text), loose=(points.EXHAUSTED.text,),
    ),
    "tokens_sec": Plot(
        title="Tokens per second, decoding and prefill, and the time to the first token",
        points=points.decode, empty="no measured cell of decode with tokens_per_s", down=("phase", "quantity"),
    ),
    "ablation": Plot(
        title="The RMSNorm backend swapped in the whole model, all else equal",
        points=points.ablation, empty="no measured cell of ablation", across=("quantity",), down=("phase",),
        dots=True, note=f"Time: of a token (decode), of a training step (train). {SAME_RUN}",
        reference={"speed relative to torch": 1},
    ),
    "training_curve": Plot(
        title="Training: loss over tokens and over seconds",
        points=training_curve.points, empty="no training log with a loss", figure=training_curve.figure, height=3.3,
        note="Numbers: the last validation loss; of several runs their median, lowest and highest.\n"
        "Train loss: means over the steps since the point before. Seconds: as logged, without compilation, validation "
        "and checkpoints.\nLosses a token compare where the tokenizer is the same.",
    ),
}  # fmt: skip


def draw(name: str, table: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | str:
    """A figure and the points that it shows, or one line that says why there is nothing to draw."""
    plot = PLOTS[name]
    shown = plot.points(table) if len(table) else table
    if shown.empty:
        return plot.empty
    with sns.axes_style("whitegrid", {"grid.color": "0.92", "axes.edgecolor": "0.6"}), rc_context(STYLE):
        return plot.figure(plot, shown, sorted(set(table["label"]))), shown


def save(table: pd.DataFrame, folder: Path, names: Sequence[str] = ()) -> Iterator[tuple[str, list[Path], str]]:
    """Draw plots (all by default) as PNG, SVG and CSV: (name, paths written, or why there are none)."""
    for name in names or PLOTS:
        drawn = draw(name, table)
        if isinstance(drawn, str):
            yield name, [], drawn
            continue
        fig, shown = drawn
        contents: dict[str, str | bytes] = {"csv": results.csv_text(shown.to_dict("records"), list(shown))}
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            out = io.BytesIO()
            with rc_context(STYLE):
                fig.savefig(out, format=kind, dpi=150, metadata=metadata)
            contents[kind] = out.getvalue()
        paths = [folder / f"{name}.{kind}" for kind in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            results.write_atomically(path, content)
        yield name, paths, ""
