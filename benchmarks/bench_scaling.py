"""Training over several ranks, as torchrun starts it on this machine: a step of `batch` rows a rank.

Each cell is a run of `python -m tinylm.train`, compiled on a GPU, in processes of its own. Its samples are the mean
times of a step between two rows of its log, so that compilation is outside and the loading of data inside; tokens are
all ranks', and FLOPs, which are set against one device's ceiling, one rank's. `ranks` 1 is the same without torchrun's
ranks to wait for: what N ranks are to be N times as fast as.
"""

import csv
import itertools
import math
import os
import random
import string
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import inputs
from tinylm.bench import cells
from tinylm.bench.proof import CheckFailed
from tinylm.data import prepare
from tinylm.model import Transformer

KINDS = ["ddp", "fsdp"]
STEPS, EVERY = {"cuda": 60, "cpu": 12}, {"cuda": 10, "cpu": 3}


def grid(name, dtype, batch, context, ranks, impl):
    axes = {"phase": ["scaling"], "preset": [name], "dtype": dtype, "batch": [batch], "context": [context]}
    return axes | {"ranks": ranks, "impl": impl}


@cells(
    choices={**inputs.CHOICES, "impl": KINDS, "phase": ["scaling"]},
    seconds={"cuda": 60.0, "cpu": 12.0},
    quick=[grid("nano", ["fp32"], 4, 128, [2], ["ddp"])],
    desktop=[grid("stories-17m", ["bf16"], 256, 256, [1, 2], ["ddp"])],
    datacenter=[
        grid("gpt2-124m", ["bf16"], 48, 1024, [1, 2, 4], ["ddp"]),
        grid("gpt2-124m", ["bf16"], 48, 1024, [2], ["fsdp"]),
    ],
)
def test_scaling(measure, device, tmp_path, phase, preset, dtype, batch, context, ranks, impl):
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs, there are {torch.cuda.device_count()}")
    config = replace(inputs.shape(preset, context), **inputs.ALIKE.get(preset, {}))
    rows = train(tmp_path, config, preset, dtype, device, batch, context, ranks, impl)
    seconds = [(late - soon) / EVERY[device] for soon, late in itertools.pairwise(rows)]
    # A GPU's clock and the allocator settle in the first steps.
    measure.samples(
        seconds[1:],
        "host",
        tokens=ranks * batch * context,
        flops=3 * Transformer.build(config, device="meta").flops(batch, context),
    )


def train(folder, config, preset, dtype, device, batch, context, ranks, impl):
    """Seconds of training at each row of the run's log. Raises CheckFailed if it fails, or its loss does not fall."""
    text = folder / "text.txt"
    letters = random.Random(0).choices(string.ascii_lowercase + " ", k=40 * context)
    text.write_text("".join(letters) * 20)  # over and over, so that there is something to learn
    tokens = prepare(text=text, folder=folder / "tokens", tokenizer="char")
    changed = f"vocab_size={config.vocab_size},bias={str(config.bias).lower()}"
    flags = {
        "--data": tokens, "--out": folder / "run", "--preset": preset, "--model": changed, "--context": context,
        "--batch": ranks * batch, "--dtype": dtype, "--device": device, "--steps": STEPS[device],
        "--log-every": EVERY[device], "--eval-every": 0, "--eval-tokens": context, "--lr": 6e-4, "--parallel": impl,
    }  # fmt: skip
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *("-m", "tinylm.train", *(str(part) for flag in flags.items() for part in flag)),
            *(["--compile"] if device == "cuda" else []),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))},
    )
    if done.returncode:
        raise CheckFailed(f"{ranks} ranks by {impl} failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    with (folder / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows]
    if not (all(map(math.isfinite, losses)) and losses[-1] < losses[0]):
        raise CheckFailed(f"the losses are {losses}: they do not fall")
    if int(rows[-1]["tokens"]) != STEPS[device] * ranks * batch * context:
        raise CheckFailed(f"the log counts {rows[-1]['tokens']} tokens")
    return [float(row["seconds"]) for row in rows]
