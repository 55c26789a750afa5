"""`llmsurgeon prune`: attentions, FFNs, blocks, heads, channels or tokens go, by a recipe or by flags."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsurgeon.cli.convert import add_verb
from llmsurgeon.cli.options import split, text_files
from llmsurgeon.errors import SurgeryError

OPS = {
    "trim_vocab",
    "prune_experts",
    "prune_attention",
    "prune_ffn",
    "prune_blocks",
    "prune_kv_heads",
    "prune_heads",
    "prune_width",
}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_verb(app, "prune", OPS, prune_steps, "pruned")


def prune_steps(
    attention: Annotated[str | None, typer.Option(help="Layers whose attention goes, e.g. 4,7,8.")] = None,
    ffn: Annotated[str | None, typer.Option(help="Layers whose FFN goes.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks that go, e.g. 20-24.")] = None,
    block_count: Annotated[int | None, typer.Option(help="How many blocks go, scored anew after each.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Merge key/value heads down to this number.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads to cut to, key/value groups with theirs.")] = None,
    width: Annotated[int | None, typer.Option(help="FFN width to cut to, by least squares.")] = None,
    vocab: Annotated[
        int | None, typer.Option(help="Rows of the vocabulary that stay; the tokenizer goes along.")
    ] = None,
    vocab_text: Annotated[
        list[str] | None, typer.Option(help="Text whose tokens stay; several: name it again.", callback=text_files)
    ] = None,
    vocab_self: Annotated[
        bool,
        typer.Option("--vocab-self/--no-vocab-self", help="And tokens of text of every kind that the model writes."),
    ] = True,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Closed-form healing afterwards.")] = True,
) -> list[dict[str, Any]]:
    """Remove attentions, FFNs, blocks, heads, FFN channels or tokens, by a recipe that prunes or by flags."""
    steps: list[dict[str, Any]] = []
    trim: list[dict[str, Any]] = []
    texts = [{"text": name} for name in vocab_text or ()]
    if vocab is None and texts:
        trim.append({"op": "trim_vocab", "keep": texts})
    elif vocab is not None:
        # As many of the text's tokens as have room; and of what it says nothing of: code, sums, another language.
        read = [*texts, *([{"self": "all"}] if vocab_self else [])] if texts else []
        kept = {"keep": [{**entry, "tokens": 0} for entry in read], "fill": "predicted"} if read else {}
        trim.append({"op": "trim_vocab", **kept, "rows": vocab})
    for op, layers in (("prune_attention", attention), ("prune_ffn", ffn), ("prune_blocks", blocks)):
        if layers:
            steps.append({"op": op, "layers": split(layers)})
    if block_count is not None:
        steps.append({"op": "prune_blocks", "count": block_count, "score": "rescored"})
    if kv_heads is not None:
        steps.append({"op": "prune_kv_heads", "kv_heads": kv_heads})
    if heads is not None:
        steps.append({"op": "prune_heads", "heads": heads})
    if width is not None:
        steps.append({"op": "prune_width", "width": width})
    if not steps and not trim:
        raise SurgeryError(
            "nothing to prune: give --recipe, or --attention, --ffn, --blocks, --block-count, --kv-heads, --heads, "
            "--width, --vocab or --vocab-text"
        )
    # Fewer tokens leave nothing to make up for.
    if refit and steps:
        steps.append({"op": "refit"})
    return trim + steps
