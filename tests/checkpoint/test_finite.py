"""What is computed in, decided in one place; and the first state that is not finite, named with its layer and dtype."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_encoder, save_tiny
from operations.helpers import logits, some_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmsurgeon.checkpoint.finite import first_not_finite, is_finite, not_finite
from llmsurgeon.cli.main import app
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.evaluation.decoders import evaluate_decoder
from llmsurgeon.evaluation.encoders import evaluate_encoder
from llmsurgeon.evaluation.latency import benchmark
from llmsurgeon.formats import dtypes
from llmsurgeon.formats.dtypes import computed_in
from llmsurgeon.formats.loading import load_model
from llmsurgeon.planning.opened import open_model

SHORT = ["--tokens", "64", "--seq-len", "16"]


def cast(folder: Path, change) -> Path:
    """The checkpoint with each tensor changed by its name."""
    held = load_file(folder / "model.safetensors")
    save_file({n: change(n, t).contiguous() for n, t in held.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def mixed(folder: Path) -> Path:
    return cast(folder, lambda name, tensor: tensor.float() if "norm" in name else tensor.bfloat16())


def float8(folder: Path) -> Path:
    folder = cast(folder, lambda name, tensor: tensor if "norm" in name else tensor.to(torch.float8_e4m3fn))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run a command in a folder of its own and return its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("make", (mixed, float8))
def test_one_dtype_for_every_command(tmp_path, call, make, monkeypatch):
    """A bfloat16 model with float32 norms, or with numbers of 8 bits, is computed in bfloat16 by all of them."""
    monkeypatch.setattr(dtypes, "multiplies_bfloat16", lambda: True)
    folder = make(save_tiny(tmp_path / "parent", "llama", tokenizer=True))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(load_model(str(folder)), some_tokens()), logits(expected, some_tokens()))
    assert open_model(str(folder)).computed_in(None, "cpu") == torch.bfloat16
    for arguments in (
        ["verify", folder],
        ["eval", folder, "--text", "text.txt", *SHORT],
        ["analyze", folder, "--text", "text.txt", "--self-share", "0", *SHORT, "-o", "found"],
        ["bench", folder, "--prompt", "8", "--new-tokens", "2", "--rounds", "1", "--json"],
        [
            "fuse",
            folder,
            "--drop-count",
            "2",
            "--text",
            "text.txt",
            "--self-share",
            "0",
            "--tokens",
            "512",
            "-o",
            "out",
        ],
        ["eval", "out", "--against", folder, "--text", "text.txt", *SHORT],
    ):
        result = call(*arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        if arguments[0] == "bench":
            assert json.loads(result.stdout)["dtype"] == "bfloat16"


def test_whole_numbers_are_no_weights(tmp_path):
    folder = cast(save_tiny(tmp_path / "p", "llama"), lambda name, t: t if "norm" in name else t.to(torch.int8))
    for reader in (open_model, load_model):
        with pytest.raises(CheckpointError, match="most of its numbers are int8, packed by a quantiser"):
            reader(str(folder))


@pytest.mark.parametrize("knows", (True, False))
def test_half_precision_on_a_cpu(knows, monkeypatch):
    """float16 becomes bfloat16, and both float32 where the processor has no instructions for bfloat16."""
    monkeypatch.setattr(dtypes, "multiplies_bfloat16", lambda: knows)
    low = torch.bfloat16 if knows else torch.float32
    for half in (torch.float16, torch.bfloat16):
        assert computed_in(half, None, "cpu") == low
        assert computed_in(half, None, "cuda:1") == half
        for asked in (torch.float16, torch.bfloat16, torch.float32):
            assert computed_in(half, asked, "cpu") == asked
    assert computed_in(torch.float32, None, "cpu") == computed_in(torch.float32, None, "cuda") == torch.float32


def test_a_processor_without_bfloat16(tmp_path, call, monkeypatch):
    """A bfloat16 checkpoint is computed in float32 by every command, and written in bfloat16."""
    monkeypatch.setattr(dtypes, "multiplies_bfloat16", lambda: False)
    folder = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    cast(folder, lambda name, tensor: tensor.to(torch.bfloat16))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(load_model(str(folder)), some_tokens()), logits(expected, some_tokens()))
    result = call("bench", folder, "--prompt", "8", "--new-tokens", "2", "--rounds", "1", "--json")
    assert json.loads(result.stdout)["dtype"] == "float32"
    mixed = ["--text", "text.txt", "--self-share", "0.25", "--tokens", "512"]
    for arguments in (["fuse", folder, "--drop-count", "2", *mixed, "-o", "out"], ["eval", "out", "--against", folder]):
        result = call(*arguments, *(SHORT if arguments[0] == "eval" else ()))
        assert result.exit_code == 0, (arguments, result.output, result.exception)
    with safe_open(Path("out") / "model.safetensors", "pt") as made:
        assert {made.get_tensor(name).dtype for name in made.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_what_the_processor_says(monkeypatch):
    dtypes.multiplies_bfloat16.cache_clear()
    assert isinstance(dtypes.multiplies_bfloat16(), bool)
    dtypes.multiplies_bfloat16.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # a build of torch without oneDNN
    assert not dtypes.multiplies_bfloat16()
    dtypes.multiplies_bfloat16.cache_clear()


def damaged(folder: Path, value: float = float("nan")) -> Path:
    def change(name, tensor):
        if "layers.3.mlp.up_proj" in name or "layer.3.intermediate.dense.weight" in name:
            tensor[0, 0] = value
        return tensor

    return cast(folder, change)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_damaged_weight_is_named_by_every_command(tmp_path, call, value):
    """At the first state that it spoils, not behind all measuring."""
    folder = damaged(save_tiny(tmp_path / "parent", "llama", tokenizer=True), value)
    named = "model.layers.3.mlp.up_proj"
    for arguments, where in (
        (["verify", folder], "tensor "),
        (
            ["analyze", folder, "--text", "text.txt", "--self-share", "0", *SHORT, "-o", "found"],
            "layer 3, FFN: tensor ",
        ),
        (["analyze", folder, *SHORT, "-o", "found"], f"{named}: tensor "),
        (["eval", folder, "--text", "text.txt", *SHORT], f"{named}: tensor "),
        (
            ["fuse", folder, "--text", "text.txt", "--self-share", "0", "--drop-count", "1", "-o", "out"],
            "layer 3, FFN: tensor ",
        ),
    ):
        error = call(*arguments).exception
        assert isinstance(error, SurgeryError) and f"{where}{named}.weight holds NaN or infinity" in str(error)
    assert not Path("found").exists() and not Path("out").exists()


def test_finite_weights_that_overflow_are_not_called_damaged(tmp_path, call):
    """In float16 gate times up leaves its range; bfloat16 holds it."""
    folder = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    large = lambda name, t: (t * 300 if "layers.2.mlp" in name and "down" not in name else t).half()  # noqa: E731
    cast(folder, large)
    problem = json.loads(call("verify", folder, "--json").stdout)["problems"]
    assert len(problem) == 1 and "damaged" not in problem[0]
    said = "finite weights give NaN or infinity in float16; use --dtype bfloat16 or --dtype float32"
    assert problem[0].startswith("a forward pass breaks: model.layers.2.mlp.") and said in problem[0]
    measured = ["--text", "text.txt", *SHORT]
    assert f"layer 2, FFN: {said}" in str(
        call("analyze", folder, *measured, "--self-share", "0", "--dtype", "float16").exception
    )
    assert said in str(call("eval", folder, *measured, "--dtype", "float16").exception)
    for dtype in ([], ["--dtype", "float32"]):
        assert call("eval", folder, *measured, *dtype).exit_code == 0


def test_numbers_beyond_a_dtype_are_named(tmp_path):
    folder = damaged(save_tiny(tmp_path / "parent", "llama"), 1e6)
    message = r"tensor model.layers.3.mlp.up_proj.weight has numbers beyond float16, which ends at 65504; use --dtype"
    with pytest.raises(SurgeryError, match=message):
        load_model(str(folder), dtype=torch.float16)
    assert load_model(str(folder), dtype=torch.bfloat16)


def test_encoders(tmp_path):
    folder = damaged(save_encoder(tmp_path / "parent", "bert", "BertForMaskedLM"))
    model = load_model(str(folder))
    with pytest.raises(SurgeryError, match=r"encoder.layer.3.intermediate.dense: tensor .* holds NaN"):
        evaluate_encoder(model, some_tokens(), parent=model)


def test_a_long_sum_is_not_taken_for_infinity():
    assert is_finite(torch.full((1000,), 6e4, dtype=torch.float16))
    assert not is_finite(torch.tensor([1.0, float("inf"), float("-inf")]))
    assert is_finite(torch.arange(3)) and is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert "out of all proportion" in str(not_finite("here", torch.float32, {"a": torch.ones(1)}))


def test_nothing_is_found_in_a_sound_model(tmp_path):
    model = load_model(str(save_tiny(tmp_path / "parent", "llama")))
    assert first_not_finite(model, torch.float32, input_ids=some_tokens()) is None
    assert evaluate_decoder(model, some_tokens()).perplexity > 1


def test_errors_name_the_folder_and_no_class(tmp_path):
    """As the user wrote it; nothing of it is kept in the model's config."""
    folder = str(save_tiny(tmp_path / "parent", "llama"))
    model = load_model(folder)
    ids = torch.zeros(1, 129, dtype=torch.long)
    for work in (
        lambda: evaluate_decoder(model, ids),
        lambda: benchmark(model, prompt=129),
        lambda: evaluate_decoder(model, ids + 64),
    ):
        with pytest.raises(SurgeryError, match=f"^{re.escape(folder)}: "):
            work()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match=f"^{re.escape(folder)}: lm_head: tensor lm_head.weight holds NaN"):
        evaluate_decoder(model, ids[:, :8])
    assert folder not in json.dumps(model.config.to_dict(), default=str)
