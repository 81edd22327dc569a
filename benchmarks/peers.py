"""Decode loops of other libraries, on the weights of a model of ours: optional peers of the runners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinylm import hf
from tinylm.model import Transformer

LLAMA = {"norm": "rmsnorm", "norm_placement": "pre", "mlp": "swiglu", "positions": "rope", "bias": False}


class HuggingFace:
    """Transformers' Llama as its documentation has it decode fast: a static cache, and a step that chooses the
    likeliest token, through torch.compile with CUDA graphs.

    Has what `inputs.decode` and its check need of a `Decoder`. Compiled once: `begin` gives it another prompt.
    """

    def __init__(self, net: Transformer, batch: int, prompt_tokens: int, max_new: int) -> None:
        from transformers import StaticCache

        self.prompt_tokens, self.max_new = prompt_tokens, max_new
        self._model: Any = llama(net)
        self._cache: Any = StaticCache(config=self._model.config, max_cache_len=prompt_tokens + max_new + 1)
        self.ids = torch.zeros(batch, prompt_tokens + max_new + 1, dtype=torch.int64, device=net.device)
        self._step = torch.compile(self._choose, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def begin(self, prompt: Tensor) -> HuggingFace:
        """Prefills a prompt (batch, prompt_tokens), and is ready to run."""
        self.ids[:, : self.prompt_tokens] = prompt
        self._known = 0
        if self._cache.layers[0].is_initialized:
            self._seen(0)
        self.ids[:, self.prompt_tokens, None] = self._choose(prompt)
        self.rewind()
        self.run(min(3, self.max_new))  # compiles, warms up and captures
        self.rewind()
        return self

    def rewind(self) -> None:
        self._known = self.prompt_tokens
        self._seen(self.prompt_tokens)

    @torch.no_grad()
    def run(self, tokens: int) -> Tensor:
        start = self._known + 1
        token = self.ids[:, start - 1 : start].clone()
        for place in range(start, start + tokens):
            token = self._step(token).clone()  # the next step's graph writes where this one's result lies
            self.ids[:, place, None] = token
        self._known += tokens
        return self.ids[:, start : start + tokens].clone()

    def _choose(self, tokens: Tensor) -> Tensor:
        logits = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def _seen(self, tokens: int) -> None:
        """How many tokens the cache holds."""
        lengths: list[Any] = [layer.cumulative_length for layer in self._cache.layers]
        torch._foreach_zero_(lengths)
        torch._foreach_add_(lengths, tokens)


def llama(net: Transformer) -> Any:
    """Transformers' Llama of the same shape, whose weights are views of the model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = net.config
    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(theirs)
        model = model.to(net.dtype)
    ours = net.state_dict()
    weights = {name: ours[to.parameter][to.start : to.stop] for name, to in hf.targets_of(config, ()).items()}
    model.load_state_dict(weights, strict=not config.tied, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs).to(net.device)  # it was on meta
    return model.eval()


def refusal(net: Transformer) -> str | None:
    """Why transformers cannot be a peer here, or None."""
    if net.device.type != "cuda":
        return "the peer hf needs a GPU: its CUDA graphs are what is compared"
    odd = [name for name, value in LLAMA.items() if getattr(net.config, name) != value]
    if odd or net.config.rope_scaling:
        return f"the peer hf is a Llama: it has not this model's {', '.join(odd) or 'rope_scaling'}"
    return None if counts() else "the peer hf needs transformers from version 5 on: pip install -e '.[hf]'"


def counts() -> bool:
    """Whether transformers is there, with a static cache that counts its tokens, as from version 5 on."""
    try:
        from transformers.cache_utils import StaticLayer
    except ImportError:
        return False
    return hasattr(StaticLayer(1), "cumulative_length")
