"""Tokens per second: prefill of a prompt, and decode with a dense cache, per preset, batch size and runner.

`prefill` is a prompt from the host to its first token on the host, so that its time is the time to first token; by
`compile` it is one CUDA graph on a GPU.
`decode` is the likeliest token each time, by every runner, and `sample` one drawn from the 200 likeliest; both end
with the ids on the host, and their context is the mean over the tokens decoded. `hf` is transformers' Llama on the
same weights.
"""

import functools

import pytest
import torch

from benchmarks import inputs, peers
from tinylm.bench import cells
from tinylm.bench.proof import CheckFailed, against
from tinylm.cache import Batch
from tinylm.generate import RUNNERS, CompiledPrefill, prefill

PEERS = ["hf"]
COMPILED = ["compile", *PEERS]
LAUNCHED = [name for name in RUNNERS if name not in COMPILED]
LOOPS = list(inputs.SAMPLINGS)


def decode(preset, dtype, batch, context, impl=LAUNCHED, phase=("decode",)):
    axes = {"preset": [preset], "dtype": dtype, "batch": batch, "context": context}
    return {"phase": list(phase), **axes, "impl": list(impl)}


def grid(preset, dtype, batch, context):
    """Prefill, which runs eagerly; decode by every runner; of single rows both ways of choosing."""
    loops = [decode(preset, dtype, [rows], context, phase=LOOPS if rows == 1 else ["decode"]) for rows in batch]
    return [decode(preset, dtype, batch, context, ["eager"], ["prefill"]), *loops]


def filled(preset, dtype, context):
    return decode(preset, dtype, [1], [context], ["eager"], ["prefill"])


@cells(
    choices={**inputs.CHOICES, "phase": ["prefill", *LOOPS], "impl": LAUNCHED},
    refuse=inputs.refuse,
    seconds={"cuda": 8.0, "cpu": 0.6},
    quick=[
        *grid("nano", ["fp16", "fp32"], [1, 8], [128]),
        *grid("tiny", ["fp32"], [1, 8], [128]),
    ],
    laptop=[
        *grid("tiny", ["bf16"], [1], [128]),
        *grid("tiny", ["bf16"], [1, 16], [1024]),
        *grid("tiny", ["fp16"], [1], [1024]),
        *grid("small", ["bf16"], [1], [1024]),
        *grid("shakespeare-10m", ["bf16"], [1], [128]),
        *grid("stories-17m", ["bf16"], [1], [128]),
    ],
    desktop=[
        *grid("tiny", ["bf16"], [1], [4096]),
        *grid("small", ["bf16"], [16], [1024]),
        *grid("gpt2-124m", ["bf16"], [1, 16], [512]),
        filled("small", ["bf16"], 4096),
    ],
    datacenter=[
        *grid("small", ["bf16"], [64], [1024]),
        *grid("llama-3-8b", ["bf16"], [1, 16], [1024]),
        filled("llama-3-8b", ["bf16"], 4096),
    ],
)
def test_decode(measure, device, phase, preset, dtype, batch, context, impl):
    config = inputs.shape(preset, context + inputs.DECODED[device])
    net = inputs.model(config, dtype, device)
    if phase in LOOPS:
        decoding(measure, device, net, phase, batch, context, impl)
        return
    if impl != "eager":
        pytest.skip("prefill runs eagerly here, and compiled")
    filling(measure, device, net, batch, context, compiled=False)


