"""Text from a checkpoint: what a model needs to speak, and its tokens as text while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylm.config import ConfigError
from tinylm.model import Transformer
from tinylm.tokenizer import FILE, Tokenizer

REPLACEMENT = "\ufffd"  # what bytes become that are no character, or none yet


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    ends: frozenset[int]  # the tokens that end a text
    start: int | None  # the token that a text without a prompt starts from

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer's template adds, at least one.

        Raises ConfigError for what is no text, for a character that a table of characters lacks, and for an
        empty prompt where there is no token to start from.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the prompt is no UTF-8 at character {error.start}: give it in UTF-8") from None
        ids = self.tokenizer.encode(prompt, special=True)
        if not ids and self.start is not None:
            ids = [self.start]
        if not ids:
            raise ConfigError("the prompt is empty, and the tokenizer has no token that starts a text: give a prompt")
        return ids


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    which: str = "newest",
) -> TextModel:
    """The model, in eval mode, of a run's folder, of one of its checkpoints or of a Hugging Face Llama directory.

    dtype: of the parameters; None: as stored. which: checkpoint of a run's folder, "newest" or "best" (of lowest
    validation loss). Raises ConfigError and CheckpointError, which name the file that is missing or wrong.
    """
    from tinylm import checkpoint, hf  # late: hf loads safetensors

    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; give a run's folder, or a Hugging Face Llama directory")
    ends: list[int] = []
    start: int | None = None
    if (directory / checkpoint.META).is_file() or checkpoint.saved(directory):
        found = checkpoint.load(directory, which, files=checkpoint.SPOKEN)
        directory = found.path
        tokenizer = Tokenizer.load(directory)
        model, _ = checkpoint.load_model(found, device, dtype or torch.float32)
    elif (directory / "config.json").is_file():
        if not (directory / FILE).is_file():
            raise ConfigError(f"{directory}: has no {FILE}; save the tokenizer's there, beside config.json")
        tokenizer = Tokenizer.load(directory)
        _, model = hf.load_hf_llama(directory, device=device, dtype=dtype)
        ends, start = hf.special_ids(directory)
    else:
        raise ConfigError(
            f"{directory}: has neither checkpoints (step-*, {checkpoint.META}) nor a config.json; "
            "give a run's folder, or a Hugging Face Llama directory"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of "
            f"{model.config.vocab_size}: give the tokenizer that the model was trained with"
        )
    eot = tokenizer.eot
    if eot is not None and not ends:
        ends = [eot]
    return TextModel(model, tokenizer, frozenset(ends), eot if start is None else start)


class TextStream:
    """Tokens in, text out, as soon as it is whole: what ends inside a character is held back.

    decode: ids -> text, as `Tokenizer.decode`. All that `push` and `finish` return is decode of all ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # The ids shown last, as context: a decoder may treat the first token of a text in its own way.
        self._shown: list[int] = []
        self._shown_text = ""
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._held += ids
        text = self._decode(self._shown + self._held)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown_text):
            return ""
        new = text[len(self._shown_text) :]
        self._shown, self._held = self._held, []
        self._shown_text = self._decode(self._shown)
        return new

    def finish(self) -> str:
        """What was held back and will not be completed."""
        return self._decode(self._shown + self._held)[len(self._shown_text) :]
