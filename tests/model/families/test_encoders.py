"""Encoders: every class of theirs, parts and blocks that go, padding, and their two forms on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ENCODER_NAMES, LAYERS, masked_head, save_encoder, tiny_encoder
from operations.helpers import operate, subject_of
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.loading import load_model
from llmsurgeon.formats.models import empty_model, fill
from llmsurgeon.formats.surgeon import as_surgeon
from llmsurgeon.formats.tensor_names import canonical
from llmsurgeon.model.families import FAMILIES, family_of
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.planning.opened import open_model
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

HEADS = [(family, head) for family in ENCODER_NAMES for head, _ in FAMILIES[family].heads]
POST_NORM = [name for name in ENCODER_NAMES if FAMILIES[name].post_norm]


def some_ids(batch=3, length=14):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model, ids, mask=None):
    """Every tensor that the model gives, at positions that are not padding."""
    mask = torch.ones_like(ids) if mask is None else mask
    choices = type(model).__name__.endswith("MultipleChoice")
    made = model(**{"input_ids": ids[None] if choices else ids, "attention_mask": mask[None] if choices else mask})
    return [t[mask.bool()] if t.shape[:2] == ids.shape else t for t in made.to_tuple() if isinstance(t, torch.Tensor)]


def equal(mine, theirs, tolerance=1e-5):
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def states(model, ids, mask=None):
    with torch.no_grad():
        return model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_every_class_in_both_forms(name, head):
    """Stock and surgeon form give what transformers' own class gives, with padding."""
    model = tiny_encoder(name, head)
    config = normalised(model.config.to_dict())
    family = family_of(config)
    assert family.model_class == head and family.encoder
    weights = canonical(model.state_dict(), family, model.all_tied_weights_keys)
    ids, mask = some_ids(), torch.ones(3, 14, dtype=torch.long)
    mask[0, 9:] = 0
    for form in (config, as_surgeon(config)):
        made = empty_model(form)
        fill(made, weights, None, "cpu")
        assert type(made).__name__ == ("Surgeon" if form is not config else "") + head
        equal(outputs(made, ids, mask), outputs(model, ids, mask), 1e-6)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_declared_paths_name_the_modules_of_the_model(name):
    model = tiny_encoder(name, masked_head(name))
    family = family_of(model.config.to_dict())
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    layers = model.get_submodule(family.layers)
    assert len(layers) == LAYERS
    for tensor in layers[0].state_dict():
        assert family.is_attention(tensor) != family.is_ffn(tensor), tensor
    for path in (family.ffn_module(family.ffn_out), f"{family.attention}.{family.attention_out}"):
        assert layers[0].get_submodule(path).weight.dim() == 2


def without(model, layer, part):
    """transformers' own model with a part's output zeroed: a norm behind the sum is all that is left of it."""
    family = family_of(model.config.to_dict())
    path = f"{family.attention}.{family.attention_out}" if part == "attention" else family.ffn_module(family.ffn_out)
    projection = model.get_submodule(family.layers)[layer].get_submodule(path)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.zero_()


@pytest.mark.parametrize("format", ["auto", "native"])
@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_a_part_that_goes(name, format):
    """In the surgeon form, and with zeros in the family's own."""
    model, ids, mask = tiny_encoder(name), some_ids(), torch.ones(3, 14, dtype=torch.long)
    mask[1, 4:] = 0
    pruned, written, spec = operate(model, PruneAttention(layers=(0, 3)), PruneFFN(layers=(2,)), format=format)
    without(model, 0, "attention")
    without(model, 3, "attention")
    without(model, 2, "ffn")
    equal(outputs(pruned, ids, mask), outputs(model, ids, mask))
    assert written.format == ("surgeon" if format == "auto" else "native")
    assert [b.attention is None for b in spec.layers] == [True, False, False, True, False, False]
    if format == "auto":
        parameters = sum(p.numel() for p in pruned.parameters())
        assert parameters < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_blocks_go_whole_and_the_format_stays_native(name):
    model, ids = tiny_encoder(name, masked_head(name)), some_ids()
    pruned, written, _ = operate(model, PruneBlocks(layers=(1, 4)))
    assert written.format == "native" and written.config["architectures"] == [masked_head(name)]
    family = family_of(model.config.to_dict())
    layers = model.get_submodule(family.layers)
    model.set_submodule(family.layers, torch.nn.ModuleList(layers[i] for i in (0, 2, 3, 5)))
    equal(outputs(pruned, ids), outputs(model, ids))


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_a_block_that_loses_both_parts_vanishes(name):
    model = tiny_encoder(name)
    both, _, spec = operate(model, PruneAttention(layers=(2,)), PruneFFN(layers=(2,)))
    whole, _, _ = operate(model, PruneBlocks(layers=(2,)))
    assert len(spec.layers) == LAYERS - 1
    equal(outputs(both, some_ids()), outputs(whole, some_ids()), 0)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_width(name):
    """Channels that matter to nothing can go without a trace; one layer narrower than the rest."""
    model, ids = tiny_encoder(name), some_ids()
    family = family_of(model.config.to_dict())
    with torch.no_grad():
        for index in range(LAYERS):
            layer = model.get_submodule(family.layers)[index]
            layer.get_submodule(family.ffn_module(family.ffn_out)).weight[:, 40:] = 0
    for layers, format in ((None, "native"), ((2,), "surgeon")):
        narrow, written, spec = operate(model, PruneWidth(width=40, score="magnitude", layers=layers))
        assert written.format == format and spec.layers[2].ffn.width == 40
        equal(outputs(narrow, ids), outputs(model, ids))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (FuseFFN(runs=((1, 2),)), "fuse_ffn: its norms follow the residual sums: each FFN's output is normed"),
        (ParallelBlocks(windows=((1, 2),)), "parallel_blocks: its norms follow the residual sums"),
        (PruneKVHeads(kv_heads=1), "prune_kv_heads: its classes cannot hold another number"),
    ],
    ids=lambda value: getattr(value, "op", ""),
)
@pytest.mark.parametrize("name", POST_NORM)
def test_what_has_no_sound_form_is_refused(name, step, reason):
    subject, _, _ = subject_of(tiny_encoder(name))
    with pytest.raises(SurgeryError, match=f"{name}: {reason}"):
        step.plan(subject)


