"""Training: a text in, a checkpoint and a loss curve out.

`train` makes one run of a `TrainConfig`; `python -m tinylm.train` has its fields as flags, and makes a run of
each combination where flags have several values.
"""

from __future__ import annotations

from tinylm.train.config import TrainConfig
from tinylm.train.failures import TrainingStopped
from tinylm.train.run import Result, train

__all__ = ["Result", "TrainConfig", "TrainingStopped", "train"]
