"""tinylm: a compact Transformer and its parts, to be measured.

The names below load their module, and torch with it, when they are first used: the measuring core in
`tinylm.bench` works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinylm.config import PRESETS as PRESETS
    from tinylm.config import ConfigError as ConfigError
    from tinylm.config import ModelConfig as ModelConfig
    from tinylm.config import RopeScaling as RopeScaling
    from tinylm.config import preset as preset
    from tinylm.generate import Decoder as Decoder
    from tinylm.generate import Sampling as Sampling
    from tinylm.model import Transformer as Transformer

__version__ = "0.1.0"

_HOMES = {
    "config": ("PRESETS", "ConfigError", "ModelConfig", "RopeScaling", "preset"),
    "generate": ("Decoder", "Sampling"),
    "model": ("Transformer",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"tinylm.{module}"), name)
    raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
