"""Loads the measuring plugin, and Hypothesis profiles; nothing else."""

import os

import pytest

pytest_plugins = ["tinylm.bench.plugin"]


@pytest.hookimpl(tryfirst=True)  # before Hypothesis's own, which heeds --hypothesis-profile
def pytest_configure() -> None:
    # Imported here, because pytest-benchmark's command line loads this file too, and benchmarks run without it.
    try:
        from hypothesis import settings
    except ImportError:
        return
    # Machines differ in speed, and no test may fail for it: no deadline. `ci` draws the same examples every time.
    settings.register_profile("default", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "default")
