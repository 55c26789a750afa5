"""Options of every family: what operations offer can be planned, alone and together, and says what it makes."""

from __future__ import annotations

import pytest
from conftest import FAMILY_NAMES, LAYERS, tiny_model
from operations.helpers import subject_of

from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.searching.options import Cut, Option, apart, combined, cuts, offered, stays, steps_of


def space_of(family):
    """A tiny model as its options see it, with stand-ins for scores."""
    subject, weights, _ = subject_of(tiny_model(family))
    offers = offered(subject, 32, OPERATIONS)
    scores: dict = {}
    for offer in offers:
        for step in offer.steps:
            for name, values in step.foresee(subject).items():
                scores.setdefault(name, {}).update(values)
    return subject_of(tiny_model(family), scores)[0], weights, offers


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_planned_together_as_alone(family):
    subject, weights, offers = space_of(family)
    made = cuts(subject, weights, combined(LAYERS, offers))
    options = [option for cut in made for option in cut.options]
    assert len(set(options)) == len(options) > 5 * LAYERS
    assert all(not option.instead for option in options if option.name == "gone")
    for option in options[:: len(options) // 25]:
        alone = Cut.of(subject, weights, [option])
        assert alone.instead(option) == option.instead and option.instead != stays(subject, option.layers[0]).instead
        stand = alone.subject.spec.layers
        assert len(stand) == LAYERS - len(option.layers) + len(option.instead)


@pytest.mark.parametrize("family", ("llama", "gpt_neox"))
def test_merged_steps_do_what_each_of_them_does(family):
    subject, weights, offers = space_of(family)
    by_op: dict = {}
    for offer in offers:
        by_op.setdefault(offer.steps[-1].op, []).append(offer)
    for op, mine in by_op.items():
        unlike = {offer.layers: offer for offer in reversed(mine)}
        chosen = apart([Option(offer.layers, (offer,)) for offer in unlike.values()])[0]
        merged = Cut.of(subject, weights, chosen)
        assert len([step for step in steps_of(chosen) if step.op == op]) <= len(chosen)
        spec = subject
        for option in sorted(chosen, key=lambda each: each.layers):
            for step in option.offers[0].steps:
                spec = spec.after(step.resolve(spec).plan(spec))
        assert spec.spec == merged.subject.spec and spec.names == merged.subject.names


def test_what_a_layer_does_not_bear_is_not_offered():
    subject, _, offers = space_of("gemma2")
    assert not [offer for offer in offers if offer.steps[-1].op == "fuse_ffn"]
    subject, _, offers = space_of("gpt2")
    assert not [offer for offer in offers if offer.steps[-1].op in ("prune_kv_heads", "prune_heads")]
    gone = [Option(offer.layers, (offer,)) for offer in offers if offer.name == "no attention"]
    with pytest.raises(SurgeryError, match="no attention"):
        Cut.of(subject, {}, gone)
