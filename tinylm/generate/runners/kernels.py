"""What the runners of kernels of our own take, `fused` and `matvec`: LLaMA-style models in 16 bits, one row each."""

from __future__ import annotations

import torch

from tinylm.cache import DenseCache
from tinylm.generate.loop import Loop
from tinylm.generate.runners.protocol import Unable
from tinylm.ops import native

DTYPES = (torch.bfloat16, torch.float16)
PARTS = {"norm": "rmsnorm", "norm_placement": "pre", "mlp": "swiglu", "attention": "gqa", "bias": False}
WEIGHTS = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.gate_up", "mlp.down")  # of a block


def need_library() -> None:
    """Raises Unable unless the library of csrc/ is here, or can be built, and has code for this GPU."""
    try:
        missing = native.cuda_missing()
    except native.NativeError as error:
        missing = str(error)
    if missing is not None:
        raise Unable(missing)


def unsupported(loop: Loop, positions: tuple[str, ...]) -> str | None:
    """Why the kernels are not for this loop, in one line; None if they are, as far as this file knows."""
    model, config, cache = loop.model, loop.model.config, loop.cache
    for field, value in PARTS.items():
        if getattr(config, field) != value:
            return f"it decodes models of {field} {value!r}, this one has {getattr(config, field)!r}"
    if config.positions not in positions:
        return f"it decodes models of positions {' or '.join(positions)}, this one has {config.positions!r}"
    if model.ops["linear"] != "torch":
        return f"it decodes models of linear 'torch', this one has {model.ops['linear']!r}"
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) > 1 or model.dtype not in DTYPES:
        given = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        return f"it decodes models all in bf16 or all in fp16, this one is in {given}"
    if not all(p.is_contiguous() and p.data_ptr() % 16 == 0 for p in model.parameters()):
        return "a weight is not contiguous, or not aligned to 16 bytes"
    if not isinstance(cache, DenseCache) or cache.dtype != model.dtype:
        return "it decodes with a dense cache in the model's dtype"
    if len(loop.ids) != 1:
        return f"it decodes one row, {len(loop.ids)} are given"
    return None
