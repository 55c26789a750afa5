"""Perplexity over a stream against llama.cpp's own tool, where it is on PATH or LLAMA_PERPLEXITY names it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from gguf_models import export, save_uniform

from llmsurgeon.evaluate import evaluate
from tests.prose import sentences

TOOL = os.environ.get("LLAMA_PERPLEXITY") or shutil.which("llama-perplexity")
WINDOW = 256  # llama.cpp makes contexts that are multiples of it


def told(model: Path, text: Path, stride: int, windows: int) -> float:
    """What the tool prints behind the last window; now and then it ends before that line is out."""
    # With a stride the tool adds half of it to the window that it is asked for. Keys of 16 bits would round.
    command = [TOOL, "-m", model, "-f", text, "-c", WINDOW - stride // 2, "-b", WINDOW, "-t", 1, "-fa", "off"]
    command += ["--cache-type-k", "f32", "--cache-type-v", "f32", *(["--ppl-stride", stride] if stride else [])]
    for _ in range(10):
        made = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        rows = dict(re.findall(r"\[(\d+)\]\s*([\d.]+)", made.stdout + made.stderr))
        if str(windows) in rows:
            return float(rows[str(windows)])
    raise AssertionError(f"{windows} windows of {WINDOW}, and the tool has {rows}")


@pytest.mark.skipif(TOOL is None, reason="llama-perplexity is not installed")
@pytest.mark.parametrize("stride", [0, 64])
def test_perplexity_is_that_of_llama_cpps_tool(stride, tmp_path):
    model = export(save_uniform(tmp_path / "model", "llama", max_position_embeddings=WINDOW), tmp_path / "m.gguf").path
    # The name of a special token in a text is text.
    (tmp_path / "text.txt").write_text("\n".join(sentences(30, seed=1)).replace("the", "</s>", 3))
    how = {"tokens": 100_000, "sequence_length": WINDOW, "stride": stride}
    found = evaluate(str(model), text=str(tmp_path / "text.txt"), **how).strided
    assert found is not None
    windows = found.tokens // (stride or WINDOW // 2 - 1)
    assert windows > 9
    assert found.perplexity == pytest.approx(told(model, tmp_path / "text.txt", stride, windows), rel=1e-3)
