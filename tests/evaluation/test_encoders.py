"""Agreement of encoders: against the naive computation, on disk, as a command, in a gate."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from conftest import ENCODER_NAMES, encoder_tokenizer, masked_head, save_encoder, save_tiny, tiny_encoder, tiny_model
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from llmsurgeon.cli import analyze, bench, evaluate
from llmsurgeon.errors import GateFailed, SurgeryError
from llmsurgeon.evaluation.encoders import encoder_family, evaluate_encoder, mask_tokens, masking_of
from llmsurgeon.evaluation.latency import benchmark
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.sequences import held_out
from llmsurgeon.text.wanted import Calibration

TEXT = "The quick brown fox jumps over the lazy dog; 0123, and so on. Pack my box with five dozen jugs. " * 30
SIZES = ("--tokens", 256, "--seq-len", 16)


def some_ids():
    return torch.randint(3, 63, (5, 12), generator=torch.Generator().manual_seed(1))


def moved(model, amount=0.02):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=amount)
    return model


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_equals_the_naive_computation(name):
    model, parent, ids = moved(tiny_encoder(name, masked_head(name))), tiny_encoder(name, masked_head(name)), some_ids()
    masking = mask_tokens(ids, 63, [0, 1, 2])
    found = evaluate_encoder(model, ids, parent, masking)
    with torch.no_grad():
        mine, theirs = (m.base_model(ids).last_hidden_state for m in (model, parent))
        q, p = (m(masking.inputs).logits.double().log_softmax(-1) for m in (model, parent))
    assert found.hidden_cosine == pytest.approx(cosine_similarity(mine, theirs, dim=-1).mean().item(), rel=1e-5)
    pooled = cosine_similarity(mine.mean(1), theirs.mean(1), dim=-1)
    assert found.pooled_cosine == pytest.approx(pooled.mean().item(), rel=1e-5)
    at = masking.masked
    kl = (p.exp() * (p - q)).sum(-1)
    # Every sequence has as many masked tokens, so means of means are means.
    assert found.masked_kl == pytest.approx(kl[at].mean().item(), rel=1e-4)
    assert found.masked_top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1))[at].double().mean().item())
    loss = -q.gather(-1, ids[..., None])[..., 0][at].mean()
    assert found.masked_perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert (found.tokens, found.sequences, found.masked_tokens) == (60, 5, 5 * 2)
    for key, value in found.to_dict().items():
        if f"{key}_interval" in found.to_dict():
            low, high = getattr(found, f"{key}_interval")
            assert low <= value <= high, key


def test_a_model_against_itself():
    model, ids = tiny_encoder("bert"), some_ids()
    found = evaluate_encoder(model, ids, tiny_encoder("bert"))
    assert found.hidden_cosine == pytest.approx(1, abs=1e-6) and found.pooled_cosine == pytest.approx(1, abs=1e-6)
    assert found.masked_kl is None and found.hidden_cosine_interval[1] <= 1


def test_masking_spares_special_tokens_and_repeats():
    ids = some_ids()
    ids[:, 0], ids[:, -1] = 1, 2
    one, two = (mask_tokens(ids, 63, [1, 2], seed=5) for _ in range(2))
    assert torch.equal(one.masked, two.masked) and not one.masked[:, [0, -1]].any()
    assert (one.inputs[one.masked] == 63).all() and torch.equal(one.inputs[~one.masked], ids[~one.masked])
    assert (one.masked.sum(1) == 2).all()  # 15 % of ten tokens, rounded
    with pytest.raises(SurgeryError, match="special tokens only"):
        mask_tokens(torch.ones(2, 3, dtype=torch.long), 63, [1])


def test_windows_are_framed_as_the_tokenizer_does(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    windows = calibration_sequences(
        "m", encoder_tokenizer(), Calibration(text=str(tmp_path / "text.txt"), tokens=64, sequence_length=16)
    ).tokens
    assert windows.shape == (4, 16) and (windows[:, 0] == 1).all() and (windows[:, -1] == 2).all()
    with pytest.raises(SurgeryError, match="hold special tokens only"):
        calibration_sequences(
            "m", encoder_tokenizer(), Calibration(text=str(tmp_path / "text.txt"), tokens=64, sequence_length=2)
        )


def test_what_does_not_fit():
    model, ids = tiny_encoder("bert"), some_ids()
    with pytest.raises(SurgeryError, match="without a masked-LM head is measured by its agreement"):
        evaluate_encoder(model, ids)
    with pytest.raises(SurgeryError, match="hidden states of 32 and 16 numbers cannot be compared"):
        evaluate_encoder(model, ids, tiny_encoder("bert", hidden_size=16))
    with pytest.raises(SurgeryError, match="sequences of 65 tokens, its limit is 64"):
        evaluate_encoder(model, torch.zeros(1, 65, dtype=torch.long), tiny_encoder("bert"))
    with pytest.raises(SurgeryError, match="is a decoder; an encoder can be compared with an encoder only"):
        evaluate_encoder(model, ids, tiny_model("llama"))
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match=r"^encoder.layer.2.output.dense: tensor .*weight holds NaN"):
        evaluate_encoder(model, ids, tiny_encoder("bert"))


def test_masked_tokens_need_both_heads():
    tokenizer, ids = encoder_tokenizer(), some_ids()
    with_head, without = tiny_encoder("bert", "BertForMaskedLM"), tiny_encoder("bert")
    assert masking_of(tokenizer, ids, with_head, None, vocab=64) is not None
    assert masking_of(tokenizer, ids, with_head, without, vocab=64) is None
    assert encoder_family(with_head).head and encoder_family(tiny_model("llama")) is None
    with pytest.raises(SurgeryError, match=r"its mask token .*: token ids from 63 to 63, its vocabulary has 3"):
        masking_of(tokenizer, ids, with_head, None, vocab=3)


@pytest.fixture
def command(tmp_path):
    app = typer.Typer()
    for module in (analyze, evaluate, bench):
        module.register(app)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return invoke


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_eval_as_a_command(command, tmp_path, text):
    parent = save_encoder(tmp_path / "parent", "bert", "BertForMaskedLM")
    model = save_encoder(tmp_path / "model", "bert", "BertForMaskedLM", seed=1)
    report = json.loads(command("eval", model, "--against", parent, "--text", text, *SIZES, "--json"))
    for key in ("hidden_cosine", "pooled_cosine", "masked_kl", "masked_top1_agreement", "masked_perplexity_ratio"):
        low, high = report[f"{key}_interval"]
        assert low <= report[key] <= high
    assert "perplexity" not in report
    shown = command("eval", model, "--against", parent, "--text", text, *SIZES)
    assert "cosine of hidden states" in shown and "masked tokens: top-1 agreement" in shown
    alone = json.loads(command("eval", model, "--text", text, *SIZES, "--json"))
    assert alone["masked_perplexity"] > 1 and alone["hidden_cosine"] is None


def test_eval_refuses_what_an_encoder_cannot_do(command, tmp_path, text):
    parent = save_encoder(tmp_path / "parent", "distilbert")
    with pytest.raises(SurgeryError, match="is an encoder and cannot sample text from itself; give --text"):
        command("eval", parent, "--against", parent)
    with pytest.raises(SurgeryError, match=r"DistilBertModel has no masked-LM head.*give --against PARENT"):
        command("eval", parent, "--text", text)
    with pytest.raises(SurgeryError, match="is an encoder and cannot sample text from itself"):
        command("analyze", parent, "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_analyze_as_a_command(command, tmp_path, text):
    """Attentions are chosen without fusing, by the cosine of what leaves the model; the recipe runs."""
    parent = save_encoder(tmp_path / "parent", "roberta")
    command("analyze", parent, "--out", tmp_path / "report", "--text", text, *SIZES, "--drop", 2)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(report["suggestion"]["drop_attention"]) == 2 and report["suggestion"]["fuse_runs"] == []
    assert report["distance"] == "cosine"
    assert all(0 <= value <= 2 for value in report["scores"]["attention_kl"]["mean"])
    recipe = (tmp_path / "report" / "suggested.yaml").read_text()
    assert "fuse_ffn" not in recipe and "KL" not in recipe
    assert "KL" not in (tmp_path / "report" / "report.html").read_text()
    sizes = ["calibration.tokens=512", "calibration.sequence_length=16"]
    small = loads(recipe, overrides=sizes, folder=tmp_path / "report")
    outcome = run(small, str(parent), str(tmp_path / "out"), Options())
    assert len(outcome.planned.spec.attentions) == 4
    assert outcome.evaluation.hidden_cosine < 1


def test_bench_times_one_forward_pass(command, tmp_path):
    parent = save_encoder(tmp_path / "parent", "bert", "BertForMultipleChoice")
    report = json.loads(command("bench", parent, "--against", parent, "--prompt", 60, "--rounds", 2, "--json"))
    assert report["prefill_speedup"]["median"] > 0 and report["decode_speedup"] is None
    assert report["model"]["decode_tokens_per_second"] is None and report["model"]["kv_cache_bytes"] == 0
    shown = command("bench", parent, "--prompt", 16, "--rounds", 1)
    assert "forward, tokens/s" in shown and "decode" not in shown and "KV cache, MB" not in shown
    with pytest.raises(SurgeryError, match="make 65 positions, its limit is 64"):
        command("bench", parent, "--prompt", 65)
    with pytest.raises(SurgeryError, match="one of the models is an encoder and the other a decoder"):
        benchmark(tiny_encoder("bert"), tiny_model("llama"), prompt=4)


def recipe(text, gate, steps="  - {op: prune_blocks, layers: [1]}\n"):
    calibration = f"calibration: {{text: {text}, tokens: 256, sequence_length: 16}}\n" if text else ""
    return loads(f"version: 1\n{calibration}gate: {gate}\nsteps:\n{steps}")


@pytest.mark.parametrize(
    ("head", "gate", "message"),
    [
        (
            "BertForMaskedLM",
            "{max_perplexity_ratio: 2}",
            "max_perplexity_ratio: bert predicts no next token; use min_hid",
        ),
        ("BertModel", "{max_kl: 2}", "max_kl: BertModel has no masked-LM head; use min_hidden_cosine and min_pooled"),
    ],
    ids=["perplexity", "kl"],
)
def test_keys_without_a_figure_are_refused(tmp_path, text, head, gate, message):
    parent = save_encoder(tmp_path / "parent", "bert", head)
    with pytest.raises(SurgeryError, match=message):
        run(recipe(text, gate), str(parent), str(tmp_path / "out"), Options())
    assert not (tmp_path / "out").exists()


def test_a_decoder_has_no_hidden_cosine(tmp_path, text):
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    with pytest.raises(SurgeryError, match="min_hidden_cosine: llama is judged by what it says next"):
        run(recipe(text, "{min_hidden_cosine: 0.5}"), str(parent), str(tmp_path / "out"), Options())


def test_gates_of_an_encoder(tmp_path, text):
    parent = save_encoder(tmp_path / "parent", "bert", "BertForMaskedLM")
    met = "{min_hidden_cosine: -1, min_pooled_cosine: -1, max_kl: 1000, min_top1_agreement: 0}"
    outcome = run(recipe(text, met), str(parent), str(tmp_path / "met"), Options())
    assert outcome.gate == () and outcome.evaluation.masked_kl > 0
    card = (tmp_path / "met" / "README.md").read_text()
    assert "cosine of the last hidden states" in card and "at masked tokens" in card
    with pytest.raises(GateFailed, match=r"hidden cosine 0\.\d+, at least 1\.0 wanted; pooled cosine"):
        run(recipe(text, "{min_hidden_cosine: 1, min_pooled_cosine: 1}"), str(parent), str(tmp_path / "out"), Options())
    with pytest.raises(SurgeryError, match="cannot sample text from itself"):
        run(recipe(None, met), str(parent), str(tmp_path / "untold"), Options())


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_the_evaluation_is_that_of_the_written_model(tmp_path, text, name):
    """What a run says on held-out text is what its checkpoint shows there."""
    from llmsurgeon.formats.loading import load_model

    parent = save_encoder(tmp_path / "parent", name, masked_head(name))
    steps = "  - {op: prune_attention, layers: [2]}\n"
    outcome = run(recipe(text, "{min_hidden_cosine: -1}", steps), str(parent), str(tmp_path / "out"), Options())
    windows = calibration_sequences(
        "m", encoder_tokenizer(), Calibration(text=str(text), tokens=256, sequence_length=16)
    )
    tokens = windows[held_out(windows.kinds, 0.125)].tokens
    models = load_model(str(outcome.out)), load_model(str(parent))
    again = evaluate_encoder(models[0], tokens, models[1], masking_of(encoder_tokenizer(), tokens, *models, vocab=64))
    for key, value in again.to_dict().items():
        if isinstance(value, float):
            assert getattr(outcome.evaluation, key) == pytest.approx(value, rel=1e-3), key
