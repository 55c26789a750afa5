"""Block Transformers (arXiv 2406.02657) beside Llamas: tokens a second at the largest batch that fits, KV bytes.

At equal parameters, and the paper's pair of equal loss: 1.2B in blocks of 4 (24 layers of 2048) beside a vanilla model
of 302M (24 layers of 1024; both counted without embeddings). Prompt and new tokens are 2048 and 128, and 128 and 2048:
what is timed are steps at the middle of what is written. Paper: 12.4 against 0.8, 25.7 against 2.1 thousand tokens/s.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import block
import torch

from gpu_parts.timing import Setting, freed

MODELS = {"vanilla 302M": (1024, 16, None), "vanilla 1.2B": (2048, 16, None), "blocks of 4, 1.2B": (2048, 16, 4)}
# (prompt, new tokens)
LOADS = {"prefill-heavy": (2048, 128), "decode-heavy": (128, 2048)}
LARGEST = 4096
# Prompts that are read at once.
PROMPTS = 8


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row for each model and load."""
    models = {"tiny": (32, 4, None), "tiny blocks": (32, 4, 4)} if setting.dry else MODELS
    loads = {"tiny": (16, 8)} if setting.dry else LOADS
    if setting.quick:
        loads = dict(list(loads.items())[:1])
    for name, (hidden, heads, length) in models.items():
        side = made(setting, name, hidden, heads, length)
        for load, (prompt, new) in loads.items():
            yield {"model": name, "load": load, "prompt": prompt, "new": new, **measured(setting, side, prompt, new)}
            freed()
        del side
        freed()


def made(setting: Setting, name: str, hidden: int, heads: int, length: int | None) -> Any:
    """A Llama of 24 layers, or what `block` makes of it, of random weights."""
    from transformers import LlamaConfig

    from llmsurgeon.formats.configs import normalised
    from llmsurgeon.formats.models import empty_model, expected_shapes
    from llmsurgeon.formats.write import write_config
    from llmsurgeon.model.families import family_of
    from llmsurgeon.operations import Subject
    from llmsurgeon.operations.block import Block

    sizes = (
        {"num_hidden_layers": 4, "vocab_size": 64} if setting.dry else {"num_hidden_layers": 24, "vocab_size": 32000}
    )
    sizes |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads}
    config = normalised({**LlamaConfig(**sizes, max_position_embeddings=4096).to_dict(), "model_type": "llama"})
    family = family_of(config)
    spec = family.describe(config)
    if length:
        subject = Subject(spec, family, frozenset(expected_shapes(empty_model(config))))
        spec = Block(block_length=length).resolve(subject).plan(subject).spec
        config = write_config(spec, family, config).config
    model = block.filled(config, setting.dtype, str(setting.device))
    return block.Side(name, model, spec, setting.dtype.itemsize)


def measured(setting: Setting, side: Any, prompt: int, new: int) -> dict[str, Any]:
    """Prefill of some prompts at once; decoding in the middle of what is written, at the largest batch that fits."""
    context = prompt + new // 2
    together = 1 if setting.dry else PROMPTS
    seconds = block.prefill(side, prompt, 1 if setting.dry else 3, together)[0] / together
    _, cache = block.prefill(side, context, 1)
    wanted = SimpleNamespace(rounds=1 if setting.dry else 3, memory=1e6)

    def tried(batch: int) -> dict[str, Any] | None:
        try:
            [row] = block.decode([side], [cache], context, batch, wanted)
        except torch.cuda.OutOfMemoryError:
            row = None
        freed()
        return row

    batch = 2 if setting.dry else LARGEST
    row = tried(batch)
    while row is None and batch > 1:
        batch //= 2
        row = tried(batch)
    if row is None:
        raise MemoryError(f"not even one sequence of {context} tokens fits")
    if not setting.dry and batch > 1 and (more := tried(batch + batch // 2)):
        batch, row = batch + batch // 2, more
    rate = row["tokens_per_second"]
    return {
        "batch": batch,
        "prefill_tokens_per_second": prompt / seconds,
        "decode_tokens_per_second": rate,
        # Of all that is written, the prompts read some at a time.
        "tokens_per_second": batch * new / (batch * seconds + batch * new / rate),
        "kv_bytes": row["kv_mbytes"] * 1e6,
        "tflops": rate * row["mflops_per_token"] / 1e6,
        "gbytes_per_second": rate * row["mbytes_per_token"] / 1e3,
    }
