"""The measuring core: time, memory and correctness of one callable, replayed into pytest-benchmark.

It imports nothing else of tinylm, and torch only where a device is used, so that it serves other suites too.
"""

from tinylm.bench.case import Case, CheckFailed, against
from tinylm.bench.plan import cells

__all__ = ["Case", "CheckFailed", "against", "cells"]
