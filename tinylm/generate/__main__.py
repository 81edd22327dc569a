"""The command `python -m tinylm.generate`: a checkpoint continues prompts, on stdout.

One prompt streams; several are a batch, printed row by row when all have ended. Notes and tokens/s go to stderr.
Exit status: 0; 2 for what cannot work, told in one line; 130 after Ctrl-C, with what was generated until then.
"""

from __future__ import annotations

import io
import os
import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from tinylm.config import CheckpointError, ConfigError
from tinylm.generate.decoder import Decoder
from tinylm.generate.prompts import pad
from tinylm.generate.rows import stream
from tinylm.generate.runners import RunnerWarning, choose
from tinylm.generate.sampling import Sampling
from tinylm.generate.text import TextModel, TextStream, load
from tinylm.model import DTYPES

NAME = "tinylm.generate"


@dataclass(frozen=True)
class Options:
    """Continues prompts with a model from a checkpoint."""

    checkpoint: Path
    """A run's folder, one of its checkpoints, or a Hugging Face Llama directory."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The text to continue; several make a batch. None: from the start of a text."""
    prompt_file: Path | None = None
    """A UTF-8 file with one more prompt (less the newline at its end); - is stdin."""
    max_new_tokens: int = 200
    """At most so many; fewer where the model's context ends before, which is told."""
    temperature: float = 0.8
    """0: the likeliest token each time."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the fewest tokens only whose probabilities sum to at least p."""
    seed: int | None = None
    """The first prompt's; the next ones have seed + 1, ... None: another one each time, which is told."""
    stop: bool = True
    """End at the token that ends a text."""
    which: Literal["newest", "best"] = "newest"
    """Checkpoint of a run's folder; best: of the lowest validation loss."""
    device: str = "auto"
    """Such as cpu or cuda:1; auto: a GPU if there is one."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = "stored"
    """Of the weights and the cache."""
    cache: Literal["dense", "none"] = "dense"
    """Where keys and values live; none: the whole text is computed again for each token."""
    runner: str = "eager"
    """How steps are launched: eager; graph, on a GPU; compile, which takes long before the first token."""


def main(args: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, args=args, prog=f"python -m {NAME}")
    try:
        return run(options)
    except (ConfigError, CheckpointError) as error:
        tell(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        tell("the device's memory is too small for this: give fewer prompts or tokens, or --dtype bf16")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads stdout, such as head, has enough
        return 0


def run(options: Options) -> int:
    seed = secrets.randbits(32) if options.seed is None else options.seed
    sampling = Sampling(options.temperature, options.top_k, options.top_p, seed)
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}: expected at least 1")
    device = choose_device(options.device)
    choose(options.runner, device.type)
    prompts = read_prompts(options)
    source = load(options.checkpoint, device=device, dtype=DTYPES.get(options.dtype), which=options.which)
    rows = [source.encode(prompt) for prompt in prompts]
    limits = room(source, rows, options.max_new_tokens)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character ends nothing

    started = time.perf_counter()
    tokens, lengths = pad(rows)
    ends = source.ends if options.stop else frozenset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RunnerWarning)
        decoder = Decoder(
            source.model,
            tokens,
            max(limits) - 1,
            lengths=lengths,
            cache=None if options.cache == "none" else options.cache,
            runner=options.runner,
            sampling=sampling,
            vocab_size=source.tokenizer.vocab_size,
            stop=ends,
        )
    for warning in told:
        tell(str(warning.message))
    ready = time.perf_counter()
    counts, interrupted = speak(source, decoder, rows, ends)
    ended = time.perf_counter()

    rest = sum(max(count - 1, 0) for count in counts)  # the first of each is prefill's
    rate = f", {rest / (ended - ready):.1f} tokens/s" if rest > 0 else ""
    drawn = f"; seed {seed}" if options.temperature else ""
    why = "interrupted" if interrupted else "" if len(rows) > 1 else reason(counts[0], limits[0], options)
    tell(f"{sum(counts)} tokens after {ready - started:.2f} s of preparation{rate}{drawn}{why and f'; {why}'}")
    return 130 if interrupted else 0


def speak(source: TextModel, decoder: Decoder, rows: list[list[int]], ends: frozenset[int]) -> tuple[list[int], bool]:
    """Writes the texts to stdout: how many new tokens each row has, and whether Ctrl-C ended it."""
    texts = [TextStream(source.tokenizer.decode) for _ in rows]
    parts = [[text.push(ids)] for text, ids in zip(texts, rows, strict=True)]
    counts, interrupted, alone = [0] * len(rows), False, len(rows) == 1
    if alone:
        write(parts[0][0])
    try:
        for chosen in stream(decoder, stop=ends):
            for row, ids in enumerate(chosen):
                counts[row] += len(ids)
                parts[row].append(texts[row].push(ids))
                if alone:
                    write(parts[row][-1])
    except KeyboardInterrupt:
        interrupted = True
    for row, text in enumerate(texts):
        parts[row].append(text.finish())
        if alone:
            write(parts[row][-1] + "\n")
        else:
            write(f"--- prompt {row + 1} of {len(rows)}\n{''.join(parts[row])}\n")
    return counts, interrupted


def read_prompts(options: Options) -> list[str]:
    """As given, or the empty prompt."""
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        name = str(options.prompt_file)
        try:
            data = sys.stdin.buffer.read() if name == "-" else options.prompt_file.read_bytes()
            prompts.append(data.decode("utf-8").removesuffix("\n").removesuffix("\r"))
        except OSError as error:
            raise ConfigError(f"--prompt-file {name}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt-file {name}: is no UTF-8 at byte {error.start}") from None
    return prompts or [""]


def room(source: TextModel, rows: list[list[int]], asked: int) -> list[int]:
    """How many new tokens each row gets; tells where the context ends before. Raises ConfigError for no room."""
    context = source.model.config.context
    names = ["the prompt"] if len(rows) == 1 else [f"prompt {number}" for number in range(1, len(rows) + 1)]
    for name, row in zip(names, rows, strict=True):
        if len(row) >= context:
            raise ConfigError(f"{name} has {len(row)} tokens, the model's context is {context}: shorten it")
    limits = [min(asked, context - len(row)) for row in rows]
    for name, row, limit in zip(names, rows, limits, strict=True):
        if limit < asked:
            tell(f"{name} has {len(row)} of the context's {context} tokens: at most {limit} new ones follow")
    return limits


def reason(count: int, limit: int, options: Options) -> str:
    if count < limit:
        return "end of text"
    return "the model's context is full" if limit < options.max_new_tokens else ""


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: give cpu, cuda or cuda:1, or leave it out")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; give cpu")
    return device


def write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail again when Python ends, with a message and a status of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise ConfigError(f"stdout cannot be written: {error.strerror}") from None


def tell(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
