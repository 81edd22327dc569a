"""The RMSNorm backend swapped in the whole model, all else equal: decode per token, and a training step.

It is the backend of add_rmsnorm too: every norm but the first is one op with the sum before it. The backends of one
setting are measured round by round, in turn, so that drift of the machine falls on all alike. Decode runs from CUDA
graphs on a GPU, where the kernels' time is not hidden behind the host's.
"""

import math

import pytest
import torch

from benchmarks import inputs
from tinylm import ops
from tinylm.bench import cells
from tinylm.bench.proof import Case, CheckFailed
from tinylm.model import DTYPES, Transformer

IMPLS = list(ops.OPS["rmsnorm"])
PHASES = ["decode", "train"]


def grid(preset, dtype, batch, context, phase=PHASES):
    axes = {"op": ["rmsnorm"], "phase": phase, "preset": [preset], "dtype": dtype}
    return axes | {"batch": [batch], "context": [context], "impl": IMPLS}


@cells(
    choices={**inputs.CHOICES, "impl": IMPLS, "op": ["rmsnorm"], "phase": PHASES},
    refuse=inputs.refuse,
    seconds={"cuda": 2.6, "cpu": 1.8},
    quick=[grid("tiny", ["fp32"], 1, 128), grid("nano", ["fp16"], 1, 128)],
    laptop=[grid("tiny", ["bf16"], 1, 1024, ["decode"]), grid("tiny", ["bf16"], 8, 1024, ["train"])],
    desktop=[grid("small", ["bf16"], 1, 1024, ["decode"]), grid("small", ["bf16"], 8, 1024, ["train"])],
    datacenter=[grid("llama-3-8b", ["bf16"], 1, 1024, ["decode"])],
)
def test_ablation(measure, device, op, phase, preset, dtype, batch, context, impl):
    config = inputs.shape(preset, context + inputs.DECODED[device])

    def build(backend):
        for used in (op, f"add_{op}"):
            if reason := ops.probe(used, backend, device, DTYPES[dtype]):
                pytest.skip(f"{used}/{backend}: {reason}")
        torch.manual_seed(0)  # the same weights for every backend
        net = Transformer.build(config, ops={op: backend}, device=device, dtype=DTYPES[dtype])
        return decoding(net) if phase == "decode" else training(net)

    def decoding(net):
        impl = "graph" if device == "cuda" else "eager"
        return Case(
            inputs.decode,
            lambda: (inputs.decoder(net.eval(), batch, context, cache="dense", impl=impl),),
            inputs.decode_check(net),
        )

    def training(net):
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

        def step(text):
            optimizer.zero_grad(set_to_none=True)
            loss = net.loss(text[:, :-1], text[:, 1:])
            loss.backward()
            optimizer.step()
            return loss.detach()

        def check(loss, text):
            """At initialization every token is about equally likely."""
            error = abs(loss.item() - math.log(config.vocab_size))
            if not error <= 0.2:
                raise CheckFailed(f"the first loss is {loss.item():.3f}, {error:.3f} from ln(vocabulary)")
            return error

        return Case(step, lambda: (inputs.tokens(config, batch, context + 1, device),), check)

    net = Transformer.build(config, device="meta", dtype=DTYPES[dtype])
    if phase == "decode":
        work = inputs.step_work(net, batch, context, "dense")
        measure.interleaved("impl", build, timing="host", units=inputs.DECODED[device], **work)
    else:
        flops = 3 * net.flops(batch, context)
        measure.interleaved("impl", build, timing="host", tokens=batch * context, flops=flops)
