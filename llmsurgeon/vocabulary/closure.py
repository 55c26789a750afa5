"""What must stay in a vocabulary beside the tokens that are wanted, so that kept text is cut as before.

Three kinds of tokenizer, by the `model` of a tokenizer.json:

BPE        A token is made by merges. All tokens on the way from its characters to it must stay: its merge tree. Merges
           stay whose two parts and whose result stay, in their order. Text whose tokens all stayed is then cut as
           before: every merge that was applied to it lies in the tree of one of its tokens, and no merge was added.
WordPiece  The longest piece that fits comes next. Fewer pieces cannot make a longer one fit, so kept text is cut as
           before.
Unigram    The best sequence of pieces wins. The best one stays the best among fewer.

Any other text must still be written with what is left: the 256 byte symbols or byte tokens stay, and where there are
none, all single characters (and their continuation forms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from llmsurgeon.checkpoint.tokenizer_json import Model, pairs_of, tokens_of
from llmsurgeon.errors import SurgeryError


def kind_of(model: Model, where: str) -> str:
    """BPE, WordPiece or Unigram.

    Raises:
        SurgeryError: a kind, or a setting of one, whose vocabulary cannot be trimmed.
    """
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind not in CLOSURES:
        raise SurgeryError(
            f"{where}: its tokenizer is of kind {kind}, whose vocabulary cannot be trimmed; {', '.join(CLOSURES)} can"
        )
    if kind == "BPE":
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise SurgeryError(f"{where}: its BPE has {key} {model[key]!r}, under which merges are not trimmed")
    return kind


# Id of one of the model's own tokens -> ids of all tokens that it takes to make it, itself included.
Trees = Callable[[int], set[int]]


def closed(model: Model, wanted: Iterable[int], where: str = "the tokenizer", trees: Trees | None = None) -> set[int]:
    """`wanted` ids of the model's own tokens with all that must stay beside them.

    trees: `trees_of(model)`, where it is at hand.

    Raises:
        SurgeryError: as `kind_of`.
    """
    beside = CLOSURES[kind_of(model, where)](model)
    return beside.union(*map(trees or trees_of(model), wanted))


def trees_of(model: Model) -> Trees:
    """What each token takes: merges make those of a BPE, pieces of other kinds stand alone."""
    if kind_of(model, "the tokenizer") != "BPE":
        return lambda i: {i}
    merges, named = MergeTrees(model), {i: token for token, i in tokens_of(model).items()}
    # Without a tree it is taken whole (ignore_merges, added tokens), or never.
    return lambda i: merges.tree(named[i]) or {i}


def byte_tokens(tokens: Iterable[str]) -> set[str]:
    """The tokens <0x00> to <0xFF> that are there."""
    named = {f"<0x{byte:02X}>" for byte in range(256)}
    return named & set(tokens)


def byte_symbols() -> set[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2's table)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


class MergeTrees:
    """The merges of a BPE, and the tree of any of its tokens."""

    def __init__(self, model: Model) -> None:
        self.ids = tokens_of(model)
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(pairs_of(model))))}

    def tree(self, token: str) -> set[int] | None:
        """Ids of every token on the way from the characters of `token` to it, itself included; None where no merges
        make it, or one of its characters is no token.

        Text around a token cannot change how it is made: a merge across its borders would have taken it apart.
        """
        parts = list(token)
        if any(part not in self.ids for part in parts):
            return None
        found = {self.ids[part] for part in parts}
        while len(parts) > 1:
            ranked = [(self.ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in self.ranks]
            if not ranked:
                return None
            _, at = min(ranked)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            found.add(self.ids[parts[at]])
        return found


def _bpe(model: Model) -> set[int]:
    ids = tokens_of(model)
    base = byte_tokens(ids) if model.get("byte_fallback") else {t for t in ids if len(t) == 1}
    unknown = {ids[model["unk_token"]]} if model.get("unk_token") in ids else set()
    return {ids[token] for token in base} | unknown


def _word_piece(model: Model) -> set[int]:
    ids, prefix = tokens_of(model), model.get("continuing_subword_prefix") or ""
    single = {
        i for token, i in ids.items() if len(token) == 1 or (token.startswith(prefix) and len(token) == len(prefix) + 1)
    }
    unknown = {ids[model["unk_token"]]} if model.get("unk_token") in ids else set()
    return single | unknown


def _unigram(model: Model) -> set[int]:
    ids = tokens_of(model)
    kept = {ids[token] for token in byte_tokens(ids)} | {i for token, i in ids.items() if len(token) == 1}
    if model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    # What an unknown character costs is counted from the lowest score.
    return kept | {min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1])}


# What must stay whatever is wanted: that with which any text can be written.
CLOSURES: dict[str, Callable[[Model], set[int]]] = {
    "BPE": _bpe,
    "WordPiece": _word_piece,
    "Unigram": _unigram,
}
