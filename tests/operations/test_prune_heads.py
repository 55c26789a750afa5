"""Fewer heads against a parent whose heads are silenced by hand, and their order against trying every removal."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_NAMES, MIXTURE_NAMES, tiny_model
from generation import generate
from operations.helpers import declared, logits, operate, some_tokens, subject_of, taking
from transformers import AutoModelForCausalLM
from walk.test_walk import runner_of

from llmsurgeon.analysis.elimination import DAMPING, eliminate_groups
from llmsurgeon.analysis.heads import eliminate_heads
from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_heads import PruneHeads

TAKING = [case for case in taking("prune_heads") if case[0] in FAMILY_NAMES]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


def silenced(model, gone):
    """A copy of the parent in which the given heads, {layer: heads}, write nothing."""
    copied = copy.deepcopy(model)
    family = subject_of(model)[0].family
    with torch.no_grad():
        for layer, heads in gone.items():
            attention = copied.get_submodule(family.layers)[layer].get_submodule(family.attention)
            columns = attention.get_submodule(family.attention_out).weight.unflatten(
                1, (HEADS["num_attention_heads"], -1)
            )
            columns[:, heads] = 0
    return copied


def every(value):
    """The same for each layer."""
    return {layer: value for layer in range(6)}


def scores_of(unit, orders):
    return {f"{unit}_elimination": {layer: torch.tensor(order, dtype=torch.float32) for layer, order in orders.items()}}


@pytest.mark.parametrize(("family_name", "changes"), TAKING)
def test_groups_go_with_keys_and_values(family_name, changes):
    model, tokens = tiny_model(family_name, **changes, **HEADS), some_tokens()
    orders = every([3, 0, 2, 1])  # groups 1 and 3 go
    student, written, spec = operate(model, PruneHeads(heads=4), scores=scores_of("group", orders))
    expected = logits(silenced(model, every([2, 3, 6, 7])), tokens)
    torch.testing.assert_close(logits(student, tokens), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model, tokens), expected, atol=1e-3)
    assert {(a.heads, a.kv_heads) for a in spec.attentions} == {(4, 2)}
    declares = declared(family_name, changes).own_head_dim == "declared"
    assert written.format == ("native" if declares else "surgeon")
    assert spec.kv_numbers_per_token() * 2 == subject_of(model)[0].spec.kv_numbers_per_token()


@pytest.mark.parametrize(("family_name", "changes"), TAKING)
def test_heads_of_some_layers(family_name, changes):
    model, tokens = tiny_model(family_name, **changes, **HEADS), some_tokens()
    # Of each group of two the one of the lower score goes, whatever the others' are.
    orders = {1: [7, 6, 0, 1, 5, 4, 2, 3], 4: [0, 1, 2, 3, 4, 5, 6, 7]}
    step = PruneHeads(keep=0.5, unit="head", layers=(1, 4))
    student, written, spec = operate(model, step, scores=scores_of("head", orders))
    expected = logits(silenced(model, {1: [1, 2, 5, 6], 4: [0, 2, 4, 6]}), tokens)
    torch.testing.assert_close(logits(student, tokens), expected, atol=1e-4, rtol=1e-4)
    assert [(a.heads, a.kv_heads) for a in spec.attentions] == [(8, 4), (4, 4), (8, 4), (8, 4), (4, 4), (8, 4)]
    assert written.format == "surgeon"
    generate(student, tokens, max_new_tokens=6)


@pytest.mark.parametrize("unit", ["group", "head"])
def test_by_magnitude(unit):
    model, tokens = tiny_model("llama", **HEADS), some_tokens()
    student, _, _ = operate(model, PruneHeads(heads=4, unit=unit, score="magnitude"))
    gone = {}
    for layer, module in enumerate(model.model.layers):
        v, o = module.self_attn.v_proj.weight, module.self_attn.o_proj.weight
        size = 2 if unit == "group" else 1
        values = v.view(4, -1).norm(dim=1).repeat_interleave(8 // size // 4)
        worth = values * torch.stack([part.norm() for part in o.chunk(8 // size, dim=1)])
        if unit == "group":
            gone[layer] = [2 * g + i for g in worth.argsort()[:2].tolist() for i in (0, 1)]
        else:
            gone[layer] = [2 * g + int(worth[2 * g : 2 * g + 2].argmin()) for g in range(4)]
    torch.testing.assert_close(logits(student, tokens), logits(silenced(model, gone), tokens), atol=1e-4, rtol=1e-4)


def test_one_key_value_head_can_lose_queries_alone():
    model, tokens = tiny_model("llama", num_attention_heads=8, num_key_value_heads=1), some_tokens()
    student, _, spec = operate(model, PruneHeads(heads=3, unit="head"), scores=scores_of("head", every(range(8))))
    expected = logits(silenced(model, every([0, 1, 2, 3, 4])), tokens)
    torch.testing.assert_close(logits(student, tokens), expected, atol=1e-4, rtol=1e-4)
    assert {(a.heads, a.kv_heads) for a in spec.attentions} == {(3, 1)}


def left_by(gram, rows, gone, size):
    """What is lost at least without these groups, the others' rows free."""
    gone = [i for group in gone for i in range(group * size, (group + 1) * size)]
    others = [i for i in range(len(gram)) if i not in gone]
    between = gram[gone][:, others]
    schur = gram[gone][:, gone] - between @ torch.linalg.solve(gram[others][:, others], between.T)
    return float((rows[gone] * (schur @ rows[gone])).sum())


