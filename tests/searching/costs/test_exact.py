"""Costs that follow from a description, against models that are there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import save_encoder, save_tiny, tiny_model
from gguf_models import export, save_uneven, save_uniform

from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.latency import cache_bytes, parameter_bytes
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.formats.loading import load_model
from llmsurgeon.planning.opened import open_model
from llmsurgeon.searching.costs import METERS, Engine, meters, parse_targets
from llmsurgeon.searching.costs.target import QUANTITIES

EXACT = ["params=0.7x", "flops=0.7x", "size=0.7x", "memory=0.7x", "kv=0.7x"]


def made(parent, engine=None, targets=EXACT, **how):
    return {
        m.target.name: m for m in meters(parse_targets(targets), Engine.parse(engine, **how), open_model(str(parent)))
    }


def test_every_quantity_has_its_meter():
    assert set(METERS) == set(QUANTITIES)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3_text", "falcon"])
def test_parts_sum_up_to_a_model_that_transformers_holds(tmp_path, family):
    folder = save_tiny(tmp_path / "parent", family)
    found = made(folder, batch=3, context=20)
    model = tiny_model(family)
    spec = found["params"].parent
    with torch.no_grad():
        _, cache = cached_call(model, input_ids=torch.zeros(3, 20, dtype=torch.long))
    assert found["params"].parent_total == sum(p.numel() for p in model.parameters())
    # A cache of a sliding window holds one token less than the window sees; Falcon's holds a copy for every head.
    if family not in ("qwen2", "gemma3_text", "falcon"):
        assert found["kv"].parent_total == cache_bytes(cache)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["size"].parent_total == weights
    assert found["memory"].parent_total == weights + found["kv"].parent_total
    for meter in found.values():
        assert meter.parent_total == meter.rest(spec) + sum(meter.layer(layer) for layer in spec.layers)
        assert meter.budget() == pytest.approx(0.7 * meter.parent_total)


@pytest.mark.parametrize("type_", ["q8_0", "f16", "Q4_0"])
def test_bytes_of_a_gguf_file_and_its_layers(tmp_path, type_):
    uneven = save_uneven(tmp_path / "uneven")
    parent = save_uniform(tmp_path / "parent", "llama")
    found = made(parent, f"llama.cpp:{type_}")["size"]
    file = GGUFFile(export(parent, tmp_path / "parent.gguf", type_).path)
    assert found.parent_total == sum(entry.end - entry.start for entry in file.entries.values())
    spec = open_model(str(uneven)).spec
    written = GGUFFile(export(uneven, tmp_path / "uneven.gguf", type_).path)
    whole = sum(entry.end - entry.start for entry in written.entries.values())
    assert found.total(spec) == whole == found.measured(uneven, parent)
    for index, layer in enumerate(spec.layers):
        own = [entry for name, entry in written.entries.items() if name.startswith(f"blk.{index}.")]
        assert found.layer(layer) == sum(entry.end - entry.start for entry in own), index
    assert found.rest(spec) == whole - sum(found.layer(layer) for layer in spec.layers)


def test_an_uneven_student_costs_what_it_weighs(tmp_path):
    parent, uneven = save_uniform(tmp_path / "parent", "llama"), save_uneven(tmp_path / "uneven")
    found = made(parent, context=16)
    spec = open_model(str(uneven)).spec
    student = load_model(str(uneven))
    assert found["params"].total(spec) == sum(p.numel() for p in student.parameters())
    assert found["params"].measured(uneven, parent) == found["params"].total(spec)
    with torch.no_grad():
        _, cache = cached_call(student, input_ids=torch.zeros(1, 16, dtype=torch.long))
    assert found["kv"].total(spec) == cache_bytes(cache)
    assert parameter_bytes(student) >= found["size"].total(spec)
    removed = replace(spec.layers[0], attention=None, ffn=None)
    assert found["params"].layer(removed) == 0
    # What a layer was made of does not change what it costs.
    layer = spec.layers[1]
    assert found["flops"].layer(layer) == found["flops"].layer(replace(layer, parents=())) > 0


def test_a_smaller_vocabulary_shrinks_the_rest_alone(tmp_path):
    found = made(save_tiny(tmp_path / "parent", "llama"))
    spec = found["params"].parent
    small = replace(spec, vocab=spec.vocab // 2)
    tables = 1 if spec.tied else 2
    assert found["params"].rest(spec) - found["params"].rest(small) == tables * spec.vocab // 2 * spec.hidden
    assert found["params"].layer(spec.layers[0]) * len(spec.layers) == found["params"].total(small) - found[
        "params"
    ].rest(small)


def test_sliding_windows_bound_the_cache(tmp_path):
    found = made(save_tiny(tmp_path / "parent", "gemma3_text"), context=100)["kv"]
    spec = found.parent
    sliding = next(layer for layer in spec.layers if layer.attention.window)
    full = next(layer for layer in spec.layers if not layer.attention.window)
    assert found.layer(full) / found.layer(sliding) == 100 / sliding.attention.window


def test_absolute_targets_and_words(tmp_path):
    parent = save_tiny(tmp_path / "parent", "llama")
    total = made(parent)["params"].parent_total
    found = made(parent, targets=[f"params={total // 2}"])["params"]
    assert found.budget() == total // 2
    assert found.say(found.budget()).startswith("0.5x params (")
    with pytest.raises(SurgeryError, match=r"params=9M: the model is there already, at 1x params \("):
        made(parent, targets=["params=9M"])["params"].budget()


def test_what_llamacpp_cannot_hold(tmp_path):
    found = made(save_uniform(tmp_path / "parent", "llama"), "llama.cpp:q8_0")["size"]
    layer = found.parent.layers[0]
    narrow = replace(layer, ffn=replace(layer.ffn, width=32))
    assert found.misfit(layer) is None
    assert found.misfit(narrow) is None
    assert found.misfit(narrow, first=True) is None
    assert found.misfit(replace(layer, attention=None)) is None
    assert "sizes its cache by the first block" in found.misfit(replace(layer, attention=None), first=True)
    assert "has attention and no FFN" in found.misfit(replace(layer, ffn=None))
    even = made(save_uniform(tmp_path / "qwen3", "qwen3"), "llama.cpp:q8_0")["size"]
    wide = even.parent.layers[0]
    assert "one shape for all blocks" in even.misfit(replace(wide, ffn=replace(wide.ffn, width=32)))
    assert made(save_tiny(tmp_path / "transformers", "llama"))["size"].misfit(replace(layer, ffn=None)) is None


@pytest.mark.parametrize(
    ("engine", "how", "said"),
    [
        ("onnx", {}, "--engine onnx: expected one of transformers, llama.cpp, such as llama.cpp:q8_0"),
        ("transformers:q8_0", {}, "--engine transformers:q8_0: expected one of bf16, f16, f32"),
        ("llama.cpp:iq2_xs", {}, "GGUF type 'iq2_xs' cannot be made here"),
        ("llama.cpp:tq1_0", {}, "it is for ternary weights alone"),
        ("llama.cpp:q8_0", {"batch": 2}, "runs one sequence on the CPU"),
        ("transformers", {"context": 0}, "--context 0: expected 1 to"),
        ("transformers", {"device": "nowhere"}, "nowhere"),
    ],
)
def test_engines_that_cannot_be_meant(engine, how, said):
    with pytest.raises(SurgeryError, match=said):
        Engine.parse(engine, **how)


def test_a_speed_needs_an_engine(tmp_path):
    parent = open_model(str(save_tiny(tmp_path / "parent", "llama")))
    with pytest.raises(SurgeryError, match=r"target decode=1\.5x: name what is to be that fast"):
        meters(parse_targets(["decode=1.5x"]), None, parent)
    encoder = open_model(str(save_encoder(tmp_path / "bert", "bert")))
    with pytest.raises(SurgeryError, match=r"llama\.cpp:q8_0 cannot run it"):
        meters(parse_targets(["size=0.5x"]), Engine.parse("llama.cpp:q8_0"), encoder)
