"""Rows that end: the new tokens of each row, up to its end of text, its limit or the model's context."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from tinylm.config import ConfigError
from tinylm.generate.decoder import Decoder
from tinylm.generate.prompts import check_room, pad
from tinylm.generate.sampling import Sampling
from tinylm.model import Transformer

# Tokens between two looks at what was chosen. On a GPU each look waits for the device, which takes some 20 us
# of a step's hundreds; on a CPU it costs nothing.
LOOK_EVERY = {"cuda": 8, "cpu": 1}


def stream(decoder: Decoder, *, stop: Collection[int] = (), every: int | None = None) -> Iterator[list[list[int]]]:
    """The new tokens of each row, from the first, as they are decoded, `every` steps a time.

    Yields a list of B lists of ids, empty ones for rows that ended: before a token of `stop`, which is left
    out, or where the row's text fills the model's context. Ends when all rows ended or after max_new tokens.
    every: None means as `LOOK_EVERY` says. Rewinds the decoder.
    """
    every = every or LOOK_EVERY.get(decoder.model.device.type, max(LOOK_EVERY.values()))
    room = [decoder.model.config.context - length for length in decoder.lengths]
    decoder.rewind()
    chosen, left = decoder.first.tolist(), decoder.max_new
    while True:
        for row, ids in enumerate(chosen):
            end = next((at for at, token in enumerate(ids) if token in stop), len(ids))
            ended = end < len(ids)
            del ids[min(end, room[row]) :]
            room[row] = 0 if ended else room[row] - len(ids)
        yield chosen
        if left == 0 or not any(room):
            return
        steps = min(every, left, max(room))
        chosen, left = decoder.run(steps).tolist(), left - steps


def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    cache: str | None = "dense",
    runner: str = "eager",
    sampling: Sampling | None = None,
    chunk: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, at most max_new_tokens and none from a token of `stop` on.

    Prompts may differ in length: each gets what it would get alone, with the seed of its row. Options: as
    `Decoder`'s. Raises ConfigError where a prompt and max_new_tokens pass the model's context.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    tokens, lengths = pad(prompts)
    check_room(model, max(lengths), max_new_tokens)
    decoder = Decoder(
        model,
        tokens,
        max_new_tokens - 1,
        lengths=lengths,
        cache=cache,
        runner=runner,
        sampling=sampling,
        chunk=chunk,
        vocab_size=vocab_size,
        stop=stop,
    )
    rows: list[list[int]] = [[] for _ in prompts]
    for chosen in stream(decoder, stop=stop, every=decoder.max_new if decoder.stops else None):
        for row, ids in zip(rows, chosen, strict=True):
            row.extend(ids)
    return rows
