"""Small checkpoints that speak: the tokenizers, run folders and directories that tests of generation share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

from tinylm import checkpoint
from tinylm.config import preset
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer, train_bpe, train_char

SAMPLE = "Once upon a time there was a small café. ¡Olé! 今日は 🙂 — the end.\n" * 4
BPE = train_bpe([SAMPLE], 300)
CHARACTERS = train_char([SAMPLE], eot=True)


def own(folder: Path, tokenizer: Tokenizer = BPE, step: int = 1, loss: float | None = None, **more: Any) -> Transformer:
    """A run's folder with a checkpoint of a random model."""
    fields = {"vocab_size": tokenizer.vocab_size, "context": 64, "init_std": 0.3, **more}
    config = preset("nano", **fields)
    model = Transformer(config).eval()
    meta = {"model": dataclasses.asdict(config), "val_loss": loss}
    checkpoint.save(folder, step, model.state_dict(), {}, meta, tokenizer, keep=5)
    return model


def llama_directory(folder: Path) -> Path:
    """A tiny Hugging Face Llama directory, whose tokenizer puts a token before each text."""
    import transformers

    made = tokenizers.Tokenizer.from_str(BPE._saved)
    made.add_special_tokens(["<s>"])
    start = made.token_to_id("<s>")
    made.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", start)]),
        ]
    )
    made.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=start,
        eos_token_id=BPE.eot,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Puts these keys into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(folder: Path, to: Path) -> Path:
    """The files of one folder in another, which it returns."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to
