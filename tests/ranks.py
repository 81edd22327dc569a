"""What tests/test_parallel.py starts on each rank: `ranks.py CONFIG.json`, a list of runs, of which some are sabotaged.

A run is TrainConfig's fields, and "sabotage": true for one whose gradients are never reduced over the ranks.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from tinylm import parallel
from tinylm.train import TrainConfig, train

wrap = parallel.wrap


def wrap_without_reducing(*arguments: Any, **options: Any) -> parallel.Wrapped:
    wrapped = wrap(*arguments, **options)

    def reducing(last: bool) -> AbstractContextManager[Any]:
        return wrapped.reducing(False)

    return parallel.Wrapped(wrapped.module, wrapped.plain, reducing)


def main(path: Path) -> None:
    runs = json.loads(path.read_text())
    with parallel.ranks(runs[0]["parallel"], "cpu"):
        for run in runs:
            sabotage = run.pop("sabotage", False)
            with mock.patch.object(parallel, "wrap", wrap_without_reducing if sabotage else wrap):
                train(TrainConfig(**run))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
