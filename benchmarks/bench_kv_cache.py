"""What a KV cache is worth: time per token with and without one, over the context.

Both sides start from a prefilled prompt and decode the same number of tokens; the one without a cache recomputes the
whole prefix for each but projects only the last position to the vocabulary. `graph` captures both in CUDA graphs.
"""

from benchmarks import inputs
from tinylm.bench import cells


def grid(preset, dtype, context, impl=("eager", "graph")):
    axes = {"preset": [preset], "dtype": dtype, "batch": [1], "context": context}
    return axes | {"cache": ["dense", "none"], "impl": list(impl)}


@cells(
    choices=inputs.CHOICES,
    refuse=inputs.refuse,
    seconds={"cuda": 2.1, "cpu": 1.3},
    quick=[grid("tiny", ["fp32"], [128, 256, 512]), grid("nano", ["fp16"], [128, 512])],
    laptop=[grid("tiny", ["bf16"], [128, 512, 2048]), grid("tiny", ["fp16"], [2048])],
    desktop=[grid("tiny", ["bf16"], [256, 1024, 4096])],
    datacenter=[grid("tiny", ["bf16"], [8192])],
)
def test_kv_cache(measure, device, preset, dtype, batch, context, cache, impl):
    config = inputs.shape(preset, context + inputs.DECODED[device])
    net = inputs.model(config, dtype, device)
    measure.extra_info["sdpa_backend"] = (
        net.sdpa_backend(batch, context) if cache == "none" else net.sdpa_backend(batch, 1, context - 1)
    )
    measure(
        inputs.decode,
        inputs=lambda: (inputs.decoder(net, batch, context, cache=cache, impl=impl),),
        check=inputs.decode_check(net),
        timing="host",
        units=inputs.DECODED[device],
        **inputs.step_work(net, batch, context, cache),
    )
