"""Training: one optimizer step, a whole run to its validation loss, and text from a model, as the commands make it.

A step is that of `python -m tinylm.train`: fp32 parameters, products in `dtype`, the memory-lean loss, clipping and
Muon, or what the published figures of a preset were made with. `impl`: `eager`; `compile`, the loss through
torch.compile; `graph`, that and the whole step as one CUDA graph. A run is the recipe for TinyShakespeare, compilation
and validation outside its clock and loading of data inside, one sample a seed. Text is prefilled, sampled and turned
into characters as it comes.
"""

import string
from dataclasses import replace

import pytest
import torch

from benchmarks import inputs
from tinylm import parallel
from tinylm.bench import cells
from tinylm.bench.proof import Case, CheckFailed
from tinylm.config import ConfigError
from tinylm.data import prepare
from tinylm.generate import Decoder, Sampling, stream
from tinylm.generate.text import TextStream
from tinylm.model import DTYPES, Transformer
from tinylm.optim import make_optimizer
from tinylm.tokenizer import train_char
from tinylm.train import TrainConfig, train
from tinylm.train.step import Step

IMPLS = ["eager", "compile", "graph"]
# What the published figures of a preset were made with.
OPTIMIZERS = {"gpt2-124m": "adamw"}
SEEDS = 5
# nanoGPT's best with a model of that size, after 1750 steps of this batch.
TARGET = 1.4697
SHAKESPEARE = TrainConfig(
    data="tinyshakespeare",
    preset="shakespeare-10m",
    batch=64,
    dropout=0.1,
    steps=560,
    optimizer="muon",
    lr=4e-3,
    warmup=0.05,
    final_lr=0.0,
    eval_every=80,
)


def grid(name, dtype, batch, context, impl=IMPLS, phase="step"):
    return {"phase": [phase], "preset": [name], "dtype": dtype, "batch": [batch], "context": [context], "impl": impl}


@cells(
    choices={**inputs.CHOICES, "impl": IMPLS, "phase": ["step"]},
    seconds={"cuda": 12.0, "cpu": 2.5},
    quick=[grid("nano", ["fp32"], 4, 128, ["eager"])],
    laptop=[grid("shakespeare-10m", ["bf16"], 64, 256), grid("shakespeare-10m", ["fp16", "fp32"], 64, 256, ["eager"])],
    desktop=[grid("stories-17m", ["bf16"], 64, 256)],
    datacenter=[
        grid("stories-17m", ["bf16"], 1024, 256, ["graph"]),
        grid("gpt2-124m", ["bf16"], 48, 1024, ["graph"]),
    ],
)
def test_step(measure, device, phase, preset, dtype, batch, context, impl):
    if impl == "graph" and device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    config = replace(inputs.shape(preset, context), **inputs.ALIKE.get(preset, {}))

    def build(impl):
        if impl == "graph" and dtype == "fp16":
            pytest.skip("fp16's scaling of the loss reads the device, which a graph cannot")
        torch.manual_seed(0)
        net = Transformer.build(config, device=device).train()
        # So low a rate that the weights stay what they are at the start, however many steps are made; fp32 holds it.
        optimizer = make_optimizer(net, OPTIMIZERS.get(preset, "muon"), lr=1e-7, capturable=impl == "graph")
        step = Step(
            parallel.wrap(net, "none", parallel.World(net.device), compiled=impl != "eager"),
            net,
            optimizer,
            rows=(batch, context + 1),
            micro=batch,
            room=4,
            autocast=DTYPES[dtype],
            clip_norm=1.0,
            graph=impl == "graph",
        )
        matrix = net.get_parameter("blocks.0.attention.out.weight")
        before = matrix.detach().clone()
        step.warm_up(inputs.tokens(config, batch, context + 1, device))

        def call(rows):
            step(rows)
            return torch.stack(step.read())  # (2, 1): the loss and the gradient's norm

        def check(found, rows):
            """Loss and norm are those of plain fp32 autograd, and the weights have moved.

            Rounding: as in inputs.decode_check. 1%: the reference has the weights of one or some steps later.
            """
            exact = torch.tensor(reference(net, rows), device=device)
            error = ((found[:, 0] - exact) / exact).abs().max().item()
            tolerance = 0.01 + 4 * torch.finfo(DTYPES[dtype]).eps * (2 * config.layers) ** 0.5
            if not error <= tolerance:
                raise CheckFailed(f"loss and norm are {found[:, 0].tolist()}, not {exact.tolist()}: off by {error:.3g}")
            if torch.equal(matrix, before):
                raise CheckFailed("the optimizer did not move the weights")
            return error

        return Case(call, lambda: (inputs.tokens(config, batch, context + 1, device),), check)

    flops = 3 * Transformer.build(config, device="meta").flops(batch, context)
    measure.interleaved("impl", build, timing="host", tokens=batch * context, flops=flops)


