"""The model card of a written checkpoint: what was cut, what it cost, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from llmsurgeon.boundary.foreign import printable
from llmsurgeon.evaluation.kinds import much_worse
from llmsurgeon.formats.form import Written
from llmsurgeon.model.costs import Costs, human
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.report.pages import Markdown, fenced, markdown_page

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageTextToText": "image-text-to-text",
}
KEYS = ("library_name", "pipeline_tag", "base_model", "tags")  # of the metadata, in order

# Perplexity of a model beside its parent's, or cosine of an encoder's sentence states, at which a model is of no use.
COLLAPSED_RATIO, COLLAPSED_COSINE = 3.0, 0.5


def collapse(evaluation: dict[str, Any] | None) -> str | None:
    """A plain warning where the measured quality has collapsed, None where it has not or was not measured."""
    if not evaluation:
        return None
    if "hidden_cosine" in evaluation:
        cosine = evaluation["pooled_cosine"]
        if cosine >= COLLAPSED_COSINE:
            return None
        return f"Quality has collapsed: the cosine of pooled states to the parent's is {cosine:.2f}."
    ratio = evaluation["perplexity"] / evaluation["parent_perplexity"]
    if ratio <= COLLAPSED_RATIO:  # not so where it is not a number
        return None
    return (
        f"Quality has collapsed: perplexity is {ratio:,.1f} times the parent's. Do not use it as it is: change less or "
        "train it (op: distill)."
    )


@dataclass(frozen=True)
class Made:
    """What a card tells of a checkpoint's making.

    base_model: the parent, as it was named.
    before, after: costs of the parent and of this model.
    recipe: its text; None for the same model in another form.
    evaluation, text: what was measured, and on which text; None where nothing was.
    notes: what was done, a sentence each.
    gate: what of the recipe's gate was missed.
    own_code: names of the parent's own code that came along.
    """

    base_model: str
    before: Costs
    after: Costs
    recipe: str | None = None
    evaluation: dict[str, Any] | None = None
    text: str | None = None
    notes: Sequence[str] = ()
    gate: Sequence[str] = ()
    own_code: Sequence[str] = ()


def model_card(written: Written, made: Made) -> str:
    """README.md of a checkpoint, with the metadata block that the hub reads."""
    auto, base = _auto_class(written), made.base_model
    # A path on somebody's disk means nothing to a reader, and the hub refuses it as base_model.
    on_hub = base.count("/") <= 1 and not base.startswith((".", "/")) and not base.endswith(".gguf")
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES.get(auto),
        base_model=base if on_hub else None,
        tags=["llmsurgeon", "model-surgery", *(["custom_code"] if written.code or made.own_code else [])],
    )
    return markdown_page(
        "card.md.j2",
        metadata=Markdown(metadata.to_yaml(original_order=list(KEYS))),
        name=base.rstrip("/").rpartition("/")[2],
        written=written,
        made=made,
        auto=auto,
        trust=lambda code: Markdown(", trust_remote_code=True" if code else ""),
        warning=collapse(made.evaluation),
        human=human,
        quality=_quality(made.evaluation) if made.evaluation else [],
        worse=much_worse((made.evaluation or {}).get("kinds", {})),
        recipe=fenced(printable(made.recipe.strip()), "yaml") if made.recipe else "",
    )


def _auto_class(written: Written) -> str:
    """The Auto class of transformers that loads the written class."""
    if written.tower:
        return "AutoModelForImageTextToText"
    name = written.config["architectures"][0].removeprefix("Surgeon")
    return next((dict(f.heads)[name] for f in FAMILIES.values() if name in dict(f.heads)), "AutoModelForCausalLM")


def _quality(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table: what was measured, the parent's figure and the model's."""
    found = evaluation
    if "hidden_cosine" not in found:
        return [
            ("perplexity", f"{found['parent_perplexity']:.2f}", f"{found['perplexity']:.2f}"),
            ("KL to the parent, nats a token", "0", f"{found['kl']:.3f}"),
            ("top-1 agreement", "100 %", f"{100 * found['top1_agreement']:.1f} %"),
            *_bits(found.get("bits")),
            *_kinds(found.get("kinds")),
        ]
    rows = [
        ("cosine of the last hidden states to the parent's", "1", f"{found['hidden_cosine']:.4f}"),
        ("cosine of the mean-pooled states to the parent's", "1", f"{found['pooled_cosine']:.4f}"),
    ]
    if found["masked_kl"] is not None:
        rows += [
            ("KL to the parent at masked tokens, nats", "0", f"{found['masked_kl']:.3f}"),
            ("top-1 agreement at masked tokens", "100 %", f"{100 * found['masked_top1_agreement']:.1f} %"),
        ]
    return rows


def _bits(bits: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Rows that compare models with different tokenizers; the others are on tokens that both have."""
    if not bits:
        return []
    return [
        ("bits per byte", f"{bits['parent_bits_per_byte']:.4f}", f"{bits['bits_per_byte']:.4f}"),
        ("perplexity per word", f"{bits['parent_word_perplexity']:.1f}", f"{bits['word_perplexity']:.1f}"),
        ("tokens of the same text", "100 %", f"{100 + 100 * bits['more_tokens']:.1f} %"),
    ]


def _kinds(kinds: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """A row for each kind of text, with the perplexity ratio and its interval of 95 % confidence."""
    rows = []
    for name, found in (kinds or {}).items():
        interval = found["perplexity_ratio_interval"]
        between = f", {interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
        here = f"{found['perplexity']:.2f} (ratio {found['perplexity_ratio']:.2f}{between})"
        rows.append((f"perplexity, {name}", f"{found['parent_perplexity']:.2f}", here))
    return rows
