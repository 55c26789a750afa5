"""The file over the config: where the two disagree, a checkpoint is read as transformers reads it, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILY_NAMES, masked_head, save_encoder, save_tiny
from gguf_models import save_uniform
from operations.helpers import logits, some_tokens
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.cli.main import app
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.export import export, export_gguf
from llmsurgeon.formats.loading import load_model
from llmsurgeon.formats.reading import same_values
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.planning.opened import open_config, open_model
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run

CUT = "version: 1\nsteps: [{op: prune_blocks, layers: [2]}]\n"


def changed(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """The checkpoint with other config values and tensors (None: without it); dots of names written as __."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **(config or {})}))
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            held.pop(name.replace("__", "."))
        else:
            held[name.replace("__", ".")] = tensor.contiguous()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def theirs(folder: Path, auto: str = "AutoModelForCausalLM") -> Any:
    return getattr(transformers, auto).from_pretrained(folder).eval()


def verify(folder: Path) -> dict[str, Any]:
    return json.loads(CliRunner().invoke(app, ["verify", str(folder), "--json"]).stdout)


@pytest.fixture
def contradicted(tmp_path):
    """A config that ties, and a head in the file that is another matrix than the embedding."""
    folder = save_tiny(tmp_path / "parent", "llama")
    return changed(folder, {"tie_word_embeddings": True})


def test_a_head_that_differs_from_the_embedding_is_kept(contradicted, tmp_path, capsys):
    expected = logits(theirs(contradicted), some_tokens())
    assert torch.equal(logits(load_model(str(contradicted)), some_tokens()), expected)
    assert "lm_head.weight differs from its model.embed_tokens.weight" in capsys.readouterr().err
    parent = open_model(str(contradicted))
    assert not parent.spec.tied and "lm_head.weight" in parent.weights
    out = Path(export(str(contradicted), str(tmp_path / "out"), "native").out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(theirs(out), some_tokens()), expected)
    assert verify(out)["ok"]


def test_its_cut_keeps_the_head_too(contradicted, tmp_path):
    """Against a cut by hand."""
    made = run(loads(CUT), str(contradicted), str(tmp_path / "out"), Options())
    by_hand = theirs(contradicted)
    del by_hand.model.layers[2]
    for index, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = index
    by_hand.config.num_hidden_layers -= 1
    assert torch.equal(logits(theirs(made.out), some_tokens()), logits(by_hand, some_tokens()))
    assert "both are kept" in (made.out / "README.md").read_text()


def test_a_gguf_of_it_has_the_head(tmp_path):
    contradicted = changed(save_uniform(tmp_path / "parent", "llama"), {"tie_word_embeddings": True})
    made = export_gguf(str(contradicted), str(tmp_path / "m.gguf"), type="F32")
    assert torch.equal(open_checkpoint(made.path)["lm_head.weight"], open_checkpoint(contradicted)["lm_head.weight"])


def test_verify_names_the_contradiction(contradicted):
    found = CliRunner().invoke(app, ["verify", str(contradicted), "--json"])
    report = json.loads(found.stdout)
    assert not report["ok"] and found.exception
    assert "Set tie_word_embeddings to false" in report["problems"][0]


def test_a_head_that_repeats_the_embedding_stays_tied(tmp_path):
    """Old files hold it twice, be it in another dtype."""
    folder = save_tiny(tmp_path / "parent", "gpt2")
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    changed(folder, lm_head__weight=embedding.double())
    parent = open_model(str(folder))
    assert parent.spec.tied and "lm_head.weight" not in parent.weights and parent.notes == ()
    assert verify(folder)["ok"]


def test_a_file_of_the_head_alone_holds_the_embedding(tmp_path):
    folder = save_tiny(tmp_path / "parent", "gpt2")
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    expected = logits(theirs(folder), some_tokens())
    changed(folder, lm_head__weight=embedding, transformer__wte__weight=None)
    assert torch.equal(logits(theirs(folder), some_tokens()), expected)
    assert torch.equal(logits(load_model(str(folder)), some_tokens()), expected)


