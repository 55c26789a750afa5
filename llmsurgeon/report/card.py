"""The model card of a written checkpoint: what was cut, what it cost, how to load it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from llmsurgeon import __version__
from llmsurgeon.boundary.foreign import printable
from llmsurgeon.boundary.places import without_folders
from llmsurgeon.formats.form import Written
from llmsurgeon.model.costs import Costs, human
from llmsurgeon.model.families import FAMILIES

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageTextToText": "image-text-to-text",
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


def model_card(
    base_model: str,
    written: Written,
    before: Costs,
    after: Costs,
    recipe: str | None,
    evaluation: dict[str, Any] | None,
    text: str | None,
    notes: list[str],
    gate: list[str],
    own_code: Sequence[str] = (),
) -> str:
    """README.md of a checkpoint, with the metadata block that the hub reads.

    Without a `recipe` it is the same model in another form. `own_code` names the parent's
    own code that came along.
    """
    auto = _auto_class(written)
    meta: dict[str, Any] = {"library_name": "transformers"}
    if auto in PIPELINES:
        meta["pipeline_tag"] = PIPELINES[auto]
    # A path on somebody's disk means nothing to a reader, and the hub refuses it as base_model.
    if base_model.count("/") <= 1 and not base_model.startswith((".", "/")) and not base_model.endswith(".gguf"):
        meta["base_model"] = base_model
    meta["tags"] = ["llmsurgeon", "model-surgery", *(["custom_code"] if written.code or own_code else [])]
    name = prose(base_model.rstrip("/").rpartition("/")[2])
    title = f"{name}, operated on" if recipe else f"{name} as {written.format}"
    lines = ["---", yaml.safe_dump(meta, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    if warning := collapse(evaluation):
        lines += [f"> **{warning}**", ""]
    if gate:
        lines += ["> **The quality gate of the recipe failed:** " + prose("; ".join(gate)), ""]
    lines += [
        f"Made from {name} by llmsurgeon {__version__} "
        + ("with the recipe below." if recipe else "without a change to what it computes."),
        "",
        "| | parent | this model |",
        "|---|---:|---:|",
        f"| blocks | {before.blocks} | {after.blocks} |",
        f"| attentions | {before.attentions} | {after.attentions} |",
        f"| parameters | {human(before.parameters)} | {human(after.parameters)} |",
        f"| FLOPs a token (weights) | {human(before.flops_per_token)} | {human(after.flops_per_token)} |",
    ]
    if before.kv_bytes_per_token:
        lines.append(f"| KV cache bytes a token | {before.kv_bytes_per_token:,} | {after.kv_bytes_per_token:,} |")
    if evaluation:
        lines += [
            *_quality(evaluation),
            "",
            f"Measured on {evaluation['tokens']:,} tokens held out from the calibration text ({prose(text or '')}). "
            "Other text can fare worse.",
        ]
    elif recipe:
        lines += ["", "Its quality has not been measured: `llmsurgeon eval THIS --against PARENT`."]
    trust = ", trust_remote_code=True" if written.code else ""
    tokenizer_trust = ", trust_remote_code=True" if written.code or own_code else ""
    lines += [
        "",
        "## Loading",
        "",
        prose(written.loads),
        "",
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("PATH"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{tokenizer_trust})',
        "```",
        "",
        f"Format: {written.format} ({prose(written.why)}).",
    ]
    if notes:
        lines += ["", "## What was done", "", *(f"- {prose(note)}" for note in notes)]
    if recipe:
        lines += ["", "## Recipe", "", *fenced(printable(recipe.strip()), "yaml")]
    return "\n".join([*lines, ""])


def prose(text: str) -> str:
    """A text of one line as Markdown that shows it: no HTML, no link, no fence; code spans stay.

    Names of models and tensors, gates and texts are a stranger's; absolute paths are cut to their last part.
    """
    line = re.sub("`{2,}", "'", " ".join(printable(without_folders(text)).split()))
    spans = re.split("(`[^`]*`)", line)
    return "".join(span if odd % 2 else re.sub(r"[`\\[\]<>&|]", _escaped, span) for odd, span in enumerate(spans))


def _escaped(found: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(found[0], "\\" + found[0])


def fenced(text: str, language: str) -> list[str]:
    """Lines of a code block that nothing in `text` ends."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return [f"{fence}{language}", text, fence]


def _auto_class(written: Written) -> str:
    """The Auto class of transformers that loads the written class."""
    if written.tower:
        return "AutoModelForImageTextToText"
    name = written.config["architectures"][0].removeprefix("Surgeon")
    return next((dict(f.heads)[name] for f in FAMILIES.values() if name in dict(f.heads)), "AutoModelForCausalLM")


def _bits(bits: dict[str, Any] | None) -> list[str]:
    """Rows that compare models with different tokenizers; the others are on tokens that both have."""
    if not bits:
        return []
    return [
        f"| bits per byte | {bits['parent_bits_per_byte']:.4f} | {bits['bits_per_byte']:.4f} |",
        f"| perplexity per word | {bits['parent_word_perplexity']:.1f} | {bits['word_perplexity']:.1f} |",
        f"| tokens of the same text | 100 % | {100 + 100 * bits['more_tokens']:.1f} % |",
    ]


def _quality(evaluation: dict[str, Any]) -> list[str]:
    """Rows of the table: the parent's figure and the model's."""
    if "hidden_cosine" not in evaluation:
        return [
            f"| perplexity | {evaluation['parent_perplexity']:.2f} | {evaluation['perplexity']:.2f} |",
            f"| KL to the parent, nats a token | 0 | {evaluation['kl']:.3f} |",
            f"| top-1 agreement | 100 % | {100 * evaluation['top1_agreement']:.1f} % |",
            *_bits(evaluation.get("bits")),
        ]
    rows = [
        f"| cosine of the last hidden states to the parent's | 1 | {evaluation['hidden_cosine']:.4f} |",
        f"| cosine of the mean-pooled states to the parent's | 1 | {evaluation['pooled_cosine']:.4f} |",
    ]
    if evaluation["masked_kl"] is not None:
        rows += [
            f"| KL to the parent at masked tokens, nats | 0 | {evaluation['masked_kl']:.3f} |",
            f"| top-1 agreement at masked tokens | 100 % | {100 * evaluation['masked_top1_agreement']:.1f} % |",
        ]
    return rows
