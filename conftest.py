"""Loads the measuring plugin, and Hypothesis profiles; nothing else."""

import os

pytest_plugins = ["tinylm.bench.plugin"]

try:
    from hypothesis import settings
except ImportError:  # benchmarks run without it
    pass
else:
    # Machines differ in speed, and no test may fail for it: no deadline. `ci` draws the same examples every time.
    settings.register_profile("default", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "default")
