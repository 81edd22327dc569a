"""hatch's build hook that puts the native library into a wheel; enabled by HATCH_BUILD_HOOK_ENABLE_CUSTOM alone."""

from __future__ import annotations

import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """CUDA too where nvcc is. Raises NativeError."""
        if version == "editable":  # builds at first use, and again after an edit
            return
        sys.path.insert(0, self.root)
        from tinylm.ops.build import LIBRARY, MANIFEST, WHEEL_ARCHS, build_library, find_nvcc

        built = build_library(WHEEL_ARCHS if find_nvcc() else (), strict=True).path.parent
        build_data["force_include"] |= {str(built / name): f"tinylm/_native/{name}" for name in (LIBRARY, MANIFEST)}
        build_data["pure_python"] = False
        # Any Python 3, because the library knows none: it is loaded as a plain shared library and registers its ops.
        # No manylinux: it needs the C and C++ libraries of the system that it was built on, or newer ones.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
