"""Code of a checkpoint runs with --trust-remote-code alone, in every command, whatever stands on stdin."""

from __future__ import annotations

import json

import pytest
import warm
from conftest import SMALL, save_tiny

from llmsurgeon.formats.loading import load_model, load_tokenizer

OWN = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from .helper_own import MARK
Path(MARK).write_text("ran")


class Own(PreTrainedTokenizerFast):
    pass
"""
TEXT = ("--text", "text.txt")
SIZES = ("--tokens", 128, "--seq-len", 16)
SHORT = ("--set", "distill.steps=1", "--set", "distill.sequence_length=16")
# Commands that read text, and those that only copy or look.
READS = {
    "run": ("run", "recipe.yaml", "parent", "-o", "out", *TEXT, *SMALL),
    "prune": ("prune", "parent", "-o", "out", "--attention", 2, *TEXT, *SMALL),
    "analyze": ("analyze", "parent", "-o", "out", *TEXT, *SIZES),
    "eval": ("eval", "parent", *TEXT, *SIZES),
    "eval against": ("eval", "plain", "--against", "parent", *TEXT, *SIZES),
    "gguf": ("export", "parent", "--to", "gguf", "-o", "out.gguf"),
    "heal": ("heal", "plain", "--parent", "parent", "-o", "out", *TEXT, *SMALL, *SHORT),
}
COPIES = {
    "prune": ("prune", "parent", "-o", "out", "--attention", 2, "--no-refit"),
    "dry run": ("prune", "parent", "--attention", 2, "--dry-run"),
    "export": ("export", "parent", "--to", "surgeon", "-o", "out"),
}
LOOKS = {
    "eval of it": ("eval", "parent", "--against", "plain", *TEXT, *SIZES),
    "inspect": ("inspect", "parent"),
    "verify": ("verify", "parent"),
    "bench": ("bench", "parent", "--prompt", 4, "--new-tokens", 2, "--rounds", 1),
}


@pytest.fixture
def own(folder, monkeypatch):
    """A parent whose tokenizer, config and processor name code, and somebody who answers yes to every question."""
    parent = folder / "parent"
    save_tiny(folder / "plain", "llama", tokenizer=True)
    (folder / "recipe.yaml").write_text("version: 1\nsteps: [{op: prune_attention, layers: [2]}, {op: refit}]\n")
    (parent / "tokenization_own.py").write_text(OWN)
    (parent / "helper_own.py").write_text(f"MARK = {str(folder / 'ran')!r}\n")
    maps = {
        "config.json": {"AutoConfig": "tokenization_own.Own", "AutoModelForCausalLM": "tokenization_own.Own"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "tokenization_own.Own"]},
        "preprocessor_config.json": {"AutoImageProcessor": "tokenization_own.Own"},
    }
    for name, auto_map in maps.items():
        path = parent / name
        there = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**there, "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    monkeypatch.setattr("llmsurgeon.progress._said", set())
    return folder


@pytest.mark.parametrize("command", READS)
def test_what_reads_text_refuses_with_one_message(run, own, command):
    code, _, err = run(*READS[command])
    assert code == 2 and "needs code of its own (tokenization_own.Own)" in err and "--trust-remote-code" in err
    assert err.count("error:") == 1 and not (own / "ran").exists() and not (own / "out").exists()


@pytest.mark.parametrize("command", COPIES)
def test_what_copies_leaves_it_out_and_says_so(run, own, command):
    code, _, err = run(*COPIES[command])
    assert code == 0, err
    assert "not copied: the tokenizer, which needs code of its own" in err and not (own / "ran").exists()
    assert "code that preprocessor_config.json asks for" in err
    if (own / "out").exists():
        there = {path.name for path in (own / "out").iterdir()}
        assert not {name for name in there if name.startswith(("token", "helper"))}
        assert "auto_map" not in json.loads((own / "out/preprocessor_config.json").read_text())
        assert "tokenization_own" not in json.dumps(json.loads((own / "out/config.json").read_text()))
        assert "not copied: the tokenizer" in (own / "out/README.md").read_text()


@pytest.mark.parametrize("command", LOOKS)
def test_what_needs_no_tokenizer_of_it_needs_no_code(run, own, command):
    code, _, err = run(*LOOKS[command])
    assert code == 0 and not (own / "ran").exists(), err


def test_trusted_code_runs_goes_along_and_is_named(run, own):
    code, _, err = run(*READS["prune"], "--trust-remote-code")
    assert code == 0 and (own / "ran").exists(), err
    assert "copied along, because --trust-remote-code was given: tokenization_own.py, helper_own.py" in err
    card = (own / "out/README.md").read_text()
    assert "helper_own.py" in card and "custom_code" in card
    assert 'AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)' in card
    assert type(load_tokenizer(str(own / "out"), trust_remote_code=True)).__name__ == "Own"
    config = json.loads((own / "out/config.json").read_text())
    assert "tokenization_own" not in json.dumps(config), "the model's own code neither runs nor goes along"


@pytest.mark.parametrize("command", [c for c in READS if c != "prune"])
def test_the_flag_is_known_to_every_command_that_reads_text(run, own, command):
    code, _, err = run(*READS[command], "--trust-remote-code")
    assert (own / "ran").exists() and (code == 0 or "no counterpart of a WordLevel tokenizer" in err), err


def test_a_y_on_stdin_is_no_consent(own):
    """In a process of its own: transformers asks on the real stdin."""
    process = warm.start(warm.LLMSURGEON, *READS["eval"], stdin="y\n" * 9)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "--trust-remote-code" in err and not (own / "ran").exists()


def test_a_config_names_no_kernel_to_fetch(tiny):
    folder = tiny()
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        config = json.loads((folder / "config.json").read_text()) | {key: "somebody/kernel"}
        (folder / "config.json").write_text(json.dumps(config))
        assert load_model(str(folder)).config._attn_implementation != "somebody/kernel"
