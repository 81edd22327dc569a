"""Generation: prefill, decode with a cache or without one, sampling, and text from a checkpoint.

`python -m tinylm.generate --checkpoint DIR --prompt "Once upon a time"` is the command. `text` and `__main__`
load what they need of the optional packages when they are used; the names below need torch alone.
"""

from tinylm.generate.decoder import Decoder, generate
from tinylm.generate.filling import CompiledPrefill, prefill
from tinylm.generate.rows import complete, stream
from tinylm.generate.runners import RUNNERS, RunnerWarning
from tinylm.generate.sampling import Noise, Sampling, select

__all__ = [
    "RUNNERS",
    "CompiledPrefill",
    "Decoder",
    "Noise",
    "RunnerWarning",
    "Sampling",
    "complete",
    "generate",
    "prefill",
    "select",
    "stream",
]