def test_an_untied_config_without_a_head_is_refused(tmp_path):
    """transformers would fill it at random."""
    folder = changed(save_tiny(tmp_path / "parent", "llama"), lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing .* set tie_word_embeddings to true"):
        open_model(str(folder))


@pytest.mark.parametrize("family", ("bert", "roberta", "distilbert", "modernbert"))
@pytest.mark.parametrize("which", ("weight", "bias"))
def test_decoders_of_masked_heads(tmp_path, family, which):
    """A decoder's matrix, or its bias where that is tied, that differs: as transformers has it, and written so."""
    head = masked_head(family)
    folder = save_encoder(tmp_path / "parent", family, head)
    model = theirs(folder, "AutoModelForMaskedLM")
    ties = {t: s for t, s in model.all_tied_weights_keys.items() if t.endswith(which)}
    if not ties:
        pytest.skip("its bias is its own")
    [(target, source)] = ties.items()
    noise = torch.randn(model.get_parameter(source).shape, generator=torch.Generator().manual_seed(3))
    changed(folder, **{target.replace(".", "__"): noise})
    expected = logits(theirs(folder, "AutoModelForMaskedLM"), some_tokens())
    assert not torch.equal(expected, logits(model, some_tokens()))
    assert torch.equal(logits(load_model(str(folder)), some_tokens()), expected)
    out = export(str(folder), str(tmp_path / "out"), "native").out
    assert torch.equal(logits(theirs(out, "AutoModelForMaskedLM"), some_tokens()), expected)


def test_a_bias_under_the_decoders_name_alone(tmp_path):
    folder = save_encoder(tmp_path / "parent", "bert", "BertForMaskedLM")
    expected = logits(theirs(folder, "AutoModelForMaskedLM"), some_tokens())
    bias = load_file(folder / "model.safetensors")["cls.predictions.bias"]
    changed(folder, cls__predictions__bias=None, cls__predictions__decoder__bias=bias)
    assert torch.equal(logits(theirs(folder, "AutoModelForMaskedLM"), some_tokens()), expected)
    assert torch.equal(logits(load_model(str(folder)), some_tokens()), expected)


BUFFERS = {
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq", lambda: 1e4 ** -(torch.arange(0, 8, 2) / 8)),
    "gpt2": ("transformer.h.0.attn.bias", lambda: torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()),
    "gpt_neox": ("gpt_neox.layers.0.attention.bias", lambda: torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()),
    "bert": ("bert.embeddings.position_ids", lambda: torch.arange(64)[None]),
}


@pytest.mark.parametrize("family", BUFFERS)
@pytest.mark.parametrize("usual", (True, False))
def test_buffers_of_old_files(tmp_path, family, usual):
    """They are left unread, as transformers leaves them; one that the config contradicts is named."""
    encoder = family == "bert"
    make = (
        (lambda: save_encoder(tmp_path / "p", family, "BertForMaskedLM"))
        if encoder
        else (lambda: save_tiny(tmp_path / "p", family))
    )
    auto = "AutoModelForMaskedLM" if encoder else "AutoModelForCausalLM"
    name, values = BUFFERS[family]
    held = values() if usual else values().flip(-1)
    folder = changed(make(), **{name.replace(".", "__"): held.bfloat16() if held.is_floating_point() else held})
    expected = logits(theirs(folder, auto), some_tokens())
    assert torch.equal(logits(load_model(str(folder)), some_tokens()), expected)
    report = verify(folder)
    assert report["ok"] and report["remarks"] == ([] if usual else report["remarks"])
    assert usual or f"the file's {name} differs from what config.json makes of it" in report["remarks"][0]


@pytest.mark.parametrize("there", (True, False))
def test_biases_that_config_and_file_disagree_on(tmp_path, there):
    """transformers leaves the first unread, and starts the second from zeros: both are refused."""
    folder = save_tiny(tmp_path / "p", "llama", attention_bias=there)
    changed(folder, {"attention_bias": not there})
    how = "is not part of the model" if there else "is missing"
    with pytest.raises(CheckpointError, match=rf"q_proj.bias {how}.*makes it attention_bias={not there}, mlp_bias"):
        open_model(str(folder))


def test_what_an_encoders_body_does_not_have_is_refused(tmp_path):
    """Heads go along; a tensor beside the embeddings is not one."""
    folder = save_encoder(tmp_path / "p", "bert", "BertForMaskedLM")
    changed(folder, bert__embeddings__relative__weight=torch.ones(4, 32))
    with pytest.raises(CheckpointError, match=r"bert.embeddings.relative.weight is not part of the model"):
        open_model(str(folder))


def test_more_rows_than_the_vocabulary_are_refused_as_in_transformers(tmp_path):
    folder = changed(save_tiny(tmp_path / "p", "llama"), {"vocab_size": 60})
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight has shape \[64, 32\], the config asks for \[60, 32\]"
    ):
        open_model(str(folder))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        theirs(folder)