@cells(
    choices={**inputs.CHOICES, "phase": ["prefill", *LOOPS], "impl": COMPILED},
    refuse=inputs.refuse,
    seconds={"cuda": 45.0, "cpu": 20.0},
    quick=[decode("tiny", ["fp32"], [1], [128], ["compile"])],
    laptop=[
        decode("small", ["bf16"], [1], [1024], ["compile"], ["prefill"]),
        decode("tiny", ["bf16"], [1], [128, 1024], ["compile", "hf"]),
        decode("tiny", ["bf16"], [1], [128, 1024], ["compile"], ["sample"]),
        decode("tiny", ["bf16"], [16], [1024], ["compile"]),
        decode("small", ["bf16"], [1], [1024], ["compile", "hf"]),
        decode("small", ["bf16"], [1], [1024], ["compile"], ["sample"]),
        decode("shakespeare-10m", ["bf16"], [1], [128], ["compile"]),
        decode("stories-17m", ["bf16"], [1], [128], ["compile"]),
    ],
    desktop=[
        decode("tiny", ["bf16"], [1], [4096], ["compile", "hf"]),
        decode("tiny", ["bf16"], [1], [4096], ["compile"], ["sample"]),
        decode("gpt2-124m", ["bf16"], [1], [512], ["compile"]),
        decode("small", ["bf16"], [1], [4096], ["compile"], ["prefill"]),
    ],
    datacenter=[
        decode("llama-3-8b", ["bf16"], [1], [4096], ["compile"], ["prefill"]),
        decode("llama-3-8b", ["bf16"], [1], [1024], ["compile", "hf"]),
        decode("llama-3-8b", ["bf16"], [1], [1024], ["compile"], ["sample"]),
    ],
)
def test_compiled(measure, device, phase, preset, dtype, batch, context, impl):
    """By what compiles first, for much longer than it is then measured."""
    net = inputs.model(inputs.shape(preset, context + inputs.DECODED[device]), dtype, device)
    if phase == "prefill" and impl not in PEERS:
        filling(measure, device, net, batch, context, compiled=True)
        return
    if impl not in PEERS:
        decoding(measure, device, net, phase, batch, context, impl)
        return
    if phase != "decode":
        pytest.skip("the peer hf chooses the likeliest token alone")
    if reason := peers.refusal(net):
        pytest.skip(reason)
    peer = peers.HuggingFace(net, batch, inputs.prompt_tokens(context, device), inputs.DECODED[device])
    prompt = (net.config, batch, peer.prompt_tokens, device)
    loop(measure, device, net, phase, batch, context, lambda: (peer.begin(inputs.tokens(*prompt)),))


def filling(measure, device, net, batch, context, compiled):
    """Measures prefill, up to the first token on the host."""

    @functools.cache
    def ready():
        """The cache, and what fills it. Not among the inputs, so that the proof gives the same one other prompts."""
        cache = net.new_cache(batch=batch, context=context + 1)  # one more, for the check
        if compiled:
            return cache, CompiledPrefill(net, cache, batch, context).run
        return cache, functools.partial(prefill, net, cache=cache)

    def make():
        ready()
        return (inputs.tokens(net.config, batch, context, "cpu"),)

    def first_token(prompt):
        logits = ready()[1](prompt)
        return logits, logits.argmax(-1).cpu()

    def reference(prompt, token):
        """Without a cache, row by row: the logits of the prompt's last token, and of the one after it."""
        with torch.inference_mode():
            rows = [row[None].to(device) for row in torch.cat((prompt, token), 1)]
            ends = (context, context + 1)
            return tuple(torch.cat([net(row[:, :end], last_only=True) for row in rows]) for end in ends)

    # As in inputs.decode_check, of whole logits, whose deviation is their norm: twice what two passes differ by.
    near = against(reference, 4 * torch.finfo(net.dtype).eps * (2 * net.config.layers) ** 0.5)

    def check(result, prompt):
        logits, token = result
        if not torch.equal(token, logits.argmax(-1).cpu()):
            raise CheckFailed("the first token is not the likeliest by the logits")
        with torch.inference_mode():  # what the cache holds is right if decoding goes on from it
            after = net.step(Batch.at(token.to(device), context), ready()[0])
        return near((logits, after), prompt, token)

    measure.extra_info["sdpa_backend"] = net.sdpa_backend(batch, context)
    measure(
        first_token,
        inputs=make,
        check=check,
        timing="host",
        tokens=batch * context,
        flops=net.flops(batch, context, last_only=True),
        bytes=inputs.weight_bytes_read(net) + net.kv_bytes(batch, context),
    )


def decoding(measure, device, net, phase, batch, context, impl):
    sampling = inputs.SAMPLINGS[phase]
    make = lambda: (inputs.decoder(net, batch, context, impl=impl, sampling=sampling),)  # noqa: E731
    loop(measure, device, net, phase, batch, context, make)


def loop(measure, device, net, phase, batch, context, make):
    """Measures the decode loop that `make` makes ready."""
    measure.extra_info["sdpa_backend"] = net.sdpa_backend(batch, 1, context - 1)
    measure.extra_info.update(inputs.loop_facts(context, device))
    measure(
        inputs.decode,
        inputs=make,
        check=inputs.decode_check(net, inputs.SAMPLINGS[phase]),
        timing="host",
        units=inputs.DECODED[device],
        **inputs.step_work(net, batch, context, "dense"),
    )