def test_the_order_is_the_greedy_one():
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    gram, rows = (read.T @ read / 200).double(), torch.randn(24, 10, generator=generator).double()
    order, lost = eliminate_groups(gram.float(), rows.float(), 4)
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    gone: list[int] = []
    for place in range(6):
        errors = {g: left_by(gram, rows, [*gone, g], 4) for g in range(6) if g not in gone} if place < 5 else {}
        group = int((order == place).nonzero())
        if errors:
            assert group == min(errors, key=errors.get)
            assert float(lost[place + 1]) == pytest.approx(errors[group], rel=2e-3)
        gone.append(group)
    assert lost[0] == 0 and float(lost[6]) == pytest.approx(float((rows * (gram @ rows)).sum()), rel=2e-3)


@pytest.mark.parametrize("family_name", ["llama", "qwen3", "gemma2"])
def test_what_is_seen_is_what_the_output_projection_reads(family_name):
    model, tokens = tiny_model(family_name, **HEADS), some_tokens(batch=6, length=32)
    family = subject_of(model)[0].family
    width = subject_of(model)[0].spec.attentions[0].head_dim
    found = eliminate_heads(runner_of(model), tokens, {2: 2 * width}, batch=4)
    out = model.get_submodule(family.layers)[2].get_submodule(f"{family.attention}.{family.attention_out}")
    read = []
    hook = out.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, 1)))
    logits(model, tokens)
    hook.remove()
    centred = read[0] - read[0].mean(0)
    order, _ = eliminate_groups(centred.T @ centred / len(centred), out.weight.T.detach(), 2 * width)
    assert set(found) == {2} and torch.equal(found[2].order, order)


