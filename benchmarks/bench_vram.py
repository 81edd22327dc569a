"""Memory against context and batch: measured in a fresh process each, beside the analytic prediction.

A cell builds the model and its cache, prefills all of the context but the last token and decodes that one; the time
is that of this step. Predicted: weights plus keys and values; on a GPU what is used beyond that is recorded by name
(see `tinylm.bench.footprint`). On a CPU `device_used_bytes` is the growth of the process's peak resident memory. Out
of memory is a result: the cell is reported as skipped with `out_of_memory`.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks import inputs
from tinylm.bench import cells, footprint, isolated, sampling, telemetry, timing
from tinylm.cache import Batch
from tinylm.generate import prefill
from tinylm.model import DTYPES, Transformer

LIMITS = timing.Limits(min_samples=3, max_samples=7, seconds=0.5)
PREFILL_TOKENS = 8192  # at once, over the whole batch: bounds the activations, which the prediction leaves out
# Of the memory that is free when the cell starts: a driver that spills into the host's memory (WSL) then reports
# out of memory instead of slowing down by orders of magnitude.
CAP = 0.97


def grid(preset, dtype, batch, context):
    return {"preset": [preset], "dtype": dtype, "batch": batch, "context": context}


@cells(
    choices=inputs.CHOICES,
    refuse=inputs.refuse,
    seconds={"cuda": 4.2, "cpu": 3.2},
    quick=[grid("tiny", ["fp32"], [1, 4], [512, 2048]), grid("nano", ["fp16"], [1], [512, 2048])],
    laptop=[
        grid("small", ["bf16"], [1, 8], [1024, 4096, 16384]),
        grid("small", ["fp16"], [1], [1024, 16384]),
    ],
    desktop=[grid("small", ["bf16"], [32], [4096, 16384])],
    datacenter=[
        grid("small", ["bf16"], [64, 256], [4096, 16384]),
        grid("llama-3-8b", ["bf16"], [1, 8], [1024, 8192]),
    ],
)
def test_vram(measure, device, preset, dtype, batch, context):
    config = inputs.shape(preset, context)
    net = Transformer.build(config, device="meta", dtype=DTYPES[dtype])
    measure.extra_info["predicted_bytes"] = net.weight_bytes() + net.kv_bytes(batch, context)
    inputs.model.cache_clear()  # the last experiment's model is not to take this one's memory
    uuid = None
    if device == "cuda":
        torch.cuda.empty_cache()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    with measure.machine.wall.phase("fresh process"):
        outcome = isolated.run(cell, config=config, dtype=dtype, batch=batch, context=context, uuid=uuid)
    if outcome.status == "out-of-memory":
        measure.extra_info["out_of_memory"] = True
        pytest.skip(f"out of memory: {outcome.reason}")
    if outcome.status != "ok":
        pytest.fail(f"{outcome.status}: {outcome.reason}", pytrace=False)
    seconds, found = outcome.value
    measure.extra_info.update(found)
    measure.samples(seconds, timing="host", tokens=batch)


def cell(config, dtype, batch, context, uuid):
    """Seconds of each step, and the memory's readings; on the card with this UUID, or on the CPU if it is None."""
    if uuid is None:
        before = telemetry.resident_bytes()
        seconds = decoded(Filled(config, dtype, batch, context, "cpu"))
        return seconds, {"device_used_bytes": telemetry.peak_resident_bytes() - before}
    nvml = telemetry.Nvml.open(uuid)
    before = nvml.read("used_bytes")  # no context of ours yet

    def used():
        own, all_used = nvml.read("own_bytes"), nvml.read("used_bytes")
        return own if own is not None or None in (all_used, before) else all_used - before

    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(CAP * free / total)
    torch.zeros(1, device="cuda")
    bare = footprint.read(used)
    # A layer alone has the kernels of all, and what they need beside tensors.
    Filled(replace(config, layers=1), dtype, batch, context, "cuda")()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    warm = footprint.read(used)
    step = Filled(config, dtype, batch, context, "cuda")
    seconds = decoded(step, torch.cuda.synchronize)
    end = footprint.read(used)
    found = {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "device_used_bytes": end and end.used,
    }
    if bare and warm and end:
        predicted = step.net.weight_bytes() + step.net.kv_bytes(batch, context)
        found |= footprint.parts(bare, warm, end, predicted)
    return seconds, found


class Filled:
    """The last step of a model whose cache has all of the context but one token."""

    def __init__(self, config, dtype, batch, context, device):
        self.net = Transformer.build(config, device=device, dtype=DTYPES[dtype]).eval()
        self.cache = self.net.new_cache(batch=batch, context=context)
        text = inputs.tokens(config, batch, context, device)
        prefill(self.net, text[:, :-1], self.cache, chunk=max(1, PREFILL_TOKENS // batch))
        self.last = Batch.at(text[:, -1:], context - 1)

    @torch.inference_mode()
    def __call__(self):
        """Its logits. Again and again: it fills the same entry with the same."""
        return self.net.step(self.last, self.cache)


def decoded(step, sync=None):
    """Seconds of each of some steps."""
    if not step().isfinite().all():
        raise ArithmeticError(f"logits after {step.last.span} tokens are not finite")
    (samples,) = sampling.collect([timing.host(step, sync)], LIMITS)
    return samples.seconds
