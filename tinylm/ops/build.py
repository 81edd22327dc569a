"""csrc/ made into a library by ninja, and kept by content.

An object is kept under the digest of its source, headers and flags, a library under that of its objects, torch and
linking: an edit compiles what it touches, and nothing is compiled twice. No file is ever half there: each is made in
a folder of its own and renamed. A process that dies in between leaves no lock, and what it had finished is used.
torch.utils.cpp_extension does none of that, and compiles no CUDA beside a torch for the CPU, where wheels are made.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
LIBRARY, MANIFEST, LOG = "libtinylm.so", "manifest.json", "build.log"
# Inside the package in a wheel, beside it in a checkout.
_PLACES = [Path(__file__).parents[1] / "csrc", Path(__file__).parents[2] / "csrc"]
SOURCES = next((folder for folder in _PLACES if folder.is_dir()), None)

# What a wheel is compiled for: Turing to Hopper, and PTX for what comes after.
WHEEL_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0+PTX")
# TORCH_CUDA_ARCH_LIST may name families, as for torch's own extensions.
FAMILIES = {"Turing": "7.5+PTX", "Ampere": "8.0 8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX"}

# The stable ABI of torch 2.11: what is built with a newer torch loads there.
CXX_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
# ptxas's report of registers and spills costs nothing and is kept in the log.
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-v")
STRICT = {".cpp": ("-Werror",), ".cu": ("-Werror=all-warnings", "-Xcompiler=-Werror")}
# libtorch.so is needed although nothing of a torch for the CPU is used from it: it brings libtorch_cuda.so where torch
# has that, and so the weak symbol of the stream. The CUDA runtime is linked statically, its names kept inside, because
# a process has another one of torch's, or none.
LINK_FLAGS = ("--no-as-needed", "-ltorch", "-ltorch_cpu", "--as-needed", "-z", "defs", "--exclude-libs", "ALL")

log = logging.getLogger(__name__)


class NativeError(RuntimeError):
    """The library can neither be found nor built; one line that says what to do."""


@dataclass(frozen=True)
class Library:
    """A built library: its file, the CUDA version of its kernels (None: it has none), what they were compiled for."""

    path: Path
    cuda: str | None
    archs: tuple[str, ...]

    @classmethod
    def within(cls, folder: Path) -> Library | None:
        """The one that lies in a folder with its manifest."""
        if not (folder / LIBRARY).is_file():
            return None
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return cls(folder / LIBRARY, manifest["cuda"], tuple(manifest["archs"]))

    @property
    def log(self) -> str:
        """What the compilers said, with ptxas's report, each source after a line `# its name`."""
        return (self.path.parent / LOG).read_text(encoding="utf-8")


def arch_order(arch: str) -> tuple[float, str]:
    """Sorts "7.5", "9.0+PTX", "12.0"."""
    number = re.match(r"\d+\.\d", arch)
    return (float(number[0]) if number else 0.0), arch


def parse_archs(text: str) -> tuple[str, ...]:
    """What TORCH_CUDA_ARCH_LIST means: "8.6;9.0+PTX" -> ("8.6", "9.0+PTX"). Raises NativeError."""
    for family, archs in FAMILIES.items():
        text = re.sub(rf"\b{family}\b(\+PTX)?", archs, text)
    archs_ = tuple(dict.fromkeys(re.split(r"[;,\s]+", text.strip("; ,"))))
    for arch in archs_:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise NativeError(f"TORCH_CUDA_ARCH_LIST has {arch!r}: use numbers such as 8.6;9.0+PTX")
    return tuple(sorted(archs_, key=arch_order))


def _gencode(arch: str) -> str:
    number = arch.removesuffix("+PTX").replace(".", "")
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def find_nvcc() -> Path | None:
    """nvcc below CUDA_HOME or CUDA_PATH, else on the PATH, else where CUDA's installer puts it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc")
    places = (
        [Path(home, "bin", "nvcc")] if home else [*([Path(found)] if found else []), Path("/usr/local/cuda/bin/nvcc")]
    )
    return next((place for place in places if os.access(place, os.X_OK)), None)


@functools.cache
def nvcc_version(nvcc: Path) -> str:
    """Such as "13.0". Raises NativeError where nvcc does not run."""
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if release is None:
        raise NativeError(f"{nvcc} --version names no release: reinstall CUDA's toolkit, or set CUDA_HOME to another")
    return release[1]


def nvcc_archs(nvcc: Path) -> list[tuple[int, int]]:
    """The compute capabilities that it compiles for."""
    found = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc, "--list-gpu-arch"))
    return [(int(major), int(minor)) for major, minor in found]


def _output(*command: object) -> str:
    try:
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NativeError(f"{command[0]} does not run: {one_line(str(error))}") from error


def _compiler() -> list[str]:
    """CXX as words, else the C++ compiler on the PATH. Raises NativeError."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    have = f"CXX is {shlex.join(named)}, which is not there" if named else "no C++ compiler on the PATH"
    raise NativeError(f"{have}: install a C++ compiler (Debian and Ubuntu: apt install g++), or use another backend")


