"""`bigtrain data`: prepare data before a run."""

from __future__ import annotations

import time
from typing import Annotated

import typer

app = typer.Typer(help="Prepare data before a run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Prepare data before a run."""  # without a callback, a group of one command would be that command


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(help="Text: a file, a folder, a quoted pattern such as 'texts/**/*.txt', or python-stdlib."),
    ],
    out: Annotated[str, typer.Argument(help="The folder to write; it must not exist.")],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, or a tokenizer.json as the tokenizers library saves it.")
    ] = "bytes",
) -> None:
    """Write text as token ids, which `data.name: tokens` reads by memory map. Each file is a document."""
    from rich.console import Console

    from bigtrain.data.token_files import pack as write

    begin = time.monotonic()
    with Console(stderr=True).status("tokenizing …") as status:
        meta = write(
            source,
            out,
            tokenizer,
            on_progress=lambda documents, tokens: status.update(f"{documents:,} documents, {tokens:,} tokens"),
        )
    rate = meta.num_tokens / max(time.monotonic() - begin, 1e-9)
    typer.echo(
        f"{out}: {meta.num_tokens:,} tokens ({meta.dtype}) of {meta.num_documents:,} documents, "
        f"vocabulary {meta.vocab_size:,}, {rate / 1e6:.1f} million tokens/s"
    )
    if meta.separator is None:
        typer.echo("no id ends a document in this vocabulary: attend_across_documents: false keeps them apart")
    typer.echo(f"read it with  data: {{name: tokens, args: {{path: {out}, context: 1024}}}}")