def reference(net, rows):
    """(loss, norm of its gradient) of rows (B, T + 1) in fp32, some rows at a time; leaves .grad alone."""
    parameters, part = list(net.parameters()), 8
    total, sums = 0.0, [torch.zeros_like(p) for p in parameters]
    for some in rows.split(part):
        loss = net.loss(some[:, :-1], some[:, 1:]) * (len(some) / len(rows))
        torch._foreach_add_(sums, torch.autograd.grad(loss, parameters))
        total += loss.item()
    return total, torch.nn.utils.get_total_norm(sums).item()


@cells(
    choices={**inputs.CHOICES, "impl": IMPLS, "phase": ["run"]},
    seconds={"cuda": 60.0},
    quick=[grid("shakespeare-10m", ["bf16"], 64, 256, ["graph"], "run")],
)
def test_run(measure, device, tmp_path, phase, preset, dtype, batch, context, impl):
    if device != "cuda":
        pytest.skip("on a CPU this run takes hours")
    if dtype == "fp16" and impl == "graph":
        pytest.skip("fp16's scaling of the loss reads the device, which a graph cannot")
    try:
        prepare(SHAKESPEARE.data)
    except ConfigError as error:
        pytest.skip(str(error))
    recipe = replace(SHAKESPEARE, preset=preset, batch=batch, context=context, dtype=dtype)
    recipe = replace(recipe, compile=impl != "eager", graph=impl == "graph")
    runs = [train(replace(recipe, seed=seed, out=str(tmp_path / str(seed)))) for seed in range(SEEDS)]
    losses = [float(run.val_loss) for run in runs]  # type: ignore[arg-type]  # a whole run has one
    if not max(losses) <= TARGET:
        raise CheckFailed(f"the validation losses are {losses}, not at most {TARGET}")
    steps, tokens = runs[0].steps, runs[0].steps * batch * context
    flops = 3 * steps * Transformer.build(inputs.shape(preset, context), device="meta").flops(batch, context)
    measure.samples([run.seconds for run in runs], "host", tokens=tokens, flops=flops)
    measure.extra_info["val_loss"] = losses
    measure.extra_info["bits_per_byte"] = [run.bits_per_byte for run in runs]


@cells(
    choices={**inputs.CHOICES, "phase": ["text"]},
    refuse=inputs.refuse,
    seconds={"cuda": 4.0, "cpu": 1.5},
    quick=[grid("nano", ["fp32"], 1, 128, ["eager"], "text")],
    laptop=[grid("tiny", ["bf16"], 1, 128, ["eager", "graph"], "text")],
    desktop=[grid("tiny", ["bf16"], 16, 128, ["eager", "graph"], "text")],
)
def test_text(measure, device, phase, preset, dtype, batch, context, impl):
    if impl == "graph" and device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    count = inputs.DECODED[device]
    tokenizer = train_char([string.printable])
    config = inputs.shape(preset, context + count)
    net = inputs.model(config, dtype, device)

    def loop():
        prompt = torch.randint(tokenizer.vocab_size, (batch, max(1, context - count // 2)), device=device)
        sampling = Sampling(temperature=0.8, top_k=50, seed=0)
        return Decoder(net, prompt, count - 1, sampling=sampling, runner=impl, vocab_size=tokenizer.vocab_size)

    def speak(decoder):
        """The text of each row, as the ids of its characters: (batch, count) int64 on the host."""
        streams, texts = [TextStream(tokenizer.decode) for _ in range(batch)], [""] * batch
        for chosen in stream(decoder):
            texts = [text + row.push(ids) for text, row, ids in zip(texts, streams, chosen, strict=True)]
        return torch.tensor([tokenizer.encode(text + row.finish()) for text, row in zip(texts, streams, strict=True)])

    def check(ids, decoder):
        """The text is what the decoder chose, all of it characters."""
        if not torch.equal(ids, decoder.ids[:, decoder.prompt_tokens : decoder.prompt_tokens + count].cpu()):
            raise CheckFailed("the text is not that of the tokens")

    work = {"flops": net.flops(batch, 1, context - 1, last_only=True), "tokens": batch}
    measure(speak, inputs=lambda: (loop(),), check=check, timing="host", units=count, **work)
