"""`python -m tinylm.data prepare`: makes a folder of tokens, and says what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinylm.config import ConfigError
from tinylm.data.corpus import SOURCES, STDLIB
from tinylm.data.preparation import TOKENIZERS, prepare
from tinylm.data.tokens import manifest
from tinylm.tokenizer import PRE_TOKENIZERS

app = typer.Typer(add_completion=False, help="Text in: prepared once into token files.", pretty_exceptions_enable=False)


@app.callback()
def _data() -> None:
    """Text in: prepared once into token files."""


@app.command("prepare")
def _prepare(
    source: Annotated[
        str | None, typer.Argument(help=f"one of {', '.join([*SOURCES, STDLIB])} [default: {STDLIB}]")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="or else: a file, or a folder of text files; .xz too")] = None,
    val_text: Annotated[Path | None, typer.Option(help="a text that validates [default: split the text]")] = None,
    folder: Annotated[Path | None, typer.Option(help="of the tokens [default: one below TINYLM_HOME]")] = None,
    tokenizer: Annotated[str | None, typer.Option(help=f"one of {', '.join(TOKENIZERS)}")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="of a BPE, with the 256 bytes and the end of text")] = None,
    pre: Annotated[str, typer.Option(help=f"how words are cut: {', '.join(PRE_TOKENIZERS)}")] = "byte_level",
    val_fraction: Annotated[float, typer.Option(help="of the text that validates")] = 0.1,
) -> None:
    """Makes a folder of tokens from a source or a text, unless it is there; prints its path last."""
    try:
        made = prepare(
            source,
            folder,
            text=text,
            val_text=val_text,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            pre=pre,
            val_fraction=val_fraction,
            progress=True,
        )
    except ConfigError as error:
        typer.echo(f"tinylm.data prepare: {error}", err=True)
        raise typer.Exit(2) from None
    described = manifest(made)
    typer.echo(f"{described['tokenizer']['kind']} tokenizer, {described['vocab_size']:,} tokens")
    for split, entry in described["splits"].items():
        counts = (f"{entry[what]:,} {what}" for what in ("tokens", "bytes", "documents"))
        typer.echo(f"{split}: {', '.join(counts)}")
    typer.echo(made)


if __name__ == "__main__":
    app(prog_name="python -m tinylm.data")
