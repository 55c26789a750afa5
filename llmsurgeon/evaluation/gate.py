"""The recipe's gate: what the result must reach, and what it falls short of."""

from __future__ import annotations

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.model.families import Family
from llmsurgeon.recipe.recipe import Gate
from llmsurgeon.text.kinds import ALL

ENCODER_KEYS = ("min_hidden_cosine", "min_pooled_cosine")
MASKED_KEYS = ("max_kl", "min_top1_agreement")
# Key of the gate -> what its figure is called, and its unit. max_: the figure must not exceed it, min_: not be less.
FIGURES = {
    "max_perplexity_ratio": ("perplexity ratio", ""),
    "max_bits_per_byte_ratio": ("bits per byte ratio", ""),
    "max_kl": ("KL", " nats a token"),
    "min_top1_agreement": ("top-1 agreement", ""),
    "min_hidden_cosine": ("hidden cosine", ""),
    "min_pooled_cosine": ("pooled cosine", ""),
}
# What `gate.kinds` bounds, of each kind it names.
OF_A_KIND = "max_perplexity_ratio"


def check_gate(gate: Gate | None, family: Family) -> None:
    """Raise SurgeryError for a key that this family's evaluation has no figure for."""
    given = [key for key, value in gate if value is not None] if gate else []
    cosines = " and ".join(ENCODER_KEYS)
    for key in given:
        if not family.encoder and key in ENCODER_KEYS:
            raise SurgeryError(
                f"gate.{key}: {family.model_type} is judged by what it says next; use max_perplexity_ratio, max_kl or "
                "min_top1_agreement"
            )
        if family.encoder and key in ("max_perplexity_ratio", "max_bits_per_byte_ratio", "kinds"):
            masked = f"; {' and '.join(MASKED_KEYS)} are taken at masked tokens" if family.head else ""
            raise SurgeryError(f"gate.{key}: {family.model_type} predicts no next token; use {cosines}{masked}")
        if family.encoder and key in MASKED_KEYS and not family.head:
            raise SurgeryError(f"gate.{key}: {family.model_class} has no masked-LM head; use {cosines}")


def missed(gate: Gate | None, evaluation: Evaluation | EncoderEvaluation | None) -> list[str]:
    """What the evaluation falls short of, one line each."""
    if gate is None or evaluation is None:
        return []
    figures, short = evaluation.figures(), _missed_kinds(gate, evaluation)
    for key in FIGURES:
        bound = getattr(gate, key)
        if bound is None:
            continue
        name, unit = FIGURES[key]
        unit += evaluation.where if key in MASKED_KEYS else ""
        kind, value = "most" if key.startswith("max_") else "least", figures.get(key)
        if value is None:
            short.append(f"{name}{unit} could not be measured, at {kind} {bound} wanted")
        elif not (value <= bound if kind == "most" else value >= bound):
            short.append(f"{name} {value:.3f}{unit}, at {kind} {bound} wanted")
    return short


def _missed_kinds(gate: Gate, evaluation: Evaluation | EncoderEvaluation) -> list[str]:
    """What the kinds that the gate names fall short of; `all` stands for each that was judged."""
    bounds = dict(gate.kinds or {})
    every = bounds.pop(ALL, None)
    if every is not None:
        bounds = {**dict.fromkeys(evaluation.kinds, every), **bounds}
    name, short = FIGURES[OF_A_KIND][0], []
    for kind, bound in bounds.items():
        figures = evaluation.kinds.get(kind)
        value = figures.figures()[OF_A_KIND] if figures else None
        if value is None:
            short.append(f"{name} of {kind} could not be measured, at most {bound} wanted")
        elif not value <= bound:
            short.append(f"{name} of {kind} {value:.3f}, at most {bound} wanted")
    return short