def test_settings_and_classes_that_are_refused():
    config = tiny_encoder("bert").config.to_dict()
    with pytest.raises(SurgeryError, match="is_decoder=True cannot be operated on"):
        FAMILIES["bert"].describe({**config, "is_decoder": True})
    with pytest.raises(SurgeryError, match="architectures names BertLMHeadModel, supported of bert are BertModel, "):
        family_of({**config, "architectures": ["BertLMHeadModel"]})


def test_positions_that_no_token_takes():
    """RoBERTa counts positions from behind its padding index."""
    config = tiny_encoder("roberta", pad_token_id=1).config.to_dict()
    assert FAMILIES["roberta"].describe(config).max_positions == 62
    assert FAMILIES["bert"].describe(tiny_encoder("bert").config.to_dict()).max_positions == 64


RECIPE = "version: 1\nsteps:\n"
DROP = "  - {op: prune_attention, layers: [1]}\n"
BLOCK = "  - {op: prune_blocks, layers: [1]}\n"


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
def test_prefixes_and_old_spellings(tmp_path, head, bare):
    """Files come with and without the prefix, with gamma and beta, position numbers and tied copies."""
    parent = save_encoder(tmp_path / "parent", "bert", head)
    tensors = load_file(parent / "model.safetensors")
    old = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        if not bare and not name.startswith("cls."):
            name = "bert." + name
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    prefix = "" if bare else "bert."
    old[f"{prefix}embeddings.position_ids"] = torch.arange(64)[None]
    if head == "BertForMaskedLM":
        old["cls.predictions.decoder.weight"] = old[f"{prefix}embeddings.word_embeddings.weight"].clone()
    save_file(old, parent / "model.safetensors", {"format": "pt"})
    expected = outputs(operate(tiny_encoder("bert", head), PruneBlocks(layers=(1,)))[0], some_ids())
    out = run(loads(RECIPE + BLOCK), str(parent), str(tmp_path / "out"), Options()).out
    equal(outputs(load_model(str(out)), some_ids()), expected)
    stock, info = getattr(transformers, head).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    equal(outputs(stock.eval(), some_ids()), expected)


def test_heads_beside_the_class_go_along(tmp_path):
    """google-bert/bert-base-uncased names BertForMaskedLM and holds a pooler and a next-sentence head, too."""
    parent = save_encoder(tmp_path / "parent", "bert", "BertForPreTraining")
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    out = run(loads(RECIPE + DROP), str(parent), str(tmp_path / "out"), Options()).out
    before, after = open_checkpoint(str(parent)), open_checkpoint(str(out))
    for name in ("bert.pooler.dense.weight", "cls.seq_relationship.bias", "cls.predictions.bias"):
        assert torch.equal(before[name], after[name]), name
    assert type(load_model(str(out))).__name__ == "SurgeonBertForMaskedLM"


def test_a_layer_beyond_the_config_is_no_head(tmp_path):
    parent = save_encoder(tmp_path / "parent", "bert")
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.5\.\S+ is not part of the model"):
        open_model(str(parent))


