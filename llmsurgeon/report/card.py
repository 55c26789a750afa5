"""The model card of a written checkpoint: what was cut, what it cost, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from llmsurgeon.boundary.foreign import printable
from llmsurgeon.checkpoint.card_file import Heritage
from llmsurgeon.evaluation.kinds import much_worse
from llmsurgeon.formats.form import Written
from llmsurgeon.model.costs import Costs, human
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.report.licences import asked_name, terms_of
from llmsurgeon.report.origin import Origin
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
# Of the metadata, in order.
KEYS = (
    *("language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model"),
    *("base_model_relation", "tags"),
)
# What of an evaluation stands in the metadata: its key, the hub's name of the metric, and ours.
METRICS = {
    "perplexity": ("perplexity", "perplexity"),
    "kl": ("kl_divergence", "KL to the parent, nats a token"),
    "top1_agreement": ("accuracy", "top-1 agreement with the parent"),
    "hidden_cosine": ("cosine_similarity", "cosine of the last hidden states to the parent's"),
    "pooled_cosine": ("cosine_similarity", "cosine of the mean-pooled states to the parent's"),
}

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

    repository: the hub's that this model goes to; None where it goes to none.
    origin: the parent; heritage: what the cards before this one say.
    before, after: costs of the parent and of this model.
    recipe: its text; None for the same model in another form.
    evaluation, text, dataset: what was measured, on which text, of which dataset of the hub; None where nothing was.
    notes: what was done, a sentence each.
    gate: what of the recipe's gate was missed.
    own_code: names of the parent's own code that came along.
    """

    repository: str | None
    origin: Origin
    heritage: Heritage
    before: Costs
    after: Costs
    recipe: str | None = None
    evaluation: dict[str, Any] | None = None
    text: str | None = None
    dataset: str | None = None
    notes: Sequence[str] = ()
    gate: Sequence[str] = ()
    own_code: Sequence[str] = ()


def model_card(written: Written, made: Made) -> str:
    """README.md of a checkpoint, with the metadata block that the hub reads."""
    auto = _auto_class(written)
    return markdown_page(
        "card.md.j2",
        metadata=Markdown(_metadata(written, made, auto).to_yaml(original_order=list(KEYS))),
        name=made.origin.short,
        terms=terms_of(made.heritage),
        asked_name=asked_name(made.heritage, made.repository),
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


def _metadata(written: Written, made: Made, auto: str) -> ModelCardData:
    """The block that the hub reads. A parent that the hub has not is passed over for those that its card names."""
    base = [made.origin.hub_id] if made.origin.hub_id else list(made.heritage.base_models)
    # The hub's word for the same model in another form, and for one in fewer bits.
    relation = "quantized" if made.recipe is None or written.format == "bitnet" else "finetune"
    heritage = made.heritage
    results = _results(PIPELINES.get(auto, "other"), made)
    return ModelCardData(
        language=list(heritage.language) or None,
        license=heritage.license,
        license_name=heritage.license_name,
        license_link=heritage.license_link,
        library_name="transformers",
        pipeline_tag=PIPELINES.get(auto),
        base_model=base or None,
        base_model_relation=relation if base else None,
        tags=["llmsurgeon", "model-surgery", *(["custom_code"] if written.code or made.own_code else [])],
        model_name=made.repository or (made.origin.short if results else None),
        eval_results=results or None,
    )


def _results(task: str, made: Made) -> list[EvalResult]:
    """What was measured, for `model-index`."""
    text = made.text or "held-out text"
    found = made.evaluation or {}
    return [
        EvalResult(task, made.dataset or "text", text, metric, round(found[key], 6), metric_name=name)
        for key, (metric, name) in METRICS.items()
        if isinstance(found.get(key), int | float) and isfinite(found[key])
    ]


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
