"""Checkpoints of random weights on disk, of a real model's shape, with a tokenizer and a text to go with them."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz ,."


def llama(folder: Path, layers: int, tiny: bool, shards: int = 4) -> Path:
    """Llama-3.1-8B's shape with so many layers, or a tiny one, in bfloat16."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from llmsurgeon.formats.configs import normalised
    from llmsurgeon.formats.models import empty_model

    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"vocab_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=8192, dtype="bfloat16").to_dict()
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: tensor.shape for name, tensor in empty_model(normalised(config)).state_dict().items()}
    names, where = list(shapes), {}
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number::shards]
        save_file({name: _random(shapes[name], device) for name in own}, folder / file)
        where |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer().save_pretrained(folder)
    return folder


def _random(shape: torch.Size, device: str) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(torch.bfloat16).cpu()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<unk>", "<s>", "</s>", *LETTERS]
    made = Tokenizer(models.WordLevel({sign: number for number, sign in enumerate(signs)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def text(path: Path, letters: int) -> Path:
    """A text of random letters."""
    source = random.Random(0)
    path.write_text("".join(source.choice(LETTERS) for _ in range(letters)))
    return path


def spoken(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in a process of its own."""
    command = [sys.executable, "-m", "llmsurgeon", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def in_this_process(arguments: list[str]) -> tuple[int, str, str]:
    """The same in this process, which imports torch once."""
    from llmsurgeon.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return code, out.getvalue(), err.getvalue()


def brief(done: dict[str, Any]) -> dict[str, Any]:
    """How a command ended, without what it printed."""
    return {key: value for key, value in done.items() if key != "out"}


def llmsurgeon(*arguments: object, here: bool = False) -> dict[str, Any]:
    """A command: its exit code, seconds, and what it printed, or the end of what it said where it failed."""
    start = time.monotonic()
    code, out, err = (in_this_process if here else spoken)([str(each) for each in arguments])
    found: dict[str, Any] = {"code": code, "seconds": round(time.monotonic() - start, 2)}
    return found | ({"said": (out + err)[-1500:]} if code else {"out": out})


def perplexities(report: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says of perplexity and KL: innermost entries, by their own names."""
    found: dict[str, Any] = {}
    for key, each in report.items():
        if isinstance(each, dict):
            found |= perplexities(each)
        elif "perplexity" in key or key == "kl":
            found[key] = each
    return found