@pytest.mark.parametrize("spread", ["even", "loss"])
@pytest.mark.parametrize("family_name", ["llama", "qwen2", *MIXTURE_NAMES])
def test_end_to_end(tiny, tmp_path, run, family_name, spread):
    parent = tiny(family_name, tokenizer=True, **HEADS)
    (tmp_path / "text.txt").write_text(
        "Seven grey geese flew over the lake, and nobody saw where they came down. " * 300
    )
    recipe = tmp_path / "heads.yaml"
    recipe.write_text(
        f"version: 1\ncalibration: {{text: {tmp_path}/text.txt, tokens: 4096, sequence_length: 64}}\n"
        f"steps:\n  - {{op: prune_heads, keep: 0.5, spread: {spread}}}\n  - {{op: refit}}\n"
    )
    code, _, errors = run("run", recipe, parent, "-o", tmp_path / "out")
    assert code == 0, errors
    surgery = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert surgery["after"]["kv_bytes_per_token"] * 2 == surgery["before"]["kv_bytes_per_token"]
    made = [update for update in surgery["refit"] if update["ridge"] is not None]
    assert made and all(update["error_ratio"] < 1 for update in made)
    stock = family_name != "qwen2" and spread == "even"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not stock)
    generate(model, some_tokens(), max_new_tokens=6)
    assert run("run", recipe, "--dry-run", parent / "config.json")[0] == 0


def test_bad_input():
    subject, _, _ = subject_of(tiny_model("llama", **HEADS))
    with pytest.raises(SurgeryError, match="8 query heads in 4 key/value groups; unit group leaves a multiple of 2"):
        PruneHeads(heads=3, score="magnitude").plan(subject)
    with pytest.raises(SurgeryError, match="unit head leaves a multiple of 4, 6 asked"):
        PruneHeads(heads=6, unit="head", score="magnitude").plan(subject)
    with pytest.raises(SurgeryError, match="layer 0 has 8 heads, 16 asked for"):
        PruneHeads(heads=16, score="magnitude").plan(subject)
    with pytest.raises(SurgeryError, match="needs the score 'group_elimination'"):
        PruneHeads(heads=4).plan(subject)
    dropped = subject.after(PruneAttention(layers=(2,)).plan(subject))
    with pytest.raises(SurgeryError, match="layer 2 has no attention"):
        PruneHeads(heads=4, layers=(2,), score="magnitude").plan(dropped)
    gpt2, _, _ = subject_of(tiny_model("gpt2"))
    with pytest.raises(SurgeryError, match="gpt2: prune_heads: its classes hold as many heads"):
        PruneHeads(heads=2, score="magnitude").plan(gpt2)
    with pytest.raises(ValueError, match="exactly one of heads, keep, counts"):
        PruneHeads(heads=2, keep=0.5)


def test_scores_are_for_heads_as_the_parent_has_them():
    subject, _, _ = subject_of(tiny_model("llama", **HEADS))
    orders = {
        **scores_of("group", every([3, 0, 2, 1])),
        **scores_of("head", every([*range(8)])),
        "group_elimination_loss": every(torch.linspace(1, 0, 5)),
    }
    cut = subject.after(PruneHeads(heads=4, score="magnitude").plan(subject))
    cut = replace(cut, scores=orders)
    for step in (PruneHeads(heads=2), PruneHeads(heads=2, unit="head")):
        with pytest.raises(SurgeryError, match="layer 0 was cut by a step before"):
            step.plan(cut)
    with pytest.raises(SurgeryError, match="layer 0 was cut by a step before"):
        PruneHeads(keep=0.5, spread="loss").resolve(cut)


def test_counts_belong_to_layers_as_they_are_written():
    assert PruneHeads(layers=[3, 1], counts=[2, 4]).counts == (4, 2)
    assert PruneHeads(layers="3, 0-1", counts=[2, 4, 6]).counts == (4, 6, 2)


def test_all_together_needs_an_attention_in_each_layer_that_is_named():
    subject, _, _ = subject_of(tiny_model("llama", **HEADS))
    dropped = subject.after(PruneAttention(layers=(2,)).plan(subject))
    dropped = replace(dropped, scores={"group_elimination_loss": every(torch.linspace(1, 0, 5))})
    for layers in ((2,), (1, 2)):
        with pytest.raises(SurgeryError, match="layer 2 has no attention"):
            PruneHeads(keep=0.5, spread="loss", layers=layers).resolve(dropped)
