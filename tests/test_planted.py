"""The properties are tested: each planted defect fails the ones that are there to catch it, a sound kernel none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import Phase
from planted import CPU_SOURCE, CUDA_SOURCE, PLANTED, Kernel, Planted, Source
from raw_kernels import Compiled, Raw, compiler, guards_stay, norms_of
from rmsnorm_properties import GUARDED, PROPERTIES
from test_rmsnorm import hold

NAMES = [*PROPERTIES, "guards stay"]


def try_it(raw: Raw, name: str, device: str = "cpu", of: int = 1) -> None:
    """One property, or one of so many of its examples, which are the same everywhere; failures are not shrunk."""
    how = {"derandomize": True, "database": None, "phases": [Phase.generate], "report_multiple_bugs": False}
    which = PROPERTIES.get(name, GUARDED)
    if which is GUARDED:
        which = which._replace(check=lambda _, case, on: guards_stay(raw, case, on))
    hold(which._replace(examples=which.examples // of, always=which.always[::of]), norms_of(raw), device, **how)


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_kernel_has_every_property(name: str) -> None:
    try_it(Kernel(), name, of=2)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.kernel.__name__)
def test_a_planted_defect_is_caught(planted: Planted) -> None:
    for name in planted.caught_by:
        with pytest.raises(AssertionError):
            try_it(planted.kernel(), name)


SOURCES = {"cpu": CPU_SOURCE, "cuda": CUDA_SOURCE}


def compiled(folder: Path, device: str, source: Source | None = None) -> Compiled:
    reason = compiler(device)
    if reason is not None:
        pytest.skip(reason)
    return Compiled(folder, device, () if source is None else source.patches)


@pytest.mark.parametrize("device", SOURCES)
def test_the_source_without_a_defect_has_these_properties(device: str, tmp_path: Path) -> None:
    """Fewer examples: the properties of what is built without a defect are tested in test_rmsnorm."""
    raw = compiled(tmp_path, device)
    for name in sorted({name for source in SOURCES[device] for name in source.caught_by}):
        try_it(raw, name, device, of=4)


@pytest.mark.parametrize(
    ("device", "source"),
    [(device, source) for device, sources in SOURCES.items() for source in sources],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_defect_in_the_source_is_caught(device: str, source: Source, tmp_path: Path) -> None:
    raw = compiled(tmp_path, device, source)
    for name in source.caught_by:
        with pytest.raises(AssertionError):
            try_it(raw, name, device)
