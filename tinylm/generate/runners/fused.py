"""One kernel for many tokens, csrc/decode.cu: for small models, whose steps are bound by the time between kernels.

It does LLaMA-style models of at most 1,024 dimensions in bf16 or fp16, one row at a time, with a dense cache, which any
other runner may continue. It adds up the residual stream in fp32, so its logits are nearer to those of an fp32 model
than the other runners' are, and not the same to the last bit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tinylm.attention import Rope
from tinylm.cache import DenseCache
from tinylm.config import ModelConfig
from tinylm.generate.loop import Loop
from tinylm.generate.runners import kernels
from tinylm.generate.runners.protocol import Unable

POSITIONS = ("rope", "none")
# What a launch waits for, and that it waited in vain, as csrc/decode.h and decode.cuh number it.
WAITS = ("qkv", "out", "gate_up", "down", "head", "attention", "combine", "choice")
LATE = 1
MOST_STOPS = 32  # that a launch looks for; after one of them it repeats it


class Fused:
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    granularity: ClassVar[int | None] = None  # it needs none, and what it falls back to has few graphs so
    fallback: ClassVar[dict[str, str]] = {"cuda": "graph"}

    tokens_per_launch: ClassVar[int] = 128  # a launch costs some 10 us, and runs of positions are shared out for it
    copies: ClassVar[int] = 4  # of what blocks exchange
    few_splits: ClassVar[int] = 12  # results of positions that every reader adds up, without a phase of its own
    split_tokens: ClassVar[int] = 192  # positions in a run, if the card has blocks enough
    cluster: ClassVar[int] = 4  # blocks, at most, that have one result
    leave: ClassVar[int] = 0  # parts to leave out, to see what they take: 1 attention, 2 MLP, 4 head

    def __init__(self, loop: Loop) -> None:
        if (why := unsupported(loop)) is not None:
            raise Unable(why)
        kernels.need_library()
        self._loop, model, config = loop, loop.model, loop.model.config
        device = model.device
        card: Any = torch.cuda.get_device_properties(device)  # of which torch's stubs do not know all
        try:
            words = torch.ops.tinylm.decode_plan(
                shape_of(config, loop.vocab_size), loop.noise is not None, card.multi_processor_count,
                1, card.shared_memory_per_block_optin, 1, self.few_splits, self.split_tokens,
            )[0]  # of clusters of one block: others need less  # fmt: skip
        except RuntimeError as error:
            raise Unable(_told(error)) from None
        self._weights = [model.embed.weight, model.head_weight, model.norm.get_parameter("weight")]
        for block in model.blocks:
            self._weights += [block.get_parameter(f"{name}.weight") for name in kernels.WEIGHTS]
        rope = model.positions
        self._rope = rope.tables(device, torch.float32) if isinstance(rope, Rope) else torch.empty(0, device=device)
        # Words of {value, tag}: a tag is the number of a token, and no two tokens of this exchange have the same.
        self._exchange = torch.zeros(self.copies * words, dtype=torch.int64, device=device)
        self._epoch = 1
        self._status = torch.zeros(2, dtype=torch.int32, device=device)
        self._seen = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        self.stops = len(loop.stop) <= MOST_STOPS
        self._stops = torch.tensor(sorted(loop.stop) if self.stops else [], dtype=torch.int64, device=device)
        noise = loop.noise
        self._noise = (int(noise.starts), noise.stride) if noise is not None else (0, 0)
        try:
            self._launch(loop.prompt_tokens, 0)  # checks all that a launch needs
        except RuntimeError as error:
            raise Unable(_told(error)) from None

    def advance(self, known: int, tokens: int) -> None:
        """Raises RuntimeError where an earlier launch failed, as far as that is known; see `check`."""
        self._raise()
        for done in range(0, tokens, self.tokens_per_launch):
            self._launch(known + done, min(self.tokens_per_launch, tokens - done))
        self._seen.copy_(self._status, non_blocking=True)

    def check(self) -> None:
        """Waits for all launches. Raises RuntimeError if one failed: the ids it was to give are -1."""
        torch.cuda.synchronize(self._loop.model.device)
        self._raise()

    def _raise(self) -> None:
        what, where = self._seen.tolist()
        if what:
            layer, wait = divmod(where, 16)
            late = f"waited in vain for the input of {WAITS[wait]} in layer {layer}"
            told = late if what == LATE else "met no token to start from"
            raise RuntimeError(f"the fused decode kernel {told}: its ids mean nothing; use runner 'graph'")

    def _launch(self, position: int, tokens: int) -> None:
        loop, config = self._loop, self._loop.model.config
        assert isinstance(loop.cache, DenseCache)
        if self._epoch + tokens >= 1 << 31:
            self._exchange.zero_()
            self._epoch = 1
        torch.ops.tinylm.decode(
            self._weights, self._rope, loop.cache.streams["k"], loop.cache.streams["v"], loop.ids.view(-1),
            loop.position.view(-1), self._stops, self._exchange, self._status, config.heads, loop.vocab_size,
            position, tokens, self._epoch, config.norm_eps, loop.sampling.temperature, loop.sampling.top_k or 0,
            *self._noise, self.copies, self.few_splits, self.split_tokens, self.cluster, self.leave,
        )  # fmt: skip
        self._epoch += tokens


def shape_of(config: ModelConfig, vocab_size: int) -> list[int]:
    """As `decode_plan` takes it."""
    return [
        config.dim, config.layers, config.heads, config.kv_heads, config.head_dim, config.d_ff, vocab_size,
    ]  # fmt: skip


def unsupported(loop: Loop) -> str | None:
    """Why the kernel is not for this loop, in one line, as far as the card does not decide; None if it is."""
    if (why := kernels.unsupported(loop, POSITIONS)) is not None:
        return why
    if loop.sampling.temperature and (loop.sampling.top_p or 1) < 1:
        return "it draws with temperature and top_k, not with top_p"
    return None


def _told(error: RuntimeError) -> str:
    return str(error).splitlines()[0]
