"""Tokens per second: prefill of a prompt, and decode with a dense cache, per preset and batch size."""

import torch

from benchmarks import inputs
from tinylm.bench import cells
from tinylm.bench.proof import against
from tinylm.generate import prefill


def grid(preset, dtype, batch, context):
    """Prefill runs eagerly; decode eagerly and, on a GPU, from CUDA graphs."""
    axes = {"preset": [preset], "dtype": dtype, "batch": batch, "context": context}
    return [
        {"phase": ["prefill"], **axes, "impl": ["eager"]},
        {"phase": ["decode"], **axes, "impl": ["eager", "graph"]},
    ]


@cells(
    choices={**inputs.CHOICES, "phase": ["prefill", "decode"]},
    refuse=inputs.refuse,
    seconds={"cuda": 2.2, "cpu": 0.6},
    quick=[
        *grid("nano", ["fp16", "fp32"], [1, 8], [128]),
        *grid("tiny", ["fp32"], [1, 8], [128]),
    ],
    laptop=[
        *grid("tiny", ["bf16"], [1, 16], [1024]),
        *grid("tiny", ["fp16"], [1], [1024]),
        *grid("small", ["bf16"], [1], [1024]),
        *grid("stories-17m", ["bf16"], [1], [128]),
    ],
    desktop=[
        *grid("small", ["bf16"], [16], [1024]),
        *grid("gpt2-124m", ["bf16"], [1, 16], [512]),
    ],
    datacenter=[
        *grid("small", ["bf16"], [64], [1024]),
        *grid("llama-3-8b", ["bf16"], [1, 16], [1024]),
    ],
)
def test_decode(measure, device, phase, preset, dtype, batch, context, impl):
    config = inputs.shape(preset, context + inputs.DECODED[device])
    net = inputs.model(config, dtype, device)
    if phase == "decode":
        measure.extra_info["sdpa_backend"] = net.sdpa_backend(batch, 1, context - 1)
        measure(
            inputs.decode,
            inputs=lambda: (inputs.decoder(net, batch, context, cache="dense", impl=impl),),
            check=inputs.decode_check(net),
            timing="host",
            units=inputs.DECODED[device],
            **inputs.step_work(net, batch, context, "dense"),
        )
        return

    def fill(prompt, cache):
        return prefill(net, prompt, cache)

    def reference(prompt, cache):
        """Without a cache, row by row."""
        with torch.inference_mode():
            return torch.cat([net(row[None], last_only=True) for row in prompt])

    measure.extra_info["sdpa_backend"] = net.sdpa_backend(batch, context)
    measure(
        fill,
        inputs=lambda: (
            inputs.tokens(config, batch, context, device),
            net.new_cache(batch=batch, context=context),
        ),
        # As in inputs.decode_check, of whole logits: their deviation is their norm.
        check=against(reference, 4 * torch.finfo(net.dtype).eps * (2 * config.layers) ** 0.5),
        timing="host",
        tokens=batch * context,
        flops=net.flops(batch, context, last_only=True),
        bytes=inputs.weight_bytes_read(net) + net.kv_bytes(batch, context),
    )
