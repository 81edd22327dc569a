"""The commands that measure a figure, an experiment or a single cell of the report again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinylm.bench import plan
from tinylm.bench.page.sheet import Line
from tinylm.bench.results import Row

Documents = Sequence[tuple[Row, Mapping[str, Any]]]


def command(label: str, lines: Sequence[Line], documents: Documents, axes: Mapping[str, Sequence[str]]) -> str:
    """What measures these cells of a label again: the commit, then the call, with options for `axes` alone."""
    own = [(run, document) for run, document in documents if run["label"] == label]
    commits = [str(commit)[:12] for _, d in own if (commit := _of(d, "commit_info", "id"))]
    files = Counter(str(line["fullname"]).partition("::")[0] for line in lines if line["fullname"])
    file = shlex.quote(min(files, key=lambda name: (-files[name], name))) if files else "PATH"
    devices = {_of(d, "machine_info", "device", "type") for _, d in own}
    ours = devices != {None}  # other suites' files have no device, and pytest there none of our options
    options = [f"--gpu-label {shlex.quote(label)}"] if ours else []
    options += ["--device cpu"] if ours and devices == {"cpu"} else []
    options += [f"{plan.option(axis)} {shlex.quote(','.join(values))}" for axis, values in axes.items()]
    call = ["tinylm-bench run", file, *options] if ours else ["pytest", file, "--benchmark-json=FILE"]
    changed = "  # and changes that were not committed" if any(_of(d, "commit_info", "dirty") for _, d in own) else ""
    first = [f"git checkout {shlex.quote(commit)}{changed}" for commit in commits[-1:]]
    return "\n".join([*first, " ".join(call)])


def for_labels(
    labels: Iterable[str], lines: Sequence[Line], documents: Documents, points: Any = None, ignore: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """(label, command) for an experiment's lines; with points, of a figure that may show a part of them."""
    found = []
    for label in labels:
        own = [line for line in lines if line["label"] == label]
        axes: dict[str, list[str]] = {}
        if points is not None:
            part = points[points["label"] == label]
            if part.empty:
                continue
            for axis in plan.AXES:
                measured = {str(line["params"][axis]) for line in own if axis in line["params"]}
                shown = [value for value in part[axis].unique() if value] if axis in part else []
                # Without its reference a ratio cannot be taken.
                if axis not in ("impl", "cache", *ignore) and shown and set(shown) < measured:
                    axes[axis] = shown
        if own:
            found.append((label, command(label, own, documents, axes)))
    return found


def one_cell(lines: Sequence[Line]) -> str:
    """How a single line of a table is measured again, by its id."""
    line = next((line for line in lines if line["fullname"]), None)
    if line is None:
        return ""
    options = " --preset-size datacenter" if line["timing"] else ""
    return f"pytest {shlex.quote(line['fullname'])}{options} --benchmark-json=FILE"


def _of(document: Mapping[str, Any], *keys: str) -> Any:
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