def test_a_dtype_that_the_file_does_not_have_is_said(tmp_path):
    folder = changed(save_tiny(tmp_path / "p", "llama"), {"dtype": "bfloat16"})
    assert open_model(str(folder)).notes == (
        "config.json says dtype bfloat16, and most of the file's numbers are float32",
    )
    assert verify(folder)["ok"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_file_of_the_body_alone(tmp_path, family):
    """Without the class's prefix, as AutoModel writes it and Qwen3-Embedding comes."""
    folder = save_tiny(tmp_path / "p", family, tie_word_embeddings=True)
    expected = logits(theirs(folder), some_tokens())
    prefix = FAMILIES[family].layers.partition(".")[0] + "."
    held = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    assert not any(name.startswith(prefix) for name in held)
    torch.testing.assert_close(logits(theirs(folder), some_tokens()), expected)
    torch.testing.assert_close(logits(load_model(str(folder)), some_tokens()), expected)
    assert verify(folder)["ok"]


def test_inspect_looks_at_the_weights(contradicted):
    found = json.loads(CliRunner().invoke(app, ["inspect", str(contradicted), "--json"]).stdout)
    assert found["problems"] == [] and "lm_head.weight differs" in found["remarks"][0]
    changed(contradicted, model__norm__weight=None)
    found = json.loads(CliRunner().invoke(app, ["inspect", str(contradicted), "--json"]).stdout)
    assert "model.norm.weight is missing" in found["problems"][0] and len(found["layers"]) == 6
    assert "not in order: " in CliRunner().invoke(app, ["inspect", str(contradicted)]).stdout


def test_a_dry_run_plans_what_the_file_holds(contradicted):
    plan = CliRunner().invoke(app, ["prune", str(contradicted), "--blocks", "2", "--dry-run"])
    assert "both are kept" in plan.stdout


REWARD = (
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForRewardModel",
    "GPT2DoubleHeadsModel",
)


@pytest.mark.parametrize("head", REWARD)
def test_a_scoring_head_is_named(tmp_path, head):
    """By every reader, the one of config.json alone included."""
    folder = save_tiny(tmp_path / "p", "gpt2" if head.startswith("GPT2") else "llama")
    changed(folder, {"architectures": [head]})
    readers = (open_model, load_model, lambda name: open_config(f"{name}/config.json"))
    for reader in readers:
        with pytest.raises(
            SurgeryError, match=rf"{head} is a decoder whose head scores a text .* predicts no next token"
        ):
            reader(str(folder))
    for command in ("inspect", "verify"):
        assert "whose head scores a text" in str(CliRunner().invoke(app, [command, str(folder)]).exception)


def test_a_sequence_classifier_of_an_encoder_is_not_refused(tmp_path):
    assert open_model(str(save_encoder(tmp_path / "p", "bert", "BertForSequenceClassification")))


def test_an_adapter_says_what_it_is_of(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    for reader in (open_model, open_config, load_model):
        with pytest.raises(
            SurgeryError, match=r"holds a LORA adapter for owner/base .* merge the two (.|\n)*merge_and"
        ):
            reader(str(folder))


def test_links(tmp_path):
    """A dead one is not a missing file; one that leads elsewhere says where."""
    folder = save_tiny(tmp_path / "p", "llama")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model.safetensors: a link to .*gone, which is not there"):
        open_model(str(folder))
    weights.unlink()
    names = list(load_file(tmp_path / "elsewhere.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shard = folder / "model-00001-of-00001.safetensors"
    shard.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"of-00001.safetensors: a link to .*gone, which is not there"):
        open_model(str(folder))
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere.safetensors, .*cp --dereference"):
        open_model(str(folder))


@pytest.mark.parametrize("dtypes", ((torch.float32, torch.float64), (torch.float8_e4m3fn, torch.float8_e4m3fn)))
@pytest.mark.parametrize("shape", ((), (0, 4), (3, 4)))
def test_values_of_odd_shapes_and_dtypes(dtypes, shape):
    one, other = (torch.full(shape, 0.5).to(dtype) for dtype in dtypes)
    assert same_values(one, other)
    assert not same_values(one, torch.full((*shape, 2), 0.5))
    assert torch.Size(shape).numel() == 0 or not same_values(one, (other.float() * 2).to(other.dtype))


@pytest.mark.parametrize("tensor", (torch.ones(0, 4), torch.tensor(0.0), torch.ones(8).to(torch.float8_e5m2)))
def test_buffers_of_odd_shapes_are_named_and_no_crash(tmp_path, tensor):
    folder = changed(save_tiny(tmp_path / "p", "gpt2"), transformer__h__0__attn__bias=tensor)
    assert "attn.bias differs" in open_model(str(folder)).notes[0]
