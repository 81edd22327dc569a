"""What a KV cache is worth: time per token with and without one, over the context.

Both sides start from a prefilled prompt and decode the same number of tokens, ending with the ids on the host; the one
without a cache recomputes the whole prefix for each but projects only the last position to the vocabulary. `impl` is
the runner: what the cache is worth is the best of them with it against the best without it.
"""

from benchmarks import inputs
from tinylm.bench import cells
from tinylm.generate import RUNNERS

COMPILED = ["compile"]
LAUNCHED = [name for name in RUNNERS if name not in COMPILED]


def grid(preset, dtype, context, impl=LAUNCHED):
    axes = {"preset": [preset], "dtype": dtype, "batch": [1], "context": context}
    return axes | {"cache": ["dense", "none"], "impl": list(impl)}


@cells(
    choices={**inputs.CHOICES, "impl": LAUNCHED},
    refuse=inputs.refuse,
    seconds={"cuda": 12.0, "cpu": 1.3},
    quick=[grid("tiny", ["fp32"], [128, 256, 512]), grid("nano", ["fp16"], [128, 512])],
    laptop=[grid("tiny", ["bf16"], [128, 512, 2048]), grid("tiny", ["fp16"], [2048])],
    desktop=[grid("tiny", ["bf16"], [256, 1024, 4096])],
    datacenter=[grid("tiny", ["bf16"], [8192, 16384, 32768])],
)
def test_kv_cache(measure, device, preset, dtype, batch, context, cache, impl):
    decoding(measure, device, preset, dtype, batch, context, cache, impl)


@cells(
    choices={**inputs.CHOICES, "impl": COMPILED},
    refuse=inputs.refuse,
    seconds={"cuda": 60.0, "cpu": 20.0},
    quick=[grid("nano", ["fp32"], [128], COMPILED)],
    laptop=[grid("tiny", ["bf16"], [512], COMPILED)],
    datacenter=[grid("tiny", ["bf16"], [2048, 8192, 32768], COMPILED)],
)
def test_compiled(measure, device, preset, dtype, batch, context, cache, impl):
    """The same by what compiles first, for much longer than it is then measured."""
    decoding(measure, device, preset, dtype, batch, context, cache, impl)


def decoding(measure, device, preset, dtype, batch, context, cache, impl):
    config = inputs.shape(preset, context + inputs.DECODED[device])
    net = inputs.model(config, dtype, device)
    measure.extra_info["sdpa_backend"] = (
        net.sdpa_backend(batch, context) if cache == "none" else net.sdpa_backend(batch, 1, context - 1)
    )
    measure.extra_info.update(inputs.loop_facts(context, device))
    measure(
        inputs.decode,
        inputs=lambda: (inputs.decoder(net, batch, context, cache=cache, impl=impl),),
        check=inputs.decode_check(net),
        timing="host",
        units=inputs.DECODED[device],
        **inputs.step_work(net, batch, context, cache),
    )
