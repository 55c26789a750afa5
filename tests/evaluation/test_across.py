"""A model and a parent with more tokens on the same text, against each of them asked on its own."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_model

from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.evaluation.across import evaluate_across
from llmsurgeon.evaluation.bits_per_byte import Passage, bits_per_byte, scored_by
from llmsurgeon.evaluation.decoders import evaluate_hidden

KEPT = torch.tensor([i for i in range(64) if i % 5])


def models():
    """A model with some rows of its parent's table, and other weights; the parent."""
    parent, whole = tiny_model("llama"), tiny_model("llama")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model = tiny_model("llama", vocab_size=len(KEPT))
    weights = whole.state_dict()
    model.load_state_dict({n: w[KEPT] if len(w) == 64 and w.dim() == 2 else w for n, w in weights.items()})
    return model, parent


def found():
    """Two passages that both cut alike, one that the parent cuts otherwise, one too short to be compared by tokens."""
    seeded = torch.Generator().manual_seed(2)
    mine = [tuple(torch.randint(len(KEPT), (n,), generator=seeded).tolist()) for n in (20, 22, 20, 7)]
    theirs = [tuple(KEPT[list(ids)].tolist()) for ids in mine]
    theirs[2] = (*theirs[2][:5], 0, *theirs[2][7:])
    return [Passage("some text", a, b, 1, 1) for a, b in zip(mine, theirs, strict=True)]


def test_equals_each_model_on_its_own():
    model, parent = models()
    passages = found()
    made = evaluate_across(model, parent, passages, KEPT)
    assert made.bits == bits_per_byte(passages, scored_by(model), scored_by(parent))
    tokens = torch.tensor([each.mine[:20] for each in passages[:3]])
    with torch.no_grad():
        mine, theirs = model(tokens).logits, parent(KEPT[tokens]).logits
    slow = evaluate_hidden(tokens, mine.__getitem__, lambda row: theirs[row][:, KEPT])
    for name in ("perplexity", "parent_perplexity", "kl", "top1_agreement", "perplexity_ratio"):
        assert getattr(made, name) == pytest.approx(getattr(slow, name), rel=1e-4), name
    inside = theirs.double().softmax(-1)[..., KEPT].sum(-1)
    assert made.outside_mass == pytest.approx(1 - inside.mean().item(), rel=1e-4)
    assert (made.sequences, made.sequence_length) == (3, 20)


def test_each_passage_is_read_once():
    model, parent = models()
    read = {"model": 0, "parent": 0}

    def count(name):
        return lambda *_: read.__setitem__(name, read[name] + 1)

    model.register_forward_hook(count("model"))
    parent.register_forward_hook(count("parent"))
    evaluate_across(model, parent, found(), KEPT)
    # The parent once more on the passage that it cuts otherwise.
    assert read == {"model": 4, "parent": 5}


def test_without_tokens_in_common_bits_alone_are_compared():
    model, parent = models()
    made = evaluate_across(model, parent, found(), None)
    assert made.kl is None and made.outside_mass is None
    assert made.bits is not None and math.isfinite(made.bits.ratio)


def test_ids_beyond_a_table_are_refused():
    model, parent = models()
    broken = [Passage("text", (1, 70), (1, 2), 1, 1)]
    with pytest.raises((SurgeryError, CheckpointError), match="70"):
        evaluate_across(model, parent, broken, None)