def test_files_of_sentence_transformers_go_along(tmp_path):
    parent = save_encoder(tmp_path / "parent", "bert")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    described = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (parent / "modules.json").write_text(json.dumps(described))
    (parent / "sentence_bert_config.json").write_text("{}")
    (parent / "1_Pooling").mkdir()
    (parent / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    out = run(loads(RECIPE + BLOCK), str(parent), str(tmp_path / "out"), Options()).out
    assert (out / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_cls_token": true}'
    assert (out / "modules.json").exists() and (out / "sentence_bert_config.json").exists()
    assert "  1_Pooling/config.json" in (out / "checksums.b3").read_text()
    card = (out / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card and "pipeline_tag: feature-extraction" in card and "KV cache" not in card


def test_loading_alone(tmp_path):
    """Every Auto class finds its own in a converted checkpoint, where this package's code is not asked."""
    parent = save_encoder(tmp_path / "parent", "roberta", "RobertaForMaskedLM")
    out = run(loads(RECIPE + DROP), str(parent), str(tmp_path / "out"), Options()).out
    expected = load_model(str(out))
    for auto in (transformers.AutoModelForMaskedLM, transformers.AutoModel):
        model, info = auto.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
        assert not [key for key in info["missing_keys"] if "pooler" not in key]
        torch.testing.assert_close(states(model.eval(), some_ids()), states(expected, some_ids()))
        assert len(model(some_ids(), output_hidden_states=True).hidden_states) == LAYERS + 1
    equal(outputs(transformers.AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True).eval(), some_ids()),
          outputs(expected, some_ids()))  # fmt: skip
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=False)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_padding_changes_nothing(name):
    pruned, _, _ = operate(tiny_encoder(name), PruneAttention(layers=(0, 3)))
    ids = some_ids(1, 9)
    padded = pad(ids, (0, 5))
    mask = pad(torch.ones_like(ids), (0, 5))
    torch.testing.assert_close(states(pruned, padded, mask)[:, :9], states(pruned, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_variants_are_the_operated_model(name):
    """A walk with parts left out ends where the model without them does."""
    model, ids = tiny_encoder(name), some_ids()
    _, weights, config = subject_of(model)
    cases = {
        Variant(): (),
        Variant(no_attention=frozenset({1})): (PruneAttention(layers=(1,)),),
        Variant(no_ffn=frozenset({2})): (PruneFFN(layers=(2,)),),
        Variant(no_attention=frozenset({3}), no_ffn=frozenset({3})): (PruneBlocks(layers=(3,)),),
    }
    runner = LayerRunner(config, weights, torch.float32)
    for stream, steps in zip(walk(runner, ids, list(cases)), cases.values(), strict=True):
        expected = states(operate(model, *steps)[0], ids)
        torch.testing.assert_close(runner.states(stream), expected, atol=1e-4, rtol=1e-4)


def fused_by_hand(model, first, second):
    """ModernBERT in which two FFNs read one input, `second` without its attention."""
    layers = model.layers

    class Run(torch.nn.Module):
        attention_type = layers[first].attention_type

        def __init__(self):
            super().__init__()
            self.first, self.second = layers[first], layers[second]

        def forward(self, x, **kwargs):
            x = x + self.first.attn(self.first.attn_norm(x), **kwargs)[0]
            return x + sum(layer.mlp(layer.mlp_norm(x)) for layer in (self.first, self.second))

    kept = [layer for i, layer in enumerate(layers) if i != second]
    kept[first] = Run()
    model.layers = torch.nn.ModuleList(kept)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_modernbert_fuses(bias):
    """Gate over up in one matrix, gains (and shifts) folded."""
    model, ids = tiny_encoder("modernbert", norm_bias=bias), some_ids()
    fused, written, spec = operate(model, PruneAttention(layers=(1,)), FuseFFN(runs=((0, 1),)))
    assert spec.layers[0].ffn.width == 2 * 96 and written.format == "surgeon"
    equal(outputs(fused, ids), outputs(fused_by_hand(model, 0, 1), ids), 1e-4)


def test_modernbert_runs_blocks_in_parallel():
    model, ids = tiny_encoder("modernbert"), some_ids()
    parallel, _, _ = operate(model, ParallelBlocks(windows=((3, 4),)))
    layers = list(model.layers)

    class Both(torch.nn.Module):
        attention_type = layers[3].attention_type

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(layers[3:5])

        def forward(self, x, **kwargs):
            return x + sum(layer(x, **kwargs) - x for layer in self.layers)

    model.layers = torch.nn.ModuleList([*layers[:3], Both(), layers[5]])
    equal(outputs(parallel, ids), outputs(model, ids), 1e-4)


@pytest.mark.parametrize("step", [PruneBlocks(layers=(0,)), ParallelBlocks(windows=((0, 1),))], ids=lambda s: s.op)
def test_modernbert_keeps_its_first_block(step):
    subject, _, _ = subject_of(tiny_encoder("modernbert"))
    with pytest.raises(SurgeryError, match="modernbert: block 0 must stay as it is: it alone has no norm before"):
        step.plan(subject)
    windows = [layer.attention.window for layer in subject.spec.layers]
    assert windows == [8, 8, None, 8, 8, 8]


def test_a_family_without_heads_is_as_declared():
    assert replace(FAMILIES["llama"]).with_head(["LlamaForSequenceClassification"]) == FAMILIES["llama"]
