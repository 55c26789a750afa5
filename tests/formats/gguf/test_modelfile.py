"""Modelfiles for Ollama: what a chat template writes around messages is found, or it is said that it does more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_models import byte_level_tokenizer, save_uniform

from llmsurgeon.formats.gguf.modelfile import modelfile, turns_of

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind"
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (s if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<turn>{{ message['role'] }}\n{{ message['content'] }}</turn>\n{% endfor %}{{ '<turn>assistant\n' }}"
)
THOUGHTS = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
COUNTS = CHATML.replace("{{ message['content'] }}", "{{ message['content'] }} ({{ loop.length }})")
TALK = [
    {"role": "user", "content": "Hello\nthere"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
BRIEF = {"role": "system", "content": "Be brief"}


def with_template(template):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def filled(template, talk):
    """What Ollama makes of these few words of Go's template language."""
    system = next((message["content"] for message in talk if message["role"] == "system"), "")
    head, _, rest = template.partition("{{ range .Messages }}")
    if head.startswith("{{ if .System }}"):
        there, _, silent = head.removeprefix("{{ if .System }}").removesuffix("{{ end }}").partition("{{ else }}")
        head = there.replace("{{ .System }}", system) if system else silent
    body = rest.removesuffix("{{ end }}{{ end }}").removeprefix('{{ if eq .Role "user" }}')
    said = dict(zip(("user", "assistant"), body.split('{{ else if eq .Role "assistant" }}'), strict=True))
    talk = [message for message in talk if message["role"] in said]
    return head + "".join(said[m["role"]].replace("{{ .Content }}", m["content"]) for m in talk)


@pytest.mark.parametrize("template", [CHATML, INSTRUCTIONS])
@pytest.mark.parametrize("talk", [TALK[:1], TALK, [BRIEF, *TALK[:1]], [BRIEF, *TALK]])
def test_the_go_template_writes_what_the_checkpoints_does(template, talk):
    tokenizer = with_template(template)
    turns = turns_of(tokenizer)
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert turns and filled(turns.template(), talk) == expected == turns(talk)


def test_a_template_without_system_messages():
    turns = turns_of(with_template(NO_SYSTEM))
    assert turns and turns.system is None and ".System" not in turns.template()
    assert turns.user == ("<turn>user\n", "</turn>\n<turn>assistant\n")


@pytest.mark.parametrize("template", [THOUGHTS, COUNTS, "{{ strftime_now('%Y') }}" + CHATML, "{% if %}", "words"])
def test_a_template_that_does_more_is_left_to_ollama(template):
    tokenizer = with_template(template)
    assert turns_of(tokenizer) is None
    text = modelfile(Path("m.gguf"), tokenizer, {})
    assert "TEMPLATE" not in text and "does more than to put texts around messages" in text


def test_the_file_beside_a_gguf_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_uniform(tmp_path / "model", "llama")
    with_template(CHATML).save_pretrained(folder)
    ends = byte_level_tokenizer().convert_tokens_to_ids(["<|im_end|>", "</s>"])
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 9, "eos_token_id": ends}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    export = ("export", "model", "--to", "gguf", "-o", "m.gguf", "--modelfile")
    assert run(*export)[0] == 0
    text = Path("m.Modelfile").read_text()
    assert 'FROM ./m.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n' in text
    for line in ("PARAMETER temperature 0.5", "PARAMETER top_k 9", 'PARAMETER stop "<|im_end|>"', 'LICENSE """mit"""'):
        assert line in text.splitlines()
    Path("m.gguf").unlink()
    code, _, err = run(*export)
    assert code == 2 and "m.Modelfile: exists" in err and not Path("m.gguf").exists()
    assert run(*export, "--overwrite")[0] == 0
    code, _, err = run("export", "model", "--to", "native", "-o", "n", "--modelfile")
    assert code == 2 and "are for --to gguf" in err
