"""Text in: sources and their documents, prepared once into token files, read by memory map.

`prepare` makes a folder of tokens from a source; `Tokens` maps one split of it; a `Sampler` draws training
windows from it, `eval_windows` cuts it for evaluation.
"""

from __future__ import annotations

from tinylm.data.preparation import prepare
from tinylm.data.tokens import Tokens
from tinylm.data.windows import Sampler, eval_windows

__all__ = ["Sampler", "Tokens", "eval_windows", "prepare"]
