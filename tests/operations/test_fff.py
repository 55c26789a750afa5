"""FFNs become trees: exact at depth 0, otherwise the dense FFN with neurons left out; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ENCODER_NAMES, tiny_encoder, tiny_model
from operations.helpers import layers_of, logits, operate, some_tokens, subject_of, taking

from llmsurgeon.analysis.fff_leaves import leaf_of
from llmsurgeon.analysis.fff_nodes import reach_nodes
from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.model.costs import costs
from llmsurgeon.model.parts import FFFSpec, FFNSpec
from llmsurgeon.model.spec import from_block_configs, to_block_configs
from llmsurgeon.operations.fff import FFF
from llmsurgeon.operations.fff_budget import within_budget
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.recipe.recipe import dump, loads
from llmsurgeon.walk.runner import LayerRunner

TOKENS = some_tokens(24, 16)


def scores_of(model, *steps, tokens=TOKENS):
    subject, weights, config = subject_of(model)
    return compute_scores(steps, LayerRunner(config, weights, model.dtype), tokens, subject)


def converted(model, step, tokens=TOKENS):
    scores = scores_of(model, step, tokens=tokens)
    return *operate(model, step, scores=scores), scores["fff"]


@pytest.mark.parametrize(("family", "changes"), taking("fff"))
def test_depth_zero_is_the_dense_model(family, changes):
    model = tiny_model(family, **changes)
    width = subject_of(model)[0].spec.layers[0].ffn.width
    for step in (FFF(depth=0, leaf_width=width), FFF(form="node", depth=0)):
        student, written, _, _ = converted(model, step)
        assert written.format == "surgeon" and "fast feedforward network" in written.why
        torch.testing.assert_close(logits(student, TOKENS), logits(model, TOKENS), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ENCODER_NAMES)
def test_depth_zero_of_an_encoder(family):
    model = tiny_encoder(family)
    for step in (FFF(depth=0, leaf_width=96), FFF(form="node", depth=0)):
        student, _, _, _ = converted(model, step)
        with torch.no_grad():
            found, expected = (m(input_ids=TOKENS).last_hidden_state for m in (student, model))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def masked(model, layer, mask, projection):
    """The model with some inner activations of one layer set to zero: mask(x [n, D]) -> bool [n, H]."""
    family = subject_of(model)[0].family
    module = layers_of(model, family)[layer]
    ffn = getattr(module, family.ffn)
    read = []
    hooks = [
        ffn.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])),
        getattr(ffn, projection).register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask(read[-1]),)),
    ]
    try:
        return logits(model, TOKENS)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("family", "out"), [("llama", "down_proj"), ("gpt2", "c_proj"), ("gpt_neox", "dense_4h_to_h")])
def test_a_leaf_is_the_dense_ffn_with_the_other_neurons_silent(family, out):
    model = tiny_model(family)
    student, _, spec, routings = converted(model, FFF(layers=(2,), depth=2, leaf_width=20, shared=10, min_tokens=8))
    (routing,) = routings[2]
    assert routing.least_tokens >= 8 and spec.layers[2].ffn.active == 30 and type(spec.layers[1].ffn) is FFNSpec

    def mask(x):
        leaf = leaf_of(x.flatten(0, 1), routing.router_weight, routing.router_bias, 2)
        kept = torch.zeros(len(leaf), subject_of(model)[0].spec.layers[2].ffn.width)
        kept[:, routing.shared] = 1
        kept.scatter_(1, routing.neurons[leaf], 1.0)
        return kept.view(*x.shape[:2], -1)

    torch.testing.assert_close(logits(student, TOKENS), masked(model, 2, mask, out), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "gate", "out"), [("llama", "gate_proj", "down_proj"), ("gpt2", "c_fc", "c_proj")])
def test_a_path_is_the_dense_ffn_with_the_other_neurons_silent(family, gate, out):
    model = tiny_model(family)
    student, _, _, routings = converted(model, FFF(form="node", layers=(2,), depth=2))
    (routing,) = routings[2]
    ffn = getattr(layers_of(model, subject_of(model)[0].family)[2], subject_of(model)[0].family.ffn)

    def mask(x):
        right = (getattr(ffn, gate)(x) > 0).flatten(0, 1)
        kept = torch.zeros_like(right)
        for nodes in routing.neurons:
            reach_nodes(kept, right, nodes, 2)
        return kept.view(*x.shape[:2], -1)

    torch.testing.assert_close(logits(student, TOKENS), masked(model, 2, mask, out), atol=2e-5, rtol=1e-5)


def test_every_neuron_stands_in_one_tree():
    _, _, spec, routings = converted(tiny_model("llama"), FFF(form="node", depth=2))
    assert spec.layers[0].ffn == FFFSpec.of_nodes(2, 14, gated=True)  # 14 trees of 7 nodes hold 96 neurons
    assert all(sorted(r.neurons[r.neurons >= 0].tolist()) == list(range(96)) for (r,) in routings.values())


@pytest.mark.parametrize("form", ["leaf", "node"])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.3])
def test_a_budget_is_kept_and_resolves_to_shapes(form, keep):
    model = tiny_model("llama")
    step = FFF(form=form, keep=keep, depth=2 if form == "leaf" else 4, min_tokens=8)
    scores = scores_of(model, step)
    subject = subject_of(model, scores)[0]
    resolved = step.resolve(subject)
    assert resolved.keep is None and resolved.shapes
    assert loads(dump(loads_step(resolved))).steps[0] == resolved
    layers = resolved.plan(subject).spec.layers
    rows = sum(b.ffn.rows if isinstance(b.ffn, FFFSpec) else 3 * b.ffn.width for b in layers)
    assert 0.6 * keep < rows / (6 * 3 * 96) <= keep


def loads_step(step):
    recipe = loads("version: 1\nsteps:\n  - {op: fff, keep: 0.5}\n")
    return recipe.model_copy(update={"steps": (step,)})


def test_a_budget_out_of_reach_is_refused():
    model = tiny_model("llama")
    step = FFF(form="node", keep=0.3, depth=2)
    with pytest.raises(SurgeryError, match=r"keep 0\.3 is out of reach, 0\.438 is the least; raise depth"):
        step.resolve(subject_of(model, scores_of(model, step))[0])


def test_a_budget_goes_where_it_costs_least():
    cheap, dear = FFFSpec.of_leaves(1, 10), FFFSpec.of_leaves(1, 20)
    options = {0: [(50, 0.5, cheap), (80, 0.2, dear)], 1: [(50, 0.01, cheap), (80, 0.005, dear)]}
    dense = {0: 100, 1: 100}
    assert within_budget(options, dense, 1.0) == {}
    assert within_budget(options, dense, 0.9) == {1: dear}
    assert within_budget(options, dense, 0.75) == {1: cheap}
    assert within_budget(options, dense, 0.65) == {0: dear, 1: cheap}
    assert within_budget(options, dense, 0.1) == {0: cheap, 1: cheap}  # nothing smaller is offered


def test_the_description_survives_config_json():
    subject, _, _ = subject_of(tiny_model("gpt2"))
    trees = (FFFSpec.of_leaves(3, 8, 4, in_bias=True), FFFSpec.of_nodes(2, 5, gated=True))
    layers = [replace(b, ffn=f) for b, f in zip(subject.spec.layers, (*trees, *trees, *trees), strict=True)]
    spec = subject.spec.with_layers(layers)
    head_dim = layers[0].attention.head_dim
    assert from_block_configs(to_block_configs(spec), head_dim, [None] * 6) == spec.layers


def test_what_a_token_multiplies_is_counted_and_not_what_is_stored():
    model = tiny_model("llama")
    subject, weights, _ = subject_of(model)
    scores = scores_of(model, step := FFF(depth=3, leaf_width=12, shared=6, min_tokens=1))
    plan = step.plan(subject_of(model, scores)[0])
    student, _, _ = operate(model, step, scores=scores)
    before = costs(subject.spec, subject.family, {n: tuple(t.shape) for n, t in weights.items()}, 4)
    after = costs(plan.spec, subject.family, {n: tuple(t.shape) for n, t in student.state_dict().items()}, 4)
    saved = 6 * 32 * (3 * 96 - (3 * 18 + 3))
    assert before.flops_per_token - after.flops_per_token == 2 * saved
    assert after.parameters > before.parameters


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (FFF(depth=7, leaf_width=4), "depth 7 makes 128 leaves of 96 neurons; the depth may be 6 at most"),
        (FFF(form="node", depth=7, trees=1), "depth 7 needs 128 neurons or more for one tree, the layer has 96"),
        (FFF(depth=2, leaf_width=90, shared=10), "leaf_width 90 and shared 10 are more than the layer's 96 neurons"),
        (FFF(depth=2, leaf_width=8, layers=(9,)), "fff: layer 9 is not in the model"),
        (FFF(depth=5, leaf_width=8), r"leaf \d+ of 32 gets \d+ of 384 calibration tokens, 64 are needed"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(step, message):
    with pytest.raises(SurgeryError, match=message):
        converted(tiny_model("llama"), step)


def test_the_deepest_tree_of_a_width_is_taken():
    assert converted(tiny_model("llama"), FFF(form="node", depth=6, trees=1))[2].layers[0].ffn.width == 127


def test_without_scores_it_says_so():
    with pytest.raises(SurgeryError, match="fff needs the score 'fff'"):
        operate(tiny_model("llama"), FFF(depth=1, leaf_width=8))


def test_cuts_after_trees_and_trees_after_cuts_are_refused():
    model = tiny_model("llama")
    step = FFF(depth=1, leaf_width=48, min_tokens=8)
    scores = scores_of(model, step)
    with pytest.raises(SurgeryError, match="layer 0 has a fast feedforward network; cut first, fff comes last"):
        operate(model, step, PruneWidth(width=40, score="magnitude"), scores=scores)
    with pytest.raises(SurgeryError, match="no layer has a dense FFN as in the checkpoint"):
        operate(model, step, step, scores=scores)
    with pytest.raises(SurgeryError, match="layer 2 is not as in the checkpoint"):
        operate(model, step, step.model_copy(update={"layers": (2,)}), scores=scores)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "bloom", "opt"])
def test_families_whose_ffn_is_no_module_of_its_own_are_refused(family):
    with pytest.raises(SurgeryError, match=f"{family}: fff: "):
        scores_of(tiny_model(family), FFF(depth=1, leaf_width=8))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{op: fff}", "fff takes exactly one of depth"),
        ("{op: fff, depth: 2}", "the leaf form needs leaf_width"),
        ("{op: fff, depth: 2, leaf_width: 8, trees: 3}", "trees belong to form: node"),
        ("{op: fff, form: node, depth: 2, shared: 3}", "leaf_width and shared belong to form: leaf"),
        ("{op: fff, keep: 0.5, shapes: [{layers: 0, depth: 1, leaf_width: 8}]}", "fff takes exactly one of depth"),
        ("{op: fff, shapes: [{layers: 0, depth: 1}]}", "shapes of the leaf form need leaf_width"),
        ("{op: fff, layers: 1, shapes: [{layers: 0, depth: 1, leaf_width: 8}]}", "shapes name their layers"),
        ("{op: fff, keep: 1.5}", "less than or equal to 1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(step, message):
    with pytest.raises(RecipeError, match=message):
        loads(f"version: 1\nsteps:\n  - {step}\n")
