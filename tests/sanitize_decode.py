"""Decodes a few tokens by the paths of the kernels of `fused` and `matvec`, for NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck python tests/sanitize_decode.py      (also racecheck, initcheck, synccheck)

A line a case, "ok" at the end; the exit status is not 0 if a launch failed. racecheck sees shared memory alone: what
passes between blocks carries its own flags (csrc/decode.cuh). synccheck fails in cuBLAS's kernels: it has to be told
--kernel-name kns=decode_tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tinylm.config import preset
from tinylm.generate import Decoder, RunnerWarning, Sampling
from tinylm.generate.runners.fused import Fused
from tinylm.model import Transformer

GREEDY, TOP_K, ALL = Sampling(), Sampling(0.9, top_k=20, seed=1), Sampling(0.9, seed=1)
# Of `fused`: shape, prompt, how a token is chosen, settings of the runner.
CASES: list[tuple[dict[str, Any], int, Sampling, dict[str, int]]] = [
    ({}, 5, GREEDY, {}),
    ({}, 5, TOP_K, {"copies": 1}),
    ({"vocab_size": 9001, "tied": False}, 5, TOP_K, {}),  # logits read from the exchange
    ({"vocab_size": 333, "kv_heads": 1, "positions": "none"}, 5, ALL, {}),
    ({"dim": 72, "heads": 3, "kv_heads": 3, "head_dim": 24, "d_ff": 1344}, 40, GREEDY, {"split_tokens": 16}),
    ({"dim": 1024, "heads": 8, "kv_heads": 2, "head_dim": 128, "d_ff": 2816, "vocab_size": 60_000}, 9, GREEDY, {}),
    # Many runs: of clusters of four, whose results are added up by all or in a phase of its own, of two, and of none.
    ({"heads": 16, "kv_heads": 1, "head_dim": 16}, 100, GREEDY, {"split_tokens": 8, "few_splits": 4}),
    ({"heads": 16, "kv_heads": 1, "head_dim": 16, "vocab_size": 2000}, 100, TOP_K, {"split_tokens": 8}),
    ({"heads": 16, "kv_heads": 1, "head_dim": 16}, 100, GREEDY, {"split_tokens": 8, "few_splits": 1}),
    ({"heads": 16, "kv_heads": 16, "head_dim": 16}, 100, GREEDY, {"split_tokens": 8}),
    ({"heads": 16, "kv_heads": 1, "head_dim": 16}, 100, GREEDY, {"split_tokens": 8, "few_splits": 4, "cluster": 1}),
    ({"heads": 10, "kv_heads": 1, "head_dim": 72}, 40, GREEDY, {"split_tokens": 8}),  # warps share them
    ({"heads": 1, "kv_heads": 1, "head_dim": 64}, 1200, GREEDY, {"split_tokens": 100_000}),  # through the ring
    ({"dim": 384, "heads": 6, "kv_heads": 6, "head_dim": 64, "d_ff": 512, "vocab_size": 333}, 5, GREEDY, {}),
    ({"dim": 768, "heads": 12, "kv_heads": 12, "head_dim": 64, "d_ff": 2048}, 5, GREEDY, {}),
    ({"dim": 1024, "heads": 8, "kv_heads": 2, "head_dim": 128, "d_ff": 8192, "vocab_size": 60_001}, 5, GREEDY, {}),
    *(({}, 5, GREEDY, {"leave": leave}) for leave in (1, 2, 7)),
]
# Of `matvec`: shape, prompt, how a token is chosen.
MATVEC: list[tuple[dict[str, Any], int, Sampling]] = [
    ({}, 5, GREEDY),
    ({"vocab_size": 333, "kv_heads": 1, "tied": False}, 5, TOP_K),
    ({"dim": 72, "heads": 3, "kv_heads": 3, "head_dim": 24, "d_ff": 1344}, 40, ALL),
    ({"dim": 2056, "heads": 12, "kv_heads": 2, "head_dim": 128, "d_ff": 14_344}, 200, GREEDY),
    ({"dim": 4104, "heads": 33, "kv_heads": 1, "head_dim": 128, "d_ff": 14_336, "layers": 1}, 20, TOP_K),
    ({"dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 256, "d_ff": 64}, 1500, GREEDY),
]


def decoder(runner: str, more: dict[str, Any], prompt: int, sampling: Sampling, settings: dict[str, int]) -> Decoder:
    # Before the call, so that a report of the sanitizer stands behind its case.
    print(runner, more, prompt, settings, flush=True)
    model = Transformer.build(preset("nano", **{"layers": 2, **more}), device="cuda", dtype=torch.bfloat16).eval()
    return Decoder(model, torch.zeros(1, prompt, dtype=torch.int64), 4, runner=runner, sampling=sampling)


def main() -> None:
    warnings.simplefilter("error", RunnerWarning)
    for more, prompt, sampling in MATVEC:
        decoder("matvec", more, prompt, sampling, {}).run(4).tolist()
    for more, prompt, sampling, settings in CASES:
        before = {name: getattr(Fused, name) for name in settings}
        for name, value in settings.items():
            setattr(Fused, name, value)
        loop = decoder("fused", more, prompt, sampling, settings)
        runner = loop._runner
        assert isinstance(runner, Fused), loop.runner
        loop.run(1)
        loop.run(3)
        runner.check()
        for name, value in before.items():
            setattr(Fused, name, value)
    print("ok")


if __name__ == "__main__":
    main()
