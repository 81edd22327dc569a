"""How the native library is found and built, with small sources of no content; and what ptxas says of the real ones."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ptxas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinylm import ops
from tinylm.ops import build, native
from tinylm.ops.build import Library, NativeError, build_library

ROOT = Path(__file__).parents[1]

# A process that loads the library of the folder in argv, as `load` does the first time; says which it was.
LOAD = """
import sys
from pathlib import Path
from tinylm.ops import build, native
build.SOURCES, native.PACKAGED = map(Path, sys.argv[1:])
native.load()
print(native.find()[0].path)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name shells and ninja would like to read otherwise; the cache is in it, and so are sources."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the native ops exist for Linux alone")
    home = tmp_path / "it's a $HOME: of some"
    sources = home / "csrc"
    sources.mkdir(parents=True)
    (sources / "one.h").write_text("int two();\n")
    (sources / "one.cpp").write_text('#include "one.h"\nint one() { return two() - 1; }\n')
    (sources / "two.cpp").write_text('#include "one.h"\nint two() { return 2; }\n')
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(home / "cache"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(native, "PACKAGED", home / "nothing")
    monkeypatch.setattr(native, "_find_and_load", functools.cache(native._find_and_load.__wrapped__))
    return home


@pytest.fixture
def compiler(home: Path) -> None:
    try:
        build._compiler()
    except NativeError as error:
        pytest.skip(str(error))


@pytest.fixture
def no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home.parent))
    monkeypatch.delenv("CXX", raising=False)


