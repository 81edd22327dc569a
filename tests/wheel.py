"""What a wheel of `tox -e wheel` must do where no compiler is: a script to run where it is installed."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path


def main() -> None:
    cuda = shutil.which("nvcc") is not None  # where the wheel was built, too
    # Nothing to build with, nothing built before.
    nothing = tempfile.mkdtemp()
    os.environ |= {"PATH": nothing, "TORCH_EXTENSIONS_DIR": nothing, "CUDA_HOME": nothing, "CXX": ""}

    import torch

    import tinylm
    from tinylm import ops
    from tinylm.ops import build, native
    from tinylm.ops.rmsnorm import rmsnorm_reference

    package = Path(tinylm.__file__).resolve().parent
    assert package != Path(__file__).resolve().parents[1] / "tinylm", f"{package} is the checkout, not a wheel"
    assert not any(map(shutil.which, ("c++", "g++", "clang++", "cc", "nvcc", "ninja"))), "a compiler is on the PATH"
    library, _ = native.find()
    assert library.path.parent == native.PACKAGED, f"{library.path} is not the wheel's"
    assert library.archs == (build.WHEEL_ARCHS if cuda else ()), f"compiled for {library.archs}"

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = (torch.randn(5, 96, dtype=dtype, requires_grad=True) for _ in range(2))
        weight = torch.randn(96, dtype=dtype, requires_grad=True)
        y = ops.get("rmsnorm", "cuda")(x, weight, 1e-5)
        torch.testing.assert_close(y, rmsnorm_reference(x, weight, 1e-5).to(dtype))
        y, total = ops.get("add_rmsnorm", "cuda")(x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, residual, weight), dy)
        expected = torch.autograd.grad(rmsnorm_reference(total, weight, 1e-5), (total, weight), dy.double())
        torch.testing.assert_close(got, (expected[0], *expected))

    assert not os.listdir(nothing), "something was built"
    has = f"CUDA {library.cuda} for {', '.join(library.archs)}" if library.cuda else "no CUDA"
    runs = f"Python {sys.version.split()[0]} and torch {torch.__version__}"
    print(f"{library.path.name}: {library.path.stat().st_size / 1e6:.1f} MB, {has}; runs with {runs}")


main()
