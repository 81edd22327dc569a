"""The library of csrc/, which makes torch.ops.tinylm.*: the one inside the package, else built at first use."""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylm.ops.build import (
    Library,
    NativeError,
    arch_order,
    build_library,
    find_nvcc,
    nvcc_archs,
    nvcc_version,
    one_line,
    parse_archs,
)

__all__ = ["NativeError", "cuda_missing", "load"]

PACKAGED = Path(__file__).parents[1] / "_native"  # where a wheel has it
_once = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    failure: str | None  # why there is no library
    cuda_missing: str | None


def load() -> None:
    """Make torch.ops.tinylm.* exist, once a process. Raises NativeError, the same one again at each call."""
    outcome = _outcome()
    if outcome.failure is not None:
        raise NativeError(outcome.failure)


def cuda_missing() -> str | None:
    """None if the library has kernels for a card of this machine, else why not, in one line. Raises NativeError."""
    load()
    return _outcome().cuda_missing


def _outcome() -> Outcome:
    with _once:  # the cache alone would let two threads build
        return _find_and_load()


@functools.cache
def _find_and_load() -> Outcome:
    try:
        library, missing = find()
        try:
            torch.ops.load_library(library.path)
        except OSError as error:
            raise NativeError(f"cannot load {library.path}: {one_line(str(error))}; use another backend") from error
    except NativeError as error:
        return Outcome(str(error), str(error))
    return Outcome(None, missing)


def find() -> tuple[Library, str | None]:
    """The library for this machine, built if need be, and why it has no kernels for its cards. Raises NativeError.

    The package's own comes first, unless it lacks kernels that can be built here.
    """
    if not sys.platform.startswith("linux"):
        raise NativeError(f"the native ops exist for Linux alone, and this is {sys.platform}: use another backend")
    packaged = Library.within(PACKAGED)
    lacking = None if packaged is None else _lacking(packaged)
    if packaged is not None and lacking is None:
        return packaged, None
    archs, why_not = archs_here()
    if packaged is not None and not archs:
        return packaged, lacking
    try:
        library = build_library(archs)
    except NativeError as error:
        if packaged is None:
            raise
        return packaged, f"{lacking}; {error}"
    return library, why_not or _lacking(library)


def archs_here() -> tuple[tuple[str, ...], str | None]:
    """What CUDA sources are compiled for on this machine, such as ("8.9",); if for nothing, why."""
    if torch.version.cuda is None:
        return (), f"torch {torch.__version__} is not built for CUDA: install one that is"
    nvcc, major = find_nvcc(), torch.version.cuda.partition(".")[0]
    if nvcc is None:
        return (), f"no nvcc found: install the toolkit of CUDA {major}, or set CUDA_HOME to where it is"
    version = nvcc_version(nvcc)
    if int(version.partition(".")[0]) > int(major):  # a driver that suits torch may be too old for its kernels
        have = f"{nvcc} is of CUDA {version}, and torch of CUDA {torch.version.cuda}"
        return (), f"{have}: install the toolkit of CUDA {major} and set CUDA_HOME to where it is"
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked and asked != "native":
        return parse_archs(asked), None
    if not torch.cuda.is_available():
        return (), "no CUDA device is visible: set TORCH_CUDA_ARCH_LIST to compile for one all the same"
    known, archs = nvcc_archs(nvcc), set()
    for card in _cards():
        fit = max((arch for arch in known if arch <= card), default=None)
        if fit is not None:  # a card newer than nvcc gets PTX, which its driver compiles
            archs.add(f"{fit[0]}.{fit[1]}" + ("" if fit == card else "+PTX"))
    if not archs:
        have = ", ".join(f"{major}.{minor}" for major, minor in _cards())
        return (), f"{nvcc} of CUDA {version} does not compile for compute capability {have}: install an older toolkit"
    return tuple(sorted(archs, key=arch_order)), None


def _cards() -> list[tuple[int, int]]:
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _lacking(library: Library) -> str | None:
    """Why no card of this machine can run the library's kernels; None if one can, or if there are no cards."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    if library.cuda is None:
        return f"{library.path} was built without nvcc: install CUDA's toolkit, and the kernels are built here"
    if int(library.cuda.partition(".")[0]) > int(torch.version.cuda.partition(".")[0]):
        have = f"{library.path} is of CUDA {library.cuda}, and torch of CUDA {torch.version.cuda}"
        return f"{have}: install a newer torch, or CUDA's toolkit, and the kernels are built here"
    if not any(_runs(arch, card) for arch in library.archs for card in _cards()):
        have, cards = ", ".join(library.archs), ", ".join(f"{major}.{minor}" for major, minor in _cards())
        return f"{library.path} is for compute capability {have}, the card is {cards}: set TORCH_CUDA_ARCH_LIST to it"
    return None


def _runs(arch: str, card: tuple[int, int]) -> bool:
    """Whether a card runs what was compiled for `arch`: its own major version's code, or PTX not newer than it."""
    major, minor, rest = re.fullmatch(r"(\d+)\.(\d)(.*)", arch).groups()  # type: ignore[union-attr]
    of = (int(major), int(minor))
    if rest[:1] in ("a", "f"):  # features of this one alone
        return of == card
    return (of[0] == card[0] and of <= card) or (rest == "+PTX" and of <= card)
