"""The healthy models and files that tries start from: tiny, and each built when first asked for."""

from __future__ import annotations

import json
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path

TEXT = "The quick brown fox jumps over the lazy dog; 0123, and so on.\n" * 40
RECIPE = """version: 1
description: a cut and a fit
calibration: {tokens: 256, sequence_length: 16, text: text.txt}
steps:
  - {op: prune_attention, layers: [2]}
  - {op: fuse_ffn, runs: auto, max_run: 2}
  - {op: refit, ridge: 0.1}
gate: {max_perplexity_ratio: 100.0}
"""
TRIM = "version: 1\nsteps: [{op: trim_vocab, keep: {tokens: 1}, multiple_of: 1}]\n"
SMALL = ["--set", "calibration.tokens=256", "--set", "calibration.sequence_length=16"]


class Ground:
    """Name -> path of something healthy. Models are folders; `text.txt`, `text.jsonl`,
    `recipe.yaml` and such are files.

    Building happens in a forked process, so that the one that tries are forked from has used neither torch's threads
    nor the tokenizers'.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            _in_a_child(lambda: BUILDERS[name](self, path), self.folder / "said.txt")
        return path


def _in_a_child(build: Callable[[], None], said: Path) -> None:
    """Call `build` in a forked process; what it prints goes into the file `said`."""
    child = os.fork()
    if not child:
        try:
            for fd in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
            build()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"a healthy input could not be built:\n{said.read_text()}")


def _tiny(family: str, **changes: object) -> Callable[[Ground, Path], None]:
    def build(ground: Ground, path: Path) -> None:
        from conftest import save_tiny

        save_tiny(path, family, tokenizer=True, num_hidden_layers=4, **changes)

    return build


def _sharded(ground: Ground, path: Path) -> None:
    from conftest import byte_tokenizer, tiny_model

    tiny_model("llama", num_hidden_layers=4).save_pretrained(path, max_shard_size="30KB")
    byte_tokenizer().save_pretrained(path)


def _encoder(ground: Ground, path: Path) -> None:
    from conftest import save_encoder

    save_encoder(path, "bert", "BertForMaskedLM", num_hidden_layers=4)


def _byte_level(ground: Ground, path: Path) -> None:
    from gguf_models import save_uniform

    save_uniform(path, "llama", num_hidden_layers=3)


def _command(*arguments: str) -> None:
    from llmsurgeon.cli.main import main

    try:
        main(["--quiet", *arguments])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"llmsurgeon {' '.join(arguments)} ended with {end.code}") from end


def _gguf(type: str) -> Callable[[Ground, Path], None]:
    def build(ground: Ground, path: Path) -> None:
        _command("export", str(ground["bytelevel"]), "--to", "gguf", "--type", type, "-o", str(path))

    return build


def _converted(parent: str, *arguments: str) -> Callable[[Ground, Path], None]:
    def build(ground: Ground, path: Path) -> None:
        text = ["--text", str(ground["text.txt"])]
        _command(arguments[0], str(ground[parent]), *arguments[1:], *text, *SMALL, "-o", str(path))

    return build


def _exported(parent: str, form: str) -> Callable[[Ground, Path], None]:
    def build(ground: Ground, path: Path) -> None:
        _command("export", str(ground[parent]), "--to", form, "-o", str(path))

    return build


def _file(content: str) -> Callable[[Ground, Path], None]:
    return lambda ground, path: path.write_text(content, encoding="utf-8")  # type: ignore[func-returns-value]


def _jsonl(ground: Ground, path: Path) -> None:
    path.write_text("".join(json.dumps({"text": TEXT[:200]}) + "\n" for _ in range(12)), encoding="utf-8")


def _parquet(ground: Ground, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [TEXT[:200]] * 12, "id": list(range(12))}), path)


BUILDERS: dict[str, Callable[[Ground, Path], None]] = {
    "llama": _tiny("llama"),
    "qwen3": _tiny("qwen3"),
    "gpt2": _tiny("gpt2"),
    "gemma3": _tiny("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2),
    "mixtral": _tiny("mixtral"),
    "bert": _encoder,
    "sharded": _sharded,
    "bytelevel": _byte_level,
    "f32.gguf": _gguf("F32"),
    "q8.gguf": _gguf("Q8_0"),
    "fused": _converted("llama", "fuse", "--drop-attention", "2", "--no-refit"),
    "surgeon": _converted("qwen3", "prune", "--attention", "1", "--no-refit"),
    "nas": _exported("fused", "nemotron-nas"),
    "ternary": _converted("llama", "ternary", "--method", "round"),
    "mlgru": _converted("llama", "matmulfree", "--count", "1", "--no-refit"),
    "block": _converted("llama", "block", "--block-length", "2", "--no-refit"),
    "fff": _converted("llama", "fff", "--depth", "1", "--leaf-width", "32", "--no-refit"),
    "text.txt": _file(TEXT),
    "text.jsonl": _jsonl,
    "text.parquet": _parquet,
    "recipe.yaml": _file(RECIPE),
    "trim.yaml": _file(TRIM),
}


def pick(draw: random.Random, *names: str) -> str:
    """One of these names; the first as often as all others together."""
    return names[0] if draw.random() < 0.5 else draw.choice(names)