def _ninja() -> str:
    with contextlib.suppress(ImportError):
        import ninja  # pip's: its folder is on the PATH of an activated environment alone

        if os.access(own := os.path.join(ninja.BIN_DIR, "ninja"), os.X_OK):
            return own
    found = shutil.which("ninja")
    if found is None:
        raise NativeError("no ninja found, which builds the native ops: pip install ninja, or use another backend")
    return found


def cache_folder() -> Path:
    """`tinylm` below TORCH_EXTENSIONS_DIR, else below torch_extensions in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions")
    return Path(home, "tinylm").absolute()


def build_library(archs: Sequence[str], strict: bool = False, sources: Path | None = None) -> Library:
    """The library of csrc/, or of the folder `sources`: from the cache, else compiled, which is logged as a warning.

    All .cpp, and with `archs` (such as "8.6" or "9.0+PTX") all .cu for those. `strict`: warnings are errors. Beside
    the library lies its log, with ptxas's report. Raises NativeError.
    """
    sources = sources or SOURCES
    if sources is None:
        raise NativeError("the sources csrc/ are not beside or inside the package: reinstall tinylm")
    texts = {
        file.name: file.read_text(encoding="utf-8") for file in sorted(sources.iterdir()) if file.suffix in SUFFIXES
    }
    archs = tuple(archs) if any(name.endswith(".cu") for name in texts) else ()
    nvcc = find_nvcc() if archs else None
    if archs and nvcc is None:
        raise NativeError(f"no nvcc found to compile for {', '.join(archs)}: install CUDA's toolkit, or set CUDA_HOME")
    cuda = nvcc_version(nvcc) if nvcc else None
    units = [
        _unit(name, texts, archs, cuda, strict) for name in texts if name.endswith((".cpp", ".cu")[: 1 + bool(archs)])
    ]
    key = _digest(str(torch.__version__), str(torch.version.cuda), str(cuda), *LINK_FLAGS, *(u.key for u in units))
    folder = cache_folder()
    library = Library(folder / key / LIBRARY, cuda, archs)
    if library.path.is_file():
        return library
    compiler, ninja = _compiler(), _ninja()
    try:
        (folder / "objects").mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock") as alone:
            if not library.path.is_file():
                what = f"the CPU and CUDA {', '.join(archs)}" if archs else "the CPU"
                log.warning("tinylm: building the native ops for %s, once, into %s", what, folder)
                if alone:
                    for left in folder.glob("building-*"):  # by a process that died
                        shutil.rmtree(left, ignore_errors=True)
                _compile(library, units, texts, compiler, nvcc, ninja)
    except OSError as error:
        told = f"cannot write the native ops to {folder} ({one_line(str(error))})"
        raise NativeError(f"{told}: set TORCH_EXTENSIONS_DIR to a folder that can be written") from error
    return library


@dataclass(frozen=True)
class _Unit:
    """A source, the flags that it is compiled with, and the digest of all that its object depends on."""

    name: str
    flags: tuple[str, ...]
    key: str

    @property
    def is_cuda(self) -> bool:
        return self.name.endswith(".cu")


def _unit(name: str, texts: dict[str, str], archs: Sequence[str], cuda: str | None, strict: bool) -> _Unit:
    # Homes are shared by machines of several kinds; who names another compiler wants it used.
    made_by = [os.uname().machine, os.environ.get("CXX", "")]
    flags: tuple[str, ...]
    headers: tuple[str, ...]
    if name.endswith(".cu"):
        flags, headers = (*NVCC_FLAGS, *map(_gencode, archs)), (".h", ".cuh")
        made_by += [str(cuda), *(os.environ.get(f"NVCC_{place}_FLAGS", "") for place in ("PREPEND", "APPEND"))]
    else:
        flags, headers = (*CXX_FLAGS, *(["-DTINYLM_CUDA"] if archs else [])), (".h",)
        made_by += [str(torch.__version__)]
    flags += STRICT[Path(name).suffix] if strict else ()
    read = [word for file, text in texts.items() if file == name or file.endswith(headers) for word in (file, text)]
    return _Unit(name, flags, _digest(*made_by, *flags, *read))


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process is alone here, while it lives: the kernel lets go of a flock with its process."""
    import fcntl

    with path.open("w") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("tinylm: another process builds the native ops; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: two may build the same, each for itself
            alone = False
        yield alone


def _compile(
    library: Library,
    units: Sequence[_Unit],
    texts: dict[str, str],
    compiler: list[str],
    nvcc: Path | None,
    ninja: str,
) -> None:
    """Compile the objects that are not there, link, and put the library's folder in place."""
    folder = library.path.parents[1]
    place = Path(tempfile.mkdtemp(prefix="building-", dir=folder))
    try:
        rules = _ninja_file(units, compiler, nvcc, folder)
        (place / "build.ninja").write_text(rules, encoding="utf-8")
        # Compiled is what the digest is of, whoever edits it meanwhile, and under a name that nvcc's shells understand.
        (place / "csrc").mkdir()
        for name, text in texts.items():
            (place / "csrc" / name).write_text(text, encoding="utf-8")
        done = subprocess.run(
            [ninja, "-j", str(_jobs())], cwd=place, env={**os.environ, "LC_ALL": "C"}, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            kept = folder / f"{library.path.parent.name}.log"
            kept.write_text(f"{rules}\n{done.stdout}", encoding="utf-8")
            raise NativeError(f"the native ops do not compile: {_first_error(done.stdout)} (all of it: {kept})")
        with (place / LOG).open("w", encoding="utf-8") as whole:
            for unit in units:
                told = (folder / "objects" / f"{unit.key}.log").read_text(encoding="utf-8", errors="replace")
                whole.write(f"# {unit.name}\n{told}")
        manifest = {"cuda": library.cuda, "archs": library.archs, "torch": str(torch.__version__)}
        (place / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(place / "csrc")
        for file in place.iterdir():
            if file.name not in (LIBRARY, MANIFEST, LOG):
                file.unlink()
        try:
            place.rename(library.path.parent)
        except OSError:
            if not library.path.is_file():  # else another process made the same
                raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _ninja_file(units: Sequence[_Unit], compiler: list[str], nvcc: Path | None, folder: Path) -> str:
    """Edges for the objects that are missing, and one for the library, with paths relative to the build's folder."""
    torch_folder = Path(torch.__file__).parent
    headers = torch_folder / "include"
    # In the messages of its checks torch's headers are named as they are included, not where they lay here.
    cxx = [*compiler, "-isystem", str(headers), f"-fmacro-prefix-map={headers}/="]
    host = [f"-ccbin={compiler[0]}"] if len(compiler) == 1 else []
    kernels = sum(unit.is_cuda for unit in units)
    cuda = [str(nvcc), *host, f"--threads={max(1, _jobs() // max(1, kernels))}"]
    edges = ["rule run\n  command = $what\n  description = $out\n"]
    for unit in units:
        out = f"{unit.key}.o"
        if (folder / "objects" / out).is_file():
            continue
        command = shlex.join([*(cuda if unit.is_cuda else cxx), *unit.flags, "-c", f"csrc/{unit.name}"])
        # Its own words beside the object, and both by renaming, the object last.
        told = f"{unit.key}.log"
        kept = " && ".join(f"mv {file} ../objects/{file}" for file in (told, out))
        what = f"{command} -o {out} >{told} 2>&1 && {kept} || {{ cat {told}; exit 1; }}"
        edges.append(_edge(f"../objects/{out}", "", what))
    objects = " ".join(f"../objects/{unit.key}.o" for unit in units)
    link = [*cuda[:-1], "-cudart=static", "-nodlink"] if nvcc else compiler
    to_linker = [word for flag in LINK_FLAGS for word in ("-Xlinker", flag)]  # nvcc changes the order of others
    libraries = shlex.join([f"-L{torch_folder / 'lib'}", *to_linker])
    edges.append(_edge(LIBRARY, objects, f"{shlex.join(link)} -shared {objects} {libraries} -o {LIBRARY}"))
    return "\n".join(edges)


def _edge(out: str, needs: str, what: str) -> str:
    return f"build {out}: run {needs}\n  what = {what.replace('$', '$$')}\n"


def _jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    return max(1, int(asked)) if asked.isdigit() else len(os.sched_getaffinity(0))


def _first_error(output: str) -> str:
    """The compiler's, nvcc's or the linker's first complaint; else its last words."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("FAILED", "ninja:"))]
    complaint = re.compile(r"\berror\b|\bfatal\b|undefined reference|cannot find -l", re.IGNORECASE)
    return one_line(next(filter(complaint.search, lines), lines[-1] if lines else "no word of why"))


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
