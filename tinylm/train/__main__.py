"""`python -m tinylm.train`: a run, or a sweep of runs where flags have several values, and one table at the end."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import shlex
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylm import parallel
from tinylm.config import CheckpointError, ConfigError
from tinylm.train import Result, TrainConfig, TrainingStopped, train
from tinylm.train.failures import Diverged

# What the table shows of a Result: its column, and how.
SHOWN = {
    "train_loss": ("loss", "{:.4f}"),
    "val_loss": ("val loss", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "best_val_loss": ("best val", "{:.4f}"),
    "seconds": ("s", "{:.2f}"),
    "tokens_per_s": ("tok/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "compile_seconds": ("compile s", "{:.1f}"),
}
STOPS = (ConfigError, CheckpointError, TrainingStopped)  # each with one line for the user


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 where a run could not start or go on, of which stderr has a line."""
    try:
        return _all(sweep(flags(arguments)))
    except (*STOPS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the newest checkpoint", file=sys.stderr)
        return 130


def flags(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Each field of TrainConfig: a tuple of values, or, of a field that is on or off, one."""
    import tyro

    types: dict[str, Any] = typing.get_type_hints(TrainConfig)
    fields: list[Any] = []
    for field in dataclasses.fields(TrainConfig):
        one = types[field.name]
        if one is bool:
            fields.append((field.name, bool, field.default))
        else:
            fields.append(
                (field.name, tuple.__class_getitem__((one, ...)), dataclasses.field(default=(field.default,)))
            )
    # Below TrainConfig, where tyro finds what each field means; its checks are for single values.
    namespace = {"__post_init__": lambda self: None, "__doc__": __doc__}
    several = dataclasses.make_dataclass("Flags", fields, bases=(TrainConfig,), frozen=True, namespace=namespace)
    given: Any = tyro.cli(
        several, prog="python -m tinylm.train", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return {field.name: getattr(given, field.name) for field in dataclasses.fields(TrainConfig)}


def sweep(values: dict[str, Any]) -> dict[str, TrainConfig]:
    """A config for each combination of values, by a name that says what is its own: "lr=0.001,seed=0".

    Their runs are folders of these names in the one folder that `out` gives. Raises ConfigError.
    """
    axes = {name: several for name, several in values.items() if isinstance(several, tuple)}
    single = {name: value for name, value in values.items() if name not in axes}
    if empty := [name for name, several in axes.items() if not several]:
        raise ConfigError(f"--{empty[0].replace('_', '-')} has no value: give one or more")
    if len(axes["out"]) > 1:
        raise ConfigError("--out has several values: give one folder, in which each run of a sweep gets its own")
    varied = [name for name, several in axes.items() if len(several) > 1]
    configs = {}
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        name = ",".join(f"{key}={Path(str(chosen[key])).name}" for key in varied)
        config = TrainConfig(**single, **chosen)
        if varied:
            root = axes["out"][0] or f"runs/sweep-{'-'.join(varied)}"
            config = dataclasses.replace(config, out=str(Path(root) / name))
        if name in configs:
            raise ConfigError(f"the sweep has {name or 'the same run'} twice: give each value once")
        configs[name] = config
    return configs


def _all(configs: dict[str, TrainConfig]) -> int:
    first = next(iter(configs.values()))
    rows: list[dict[str, Any]] = []
    # Ranks that have left cannot join again, so they stay for the whole sweep.
    with parallel.ranks(first.parallel, first.device) as world:
        for name, config in configs.items():
            if world.main and len(configs) > 1:
                print(f"{len(rows) + 1} of {len(configs)}: {name}", file=sys.stderr)
            row: dict[str, Any] = {"name": name or config.run.name}
            try:
                row |= dataclasses.asdict(train(config))
            except STOPS as error:
                # The other ranks might wait for this one, unless they have seen the same.
                if len(configs) == 1 or (world.size > 1 and not isinstance(error, Diverged)):
                    raise
                row["error"] = str(error)  # the others may do better
                print(f"error: {name}: {error}", file=sys.stderr)
            rows.append(row)

        def report() -> None:
            _table(rows)
            if len(configs) > 1:
                _write(first.run.parent / "sweep.csv", rows, configs)

        world.first(report)  # for which all wait: torchrun ends the others once one has left with an error
    return 2 if any("error" in row for row in rows) else 0


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    finished = [row for row in rows if "error" not in row]
    table = Table(Column("run", no_wrap=True), *(column for column, _ in SHOWN.values()))
    best = sorted(finished, key=lambda row: row["val_loss"])
    for row in best:
        cells = ("" if row[key] is None else form.format(row[key]) for key, (_, form) in SHOWN.items())
        table.add_row(row["name"], *cells)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['name']} stopped: {row['error']}", highlight=False)
    for row in best[:1]:
        console.print(f"MFU is of {row['peak_flops'] / 1e12:,.3g} TFLOP/s ({row['peak_source']}).")
        console.print(
            f"To hear it: python -m tinylm.generate --checkpoint {shlex.quote(str(row['run']))}",
            highlight=False,
            soft_wrap=True,
        )


def _write(path: Path, rows: list[dict[str, Any]], configs: dict[str, TrainConfig]) -> None:
    """The table's rows with each run's config, as CSV."""
    columns = [field.name for field in dataclasses.fields(TrainConfig)]
    results = [field.name for field in dataclasses.fields(Result)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["name", *columns, *(n for n in results if n not in columns), "error"])
        writer.writeheader()
        for row, config in zip(rows, configs.values(), strict=True):
            writer.writerow({**dataclasses.asdict(config), **row})


if __name__ == "__main__":
    parallel.leave(main())