def fake_compiler(home: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> Path:
    """A c++ that writes a line into the file returned and runs `before`, then the real one."""
    real, calls = shutil.which(build._compiler()[0]), home / "calls"
    fake = home.parent / "bin" / "c++"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> "$CALLS"\n{before}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    monkeypatch.delenv("CXX", raising=False)
    return calls


def process(home: Path, packaged: str = "nothing") -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", LOAD, str(home / "csrc"), str(home / packaged)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(happened: Callable[[], bool]) -> None:
    for _ in range(600):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened in a minute")


def objects(home: Path) -> int:
    return len(list((home / "cache" / "tinylm" / "objects").glob("*.o")))


# Content


@pytest.mark.usefixtures("compiler")
def test_a_build_is_kept_by_content_and_an_edit_compiles_what_it_touches(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = home / "csrc"
    first = build_library(())
    made = first.path.stat().st_mtime_ns
    assert objects(home) == 2
    assert sorted(p.name for p in first.path.parent.iterdir()) == sorted([build.LIBRARY, build.MANIFEST, build.LOG])
    assert Library.within(first.path.parent) == first

    (sources / "README.md").write_text("no source")
    (sources / "one.cuh").write_text("of .cu files alone")
    os.utime(sources / "one.cpp")
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        assert build_library(()) == first and first.path.stat().st_mtime_ns == made

    text = (sources / "two.cpp").read_text()
    (sources / "two.cpp").write_text(text.replace("2;", "1 + 1;"))
    second = build_library(())
    assert second.path != first.path and objects(home) == 3
    (sources / "one.h").write_text("int two();\nint three();\n")
    third = build_library(())
    assert third.path not in (first.path, second.path) and objects(home) == 5, "all that may include it"
    strict = build_library((), strict=True)
    assert strict.path not in (first.path, second.path, third.path)

    (sources / "two.cpp").write_text(text)
    (sources / "one.h").write_text("int two();\n")
    assert build_library(()) == first and first.path.stat().st_mtime_ns == made, "the old one is still there"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("version", ["2.11.0+cpu", "2.11.0+cu130"])
def test_each_torch_has_its_own(home: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    first = build_library(())
    monkeypatch.setattr(torch, "__version__", version)
    assert build_library(()).path != first.path


@pytest.mark.usefixtures("compiler")
def test_a_second_process_compiles_nothing_and_says_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Like the user's first: one line, for the wait.
    out, err = process(home).communicate()
    assert out.strip().endswith(build.LIBRARY), err
    assert len(err.splitlines()) == 1 and "building the native ops for the CPU, once" in err
    monkeypatch.setenv("PATH", "")
    assert process(home).communicate() == (out, "")


@pytest.mark.parametrize(
    ("name", "value", "folder"),
    [
        ("TORCH_EXTENSIONS_DIR", "/a b", "/a b/tinylm"),
        ("XDG_CACHE_HOME", "/c", "/c/torch_extensions/tinylm"),
        ("HOME", "/d", "/d/.cache/torch_extensions/tinylm"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, folder: str
) -> None:
    for other in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert build.cache_folder() == Path(folder)


# Processes and threads


@pytest.mark.usefixtures("compiler")
def test_processes_at_once_build_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_compiler(home, monkeypatch, "sleep 1")
    running = [process(home) for _ in range(2)]
    ends = [(*one.communicate(), one.returncode) for one in running]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert len({out for out, _, _ in ends}) == 1
    assert len(calls.read_text().splitlines()) == 3, "two sources and the library"


@pytest.mark.usefixtures("compiler")
def test_a_killed_build_blocks_nobody(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One source is finished, the other never ends: until there is a file.
    wait = 'case "$*" in *two.cpp*) while [ ! -e "$CALLS.go" ]; do sleep 0.1; done;; esac'
    calls = fake_compiler(home, monkeypatch, wait)
    monkeypatch.setenv("MAX_JOBS", "2")
    killed = process(home)
    try:
        wait_for(lambda: calls.exists() and "two.cpp" in calls.read_text() and objects(home) == 1)
        killed.kill()
        killed.wait()
        (home / "calls.go").touch()
        library = build_library(())
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    assert library.path.is_file()
    assert [*library.path.parents[1].glob("building-*")] == []
    assert sum("one.cpp" in line for line in calls.read_text().splitlines()) == 1, "what was finished is used"


def test_threads_load_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def slow(archs: tuple[str, ...]) -> Library:
        builds.append(archs)
        time.sleep(0.1)
        raise NativeError("no compiler: install one")

    monkeypatch.setattr(native, "build_library", slow)
    told: list[str] = []

    def load() -> None:
        try:
            native.load()
        except NativeError as error:
            told.append(str(error))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load()
    assert told == ["no compiler: install one"] * 9 and len(builds) == 1


# What is missing


def failure() -> str:
    with pytest.raises(NativeError) as caught:
        native.load()
    text = str(caught.value)
    assert "\n" not in text
    with pytest.raises(NativeError, match=re.escape(text)):
        native.load()
    with pytest.raises(NativeError, match=re.escape(text)):
        native.cuda_missing()
    return text


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reason_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"no C\+\+ compiler .*: install .*apt install g\+\+.*another backend", failure())
    ops._probe.cache_clear()
    assert ops.probe("rmsnorm", "torch", "cpu", torch.float32) is None
    monkeypatch.setenv("CXX", "/opt/nosuch/g++ -m64")
    with pytest.raises(NativeError, match=r"CXX is /opt/nosuch/g\+\+ -m64, which is not there: install"):
        build_library(())


def test_without_ninja_the_reason_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home.parent / "c++").touch(0o755)
    monkeypatch.setenv("PATH", str(home.parent))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert "pip install ninja" in failure()


def test_ninja_need_not_be_on_the_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", str(home.parent))
    assert os.access(build._ninja(), os.X_OK)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("text", "first"),
    [
        ('#include "one.h"\nint two() { return nosuch; }\nint three() { return later; }\n', "nosuch"),
        ('#include "nosuch.h"\n', "nosuch.h"),
        ("int three() { return 3; }\n", "two"),  # what one.cpp needs, missed by the linker
    ],
)
def test_broken_sources_are_told_by_their_first_error(home: Path, text: str, first: str) -> None:
    (home / "csrc" / "two.cpp").write_text(text)
    reason = failure()
    assert reason.startswith("the native ops do not compile: ") and first in reason.partition(" (all of it: ")[0]
    log = Path(reason.partition(" (all of it: ")[2].removesuffix(")"))
    assert first in log.read_text()
    (home / "csrc" / "two.cpp").write_text("int two() { return 2; }\n")
    assert build_library(()).path.is_file(), "mended"


@pytest.mark.usefixtures("compiler")
def test_warnings_are_errors_where_they_are_asked_to_be(home: Path) -> None:
    (home / "csrc" / "two.cpp").write_text("int two() { int unused; return 2; }\n")
    assert "unused" in build_library(()).log
    with pytest.raises(NativeError, match="unused"):
        build_library((), strict=True)


@pytest.mark.usefixtures("compiler")
def test_a_library_that_does_not_load_is_a_reason(home: Path) -> None:
    (home / "packaged").mkdir()
    (home / "packaged" / build.LIBRARY).write_text("no library")
    (home / "packaged" / build.MANIFEST).write_text(json.dumps({"cuda": None, "archs": []}))
    native.PACKAGED = home / "packaged"
    assert failure().startswith(f"cannot load {home}")


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_is_a_reason(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(home / "file"))
    assert "set TORCH_EXTENSIONS_DIR" in failure()


def test_another_system_is_a_reason(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.sys, "platform", "win32")
    assert "for Linux alone, and this is win32" in failure()


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("NativeError: no C++ compiler on the PATH: install a C++ compiler", "g++"),
        ("NativeError: no ninja found, which builds the native ops: pip install ninja", "pip install ninja"),
        ("NativeError: no nvcc found: install the toolkit of CUDA 13, or set CUDA_HOME to where it is", "CUDA_HOME"),
        ("NativeError: /usr/bin/nvcc is of CUDA 13.0, and torch of CUDA 12.8: install", "torch's CUDA version"),
        (
            "NativeError: the native ops do not compile: csrc/one.cu(1): error: compiler ninja nvcc (all of it",
            "the log",
        ),
        (
            "NativeError: x.so is for compute capability 8.0, the card is 9.0: set TORCH_CUDA_ARCH_LIST to it",
            "the card's",
        ),
    ],
)
def test_doctors_remedy_fits_the_reason(reason: str, remedy: str) -> None:
    assert remedy in ops.remedy_for(reason)


# The wheel's


@pytest.mark.usefixtures("compiler")
def test_the_packages_own_library_comes_before_building(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build_library(()).path.parent, home / "packaged")
    (home / "csrc" / "two.cpp").write_text("newer, and broken")
    monkeypatch.setenv("PATH", "")
    out, err = process(home, "packaged").communicate()
    assert out.strip() == str(home / "packaged" / build.LIBRARY), err


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: str | None, *cards: tuple[int, int]) -> None:
    """A torch for that CUDA on a machine with those cards."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index])


def test_what_the_packages_library_lacks_is_built_where_it_can_be(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = home / "packaged"
    packaged.mkdir()
    (packaged / build.LIBRARY).touch()
    monkeypatch.setattr(native, "PACKAGED", packaged)
    built = Library(home / build.LIBRARY, "13.0", ("9.0",))
    monkeypatch.setattr(native, "build_library", lambda archs: built)

    def manifest(cuda: str | None, *archs: str) -> None:
        (packaged / build.MANIFEST).write_text(json.dumps({"cuda": cuda, "archs": archs}))

    def found() -> tuple[Path, str | None]:
        library, missing = native.find()
        return library.path.parent, missing

    manifest(None)
    fake_nvcc(home, monkeypatch)
    pretend(monkeypatch, "13.0")
    assert found() == (packaged, None), "no card, nothing missing"
    pretend(monkeypatch, "13.0", (9, 0))
    assert found() == (home, None)
    manifest("13.0", *build.WHEEL_ARCHS)
    assert found() == (packaged, None)
    pretend(monkeypatch, "13.0", (12, 0))
    assert found() == (packaged, None), "its PTX"
    pretend(monkeypatch, "12.8", (9, 0))
    folder, missing = found()
    assert folder == packaged and missing is not None and "is of CUDA 13.0, and torch of CUDA 12.8" in missing
    manifest("13.0", "8.0")
    pretend(monkeypatch, "13.0", (9, 0))
    monkeypatch.setenv("CUDA_HOME", str(home))
    folder, missing = found()
    assert folder == packaged and missing is not None and "is for compute capability 8.0, the card is 9.0" in missing


# For which cards


def fake_nvcc(home: Path, monkeypatch: pytest.MonkeyPatch, *, version: str = "13.0", runs: bool = True) -> None:
    nvcc = home / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    known = " ".join(f"compute_{n}" for n in (75, 80, 86, 89, 90, 100, 121))
    says = f'case "$1" in --version) echo "Cuda, release {version}, V1";; *) echo {known};; esac'
    nvcc.write_text(f"#!/bin/sh\n{says if runs else 'exit 1'}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home / "cuda"))
    build.nvcc_version.cache_clear()


@pytest.mark.parametrize(
    ("cards", "asked", "archs"),
    [
        ([(9, 0)], "", ["9.0"]),
        ([(9, 0), (7, 5), (9, 0)], "", ["7.5", "9.0"]),
        ([(12, 0)], "", ["10.0+PTX"]),  # between two that the fake knows
        ([(13, 0)], "native", ["12.1+PTX"]),
        ([(7, 0), (8, 6)], "", ["8.6"]),
        ([(9, 0)], "8.6;7.5+PTX", ["7.5+PTX", "8.6"]),
        ([], "9.0", ["9.0"]),
    ],
)
def test_the_card_at_hand_or_the_list_decides(
    home: Path, monkeypatch: pytest.MonkeyPatch, cards: list[tuple[int, int]], asked: str, archs: list[str]
) -> None:
    fake_nvcc(home, monkeypatch)
    pretend(monkeypatch, "13.0", *cards)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert native.archs_here() == (tuple(archs), None)


def test_each_reason_for_no_kernels_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        archs, why = native.archs_here()
        assert archs == () and why is not None and "\n" not in why
        return why

    pretend(monkeypatch, None)
    assert "is not built for CUDA: install one that is" in reason()
    pretend(monkeypatch, "13.0", (7, 0))
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert "no nvcc found: install the toolkit of CUDA 13, or set CUDA_HOME" in reason()
    fake_nvcc(home, monkeypatch)
    assert "does not compile for compute capability 7.0" in reason()
    pretend(monkeypatch, "13.0")
    assert "no CUDA device is visible: set TORCH_CUDA_ARCH_LIST" in reason()
    pretend(monkeypatch, "12.8", (9, 0))
    assert "is of CUDA 13.0, and torch of CUDA 12.8: install the toolkit of CUDA 12 " in reason()
    fake_nvcc(home, monkeypatch, version="12.6")
    pretend(monkeypatch, "13.0", (9, 0))
    assert native.archs_here() == (("9.0",), None), "a newer driver runs older code"
    fake_nvcc(home, monkeypatch, runs=False)
    with pytest.raises(NativeError, match="does not run"):
        native.archs_here()


@given(
    archs=st.lists(
        st.tuples(st.sampled_from(["7.5", "8.0", "9.0", "9.0a", "12.0", "12.0f"]), st.sampled_from(["", "+PTX"])),
        min_size=1,
    ),
    separator=st.sampled_from([";", " ", ", ", " ; "]),
)
def test_an_arch_list_is_read_in_any_order_and_form(archs: list[tuple[str, str]], separator: str) -> None:
    names = ["".join(arch) for arch in archs]
    read = build.parse_archs(separator.join(names))
    assert set(read) == set(names) and len(read) == len(set(names))
    assert list(read) == sorted(read, key=build.arch_order)


def test_an_arch_list_may_name_families_and_no_nonsense() -> None:
    assert build.parse_archs("Turing;Hopper") == ("7.5+PTX", "9.0+PTX")
    assert build.parse_archs("Ampere") == ("8.0", "8.6+PTX")
    with pytest.raises(NativeError, match=r"'sm_90': use numbers such as 8.6;9.0\+PTX"):
        build.parse_archs("8.0;sm_90")


@pytest.mark.parametrize(
    ("arch", "runs_on", "not_on"),
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0+PTX", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        ("9.0a", [(9, 0)], [(10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_cards_run_what_was_compiled(
    arch: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    assert all(native._runs(arch, card) for card in runs_on)
    assert not any(native._runs(arch, card) for card in not_on)


# With nvcc

KERNEL = """
template <int N> __global__ void shift(const float* x, float* y) {
  __shared__ float s[N];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[N - 1 - threadIdx.x];
}
// An index that the compiler cannot know keeps the array in memory: a stack frame.
__global__ void stacked(const int* i, float* y) {
  float a[8];
  for (int k = 0; k < 8; ++k) a[(i[k] + k) % 8] = y[k];
  y[8] = a[i[8] % 8];
}
int one() {
  shift<32><<<1, 32>>>(nullptr, nullptr);
  stacked<<<1, 1>>>(nullptr, nullptr);
  return cudaGetLastError();
}
"""


@pytest.fixture
def nvcc(compiler: None) -> Path:
    found = build.find_nvcc()
    if found is None:
        pytest.skip("no nvcc here")
    return found


@pytest.mark.usefixtures("nvcc")
def test_kernels_are_compiled_for_their_targets_and_ptxas_reports_them(home: Path) -> None:
    (home / "csrc" / "one.cpp").unlink()
    (home / "csrc" / "one.cu").write_text(KERNEL)
    library = build_library(("7.5", "9.0+PTX"), strict=True)
    assert library.cuda and library.archs == ("7.5", "9.0+PTX")
    torch.ops.load_library(library.path)  # with any torch, and no card
    report = ptxas.parse(library.log)
    assert report.keys() == {"sm_75", "sm_90"}
    for kernels in report.values():
        [shift] = [use for name, use in kernels.items() if "shift" in name]
        [stacked] = [use for name, use in kernels.items() if "stacked" in name]
        assert shift.shared == 128 and shift[2:] == (0, 0, 0) and 0 < shift.registers < 64
        assert stacked.stack == 32
    assert objects(home) == 2
    (home / "csrc" / "two.cpp").write_text("int two() { return 1 + 1; }\n")
    build_library(("7.5", "9.0+PTX"), strict=True)
    assert objects(home) == 3, "an edit of C++ compiles no CUDA"
    (home / "csrc" / "one.cu").write_text("__global__ void k() { int unused; }\nint one() { return 1; }\n")
    with pytest.raises(NativeError, match="unused"):
        build_library(("7.5",), strict=True)


def kernels() -> dict[str, dict[str, ptxas.Use]]:
    report = ptxas.report()
    if not report:
        pytest.skip("csrc/ has no kernels")
    return report


def test_every_kernel_compiles_for_every_target_without_warnings() -> None:
    report = kernels()
    assert report.keys() == {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in build.WHEEL_ARCHS}
    assert len({frozenset(kernels) for kernels in report.values()}) == 1, "the same ones for each"


def test_no_kernel_spills() -> None:
    spills = [
        f"{arch} {name}: {use}"
        for arch, kernels_ in kernels().items()
        for name, use in kernels_.items()
        if any(use[2:])
    ]
    assert not spills, "\n".join(spills)


def test_the_library_needs_torch_and_the_system_alone() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf here")
    try:
        library = build_library(build.WHEEL_ARCHS if build.find_nvcc() else (), strict=True)
    except NativeError as error:
        pytest.skip(str(error))
    said = subprocess.run(["readelf", "-d", library.path], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", said))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
    assert needed - system - {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"} == {"libtorch.so", "libtorch_cpu.so"}
    assert "PATH)" not in said, "found in the process, whose torch it is"
