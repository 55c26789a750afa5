"""The README's commands run as they stand there, on a tiny model in place of the real one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import save_tiny, tiny_config

from llmsurgeon.cli.main import main

ROOT = Path(__file__).parent.parent
REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Set-up, which scripts/test and scripts/demo are there to prove.
SETUP = ("pip ", "./scripts/")


def commands() -> list[str]:
    """Every line of the README's shell blocks, comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for layer in blocks for line in layer.splitlines()]
    return [line for line in lines if line and not line.startswith(SETUP)]


def test_the_readme_has_commands():
    assert len(commands()) >= 8
    assert all(line.startswith("llmsurgeon ") for line in commands())


@pytest.mark.slow
@pytest.mark.usefixtures("little_text")
def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    # Enough layers for those that the commands name.
    model = save_tiny(tmp_path / "tiny", "llama", tokenizer=True, num_hidden_layers=12, max_position_embeddings=1024)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/config.json").write_text(json.dumps(tiny_config("llama", num_hidden_layers=126)))
    (tmp_path / "my.txt").write_text("The river rose for three days and fell on the fourth. " * 1200)
    (tmp_path / "my.yaml").write_text(
        "version: 1\ncalibration: {tokens: 4096, sequence_length: 128}\n"
        "steps:\n  - {op: prune_attention, layers: [4]}\n  - {op: refit}\n"
    )
    for number, line in enumerate(commands()):
        line = line.replace(REAL, str(model)).replace("MODEL", str(model)).replace("-o OUT", f"-o out-{number}")
        try:
            main(shlex.split(line)[1:])
        except SystemExit as stop:
            assert stop.code in (0, None), f"{line}: {capsys.readouterr().err}"
    student = json.loads((tmp_path / "smollm2-fused" / "surgery.json").read_text())
    assert student["after"]["attentions"] == 9
