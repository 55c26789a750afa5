"""What each score of an analysis is: its title, what it means, how to read it, and who defined it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class About:
    """What a score is: its title, what it means, how to read it, and who defined it."""

    title: str
    meaning: str
    reading: str
    source: str


SCORES = {
    "attention_kl": About(
        "Attention KL",
        "KL(parent || parent without this attention) on the logits, in nats a token, on an eighth of the sequences.",
        "Low can go: the model hardly notices.",
        "replace-one-block score of Puzzle, arXiv 2411.19146",
    ),
    "ffn_kl": About(
        "FFN KL",
        "The same for the FFN alone.",
        "Low can go: the model hardly notices.",
        "Puzzle, arXiv 2411.19146",
    ),
    "block_kl": About(
        "Block KL",
        "The same for attention and FFN together, on four times as many sequences.",
        "Low can go: the model hardly notices.",
        "Puzzle, arXiv 2411.19146",
    ),
    "attention_similarity": About(
        "Attention similarity",
        "cos(x, x + attention(norm(x))): how little the attention turns the hidden state.",
        "High can go: it changes little.",
        "LLM-Drop, arXiv 2406.15786",
    ),
    "ffn_similarity": About(
        "FFN similarity",
        "cos(x, x + FFN(norm(x))): how little the FFN turns the hidden state.",
        "High can go: it changes little.",
        "LLM-Drop, arXiv 2406.15786",
    ),
    "block_influence": About(
        "Block influence",
        "1 - cos(what enters the block, what leaves it).",
        "Low can go: it changes little.",
        "ShortGPT, arXiv 2403.03853",
    ),
}
MATRICES = {
    "block_dependency": About(
        "M, blocks",
        "M[i, j] = 1 - cos(contribution of block j, the same with block i removed), averaged over the tokens of half "
        "of the sequences.",
        "Low for all pairs of a run: its blocks can work side by side.",
        "FFN Fusion, arXiv 2503.18908, section 3",
    ),
    "ffn_dependency": About(
        "M, FFNs",
        "The same between FFNs alone, with the suggested attentions already dropped.",
        "Low for all pairs of a run: its FFNs can be fused.",
        "FFN Fusion, arXiv 2503.18908, section 3",
    ),
    "angular_distance": About(
        "Angular distance",
        "arccos(cos(input of layer l, input of layer l + n)) / pi over the last token of each sequence.",
        "Low can go: the n blocks from l on change little.",
        "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, eq. 2",
    ),
}


@dataclass(frozen=True)
class Words:
    """What the distance to the parent is called, its unit, and what it looks at; `meaning` says it to a newcomer."""

    name: str
    short: str
    unit: str
    looks_at: str
    scores: dict[str, About]
    meaning: str


KL = Words(
    "KL",
    "KL",
    "nats a token",
    "what the model says",
    SCORES,
    "KL is how far what a model says of the next token is from what the parent says, averaged over text that fitted "
    "nothing: 0 is the same model.",
)
# Hidden states are what an encoder is for.
COSINE = Words(
    "cosine distance",
    "Distance",
    "1 \N{MINUS SIGN} cos",
    "what leaves the model",
    {
        **SCORES,
        "attention_kl": replace(
            SCORES["attention_kl"],
            title="Attention distance",
            meaning="1 - cos between the last hidden states of the parent and of the parent without this attention, on "
            "an eighth of the sequences.",
        ),
        "ffn_kl": replace(SCORES["ffn_kl"], title="FFN distance"),
        "block_kl": replace(SCORES["block_kl"], title="Block distance"),
    },
    "The distance is 1 \N{MINUS SIGN} cos between the last hidden states of a model and of the parent, averaged over "
    "the tokens of text that fitted nothing: 0 is the same direction.",
)


def words_of(report: Mapping[str, Any]) -> Words:
    """The words for the distance by which an analysis ranked, or a search chose."""
    return COSINE if report.get("distance") == "cosine" else KL
